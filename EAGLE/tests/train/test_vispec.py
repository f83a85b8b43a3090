"""Training of ViSpec heads: what is trained is what decoding reads, and the published layout is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from online_support import Case, ViSpecCase
from safetensors.torch import load_file
from test_eagle3 import sure, train
from test_overfit import CHAIN, NEW, own_answer
from tiny_families import make_qwen3_vl
from tiny_llava import make_image, make_llava_hf
from tiny_stock import make_qwen
from train_support import make_sample

from eagle.decode.msd import MSDModel
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.config import DraftConfig, ViSpecConfig
from eagle.drafts.head import Prompt
from eagle.drafts.vispec import ViSpecDraft
from eagle.families import Target, load_target
from eagle.families.base import Prefill
from eagle.families.base_weights import load_base_tensors
from eagle.families.draft_config import vispec_config_of
from eagle.hidden_states.shards import Sample
from eagle.train import main_deepspeed
from eagle.train.collate import Batch, collate
from eagle.train.settings import VISPEC_RECIPE, TrainConfig, read_config
from eagle.train.trainer import Trainer
from eagle.train.validation import batch_sums, summary
from eagle.train.vispec import ViSpecObjective
from llava.errors import UserError, run_cli

MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen3_vl": make_qwen3_vl,
    "qwen2_5_vl": partial(make_qwen, version="2.5", num_hidden_layers=3),
    "llava": make_llava_hf,
}
PICTURES = ((60, 50), (112, 60), (56, 100))
PUBLISHED = """
    embed_tokens.weight fc.weight fc.bias img_fc.weight img_fc.bias
    imadpt.q imadpt.k_proj.weight imadpt.v_proj.weight imadpt.o_proj.weight
    layers.0.self_attn.q_proj.weight layers.0.self_attn.k_proj.weight layers.0.self_attn.v_proj.weight
    layers.0.self_attn.o_proj.weight layers.0.mlp.gate_proj.weight layers.0.mlp.up_proj.weight
    layers.0.mlp.down_proj.weight layers.0.post_attention_layernorm.weight
"""
BIASES = """
    imadpt.k_proj.bias imadpt.v_proj.bias
    layers.0.self_attn.q_proj.bias layers.0.self_attn.k_proj.bias layers.0.self_attn.v_proj.bias
"""


@pytest.fixture(scope="module", params=MAKERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Target]:
    base = sure(MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "base"))
    target = load_target(base, dtype="float32")
    target.model.generation_config.eos_token_id = None
    return base, target


def new_objective(base: Path, queries: int = 2, **changes: Any) -> ViSpecObjective:
    torch.manual_seed(0)
    config = {**vispec_config_of(base).to_dict(), "vispec": {"queries": queries}, **changes}
    draft = ViSpecDraft(ViSpecConfig.from_dict(config, "config"))
    settings = TrainConfig(**{**VISPEC_RECIPE, "token_weight": 1.0, "noise": 0.0})
    return ViSpecObjective(draft, load_base_tensors(base), settings)


@torch.no_grad()
def amplify(draft: ViSpecDraft) -> None:
    """Lets a new head depend on its pictures as a trained one does."""
    torch.nn.init.normal_(draft.img_fc.weight[:, draft.config.hidden_size :], std=0.2)
    for part in (draft.imadpt.v_proj, draft.imadpt.o_proj):
        part.weight.mul_(10)


def batch_of(objective: ViSpecObjective, samples: list[Sample], most: int = 2048) -> Batch:
    return collate(samples, objective.draft.config.vocab_size, most, queries=objective.draft.image_queries)


def question(target: Target, pictures: tuple[tuple[int, int], ...]) -> dict[str, torch.Tensor]:
    images = [make_image(width=width, height=height) for width, height in pictures]
    return target.prepare(target.chat_prompt("Count the shapes.", len(images)), images)


@torch.no_grad()
def read(target: Target, pictures: tuple[tuple[int, int], ...]) -> tuple[Prefill, Sample]:
    """A question about pictures of these sizes, as decoding and as training get it."""
    inputs = question(target, pictures)
    prefill, ids = target.prefill(inputs), inputs["input_ids"][0]
    mask, answer = prefill.image_mask[0], torch.arange(len(ids)) >= len(ids) - 9
    assert bool(mask.any()) == bool(pictures)
    return prefill, Sample("one", ids, answer, mask, prefill.hidden[0], prefill.embeds[0][mask])


@pytest.mark.parametrize("queries", [1, 2, 4])
@torch.no_grad()
def test_rows_of_training_are_those_of_decoding(pair: tuple[Path, Target], queries: int) -> None:
    """Also of padded samples in one batch, with different numbers of pictures."""
    base, target = pair
    objective = new_objective(base, queries)
    draft = objective.draft
    amplify(draft)
    found = [read(target, pictures) for pictures in (PICTURES[:1], (), PICTURES)]
    batch, contexts = batch_of(objective, [sample for _, sample in found]), []
    size = draft.config.hidden_size
    embeds = objective.embeds(batch)[:, 1:]
    rows = draft.fuse(batch.features[:, :-1], embeds, batch.image_mask[:, 1:])
    for index, (prefill, sample) in enumerate(found):
        next_is_image = prefill.image_mask[:, 1:]
        prompt = Prompt(
            prefill.features[:, :-1], sample.input_ids[None, 1:], next_is_image, prefill.embeds[:, 1:],
            prefill.positions[..., :-1], prefill.next_position,
        )  # fmt: skip
        decoded = draft.read_prompt(prompt, draft.compression)
        count = decoded.x.shape[1]
        pictures = (1, 0, 3)[index]
        assert count == batch.lengths[index] - 1
        assert count == next_is_image.shape[1] - int(next_is_image.sum()) + pictures * (queries - 1)
        torch.testing.assert_close(rows[index : index + 1, :count], decoded.x, atol=1e-5, rtol=1e-4)
        assert batch.positions is not None and decoded.positions is not None and decoded.context is not None
        assert torch.equal(batch.positions[0, index, :count], decoded.positions[0])
        assert decoded.next_position == batch.positions[0, index, count] == len(sample.input_ids) - 1
        torch.testing.assert_close(embeds[index, count - 1, size:], decoded.context[0])
        contexts.append(decoded.context[0])
    assert not contexts[1].any() and not torch.allclose(contexts[0], contexts[2])


@pytest.mark.parametrize(
    ("pair", "queries"),
    [
        ("qwen3_vl", 2),
        *(pytest.param(family, count, marks=pytest.mark.slow) for family in MAKERS for count in (2, 4)
          if (family, count) != ("qwen3_vl", 2)),
    ],
    indirect=["pair"],
)  # fmt: skip
def test_simulated_acceptance_is_that_of_decoding(pair: tuple[Path, Target], tmp_path: Path, queries: int) -> None:
    """Three pictures of different sizes, and a half-trained head from its checkpoint; chains and trees give the answer
    of transformers' ``generate``."""
    base, target = pair
    objective = new_objective(base, queries)
    amplify(objective.draft)
    inputs = question(target, PICTURES)
    sample = own_answer(target, inputs)
    batch = batch_of(objective, [sample])
    train(objective, batch, 40)
    simulated = summary(batch_sums(objective.eval(), batch), depth=6)
    with torch.no_grad():
        objective.draft.imadpt.o_proj.weight.mul_(-1)
        others = summary(batch_sums(objective, batch), depth=6)
        objective.draft.imadpt.o_proj.weight.mul_(-1)
    assert others["loss"] != pytest.approx(simulated["loss"], rel=1e-3), "pictures make no difference"
    head = load_draft(save_draft(objective.draft, tmp_path, dtype=torch.float32), dtype=torch.float32)
    assert isinstance(head, ViSpecDraft) and head.config == objective.draft.config
    model = MSDModel(target, head, CHAIN)
    output = model.generate(**inputs, max_new_tokens=NEW, temperature=0)
    plain = target.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    assert torch.equal(output.sequences, plain) and torch.equal(plain[0], sample.input_ids)
    assert simulated["tau"] == pytest.approx(output.stats.tau) and 1 < output.stats.tau < 7
    tree = model.generate(**inputs, max_new_tokens=NEW, temperature=0, tree=TreeConfig(3, 4, 16))
    assert torch.equal(tree.sequences, plain)


@pytest.mark.slow
def test_a_head_trained_on_one_answer_is_accepted(pair: tuple[Path, Target], tmp_path: Path) -> None:
    base, target = pair
    objective, inputs = new_objective(base), question(target, PICTURES[:2])
    objective.config = replace(objective.config, rollout_steps=6)
    sample = own_answer(target, inputs)
    assert sample.input_ids[-NEW:].unique().numel() > NEW / 8, "an answer in a loop would prove little"
    train(objective, batch_of(objective, [sample]), 300)
    head = load_draft(save_draft(objective.draft, tmp_path, dtype=torch.float32), dtype=torch.float32)
    output = MSDModel(target, head, CHAIN).generate(**inputs, max_new_tokens=NEW, temperature=0)
    assert output.stats.cycles <= -(-(NEW - 1) // 7) + 1, output.stats.accept_lengths


def test_each_weight_has_a_gradient_in_each_batch(pair: tuple[Path, Target]) -> None:
    """Several processes wait for each other's gradients. Without pictures those of the compressor are zeros."""
    base, target = pair
    objective = new_objective(base)
    amplify(objective.draft)
    for pictures in ((), PICTURES[:1]):
        objective.zero_grad()
        objective(batch_of(objective, [read(target, pictures)[1]])).total.backward()
        for name, parameter in objective.draft.named_parameters():
            if name == "embed_tokens.weight":
                assert not parameter.requires_grad
            else:
                assert parameter.grad is not None, name
                bias_of_keys = name in ("imadpt.k_proj.bias", "layers.0.self_attn.k_proj.bias")  # adds to all alike
                used = pictures or not name.startswith("imadpt")
                assert bool(parameter.grad.any()) == bool(used) or bias_of_keys, name


@pytest.mark.parametrize("most", [3, 4, 8, 9])
def test_a_sample_is_not_cut_inside_a_picture(most: int) -> None:
    """Tokens are x0, the two rows of a picture, four of text, the two rows of another, and text."""
    sample = make_sample(30, image=9)
    image_mask = sample.image_mask.clone()
    image_mask[14:20] = True
    sample = Sample(
        "a", sample.input_ids, sample.loss_mask, image_mask, sample.hidden, torch.arange(15.0)[:, None] * torch.ones(16)
    )
    batch = collate([sample, sample], 40, most, queries=3)
    kept = {3: 3, 4: 4, 8: 7, 9: 9}[most]
    assert list(batch.lengths) == [kept] * 2 and list(batch.runs) == [9, 6][: 1 + (most == 9)] * 2
    assert batch.image_features[:, 0].tolist() == list(range(sum(batch.runs) // 2)) * 2
    assert batch.positions is not None and batch.pictures is not None
    assert batch.positions[0, 0, :kept].tolist() == [7, 8, 9, 10, 11, 12, 17, 18, 19][:kept]
    second = 1 + len(batch.runs) // 2
    assert batch.pictures[1, :kept].tolist() == [0, *[second] * 6, second + 1, second + 1][:kept]


@torch.no_grad()
def test_pictures_smaller_than_the_queries_have_no_more_rows_than_before(pair: tuple[Path, Target]) -> None:
    """Else their positions would be below 0 and the rows would not fit into the cache of the request."""
    base, target = pair
    _, sample = read(target, ((28, 28),) * 3)
    objective = new_objective(base, queries=64)
    batch = batch_of(objective, [sample])
    assert int(batch.image_mask.sum()) == sum(min(63, run) for run in batch.runs) and batch.positions is not None
    numbers = batch.positions[0, 0, : batch.lengths[0]].diff()
    assert bool((numbers > 0).all()), numbers
    assert objective.embeds(batch).isfinite().all()
    inputs = question(target, ((28, 28),) * 3)
    output = MSDModel(target, objective.draft, CHAIN).generate(**inputs, max_new_tokens=4, temperature=0)
    plain = target.model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert torch.equal(output.sequences, plain)


class Killed(BaseException):
    """Ends a run as a signal would: no handler of errors sees it."""


def test_the_command_trains_resumes_and_writes_the_published_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Online and stored training, and runs that are killed and resumed, have the same losses."""
    case: Case = ViSpecCase("qwen2_vl", tmp_path)

    def run(cpdir: str, *flags: str) -> int:
        monkeypatch.setattr(sys, "argv", case.command(cpdir, *flags))
        return run_cli(main_deepspeed.main)

    step = Trainer._step

    def killed(trainer: Trainer, batches: Any, epoch: int) -> None:
        if trainer.progress.step == 5:
            raise Killed
        step(trainer, batches, epoch)

    case.allocate()
    curves = {}
    for way in ("online", "stored"):
        flags = getattr(case, way)
        assert run(way, *flags) == 0
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", killed)
            with pytest.raises(Killed):
                run(f"killed-{way}", *flags)
        assert run(f"killed-{way}", *flags, "--resume") == 0
        curves[way] = case.curve(way)
        assert len(set(curves[way])) == len(curves[way]) > 6
        assert case.curve(f"killed-{way}") == pytest.approx(curves[way], abs=1e-6)
        weights = [load_file(case.folder / name / "final" / "model.safetensors") for name in (way, f"killed-{way}")]
        assert weights[0].keys() == weights[1].keys() and all(
            weights[1][name].equal(weights[0][name]) for name in weights[0]
        )
    assert curves["stored"] == pytest.approx(curves["online"], abs=1e-4)
    assert case.history("stored")["validations"][-1]["results"]["image"]["tau"] >= 1

    final = case.folder / "stored" / "final"
    config, tensors = json.loads((final / "config.json").read_text()), load_file(final / "model.safetensors")
    assert set(tensors) == {*PUBLISHED.split(), *BIASES.split()}
    assert config["architectures"] == ["LlamaForCausalLM"] and config["qkv_bias"] is True
    assert config["vispec"] == {"queries": 3} and not {"train", "msd", "rope_scaling"} & config.keys()
    assert tuple(tensors["imadpt.q"].shape) == (3, config["num_attention_heads"], 8)
    assert (tensors["img_fc.weight"][:, 32:] != 0).any(), "the global vector was not trained"
    published = {key: value for key, value in config.items() if key != "vispec"}
    (final / "config.json").write_text(json.dumps(published))
    head = load_draft(final)
    assert isinstance(head, ViSpecDraft) and head.config.queries == 3
    (final / "config.json").write_text(json.dumps({**published, "vispec": {"queries": 2}}))
    with pytest.raises(UserError, match=r"imadpt.q has 3 queries, section 'vispec' says 2"):
        load_draft(final)
    (final / "config.json").write_text(json.dumps(config))

    capsys.readouterr()
    assert run("begun", *case.stored, "--init", str(final), "--max-steps", "1") == 0, capsys.readouterr()
    file = case.folder / "draft.json"
    own = json.loads(file.read_text())
    file.write_text(json.dumps({**own, "vispec": {"queries": 2}}))
    assert run("killed-stored", *case.stored, "--resume") == 2
    assert "the interrupted run had queries=3, this one has 2" in capsys.readouterr().err
    assert run("begun-2", *case.stored, "--init", str(final)) == 2
    assert "--init has queries=3, --config 2" in capsys.readouterr().err


def test_config_of_a_base(pair: tuple[Path, Target], tmp_path: Path) -> None:
    base, target = pair
    made, settings = read_config("auto", str(base), "vispec")
    assert type(made) is ViSpecConfig and made.queries == 2 and settings == TrainConfig(**VISPEC_RECIPE)
    assert made.hidden_size == target.hidden_size and made.num_key_value_heads == made.num_attention_heads
    biased = target.text_model.layers[0].self_attn.k_proj.bias is not None
    assert made.attention_bias == made.compressor_bias == biased and not made.input_layernorm
    names = {*PUBLISHED.split(), *(BIASES.split() if biased else ())}
    assert set(ViSpecDraft(made).state_dict()) == names
    path = tmp_path / "draft.json"
    path.write_text(json.dumps({**made.to_dict(), "train": {"epochs": 3}}))
    again, settings = read_config(path)
    assert again == made and settings == TrainConfig(**{**VISPEC_RECIPE, "epochs": 3})
    assert type(read_config("auto", str(base))[0]) is DraftConfig
    with pytest.raises(UserError, match=r"--draft-positions plain for a ViSpec head \(leave it out"):
        read_config("auto", str(base), "vispec", "plain")


def test_settings_without_effect_and_unknown_keys_are_refused(pair: tuple[Path, Target], tmp_path: Path) -> None:
    base, _ = pair
    with pytest.raises(UserError, match=r"draft_image_tokens=4 for a ViSpec head"):
        ViSpecObjective.check(vispec_config_of(base), load_base_tensors(base), TrainConfig(draft_image_tokens=4))
    with pytest.raises(UserError, match=r"with compressed image rows alone"):
        new_objective(base, msd={"image_rows": "token"})
    path, shape = tmp_path / "draft.json", vispec_config_of(base).to_dict()
    for changes, message in (
        ({"vispec": {"querys": 2}}, r"unknown key 'querys'.*did you mean 'queries'"),
        ({"vispec": {"queries": 0}}, r"queries"),
        ({"msd": {"positions": "mrope"}}, r"unknown key 'positions'"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, r"5 heads for a hidden size of"),
        ({"num_hidden_layers": 2}, r"num_hidden_layers=2"),
        ({"block": {}}, r"a config of two kinds of heads"),
        ({"draft_vocab_size": 9}, r"a config of two kinds of heads"),
    ):
        path.write_text(json.dumps({**shape, **changes}))
        with pytest.raises(UserError, match=message):
            read_config(path)
    path.write_text(json.dumps({**{key: shape[key] for key in shape if key != "vispec"}, "vispecs": {}}))
    with pytest.raises(UserError, match=r"unknown key 'vispecs'.*did you mean 'vispec'"):
        read_config(path)

"""Training of EAGLE-3 heads: the rows of the training-time test, acceptance when decoding, checkpoints, refusals."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_llava
import torch
from online_support import Case
from safetensors.torch import load_file, save_file
from test_overfit import CHAIN, NEW, own_answer
from tiny_families import make_qwen3_vl

from eagle.conversations import Conversation
from eagle.decode.msd import MSDModel
from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.eagle3_config import Eagle3Config
from eagle.families import Target, load_target, template_of
from eagle.families.base_weights import load_base_tensors
from eagle.families.draft_config import eagle3_config_of
from eagle.ge_data.extract import source_of
from eagle.ge_data.reader import Reader
from eagle.hidden_states.shards import Sample
from eagle.serving.eagle3_export import export_eagle3
from eagle.train import main_deepspeed
from eagle.train.collate import Batch, collate
from eagle.train.eagle3 import Eagle3Objective, trimmed_vocabulary
from eagle.train.engine import PlainEngine
from eagle.train.schedule import BatchSizes
from eagle.train.settings import EAGLE3_RECIPE, TrainConfig, read_config
from eagle.train.validation import batch_sums, summary
from llava.errors import UserError, run_cli

RECIPE = {**EAGLE3_RECIPE, "rollout_steps": 6, "simulated_depth": 6}


def sure(folder: Path) -> Path:
    """Sharpens the distributions of a base."""
    tensors = load_file(folder / "model.safetensors")
    (head,) = (name for name in tensors if name.endswith("lm_head.weight"))
    tensors[head] *= 40
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that is sure of its next token: with random weights alone its distribution is almost uniform."""
    return sure(make_qwen3_vl(tmp_path_factory.mktemp("qwen3") / "base"))


@pytest.fixture(scope="module")
def target(base: Path) -> Target:
    loaded = load_target(base, dtype="float32")
    loaded.model.generation_config.eos_token_id = None
    return loaded


def new_objective(base: Path, target: Target, msd: dict[str, Any] | None = None, **changes: Any) -> Eagle3Objective:
    torch.manual_seed(0)
    config = {**eagle3_config_of(base).published, "msd": msd or {}, **changes}
    draft = Eagle3Draft(Eagle3Config.from_dict(config, "config"))
    draft.use_target(len(target.text_model.layers))
    return Eagle3Objective(draft, load_base_tensors(base), TrainConfig(**RECIPE))


def answered(
    target: Target, objective: Eagle3Objective, pictures: tuple[tuple[int, int], ...] = ((60, 50),)
) -> tuple[dict[str, torch.Tensor], Sample]:
    """A question about pictures of these sizes, and the target's answer with the streams that the head reads."""
    images = [tiny_llava.make_image(width=width, height=height) for width, height in pictures]
    inputs = target.prepare(target.chat_prompt("Count the shapes.", len(images)), images)
    sample = own_answer(target, inputs)
    ids = sample.input_ids[None]
    full = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    full |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    full |= target.complete_inputs(ids, full)
    with torch.no_grad():
        streams = target.prefill(full, objective.draft.target_layers).streams
    assert streams is not None and bool(sample.image_mask.any()) == bool(pictures)
    return inputs, replace(sample, streams=streams[0])


def batch_of(objective: Eagle3Objective, samples: list[Sample]) -> Batch:
    draft = objective.draft
    settings = {"positions": draft.positions, "image_ids": draft.embeds_image_ids, "compression": draft.compression}
    return collate(samples, draft.config.vocab_size, 2048, **settings)


def train(objective: Eagle3Objective, batch: Batch, steps: int) -> None:
    engine = PlainEngine(objective, objective.config, {"gradient_clipping": 0.5}, BatchSizes(1, 1, 1))
    for step in range(steps):
        engine.step([batch], learning_rate=4e-3 * (1 - step / steps))


def as_served(objective: Eagle3Objective, folder: Path) -> Eagle3Draft:
    """The head from its checkpoint."""
    head = load_draft(save_draft(objective.draft, folder, dtype=torch.float32), dtype=torch.float32)
    assert isinstance(head, Eagle3Draft)
    return head


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2, "sliding_window": 5},
        {"msd": {"image_rows": "feature", "feedback": "after"}},
        {"msd": {"positions": "temporal"}, "norm_before_residual": True},
        {"msd": {"positions": "plain"}},
    ],
    ids=["default", "window, two layers", "features", "temporal", "plain"],
)
@torch.no_grad()
def test_each_root_drafts_as_plain_forwards_do(base: Path, target: Target, changes: dict[str, Any]) -> None:
    """One root at a time: its true rows, then its own drafts behind them, by forwards without a cache."""
    objective = new_objective(base, target, **changes)
    _, sample = answered(target, objective)
    batch, draft, steps = batch_of(objective, [sample]), objective.draft.eval(), 3
    batch.loss_mask[:] = True  # all rows, pictures and prompt included
    predicted = [each for *_, each in objective.predict(batch, batch.features, steps)]
    true = draft.condense(batch.features)[0]  # [S, H]
    embeds = target.model.get_input_embeddings()(sample.input_ids)
    if draft.config.image_rows == "feature":
        embeds[sample.image_mask] = sample.image_features
    places = torch.arange(len(true)).expand(3, -1) if batch.positions is None else batch.positions[:, 0]
    if draft.positions == "temporal":
        places = places[:1].expand(3, -1)
    for root in (1, len(true) // 2, len(true) - 5):
        hidden = true[: root + 1]
        for step in range(steps):
            x = torch.cat([embeds[1 : len(hidden) + 1], hidden], dim=-1)[None]
            rows = torch.arange(len(hidden))
            behind = rows[:, None] - rows
            seen = (behind >= 0) & (behind < (draft.window or len(rows)))
            output = draft(x, places[:, None, : len(hidden)], seen[None, None])[0, -1:]
            torch.testing.assert_close(predicted[step][root], output[0], atol=1e-5, rtol=1e-4)
            hidden = torch.cat([hidden, output])


@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
def test_loss_is_cross_entropy_over_the_kept_tokens_and_regression(
    base: Path, target: Target, hidden_weight: float
) -> None:
    objective = new_objective(base, target, draft_vocab_size=40)
    _, sample = answered(target, objective)
    objective.begin([sample])
    batch, head = batch_of(objective, [sample]), objective.draft.lm_head
    ids = objective.draft.draft_vocab
    assert ids is not None and head is not None and len(ids) == 40
    assert set(sample.input_ids[sample.loss_mask].tolist()) <= set(ids.tolist())
    assert torch.equal(head.weight, objective.head[ids])
    objective.config = replace(objective.config, head_chunk=7, hidden_weight=hidden_weight)
    ((_, rows, predicted),) = objective.predict(batch, batch.features, 1)
    assert torch.equal(rows, batch.loss_mask)
    losses = objective.loss([predicted], [batch.hidden[:, 1:][rows]])
    logits = (batch.hidden[:, 1:][rows] @ objective.head.T)[:, ids]
    own = head(objective.draft.norm(predicted))
    expected = torch.nn.functional.cross_entropy(own, logits.softmax(-1))
    torch.testing.assert_close(losses.token, expected)
    read, wanted = objective.draft.norm(predicted), batch.hidden[:, 1:][rows]
    regression = torch.nn.functional.smooth_l1_loss(read, wanted.float())
    torch.testing.assert_close(losses.hidden, regression if hidden_weight else torch.tensor(0.0))
    expected = expected + hidden_weight * regression
    torch.testing.assert_close(losses.total, expected)
    weights = [head.weight, objective.draft.fc.weight]
    for got, wanted in zip(
        torch.autograd.grad(losses.total, weights, retain_graph=True),
        torch.autograd.grad(expected, weights),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_float16_weights_have_the_gradients_of_float32(base: Path, target: Target) -> None:
    """The sum over the rows of a step exceeds float16, their mean does not."""
    objective = new_objective(base, target, draft_vocab_size=40)
    _, sample = answered(target, objective)
    objective.begin([sample])
    batch, scale = batch_of(objective, [sample]), 2000.0
    with torch.no_grad():
        objective.draft.norm.weight.mul_(scale)
        objective.own_head.div_(scale)
        for part in (*objective.parameters(), objective.head, objective.table):
            part.copy_(part.half())
    names = [name for name, part in objective.named_parameters() if part.requires_grad]

    def gradients(kind: torch.dtype) -> list[torch.Tensor]:
        own = deepcopy(objective).to(kind)
        losses = own(batch)
        assert losses.total.dtype == torch.float32 and float(losses.rows) * scale > torch.finfo(torch.float16).max
        return list(torch.autograd.grad(losses.total, [own.get_parameter(name) for name in names]))

    for name, found, wanted in zip(names, gradients(torch.float16), gradients(torch.float32), strict=True):
        close = {"rtol": 0.05, "atol": 0.05 * float(wanted.abs().max())}
        torch.testing.assert_close(found.float(), wanted, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("image_rows", "changes"),
    [("token", {}), ("feature", {"draft_vocab_size": 60})],
    ids=["placeholders", "features, trimmed vocabulary"],
)
@pytest.mark.slow
def test_a_head_trained_on_one_answer_is_accepted(
    base: Path, target: Target, tmp_path: Path, image_rows: str, changes: dict[str, Any]
) -> None:
    """Simulated and served acceptance are the same when half trained; in the end all drafted tokens are accepted."""
    objective = new_objective(base, target, {"image_rows": image_rows}, **changes)
    inputs, sample = answered(target, objective)
    assert sample.input_ids[-NEW:].unique().numel() > NEW / 8, "an answer in a loop would prove little"
    objective.begin([sample])
    batch = batch_of(objective, [sample])
    taus = []
    for steps in (15, 300):
        train(objective, batch, steps)
        simulated = summary(batch_sums(objective.eval(), batch), depth=6)["tau"]
        head = as_served(objective, tmp_path / f"after-{steps}")
        assert head.config.image_rows == image_rows
        output = MSDModel(target, head, CHAIN).generate(**inputs, max_new_tokens=NEW, temperature=0)
        assert torch.equal(output.sequences[0], sample.input_ids)
        assert simulated == pytest.approx(output.stats.tau)
        taus.append(output.stats.tau)
        objective.train()
    assert 1 < taus[0] < taus[1]
    assert output.stats.cycles <= -(-(NEW - 1) // 7) + 1, output.stats.accept_lengths


def test_streams_are_read_beside_the_states(target: Target, tmp_path: Path) -> None:
    """Only if asked for, each sample's own part of a padded batch."""
    template = template_of(target)
    items = [
        template.prepare(Conversation(text, (("Name two rivers.", text),), ()), tmp_path, 500)
        for text in ("The Nile.", "The Nile and the Rhine, and the Elbe.")
    ]
    read = partial(Reader, target, template, source_of(target, "tiny"), 1000)
    (without,) = read().read([items])
    assert all(sample.streams is None for sample in without)
    (samples,) = read(layers=(1, 3)).read([items])
    for item, sample in zip(items, samples, strict=True):
        alone = target.prefill({"input_ids": item.input_ids[None]}, (1, 3)).streams
        assert alone is not None and sample.streams is not None
        torch.testing.assert_close(sample.streams.float(), alone[0], atol=1e-4, rtol=2**-7)


def test_the_most_frequent_tokens_are_kept_and_the_number_is_that_of_the_config(base: Path, target: Target) -> None:
    config = new_objective(base, target, draft_vocab_size=4).draft.config
    ids, spoken = torch.tensor([9, 9, 7, 5, 5, 8]), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    sample = Sample("a", ids, spoken, ~spoken, torch.zeros(6, 1), torch.zeros(0, 1))
    assert trimmed_vocabulary([sample], config).tolist() == [0, 5, 8, 9]


class Eagle3Case(Case):
    """Training of an EAGLE-3 head by the command."""

    def _write_configs(self) -> None:
        super()._write_configs()
        config = json.loads((self.folder / "draft.json").read_text())
        head = {**eagle3_config_of(self.base).published, "draft_vocab_size": 50, "msd": {"image_rows": "feature"}}
        train = {"epochs": 2, "learning_rate": 1e-3, "log_every": 1, "rollout_steps": 2, "simulated_depth": 2}
        train |= {key: config["train"][key] for key in ("validation_share", "max_length")}
        (self.folder / "draft.json").write_text(json.dumps({**head, "train": train}))


def test_the_command_trains_resumes_and_writes_the_flat_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Eagle3Case("qwen2_vl", tmp_path)

    def run(cpdir: str, *flags: str) -> int:
        monkeypatch.setattr(sys, "argv", case.command(cpdir, *case.online, *flags))
        return run_cli(main_deepspeed.main)

    assert run("whole") == 0
    assert run("parts", "--max-steps", "3") == 0 and run("parts", "--resume") == 0
    assert case.curve("parts") == pytest.approx(case.curve("whole"), abs=1e-5) and len(case.curve("whole")) > 3
    capsys.readouterr()
    assert run("parts", "--resume", "--config", "auto") == 2
    assert "had draft_kind=EAGLE-3, this one has MSD" in capsys.readouterr().err
    made = ("--config", "auto", "--draft-kind", "eagle3", "--draft-positions", "plain", "--max-steps", "1")
    assert run("plain", *made) == 0
    assert json.loads((case.folder / "plain" / "final" / "config.json").read_text())["msd"]["positions"] == "plain"
    final = case.folder / "whole" / "final"
    config, tensors = json.loads((final / "config.json").read_text()), load_file(final / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == 50
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2], "two layers have no default ones"
    assert config["msd"] == {"image_rows": "feature", "positions": "mrope"} and "train" not in config
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].sum() == 50
    assert not any(name.startswith("embed_tokens") for name in tensors)
    head = load_draft(final)
    assert head.draft_vocab is not None and torch.equal(head.draft_vocab, tensors["t2d"].nonzero().flatten())
    assert json.loads((final / "provenance.json").read_text())["data"]["image"]["online"] is True
    assert case.history("whole")["validations"][-1]["results"]["image"]["tau"] >= 1
    capsys.readouterr()
    assert run("other", "--init", str(final)) == 0, capsys.readouterr()


@pytest.mark.parametrize("kind", ["int8", "auto"])
def test_stored_streams_give_the_losses_of_online_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The same samples, vocabulary and steps. Streams are rounded to 16 bit on both ways; int8 is for the states that
    the loss reads."""
    case = Eagle3Case("qwen2_vl", tmp_path)

    def run(cpdir: str, *flags: str) -> int:
        monkeypatch.setattr(sys, "argv", case.command(cpdir, *flags))
        return run_cli(main_deepspeed.main)

    case.allocate("--hidden-dtype", kind, "--feature-layers", "auto")
    assert run("stored", *case.stored) == 0 and run("online", *case.online) == 0
    expected, found = case.curve("online"), case.curve("stored")
    assert len(found) == len(expected) > 3
    assert found == pytest.approx(expected, abs=1e-4 if kind == "auto" else 1e-2)
    heads = [load_draft(case.folder / name / "final") for name in ("online", "stored")]
    first, second = (head.draft_vocab for head in heads)
    assert first is not None and second is not None and torch.equal(first, second)
    config = json.loads((case.folder / "draft.json").read_text())
    (case.folder / "draft.json").write_text(json.dumps({**config, "msd": {"target_layers": [0, 2]}}))
    assert run("subset", *case.stored, "--max-steps", "1") == 0, capsys.readouterr()


def test_settings_without_effect_and_unknown_keys_are_refused(base: Path, target: Target, tmp_path: Path) -> None:
    draft, tensors = new_objective(base, target).draft, load_base_tensors(base)
    with pytest.raises(UserError, match=r"token_weight=0.0 for an EAGLE-3 head .leave it out"):
        Eagle3Objective(draft, tensors, TrainConfig(**{**RECIPE, "token_weight": 0.0}))
    path = tmp_path / "draft.json"
    for section, key in (("train", "epoch"), ("msd", "image_row")):
        path.write_text(json.dumps({**draft.config.published, section: {key: 1}}))
        with pytest.raises(UserError, match=f"unknown key '{key}'.*did you mean '{key}s'"):
            read_config(path)
    path.write_text(json.dumps({**draft.config.published, "train": {"epochs": 3}}))
    config, train_config = read_config(path)
    assert isinstance(config, Eagle3Config) and train_config == TrainConfig(epochs=3, **EAGLE3_RECIPE)
    made, recipe = read_config("auto", str(base), "eagle3")
    assert isinstance(made, Eagle3Config) and made.target_layers == (1, 2, 3) and recipe.rollout_steps == 7
    with pytest.raises(UserError, match="--draft-kind eagle3 with a config file"):
        read_config(path, str(base), "eagle3")
    with pytest.raises(UserError, match="--draft-positions plain with a config file"):
        read_config(path, str(base), None, "plain")


@pytest.mark.parametrize(("kind", "own"), [("eagle3", "mrope"), ("msd", "plain"), ("block", "plain")])
def test_positions_of_a_draft_made_for_a_base_can_be_chosen(base: Path, tmp_path: Path, kind: str, own: str) -> None:
    def chosen(base: Path, positions: str | None) -> str:
        config, _ = read_config("auto", str(base), kind, positions)
        written = type(config).from_dict(config.to_dict(), "config.json")
        return written.positions if isinstance(written, Eagle3Config) else written.options.positions

    assert [chosen(base, each) for each in (None, "plain", "mrope")] == [own, "plain", "mrope"]
    if kind == "eagle3":
        assert chosen(base, "temporal") == "temporal"
    else:
        with pytest.raises(UserError, match="positions='temporal'"):
            chosen(base, "temporal")
    with pytest.raises(UserError, match=r"positions 'mrope' with mrope_section \[\]"):
        chosen(tiny_llava.make_llava_hf(tmp_path / "llava"), "mrope")


@pytest.mark.by_hand
def test_the_library_speculators_gives_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head that was trained here and exported in its layout; needs the package ``speculators``."""
    library = pytest.importorskip("speculators.models.eagle3")
    case = Eagle3Case("qwen2_vl", tmp_path)
    monkeypatch.setattr(sys, "argv", case.command("run", *case.online))
    assert run_cli(main_deepspeed.main) == 0
    base = load_target(case.base, dtype="float32")
    trained = load_draft(case.folder / "run" / "final", dtype=torch.float32)
    assert isinstance(trained, Eagle3Draft)
    head = save_draft(trained, tmp_path / "head", dtype=torch.float32)
    out = export_eagle3(head, tmp_path / "out", "speculators", case.base)
    config = library.Eagle3SpeculatorConfig.from_pretrained(out)
    config.transformer_layer_config._attn_implementation = "eager"
    theirs = library.Eagle3DraftModel.from_pretrained(out, config=config).float().eval()
    trained.use_embedding(base.model.get_input_embeddings())
    size, rows = base.hidden_size, 12
    features, ids = torch.randn(1, rows, 3 * size), torch.randint(3, 300, (1, rows))
    logits: list[torch.Tensor] = []
    theirs.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    assert trained.lm_head is not None
    with torch.no_grad():
        theirs(features, ids, torch.zeros(1, rows, dtype=torch.long), ttt_steps=1)
        hidden = trained(trained.text_rows(trained.condense(features), ids), torch.arange(rows)[None])
        own = trained.lm_head(trained.head_input(hidden))
    print("largest difference", float((own - logits[0]).abs().max()), "of", float(own.abs().max()))
    torch.testing.assert_close(logits[0], own, atol=1e-5, rtol=0)
    assert theirs.d2t.tolist() == (trained.draft_vocab - torch.arange(len(trained.draft_vocab))).tolist()

"""The gate between training and decoding: a draft trained on one sample must be accepted when it decodes that sample.

An off-by-one anywhere (state, token, picture, position, mask) shows here, since decoding reads what training never saw.
"""

from copy import deepcopy
from functools import partial

import pytest
import tiny_llava
import tiny_stock
import torch
from tiny_families import FAMILY_MAKERS, make_gemma3, make_gemma4, make_internvl, make_qwen3_vl

from eagle.decode.msd import MSDModel
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families import Target, load_target
from eagle.families.base_weights import BaseTensors, load_base_tensors
from eagle.families.draft_config import draft_config_of
from eagle.families.llava.target import LlavaTarget
from eagle.hidden_states.shards import Sample
from eagle.train.collate import collate
from eagle.train.engine import PlainEngine
from eagle.train.loss import DraftObjective
from eagle.train.schedule import BatchSizes
from eagle.train.settings import TrainConfig, with_draft_settings
from eagle.train.validation import batch_sums, summary

NEW = 48
CHAIN = TreeConfig(depth=5, top_k=1, total_tokens=7)


@pytest.fixture(scope="module")
def llava():
    return LlavaTarget(tiny_llava.tiny_model(tiny_llava.TinySizes(), seed=1, vocab_size=120), processor=None)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return load_target(tiny_stock.make_qwen(tmp_path_factory.mktemp("qwen"), seed=3), dtype="float32")


@pytest.fixture(params=["llava plain", "qwen plain", "qwen mrope"])
def case(request):
    """A target and the kind of its draft's positions."""
    name, positions = request.param.split()
    return request.getfixturevalue(name), positions


def prompt(target: Target, pictures: int) -> dict[str, torch.Tensor]:
    """Text, and each picture (16 image tokens) behind some more of it; for Qwen2-VL 2 x 8 of them."""
    generator = torch.Generator().manual_seed(pictures)
    text = torch.randint(3, 100, (3 * (pictures + 1),), generator=generator).split(3)
    picture = torch.full((16,), target.config.image_token_id)
    ids = torch.cat([part for piece in text for part in (piece, picture)][:-1])[None]
    images = {}
    if pictures and target.family == "llava":
        images = {"pixel_values": torch.randn(pictures, 3, 56, 56, generator=generator)}
    elif pictures:
        patches = torch.randn(pictures * 64, 3 * 2 * 14 * 14, generator=generator)
        images = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 16]] * pictures)}
        images["mm_token_type_ids"] = (ids == target.config.image_token_id).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


@torch.no_grad()
def own_answer(target: Target, inputs: dict[str, torch.Tensor]) -> Sample:
    """The target's greedy answer with its hidden states."""
    sequence = MSDModel(target).generate(**inputs, max_new_tokens=NEW, temperature=0).sequences
    full = {**inputs, "input_ids": sequence, "attention_mask": torch.ones_like(sequence)}
    prefill = target.prefill(full)
    answer = torch.arange(sequence.shape[1]) >= inputs["input_ids"].shape[1]
    mask = prefill.image_mask[0]
    grids = inputs.get("image_grid_thw", torch.empty(0, 3).long()) // torch.tensor([1, 2, 2])
    return Sample("one", sequence[0], answer, mask, prefill.hidden[0], prefill.embeds[0][mask], grids)


def new_objective(target: Target, positions: str = "plain", decoupled: bool = True, **settings) -> DraftObjective:
    torch.manual_seed(0)
    shape = {"model_type": target.family, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
             "vocab_size": target.vocab_size, "msd": {"positions": positions, "decoupled": decoupled},
             "rope_scaling": {"mrope_section": [1, 1, 2]}}  # fmt: skip
    base = BaseTensors(target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight)
    return DraftObjective(DraftModel(DraftConfig.from_dict(shape)), base, TrainConfig(**settings))


def train(objective: DraftObjective, sample: Sample, steps: int) -> PlainEngine:
    """The real engine and the real loss, without noise; image rows merged as the settings say."""
    objective.draft.config = with_draft_settings(objective.draft.config, objective.config)
    engine = PlainEngine(objective, objective.config, {"gradient_clipping": 0.5}, BatchSizes(1, 1, 1))
    options = objective.draft.config.options
    vocab_size = int(sample.input_ids.max()) + 1
    batch = collate([sample], vocab_size, 2048, compression=options.compression, positions=options.positions)
    for step in range(steps):
        engine.step([batch], learning_rate=4e-3 * (1 - step / steps))
    return engine


def decode(target: Target, objective: DraftObjective, inputs: dict[str, torch.Tensor], sample: Sample):
    """Decodes with the draft; the answer must be the target's own."""
    draft = objective.draft.eval().requires_grad_(False)
    output = MSDModel(target, draft, CHAIN).generate(**inputs, max_new_tokens=NEW, temperature=0)
    assert torch.equal(output.sequences[0], sample.input_ids)
    return output.stats


@pytest.mark.parametrize("pictures", [*(pytest.param(count, marks=pytest.mark.slow) for count in (0, 1)), 2])
def test_a_draft_trained_on_one_sample_is_accepted_when_decoding_it(case, pictures):
    target, positions = case
    inputs = prompt(target, pictures)
    sample = own_answer(target, inputs)
    assert sample.image_mask.sum() == 16 * pictures
    assert sample.input_ids[-NEW:].unique().numel() > NEW / 6, "an answer in a loop would prove little"
    objective = new_objective(target, positions, token_weight=1.0, rollout_steps=2)
    train(objective, sample, steps=300)
    stats = decode(target, objective, inputs, sample)
    shortest = -(-(NEW - 1) // 7)  # a cycle gives at most six drafted tokens and the bonus token
    assert stats.cycles <= shortest + 1, f"accepted {stats.accept_lengths}, tau {stats.tau:.2f}"


def test_a_draft_that_is_not_decoupled_decodes_as_it_was_trained(llava):
    """The same gate for the ablation: image rows go through fc in training and in decoding alike."""
    inputs = prompt(llava, 1)
    sample = own_answer(llava, inputs)
    objective = new_objective(llava, decoupled=False, token_weight=1.0, simulated_depth=6)
    train(objective, sample, steps=70)
    batch = collate([sample], llava.vocab_size, 2048)
    values = summary(batch_sums(objective.eval(), batch), depth=6)
    as_published = new_objective(llava, token_weight=1.0, simulated_depth=6)
    as_published.draft.load_state_dict(objective.draft.state_dict())
    others = summary(batch_sums(as_published.eval(), batch), depth=6)
    assert others["loss"] != pytest.approx(values["loss"], rel=1e-3), "image rows were the same both ways"
    assert values["tau"] == pytest.approx(decode(llava, objective, inputs, sample).tau)
    assert 1 < values["tau"] < 7


@pytest.mark.parametrize("rows", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_draft_trained_with_merged_image_rows_is_accepted_too(case, rows):
    target, positions = case
    inputs = prompt(target, 2)
    sample = own_answer(target, inputs)
    objective = new_objective(target, positions, token_weight=1.0, rollout_steps=2, draft_image_tokens=rows)
    train(objective, sample, steps=300)
    stats = decode(target, objective, inputs, sample)
    assert stats.cycles <= -(-(NEW - 1) // 7) + 1, f"accepted {stats.accept_lengths}, tau {stats.tau:.2f}"


def scales_embeddings(target: Target) -> bool:
    embed, ids = target.model.get_input_embeddings(), torch.arange(9)
    return not torch.equal(embed(ids), embed.weight[ids])


WIDE_HEADS = {"head_dim": 16, "rope_parameters": {"mrope_section": [4, 2, 2], "mrope_interleaved": True}}
GEOMETRIES = {
    "heads of another size, with norms": (
        partial(make_qwen3_vl, **WIDE_HEADS), {},
        lambda target, draft: (
            draft.config.head_dim * draft.config.num_attention_heads == 2 * target.hidden_size
            and hasattr(target.text_model.layers[0].self_attn, "q_norm")
        ),
    ),
    "tied and scaled embeddings": (
        make_gemma3, {},
        lambda target, draft: (
            target.model.get_output_embeddings().weight is target.model.get_input_embeddings().weight
            and scales_embeddings(target)
        ),
    ),
    "capped logits": (make_gemma4, {}, lambda target, draft: target.logit_cap == 3),
    "smaller layer": (make_internvl, {"layer_size": 24}, lambda target, draft: draft.fc.out_features == 24),
    "larger layer": (make_internvl, {"layer_size": 48}, lambda target, draft: draft.fc.out_features == 48),
}  # fmt: skip
"""For each the base, options of the draft, and that the pair has it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_draft_for_every_geometry(name, tmp_path):
    """The automatic config fits, and a draft trained on one answer about a picture is accepted when decoding it; also
    from its file, and compiled."""
    make, options, has_it = GEOMETRIES[name]
    target = load_target(make(tmp_path / "base"), dtype="float32")
    target.model.generation_config.eos_token_id = None
    inputs = target.prepare(target.chat_prompt("Count the shapes.", 1), [tiny_llava.make_image(width=60, height=50)])
    sample = own_answer(target, inputs)
    torch.manual_seed(0)
    config = DraftConfig.from_dict({**draft_config_of(tmp_path / "base").to_dict(), "msd": options})
    draft, base = DraftModel(config), load_base_tensors(tmp_path / "base")
    assert has_it(target, draft)
    objective = DraftObjective(draft, base, TrainConfig(token_weight=1.0, rollout_steps=2))
    train(objective, sample, steps=200)
    assert decode(target, objective, inputs, sample).tau > 4
    own = load_draft(save_draft(draft, tmp_path / "draft", dtype=torch.float32), dtype=torch.float32)
    assert own.config == draft.config
    compiled = MSDModel(target, own, CHAIN, compile="eager")
    output = compiled.generate(**inputs, max_new_tokens=NEW, temperature=0)
    assert torch.equal(output.sequences[0], sample.input_ids) and output.stats.tau > 4


def distinct(sample: Sample) -> int:
    """Different tokens of an answer."""
    return sample.input_ids[-NEW:].unique().numel()


SEEDS = {"llava_onevision": 3}
"""Of bases whose weights by seed 0 answer with a few tokens in a loop."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name == "qwen3_vl" else pytest.mark.by_hand)
        for name in FAMILY_MAKERS
        if "-" not in name  # a variant
    ],
)
def test_every_drafted_token_is_accepted(family, tmp_path):
    """In each of today's families, about a picture and with the automatic draft config."""
    target = load_target(FAMILY_MAKERS[family](tmp_path / "base", seed=SEEDS.get(family, 0)), dtype="float32")
    target.model.generation_config.eos_token_id = None
    asked = [
        target.prepare(target.chat_prompt(question, 1), [tiny_llava.make_image(width=60, height=50, seed=seed)])
        for question in ("Count the shapes.", "Which two?", "Why is that?", "Name it.", "And here?")
        for seed in range(3)
    ]
    answers = [(inputs, own_answer(target, inputs)) for inputs in asked]
    inputs, sample = max(answers, key=lambda answer: distinct(answer[1]))
    assert sample.image_mask.any()
    assert distinct(sample) > NEW / 8, "an answer in a loop would prove little"
    torch.manual_seed(0)
    draft, base = DraftModel(draft_config_of(tmp_path / "base")), load_base_tensors(tmp_path / "base")
    objective = DraftObjective(draft, base, TrainConfig(token_weight=1.0, rollout_steps=3))
    for _ in range(4):  # some draft heads take longer
        train(objective, sample, steps=1000)
        stats = decode(target, deepcopy(objective), inputs, sample)
        *cycles, last = stats.accept_lengths
        if set(cycles) == {CHAIN.depth + 1}:
            break
    assert set(cycles) == {CHAIN.depth + 1}, stats.accept_lengths
    assert last >= NEW - 2 - (CHAIN.depth + 2) * len(cycles), "the rest, of which the target gives the last token"


@pytest.mark.parametrize(("pictures", "steps"), [(1, 30), (1, 70), (0, 70)])
def test_simulated_acceptance_is_that_of_decoding(case, pictures, steps):
    """A half-trained draft: validation's walk must take exactly the cycles that decoding takes."""
    target, positions = case
    inputs = prompt(target, pictures)
    sample = own_answer(target, inputs)
    objective = new_objective(target, positions, token_weight=1.0, simulated_depth=6)
    train(objective, sample, steps)
    batch = collate([sample], target.vocab_size, 2048, positions=positions)
    values = summary(batch_sums(objective.eval(), batch), depth=6)
    stats = decode(target, objective, inputs, sample)
    assert values["tau"] == pytest.approx(stats.tau)
    assert 1 < stats.tau < 7, "neither nothing nor everything accepted"

"""One seed, one answer: whatever tree, draft or batch it comes from, and the one that transformers finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian
from tiny_stock import make_qwen
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from eagle import MSDModel, TreeConfig
from eagle.decode.noise import Noise, derived_seed, gumbel, seeds_of
from eagle.exactness import noise_processors
from eagle.families import load_target
from llava import UserError

PROMPTS = {
    "llava": ["USER: Name two rivers. ASSISTANT:", "USER: <image>\nHow many shapes are there? ASSISTANT:", "USER: Hi"],
    "qwen": ["Name two rivers.", "<|vision_start|><|image_pad|><|vision_end|>How many?", "Hi"],
}
TREES = [TreeConfig(1, 64, 128), TreeConfig(5, 10, 60), TreeConfig(3, 2, 6), TreeConfig(0, 3, 4), TreeConfig(4, 4, 1)]
SEEDS = [4, 9, 2]
WARM: dict[str, Any] = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_new_tokens": 30, "eos_token_id": None}


@pytest.fixture(scope="module", params=PROMPTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    folder = tmp_path_factory.mktemp("noise")
    base = (make_liuhaotian if request.param == "llava" else make_qwen)(folder / "base")
    draft = make_draft(folder / "draft", load_target(base, dtype=torch.float32), agree=1.0)
    made = MSDModel.from_pretrained(base, draft, dtype=torch.float32)
    made.prompts = PROMPTS[request.param]  # type: ignore[attr-defined]
    return made


def prepare(model: Any, *numbers: int) -> dict[str, torch.Tensor]:
    pictures = [make_image(width=56, height=56, seed=1)] if 1 in numbers else []
    return model.target.prepare([model.prompts[number] for number in numbers], pictures)


def said(model: Any, *numbers: int, **settings: Any) -> list[list[int]]:
    inputs = prepare(model, *numbers)
    output = model.generate(**inputs, **{**WARM, **settings})
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.3}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_the_same_answer_with_any_tree_and_without(model: MSDModel, more: dict[str, float]) -> None:
    plain = said(model, 1, seed=4, use_msd=False, **more)
    for tree in TREES:
        assert said(model, 1, seed=4, tree=tree, **more) == plain, tree
    assert said(model, 1, seed=4, **more) == plain, "a tree that adapts"
    assert said(model, 1, seed=5, use_msd=False, **more) != plain


def test_the_draft_helps_while_sampling(model: MSDModel) -> None:
    """Else the test above would say nothing of accepted tokens."""
    stats = model.generate(**prepare(model, 1), **WARM, seed=4, tree=TREES[0]).stats
    assert sum(stats.accept_lengths) > 0


def test_rows_of_a_batch_are_what_their_seeds_give_alone(model: MSDModel) -> None:
    alone = [said(model, number, seed=seed)[0] for number, seed in enumerate(SEEDS)]
    assert said(model, 0, 1, 2, seed=SEEDS, tree=TREES[0]) == alone
    assert said(model, 2, 0, seed=[SEEDS[2], SEEDS[0]], tree=TREES[2]) == [alone[2], alone[0]]


def test_one_seed_for_a_batch_gives_rows_of_their_own(model: MSDModel) -> None:
    rows = said(model, 0, seed=4, num_return_sequences=3)
    assert rows[0] == said(model, 0, seed=4)[0] and len({tuple(row) for row in rows}) == 3
    with pytest.raises(UserError, match="2 seeds for 3 sequences"):
        said(model, 0, 1, 2, seed=[1, 2])


@pytest.mark.parametrize("more", [[], [TopKLogitsWarper(5), TopPLogitsWarper(0.9)]], ids=["plain", "top-k and top-p"])
def test_transformers_finds_it_by_searching_in_noisy_scores(model: MSDModel, more: list[Any]) -> None:
    inputs = prepare(model, 1)
    warp, noise = noise_processors(0.7, 4, inputs["input_ids"])
    settings = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None}
    found = model.target.model.generate(
        **inputs, **settings, logits_processor=LogitsProcessorList([warp, *more, noise])
    )
    limits = {"top_k": 5, "top_p": 0.9} if more else {}
    assert said(model, 1, seed=4, **limits)[0] == found[0, inputs["input_ids"].shape[1] :].tolist()


def test_without_a_seed_the_global_state_decides(model: MSDModel) -> None:
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(said(model, 0, use_msd=False))
    assert answers[0] == answers[1] != answers[2]
    before = torch.get_rng_state()
    said(model, 0, seed=4)
    assert torch.equal(before, torch.get_rng_state()), "a seed leaves it alone"


def test_noise_is_of_the_place_however_it_is_asked_for() -> None:
    def noise() -> Noise:
        return Noise(torch.Generator().manual_seed(3), "cpu")

    whole = noise().rows(0, 9, 50)
    one = noise()
    assert torch.equal(torch.cat([one.rows(place, 1, 50) for place in range(9)]), whole)
    ahead = noise()
    assert torch.equal(ahead.rows(0, 4, 50), whole[:4])
    assert torch.equal(ahead.rows(3, 5, 50), whole[3:8])
    assert torch.equal(ahead.rows(8, 1, 50), whole[8:])
    assert torch.equal(noise().rows(6, 3, 50), whole[6:])


def test_gumbel_noise_is_gumbel() -> None:
    """exp(-exp(-x)) of it is uniform; and no value is infinite."""
    noise = gumbel([400, 500], torch.Generator().manual_seed(1), "cpu")
    uniform = noise.neg().exp().neg().exp().flatten().sort().values
    steps = torch.linspace(0, 1, len(uniform))
    assert (uniform - steps).abs().max() < 1.95 / len(uniform) ** 0.5  # Kolmogorov-Smirnov at 0.001
    assert noise.isfinite().all()


def test_seeds() -> None:
    assert seeds_of(7, 1) == [7] and seeds_of([5, 6], 2) == [5, 6]
    assert seeds_of(7, 3)[:2] == seeds_of(7, 2) and len(set(seeds_of(7, 100) + seeds_of(8, 100))) == 200
    assert len({derived_seed(*place) for place in [(1, 2, 3), (12, 3, 4), (1, 23, 4), (1, 2, 4), (2, 2, 3)]}) == 5
    assert all(0 <= derived_seed(seed) < 2**63 for seed in range(100))

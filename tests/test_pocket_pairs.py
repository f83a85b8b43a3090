"""The trained models in pocket/: they see, their drafts are accepted, and answers stay what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from eagle import MSDModel, TreeConfig
from eagle.questions import read_questions
from pocket.recipe.evaluate import evaluate, load_answerer, read_items

POCKET = Path(__file__).resolve().parents[1] / "pocket"
HELDOUT = POCKET / "data" / "heldout.jsonl"
PAIRS = ("llava", "qwen2vl")
LARGEST = 70_000_000  # bytes of all weights


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.slow
def test_the_target_sees_the_picture(name: str) -> None:
    items = [item for item in read_items(HELDOUT) if item["images"]][:16]
    answerer = load_answerer(str(POCKET / name), torch.get_num_threads(), max_new_tokens=128)
    report, _ = evaluate(answerer, items, HELDOUT.parent, exchanged=True, batch=16)
    score = report.scores["all pictures"]
    assert score["right"].asked > 60
    assert score["right"].right > 0.85 * score["right"].asked
    assert score["exchanged"].right < 0.15 * score["exchanged"].asked


@pytest.mark.parametrize("name", [PAIRS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PAIRS[1:])])
def test_the_draft_is_accepted_and_changes_nothing(name: str) -> None:
    model = MSDModel.from_pretrained(POCKET / name, POCKET / f"{name}-msd", dtype="float32")
    tokens = cycles = 0
    for question in read_questions(HELDOUT, limit=6):
        inputs = question.inputs(model.target)
        expected = model.target.model.generate(**inputs, do_sample=False, max_new_tokens=64)
        output = model.generate(**inputs, temperature=0.0, max_new_tokens=64)
        assert torch.equal(output.sequences, expected), question.id
        tokens, cycles = tokens + output.stats.new_tokens - 1, cycles + output.stats.cycles
    assert tokens / cycles > 3, "the draft is hardly ever right"


@pytest.mark.parametrize("name", PAIRS)
def test_the_draft_is_accepted_in_a_batch_as_alone(name: str) -> None:
    """Answers cannot tell a draft that reads another sequence's rows; accepted tokens can."""
    model = MSDModel.from_pretrained(POCKET / name, POCKET / f"{name}-msd", dtype="float32")
    asked = list(read_questions(HELDOUT, limit=3))
    prompts = [model.target.chat_prompt(each.question, num_images=len(each.images)) for each in asked]
    pictures = [Image.open(path) for each in asked for path in each.images]
    settings = {"max_new_tokens": 32, "temperature": 0.0, "tree": TreeConfig(4, 3, 10)}
    alone = [model.generate(**each.inputs(model.target), **settings).stats for each in asked]
    together = model.generate(**model.target.prepare(prompts, pictures), **settings).stats
    accepted = sum(sum(stats.accept_lengths) for stats in alone)
    assert accepted > 40
    assert abs(sum(together.accept_lengths) - accepted) <= 5 * len(asked), "the last cycle of each may differ"


def test_weights_stay_small() -> None:
    files = [path for name in PAIRS for folder in (name, f"{name}-msd") for path in (POCKET / folder).iterdir()]
    assert sum(path.stat().st_size for path in files) < LARGEST

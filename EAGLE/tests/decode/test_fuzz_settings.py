"""Random settings, processors, batches and trees: greedy answers are transformers', sampled ones plain decoding's."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_llava_hf
from tiny_stock import make_qwen

from eagle import MSDModel, TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target

ROUNDS, EACH = 12, 42  # comparisons: ROUNDS x EACH for each of two families, 1 008 in all
WORDS = (
    "Name", "two", "rivers", "of", "the", "world", "that", "you", "can", "count", "and", "say", "what", "colours",
)  # fmt: skip
PROCESSORS: list[dict[str, Any]] = [
    {}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.8}, {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3}, {"min_new_tokens": 5}, {"encoder_repetition_penalty": 1.4},
    {"encoder_no_repeat_ngram_size": 3}, {"suppress_tokens": [5, 6, 7, 8]}, {"begin_suppress_tokens": [9, 10]},
    {"bad_words_ids": [[11], [12, 13]]}, {"exponential_decay_length_penalty": (4, 1.2)}, {"forced_eos_token_id": 2},
    {"sequence_bias": [[[14], 2.0], [[15, 16], -3.0]]}, {"renormalize_logits": True}, {"remove_invalid_values": True},
]  # fmt: skip
WARPERS: list[dict[str, Any]] = [
    {}, {"top_k": 5}, {"top_p": 0.8}, {"top_p": 0.0}, {"min_p": 0.1}, {"typical_p": 0.7}, {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.01}, {"top_k": 20, "top_p": 0.9},
]  # fmt: skip


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    folder = tmp_path_factory.mktemp("fuzz")
    make = make_llava_hf if request.param == "llava" else make_qwen
    target = load_target(make(folder / "base"), dtype=torch.float32)
    draft = make_draft(folder / "draft", target, agree=1.0)
    return MSDModel(target, load_draft(draft, dtype=torch.float32))


def prompts(model: MSDModel, chance: Random, count: int) -> list[tuple[str, list[Any]]]:
    """Questions with and without pictures."""
    made = []
    for _ in range(count):
        pictures = [
            make_image(width=chance.choice([40, 64, 112]), height=chance.choice([30, 64]), seed=chance.randrange(9))
            for _ in range(chance.choice([0, 0, 1, 2]))
        ]
        text = " ".join(chance.choices(WORDS, k=chance.randrange(1, 16)))
        made.append((model.target.chat_prompt(text, num_images=len(pictures)), pictures))
    return made


def compare(model: MSDModel, chance: Random) -> int:
    """One request; returns the number of answers that were compared."""
    asked = prompts(model, chance, chance.choice([1, 1, 1, 2, 3]))
    batch = model.target.prepare(
        [text for text, _ in asked] if len(asked) > 1 else asked[0][0], [image for _, own in asked for image in own]
    )
    tree = TreeConfig(chance.randrange(0, 7), chance.randrange(1, 6), chance.randrange(1, 40))
    settings = {"max_new_tokens": chance.randrange(1, 20), **chance.choice(PROCESSORS), **chance.choice(PROCESSORS)}
    if chance.random() < 0.6:
        output = model.generate(**batch, **settings, do_sample=False, tree=tree)
        for (text, own), tokens in zip(asked, output.tokens, strict=True):
            alone = model.target.prepare(text, own)
            expected = model.target.model.generate(**alone, **settings, do_sample=False)
            assert tokens == expected[0, alone["input_ids"].shape[1] :].tolist(), (settings, tree, len(asked))
        return len(asked)
    settings |= {"temperature": chance.choice([0.5, 1.0, 1.7]), "top_k": 0, "top_p": 1.0, **chance.choice(WARPERS)}
    seeds = [chance.randrange(2**40) for _ in asked]
    output = model.generate(**batch, **settings, do_sample=True, tree=tree, seed=seeds)
    for (text, own), tokens, seed in zip(asked, output.tokens, seeds, strict=True):
        alone = model.target.prepare(text, own)
        plain = model.generate(**alone, **settings, do_sample=True, use_msd=False, seed=seed)
        assert [tokens] == plain.tokens, (settings, tree, len(asked))
    return len(asked)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ROUNDS))
def test_answers_do_not_depend_on_the_draft(model: MSDModel, number: int) -> None:
    chance, compared = Random(number), 0
    while compared < EACH:
        compared += compare(model, chance)

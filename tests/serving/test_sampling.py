"""Sampled answers with a draft have the target's distribution, also on vLLM's CPU backend."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from serving_support import Pair, Run

from eagle.exactness import Fit, distribution, fit_of, processors_of, significant
from eagle.questions import Question

pytestmark = pytest.mark.by_hand

SAMPLES, LENGTH, ENOUGH = 600, 9, 150
SETTINGS = {"T 1": {"temperature": 1.0}, "T 2, top-k 20": {"temperature": 2.0, "top_k": 20}}
QUESTION = {"llava": 99, "qwen2_vl": 123}
"""For each family a question whose answer begins in several ways. Most answers of these small models begin in one."""
WRONG = {"temperature": 0.6}
"""Another distribution, which the test must tell from the right one."""


def next_tokens(samples: list[list[int]]) -> dict[tuple[int, ...], Counter[int]]:
    """How often each token follows each beginning of an answer that is frequent enough."""
    found: dict[tuple[int, ...], Counter[int]] = {}
    for ids in samples:
        for place, token in enumerate(ids):
            found.setdefault(tuple(ids[:place]), Counter())[token] += 1
    return {prefix: counts for prefix, counts in found.items() if counts.total() >= ENOUGH}


def fits(pair: Pair, question: Question, samples: list[list[int]], setting: dict[str, float]) -> list[Fit]:
    """Chi-square of the tokens after each beginning, against the target's own probabilities."""
    inputs, target = question.inputs(pair.msd.target), pair.msd.target
    made = []
    for prefix, counts in next_tokens(samples).items():
        ids = torch.cat([inputs["input_ids"], torch.tensor([prefix], dtype=torch.long)], dim=1)
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in given:  # text behind the prompt
            more = torch.zeros_like(ids[:, inputs["input_ids"].shape[1] :])
            given["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], more], dim=1)
        with torch.no_grad():
            logits = target.model(**given).logits[:, -1].float()  # [1, V]
        observed = torch.zeros(logits.shape[1], dtype=torch.long)
        for token, count in counts.items():
            observed[token] = count
        wanted = distribution(logits, processors_of(setting))[0]
        made.append(fit_of(str(setting), str(len(prefix)), [(observed, wanted)]))
    return made


def test_sampled_tokens_have_the_targets_distribution(pair: Pair, questions: list[Question], run_engine: Run) -> None:
    jobs = [{"n": SAMPLES, "max_tokens": LENGTH, "seed": None, **setting} for setting in SETTINGS.values()]
    question = questions[QUESTION[pair.msd.target.family]]
    found = run_engine(pair, [pair.request(question)], sampling=jobs, block_size=32, max_num_seqs=32)
    assert found["counters"]["num_accepted_tokens"] > SAMPLES
    right, wrong = [], []
    for setting, samples in zip(SETTINGS.values(), found["samples"], strict=True):
        assert len(samples) == SAMPLES
        right += fits(pair, question, samples, setting)
        wrong += fits(pair, question, samples, WRONG)
    assert len({fit.where for fit in right}) > 3
    assert significant(right) == []
    assert {fit.where for fit in significant(wrong)} - {"0"}  # behind the first token, which is not drafted


def test_a_seed_gives_the_same_answer_again(pair: Pair, questions: list[Question], run_engine: Run) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 32, "seed": 7}
    requests = [pair.request(questions[0])] * 2 + [pair.request(questions[1])]
    found = run_engine(pair, requests, sampling=[sampling])
    first, again, other = found["ids"]
    assert first == again != other

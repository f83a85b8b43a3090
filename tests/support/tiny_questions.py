"""Questions with and without pictures for tiny models. No pytest in here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from tiny_llava import make_image

from eagle.families import Target

Question = tuple[str, int]
"""Text and number of pictures."""
QUESTIONS: list[Question] = [("Which is larger?", 2), ("Name two rivers.", 0), ("How many shapes are there?", 1)]


def prepared(target: Target, questions: Sequence[Question]) -> dict[str, Any]:
    """Model inputs of one question, or of a batch."""
    prompts = [target.chat_prompt(text, num_images=count) for text, count in questions]
    images = [make_image(seed=seed) for _, count in questions for seed in range(count)]
    return target.prepare(prompts if len(prompts) > 1 else prompts[0], images)


@cache
def answer_alone(target: Target, question: Question, tokens: int) -> list[int]:
    """The answer of transformers' `generate`."""
    inputs = prepared(target, [question])
    inputs |= target.complete_inputs(inputs["input_ids"], inputs)
    output = target.model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return output[0, inputs["input_ids"].shape[1] :].tolist()

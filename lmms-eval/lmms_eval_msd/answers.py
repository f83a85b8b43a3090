"""Scoring of the `*_msd` tasks: they ask for an explanation, and lmms-eval's own scoring gets the answer at its end."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

_ANSWER = re.compile(r"\banswer(?:\s+is)?\s*[:：]\s*(.+)", re.IGNORECASE)
Score = Callable[[Any, list[str]], dict[str, Any]]


def final_answer(text: str) -> str:
    """What follows the last "Answer:"; the whole text where there is none.

    >>> final_answer("The bar is 3 high.\\nAnswer: 3.")
    '3'
    """
    found = _ANSWER.findall(text)
    return (found[-1] if found else text).strip().rstrip(".")


def _upstream(task: str, function: str) -> Score:
    def score(doc: Any, results: list[str]) -> dict[str, Any]:
        own = getattr(import_module(f"lmms_eval.tasks.{task}.utils"), function)
        return own(doc, [final_answer(result) for result in results])

    return score


chartqa = _upstream("chartqa", "chartqa_process_results")
mme = _upstream("mme", "mme_process_results")
vqav2 = _upstream("vqav2", "vqav2_process_results_val")


def textvqa(doc: Any, results: list[str]) -> dict[str, Any]:
    """As upstream, without the submission file."""
    return {"exact_match": _upstream("textvqa", "textvqa_process_results")(doc, results)["exact_match"]}


def gqa(doc: Any, results: list[str]) -> dict[str, Any]:
    """Equal but for case and punctuation."""
    given, wanted = (re.sub(r"[^\w\s]", "", text).strip().lower() for text in (final_answer(results[0]), doc["answer"]))
    return {"exact_match": float(given == wanted)}

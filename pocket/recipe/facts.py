"""Facts which a machine can check in an answer, whatever wording the question had.

number: the first number after `subject` (and `cue`) in one sentence is within `tolerance` of `value`
choice: the first of `options` after `subject` (and `cue`) in one sentence is `value`
word:   `value` occurs in the answer
A value read off an axis may be off by one grid step, so its tolerance is the chart's grid step.
"""

from __future__ import annotations

import re
from typing import Any

Fact = dict[str, Any]


def number(slot: str, subject: str, value: int, tolerance: int = 0, cue: str = "") -> Fact:
    """A number which must follow the subject."""
    return {
        "slot": slot,
        "kind": "number",
        "subject": subject,
        "cue": cue,
        "value": value,
        "tolerance": tolerance,
    }


def choice(slot: str, subject: str, value: str, options: tuple[str, ...] | list[str], cue: str = "") -> Fact:
    """A word of a closed list which must follow the subject."""
    return {
        "slot": slot,
        "kind": "choice",
        "subject": subject,
        "cue": cue,
        "value": value,
        "options": list(options),
    }


def word(slot: str, value: str) -> Fact:
    """A word which must occur."""
    return {"slot": slot, "kind": "word", "value": value}


def _find(text: str, wanted: str) -> re.Match[str] | None:
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, re.IGNORECASE)


def _after(sentence: str, fact: Fact) -> str | None:
    """What follows subject and cue in the sentence, or None if they do not occur."""
    for wanted in (fact["subject"], fact["cue"]):
        if wanted:
            hit = _find(sentence, wanted)
            if hit is None:
                return None
            sentence = sentence[hit.end() :]
    return sentence


def _stated(rest: str, fact: Fact) -> Any:
    """The number or option which the rest of a sentence names first, or None."""
    if fact["kind"] == "number":
        hit = re.search(r"\d+", rest)
        return int(hit.group()) if hit else None
    hits = [(m.start(), -len(o), o) for o in fact["options"] if (m := _find(rest, o))]
    return min(hits)[2] if hits else None


def is_right(fact: Fact, answer: str) -> bool:
    """True if the answer states the fact."""
    if fact["kind"] == "word":
        return _find(answer, fact["value"]) is not None
    for sentence in re.split(r"[.;](?:\s|$)", answer):
        rest = _after(sentence, fact)
        stated = None if rest is None else _stated(rest, fact)
        if stated is not None:
            if fact["kind"] == "number":
                return abs(stated - fact["value"]) <= fact["tolerance"]
            return stated == fact["value"]
    return False

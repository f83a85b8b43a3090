"""The wording of questions: openings, cores and endings that are combined at random."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from .facts import Fact

OPENINGS = (
    "Please look at the picture.", "I need help with this picture.", "Have a close look.",
    "I am preparing a short talk and this is one of my pictures.", "My eyes are tired today.",
    "We discuss this picture in class and I want to be sure.", "Here is a picture from my notes.",
    "I would like to understand what I see here.", "Someone sent me this without any comment.",
    "I have to write a short report and cannot afford a mistake.",
)  # fmt: skip
ENDINGS = (
    "Please explain your answer.", "Explain it in a few sentences.", "Be exact, please.",
    "Please write full sentences.", "Tell me how you see it.", "Thank you for your help!",
    "Take your time.", "I want to use your answer in my report.",
)  # fmt: skip
SHORT = ("Answer briefly.", "A short answer is enough.", "Please keep it short.", "In a few words, please.")


@dataclass(frozen=True)
class Turn:
    """A question with its answer and the facts the answer must state."""

    kind: str
    question: str
    answer: str
    facts: list[Fact] = field(default_factory=list)


def word_question(rng: Random, core: str, short: bool) -> str:
    """A core question, often with sentences around it; `short` asks for a short answer."""
    parts = [core]
    if rng.random() < 0.45:
        parts.insert(0, rng.choice(OPENINGS))
    if short:
        parts.append(rng.choice(SHORT))
    elif rng.random() < 0.45:
        parts.append(rng.choice(ENDINGS))
    return " ".join(parts)


def listing(items: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]

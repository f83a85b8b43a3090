"""Text-only conversations in real English: the Python language reference, as `pydoc_data.topics` ships it.

Text: Python Software Foundation, PSF licence version 2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from random import Random

from .facts import word
from .phrases import Turn

MAX_PARAGRAPHS = 3
ASK = (
    "What does Python say about {}?", "Tell me about {} in Python.", "Please explain {} to me.",
    "What do I have to know about {}?", "I am learning Python. What is meant by {}?",
    "What does the language reference say about {}?", "Can you give me a text about {}?",
)  # fmt: skip
MORE = (
    "Please go on.",
    "What else?",
    "Tell me more.",
    "Go on, please.",
    "And what comes next?",
    "Continue, please.",
)


@dataclass(frozen=True)
class Topic:
    """A heading of the reference with its first paragraphs."""

    name: str
    paragraphs: tuple[str, ...]


def _prose(paragraph: str) -> str | None:
    """The paragraph on one line if it is plain prose of a useful length, else None."""
    if paragraph.startswith((" ", "*", "-", "+", "|")) or re.search(r"::=|>>>|\n {2,}|[<>{}|]", paragraph):
        return None
    line = re.sub(r"\s+", " ", paragraph).replace('"', "").strip().rstrip(":")
    line = re.sub(r" ?\[\d+\]", "", line)
    if not line.isascii():
        return None
    return line if 120 <= len(line) <= 420 else None


@cache
def topics() -> tuple[Topic, ...]:
    """All topics of the reference that have prose."""
    from pydoc_data.topics import topics as reference

    found, seen = [], set()
    for _, text in sorted(reference.items()):
        blocks = text.strip().split("\n\n")
        name = blocks[0].split("\n")[0].replace('"', "").strip()
        prose = [p for p in map(_prose, blocks[1:]) if p and p not in seen]
        if prose and name.isascii() and len(name) < 50:
            seen.update(prose[:MAX_PARAGRAPHS])
            found.append(Topic(name, tuple(prose[:MAX_PARAGRAPHS])))
    return tuple(found)


@cache
def _rare_words(paragraph: str) -> tuple[str, ...]:
    """Three long words which few other paragraphs use."""
    everything = " ".join(p for t in topics() for p in t.paragraphs).lower()
    words = sorted(set(re.findall(r"(?<![\w.])[a-z]{5,}(?!\w)", paragraph.lower())))
    return tuple(sorted(words, key=lambda w: (len(re.findall(rf"\b{w}\b", everything)), -len(w), w))[:3])


def ask_text(rng: Random) -> list[Turn]:
    """A conversation about one topic; each further turn asks for the next paragraph."""
    topic = rng.choice(topics())
    turns = []
    for i in range(rng.randint(1, len(topic.paragraphs))):
        question = rng.choice(ASK).format(topic.name) if i == 0 else rng.choice(MORE)
        rare = [w for w in _rare_words(topic.paragraphs[i]) if w not in question.lower()]
        turns.append(Turn("text", question, topic.paragraphs[i], [word(f"word {w}", w) for w in rare]))
    return turns

"""A pair of models in vLLM and in our own loop. No pytest in here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from repository import REPO

from eagle import MSDModel, TreeConfig
from eagle.questions import Question
from eagle.serving.draft import export_draft

POCKET = REPO / "pocket"
CHAIN = TreeConfig(4, 1, 6)
"""A chain of five tokens: what vLLM drafts."""
TOKENS = 128
Run = Callable[..., dict[str, Any]]


def load_msd(base: Path, draft: Path) -> MSDModel:
    """The pair in float32, drafting a chain."""
    return MSDModel.from_pretrained(base, draft, tree=CHAIN, dtype=torch.float32, device_map="cpu")


@dataclass(frozen=True)
class Reference:
    """What our loop does: ids of the answers, chains drafted, and how often each position of them was accepted."""

    ids: list[list[int]]
    drafts: int
    accepted: list[int]


@dataclass(frozen=True)
class Pair:
    """A base and its draft: ``base`` and ``source`` as this project loads them, ``model`` and ``draft`` as vLLM does.
    ``msd`` is our model of them."""

    base: Path
    source: Path
    model: Path
    draft: Path
    msd: MSDModel

    def with_draft(self, source: Path, out: Path) -> Pair:
        """The same base with another draft, which is exported to ``out``."""
        draft = export_draft(source, out, self.base)
        return Pair(self.base, source, self.model, draft, load_msd(self.base, source))

    def request(self, question: Question) -> dict[str, Any]:
        """The question for vLLM, as ids: each picture has one token, from which vLLM makes all."""
        image = self.msd.target.config.image_token_id
        ids = question.inputs(self.msd.target)["input_ids"][0].tolist()
        kept = [each for number, each in enumerate(ids) if each != image or number == 0 or ids[number - 1] != image]
        return {"prompt_token_ids": kept, "images": [str(path.resolve()) for path in question.images]}

    def answers(self, questions: list[Question]) -> Reference:
        """Our greedy answers by the chain. They may be a cycle longer, because our loop drafts no further than the
        answer may go, and vLLM always drafts the whole chain."""
        room = CHAIN.depth + 2
        outputs = [
            self.msd.generate(**question.inputs(self.msd.target), max_new_tokens=TOKENS + room, temperature=0.0)
            for question in questions
        ]
        lengths = []
        for output in outputs:
            tokens = 1  # the first one comes with the prompt
            for length in output.stats.accept_lengths:
                if tokens < TOKENS:
                    lengths.append(length)
                tokens += length + 1
        accepted = [sum(length > place for length in lengths) for place in range(CHAIN.depth + 1)]
        return Reference([output.tokens[0][:TOKENS] for output in outputs], len(lengths), accepted)

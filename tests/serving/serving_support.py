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

POCKET = REPO / "pocket"
CHAIN = TreeConfig(4, 1, 6)
"""A chain of five tokens: what vLLM drafts."""
TOKENS = 128
Run = Callable[..., dict[str, Any]]


def load_msd(base: Path, draft: Path) -> MSDModel:
    """The pair in float32, drafting a chain."""
    msd = MSDModel.from_pretrained(base, draft, dtype=torch.float32, device_map="cpu")
    msd.tree = CHAIN
    return msd


@dataclass(frozen=True)
class Pair:
    """What vLLM loads, our model of the same pair, and its target's id of pictures."""

    model: Path
    draft: Path
    msd: MSDModel

    def request(self, question: Question) -> dict[str, Any]:
        """The question for vLLM, as ids: each picture has one token, from which vLLM makes all."""
        image = self.msd.target.config.image_token_id
        ids = question.inputs(self.msd.target)["input_ids"][0].tolist()
        kept = [each for number, each in enumerate(ids) if each != image or number == 0 or ids[number - 1] != image]
        return {"prompt_token_ids": kept, "images": [str(path.resolve()) for path in question.images]}

    def answers(self, questions: list[Question]) -> tuple[list[list[int]], list[int]]:
        """Ids of our greedy answers by the chain, and how often each position of it was accepted."""
        ids, accepted = [], [0] * CHAIN.depth + [0]
        for question in questions:
            out = self.msd.generate(**question.inputs(self.msd.target), max_new_tokens=TOKENS, temperature=0.0)
            ids.append(out.tokens[0])
            for length in out.stats.accept_lengths:
                accepted = [count + (position < length) for position, count in enumerate(accepted)]
        return ids, accepted

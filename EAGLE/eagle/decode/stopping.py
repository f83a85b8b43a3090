"""The end of an answer: the same as in transformers' `generate`, although several tokens arrive at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria


class Stopper:
    """Cuts newly accepted tokens at the end of the answer.

    Length and end tokens are plain integer checks; all other criteria are evaluated after each token, as in `generate`.

    Args:
        criteria: prepared stopping criteria.
        prompt_length: P, tokens of the prompt with its padding; `generate` counts from there.
    """

    def __init__(self, criteria: Iterable, prompt_length: int) -> None:
        self._custom = StoppingCriteriaList()
        self._ends: set[int] = set()
        self.max_new_tokens = 2**31
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                self.max_new_tokens = min(self.max_new_tokens, criterion.max_length - prompt_length)
            elif isinstance(criterion, EosTokenCriteria):
                self._ends.update(criterion.eos_token_id.flatten().tolist())
            else:
                self._custom.append(criterion)

    def cut(self, context: Tensor, before: list[int], added: list[int]) -> tuple[list[int], bool]:
        """The part of ``added`` that belongs to the answer to ``context`` [1, P] after the new tokens ``before``, and
        whether the answer is over."""
        for count, token in enumerate(added, start=1):
            length = len(before) + count
            if token in self._ends or length >= self.max_new_tokens:
                return added[:count], True
            if self._custom and self._custom_stop(context, [*before, *added[:count]]):
                return added[:count], True
        return added, False

    def _custom_stop(self, context: Tensor, tokens: list[int]) -> bool:
        new = torch.tensor([tokens], dtype=context.dtype, device=context.device)
        return bool(self._custom(torch.cat([context, new], dim=-1), None).all())

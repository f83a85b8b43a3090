"""The end of an answer: the same as in transformers' `generate`, although several tokens arrive at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import MaxLengthCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria

NO_ID = 2**40
"""Stands before the first token: transformers reads an id beyond its vocabulary as one that fits no stop string."""


class Stopper:
    """Cuts newly accepted tokens at the end of the answer.

    Length and end tokens are plain integer checks. Stop strings are looked for once for all new tokens, in the host's
    memory. All other criteria are evaluated after each token, as in `generate`.

    Args:
        criteria: prepared stopping criteria.
        prompt_length: P, tokens of the prompt with its padding; `generate` counts from there.
    """

    def __init__(self, criteria: Iterable, prompt_length: int) -> None:
        self._custom = StoppingCriteriaList()
        self._texts: list[StopStringCriteria] = []
        self._ends: set[int] = set()
        self.max_new_tokens = 2**31
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                self.max_new_tokens = min(self.max_new_tokens, criterion.max_length - prompt_length)
            elif isinstance(criterion, EosTokenCriteria):
                self._ends.update(criterion.eos_token_id.flatten().tolist())
            elif isinstance(criterion, StopStringCriteria):
                self._texts.append(criterion)
            else:
                self._custom.append(criterion)

    def cut(self, context: Tensor, before: list[int], added: list[int]) -> tuple[list[int], bool]:
        """The part of ``added`` that belongs to the answer to ``context`` [1, P] after the new tokens ``before``, and
        whether the answer is over."""
        room = self.max_new_tokens - len(before)
        last = next((count for count, token in enumerate(added, 1) if token in self._ends or count >= room), None)
        for criterion in self._texts:
            last = first_stop(criterion, context, before, added[:last]) or last
        kept, over = added[:last], last is not None
        for count in range(1, len(kept) + (not over)) if self._custom else ():
            if self._custom_stop(context, [*before, *kept[:count]]):
                return kept[:count], True
        return kept, over

    def _custom_stop(self, context: Tensor, tokens: list[int]) -> bool:
        new = torch.tensor([tokens], dtype=context.dtype, device=context.device)
        return bool(self._custom(torch.cat([context, new], dim=-1), None).all())


def first_stop(criterion: StopStringCriteria, context: Tensor, before: list[int], added: list[int]) -> int | None:
    """After how many of the tokens ``added`` to ``context`` [1, P] and ``before`` the criterion holds for the first
    time. None if it never does."""
    width, count = criterion.maximum_token_len, len(added)
    missing = max(width - 1 - len(before), 0)
    past = context[0, context.shape[1] - min(missing, context.shape[1]) :].tolist() if missing else []
    ids = [*past, *before[len(before) - (width - 1 - missing) :], *added]
    ids = [NO_ID] * (width - 1 + count - len(ids)) + ids
    rows = torch.tensor(ids).unfold(0, width, 1)  # [count, width] the tokens up to each new one
    return next(iter(criterion(rows, None).nonzero().flatten().add(1).tolist()), None)

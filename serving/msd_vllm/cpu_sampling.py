"""Sampling with speculation on vLLM's CPU backend.

With a temperature, vLLM's rejection sampler repeats each request's temperature, top-p and top-k for its drafted tokens.
On the CPU backend of 0.32 this writes into a copy, so the sampler reads uninitialized memory and sampled answers are
wrong, with any kind of draft (https://github.com/vllm-project/vllm/issues/55005). Also, in a step in which no request
has drafted tokens, because all are at their last one, top-k takes the maximum of nothing, which ends the engine. Greedy
answers are not concerned. Where an MSD draft is served on this backend, both are corrected here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def repair_sampling() -> None:
    """On the CPU backend: replaces the first step if it is wrong, and skips the second one where there are no tokens.
    It may be called several times."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu():
        return
    values, ends = torch.tensor([0.5, 2.0]), torch.tensor([1, 3], dtype=torch.int32)
    if not torch.equal(rejection_sampler.expand_batch_to_tokens(values, ends, 3), repeat_for_tokens(values, ends, 3)):
        rejection_sampler.expand_batch_to_tokens = repeat_for_tokens
    constrain = rejection_sampler.apply_sampling_constraints
    if not getattr(constrain, "is_msd", False):
        rejection_sampler.apply_sampling_constraints = unless_empty(constrain)


def unless_empty(constrain: Any) -> Any:
    """``constrain``, vLLM's temperature, top-p and top-k, only for logits [N, V] with rows."""

    @functools.wraps(constrain)
    def constrained(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return constrain(logits, *args, **kwargs) if len(logits) else logits

    constrained.is_msd = True  # type: ignore[attr-defined]
    return constrained


def repeat_for_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """The value of each request for each of its drafted tokens, [B] → [N]; the arguments are vLLM's.

    Args:
        cu_num_tokens: [B] tokens of a request and of those before it.
        num_tokens: N.
        replace_from, replace_to: a value that is replaced, and by what.

    >>> repeat_for_tokens(torch.tensor([0.0, 0.5]), torch.tensor([1, 3]), 3, replace_from=0, replace_to=1).tolist()
    [1.0, 0.5, 0.5]
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts, output_size=num_tokens)

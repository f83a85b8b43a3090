"""Plain positions for MSD drafts in vLLM's V1 runner.

MSD's drafts count 0, 1, 2, ... also where the target (Qwen2-VL) has M-RoPE positions. vLLM's V2 runner gives a draft
plain positions. The V1 runner gives a draft without M-RoPE the target's first row of them, where all tokens of a
picture have one number, and computes from it the cache slots of the steps after the first. So for a target with M-RoPE
and an MSD draft the positions are computed here, from the lengths of the sequences. Nothing changes for other drafts.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from msd_vllm import untested

NEEDED = {"target_positions", "common_attn_metadata"}
"""Arguments of vLLM's `propose` that are used here."""


def use_plain_positions(draft_class: type) -> None:
    """Wraps the proposer of the V1 runner, once in a process.

    Args:
        draft_class: drafts of this class get plain positions.

    Raises:
        RuntimeError: this vLLM's proposer is not the one that this was written for.
    """
    try:
        from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    except ImportError as error:
        raise unknown_proposer(str(error)) from error
    propose = SpecDecodeBaseProposer.propose
    if getattr(propose, "is_msd", False):
        return
    signature = inspect.signature(propose)
    if missing := NEEDED - signature.parameters.keys():
        raise unknown_proposer(f"propose does not take {', '.join(sorted(missing))}")

    @functools.wraps(propose)
    def with_plain_positions(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.model, draft_class) or not self.vllm_config.model_config.uses_mrope:
            return propose(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        metadata = given.arguments["common_attn_metadata"]
        count = given.arguments["target_positions"].shape[-1]
        positions = plain_positions(metadata.query_start_loc, metadata.seq_lens, count)
        given.arguments["target_positions"] = positions.expand(3, -1)  # the proposer takes the first row
        return propose(*given.args, **given.kwargs)

    with_plain_positions.is_msd = True  # type: ignore[attr-defined]
    SpecDecodeBaseProposer.propose = with_plain_positions


def plain_positions(query_start: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Positions [count] of the tokens of a batch whose sequences lie one behind the other.

    Args:
        query_start: [B + 1] where the tokens of each sequence begin.
        lengths: [B] of each sequence, these tokens included.

    >>> plain_positions(torch.tensor([0, 3, 4]), torch.tensor([3, 10]), 4).tolist()
    [0, 1, 2, 9]
    """
    tokens = torch.arange(count, dtype=query_start.dtype, device=query_start.device)
    sequence = torch.searchsorted(query_start[1:], tokens, right=True).clamp(max=len(lengths) - 1)
    return (lengths[sequence] - query_start[1:][sequence] + tokens).long()


def unknown_proposer(reason: str) -> RuntimeError:
    """One line for a vLLM whose V1 proposer is another one."""
    from vllm import __version__

    return RuntimeError(f"MSD drafts cannot be served: {untested(__version__)} ({reason})")

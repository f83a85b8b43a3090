"""The target's choice of a next token: arg-max or a sample of its processed distribution.

Processors are transformers' own, prepared by its `generate`, so temperature, top-k, top-p and all others mean exactly
what they mean there.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

# Processors that look at one row of logits alone. All others may look at the tokens before it.
ROW_WISE = tuple(
    getattr(hf, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "LogitNormalization",
        "InfNanRemoveLogitsProcessor",
    )
    if hasattr(hf, name)
)

ROW_SETTINGS = ("prompt_ignore_length",)  # settings of processors that have one value for each row of a batch


class TokenChooser:
    """Chooses next tokens from raw target logits.

    Args:
        processors: prepared logits processors.
        do_sample: sample, or take the arg-max of the processed scores.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool) -> None:
        self.processors, self.do_sample = processors, do_sample
        self.row_wise = all(type(processor) in ROW_WISE for processor in processors)

    def of_row(self, row: int, batch: int) -> TokenChooser:
        """The same choice for one sequence of a batch: what processors know of each row is cut to this one's."""
        if batch == 1 or self.row_wise:
            return self
        own = LogitsProcessorList(copy(processor) for processor in self.processors)
        for processor in own:
            for name, value in vars(processor).items():
                if name in ROW_SETTINGS and isinstance(value, Tensor) and value.shape[:1] == (batch,):
                    setattr(processor, name, value[row : row + 1])
        return TokenChooser(own, self.do_sample)

    def choose(self, logits: Tensor, prefix: Tensor, noise: Tensor | None = None) -> Tensor:
        """One token for each row.

        Args:
            logits: [N, V] raw.
            prefix: [N, S] or [1, S] ids before the choice; read only by processors that are not row-wise.
            noise: [N, V] Gumbel noise of the places of the tokens (`eagle.decode.noise`), where tokens are sampled.

        Returns:
            [N] ids.
        """
        if not self.do_sample and not self.processors:
            return logits.argmax(dim=-1)
        return self.pick(self.scores(logits, prefix), noise)

    def pick(self, scores: Tensor, noise: Tensor | None) -> Tensor:
        """The choice [..., N] from processed scores [N, V] with noise [..., N, V], or without where it is greedy."""
        if not self.do_sample:
            return scores.argmax(dim=-1)
        assert noise is not None
        return (scores + noise).argmax(dim=-1)

    def scores(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """Processed logits [N, V], float32, on the device of ``prefix``: processors hold tensors of their own there."""
        raw = logits.to(prefix.device, torch.float32, copy=True)
        scores: Tensor = self.processors(prefix.expand(raw.shape[0], -1), raw)
        return scores

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
        generator: random state of this request, on the device of the prompts; None uses the device's global one.
    """

    def __init__(
        self, processors: LogitsProcessorList, do_sample: bool, generator: torch.Generator | None = None
    ) -> None:
        self.processors, self.do_sample, self.generator = processors, do_sample, generator
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
        return TokenChooser(own, self.do_sample, self.generator)

    def choose(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """One token for each row.

        Args:
            logits: [N, V] raw.
            prefix: [N, S] or [1, S] ids before the choice; read only by processors that are not row-wise.

        Returns:
            [N] ids.
        """
        if not self.do_sample and not self.processors:
            return logits.argmax(dim=-1)
        scores = self.scores(logits, prefix)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator).squeeze(-1)

    def sample(self, logits: Tensor, prefix: Tensor, draws: int) -> Tensor:
        """What ``draws`` calls of `choose` would give for the same logits while sampling, [draws, N] ids."""
        shares = self.scores(logits, prefix).softmax(dim=-1)
        return torch.multinomial(shares, draws, replacement=True, generator=self.generator).T

    def scores(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """Processed logits [N, V], float32, on the device of ``prefix``: processors hold tensors of their own there."""
        raw = logits.to(prefix.device, torch.float32, copy=True)
        scores: Tensor = self.processors(prefix.expand(raw.shape[0], -1), raw)
        return scores

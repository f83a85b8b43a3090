"""How the target chooses its next token: arg-max, or a sample of its processed distribution.

Logits processors are transformers' own, prepared by its `generate`. Temperature, top-k, top-p and all other settings
mean exactly what they mean there.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from llava.arguments import is_greedy
from llava.arguments import temperature as check_temperature
from llava.errors import UserError

BEST = 1024
"""Tokens of a row that top-p looks at first."""


@dataclass(frozen=True)
class SamplingSettings:
    """How a command, a page or a task wants answers to be sampled. Only this class says what special values mean.

    Attributes:
        temperature: 0 is greedy decoding; all other settings are then ignored.
        top_p: 0 is the best token alone; None is no limit.
        top_k: None or 0 is no limit. The limits of the checkpoint's generation config are not used either.
        seed: makes sampling repeatable; one for all sequences or one for each.

    Raises:
        UserError: the temperature is negative, not finite, or too close to 0.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: float | None = None
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}", fix="give a number from 0 (the best token alone) to 1 (no limit)")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k {self.top_k}", fix="give a whole number; 0 means no limit")

    @property
    def greedy(self) -> bool:
        return is_greedy(self.temperature)

    @property
    def limits(self) -> dict[str, Any]:
        """``top_p`` and ``top_k`` as `MSDModel.generate` takes them."""
        return {"top_p": 1.0 if self.top_p is None else self.top_p, "top_k": int(self.top_k or 0)}

    def for_engine(self) -> dict[str, Any]:
        """Keyword arguments of `MSDModel.generate`."""
        if self.greedy:
            return {"temperature": 0.0}
        return {"temperature": self.temperature, **self.limits, "seed": self.seed}


class NucleusWarper(hf.TopPLogitsWarper):
    """transformers' top-p. On a CPU it sorts only the `BEST` tokens of a row if these hold the mass; on an accelerator
    the host would have to wait to know that."""

    def __init__(self, given: hf.TopPLogitsWarper) -> None:
        super().__init__(given.top_p, given.filter_value, given.min_tokens_to_keep)

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        if scores.device.type == "cpu" and scores.shape[-1] > 4 * BEST:
            best, ids = scores.topk(BEST, dim=-1)  # [N, BEST]
            shares = (best - scores.logsumexp(dim=-1, keepdim=True)).exp()
            kept = shares.cumsum(dim=-1) - shares < self.top_p  # the better tokens do not hold the mass yet
            kept[:, : self.min_tokens_to_keep] = True
            limited = best.masked_fill(~kept, self.filter_value)
            limited = torch.full_like(scores, self.filter_value).scatter(-1, ids, limited)
            if (flat := kept[:, -1]).any():
                limited[flat] = super().__call__(input_ids, scores[flat])
            return limited
        return super().__call__(input_ids, scores)


# Processors that read one row of logits only. All others may read the tokens before it.
ROW_WISE = (
    NucleusWarper,
    *(
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
    ),
)


def is_order_free(processor: Any) -> bool:
    """Whether a processor reads the tokens before as a set, so that repeating one of them changes nothing."""
    ignored = getattr(processor, "prompt_ignore_length", None)  # a tensor has one for each row
    return type(processor) is hf.RepetitionPenaltyLogitsProcessor and not isinstance(ignored, Tensor)


COUNTS_FROM_THE_PROMPT = (
    "prompt_length_to_skip", "begin_index", "regulation_start", "max_length", "prompt_ignore_length",
)  # fmt: skip
"""Attributes of processors that count positions from the start of the padded prompt."""


def processor_of(processor: Any, index: int, batch: int, prompt: Tensor, padding: int) -> Any:
    """A processor of a batch for one of its sequences, as it would be for the sequence alone.

    Args:
        prompt: [1, S] the sequence's prompt without padding.
        padding: tokens that were added to it.
    """
    own = copy(processor)
    for name in COUNTS_FROM_THE_PROMPT:
        value = getattr(own, name, None)
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
            value = value[index : index + 1]
        if value is not None and not isinstance(value, bool):
            setattr(own, name, value - padding)
    if isinstance(own, hf.EncoderRepetitionPenaltyLogitsProcessor):
        own.encoder_input_ids = prompt
    elif isinstance(own, hf.EncoderNoRepeatNGramLogitsProcessor):
        own = hf.EncoderNoRepeatNGramLogitsProcessor(own.ngram_size, prompt)
    elif isinstance(own, hf.PrefixConstrainedLogitsProcessor):
        allowed = own._prefix_allowed_tokens_fn
        own._prefix_allowed_tokens_fn = lambda _, ids: allowed(index, ids)
    return own


class Sampler:
    """Samples next tokens from raw target logits.

    ``row_wise``: all processors read one row of logits only. ``order_free``: they may also read which tokens come
    before, but not in which order or how many.

    Args:
        processors: prepared logits processors.
        do_sample: sample, or take the arg-max of the processed scores.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool) -> None:
        chosen = [NucleusWarper(each) if type(each) is hf.TopPLogitsWarper else each for each in processors]
        self.processors, self.do_sample = LogitsProcessorList(chosen), do_sample
        self.row_wise = all(type(processor) in ROW_WISE for processor in processors)
        self.order_free = all(type(processor) in ROW_WISE or is_order_free(processor) for processor in processors)

    def for_sequence(self, index: int, batch: int, prompt: Tensor, padding: int) -> Sampler:
        """The sampler of one sequence of a batch (`processor_of`). ``prompt``: [1, S], without its ``padding``."""
        if batch == 1 or self.row_wise:
            return self
        processors = [processor_of(each, index, batch, prompt, padding) for each in self.processors]
        # `generate` of older releases turns min_new_tokens into a min_length with the padded prompt
        least = {each.prompt_length_to_skip + each.min_new_tokens for each in self.processors
                 if isinstance(each, hf.MinNewTokensLengthLogitsProcessor)}  # fmt: skip
        for each in processors:
            if isinstance(each, hf.MinLengthLogitsProcessor) and each.min_length in least:
                each.min_length -= padding
        return Sampler(LogitsProcessorList(processors), self.do_sample)

    def sample(self, logits: Tensor, prefix: Tensor, noise: Tensor | None = None) -> Tensor:
        """One token for each row.

        Args:
            logits: [N, V] raw.
            prefix: [N, S] or [1, S] ids before the choice. Read only by processors that are not row-wise.
            noise: [N, V] Gumbel noise for the positions of the tokens (`eagle.decode.noise`), if tokens are sampled.

        Returns:
            [N] ids.
        """
        if not self.do_sample and not self.processors:
            return logits.argmax(dim=-1)
        return self.select(self.scores(logits, prefix), noise)

    def select(self, scores: Tensor, noise: Tensor | None) -> Tensor:
        """Ids [..., N] from processed scores [N, V], with noise [..., N, V] if tokens are sampled."""
        if not self.do_sample:
            return scores.argmax(dim=-1)
        assert noise is not None
        return (scores + noise).argmax(dim=-1)

    def scores(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """Processed logits [N, V], float32, on the device of ``prefix``, where the processors' own tensors are.

        Raises:
            UserError: a length penalty overflows.
        """
        raw = logits.to(prefix.device, torch.float32, copy=True)
        try:
            scores: Tensor = self.processors(prefix.expand(raw.shape[0], -1), raw)
        except OverflowError as error:  # the power of a Python number
            if not any(isinstance(each, hf.ExponentialDecayLengthPenalty) for each in self.processors):
                raise
            raise UserError("exponential_decay_length_penalty overflows", fix="give a smaller factor") from error
        return scores

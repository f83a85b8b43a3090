"""One sequence of a request: its prompt and what has been decoded so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eagle.decode.noise import Noise
from eagle.decode.sampling import TokenChooser


@dataclass
class Sequence:
    """State of one sequence.

    ``prompt`` [1, S] ids without padding; ``context`` [1, P] the same filled up on the left to the padded length, for
    logits processors and stopping criteria, which count positions from there; ``chooser`` the target's choice of its
    tokens, ``noise`` its chance; ``tokens`` the new ones; ``next_position`` [1] position number of the newest token;
    ``certain`` accepted rows that the draft has not read yet, hidden [n, H] and tokens [n].
    """

    prompt: Tensor
    context: Tensor
    chooser: TokenChooser
    noise: Noise
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    next_position: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    certain: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Prompt tokens."""
        return self.prompt.shape[1]

    def add_certain(self, hidden: Tensor, tokens: Tensor) -> None:
        """Rows for the draft to read, after those that it has not read yet."""
        if self.certain is not None:
            hidden, tokens = torch.cat([self.certain[0], hidden]), torch.cat([self.certain[1], tokens])
        self.certain = hidden, tokens

    def choice_in(self, logits: Tensor) -> Callable[[int, list[int]], int]:
        """The target's choice at a node after the tokens that lead to it. ``logits`` [N, V]."""

        def choose(node: int, added: list[int]) -> int:
            new = torch.tensor([self.tokens + added], device=self.context.device)
            noise = self.noise_ahead(1, logits.shape[-1], len(added))
            return int(self.chooser.choose(logits[node : node + 1], torch.cat([self.context, new], dim=1), noise))

        return choose

    def noise_ahead(self, count: int, vocabulary: int, after: int = 0) -> Tensor | None:
        """[count, V] for the places that follow the newest token and ``after`` others; None where nothing is
        sampled."""
        if not self.chooser.do_sample:
            return None
        return self.noise.rows(len(self.tokens) + after, count, vocabulary)


def sequences_of(
    input_ids: Tensor, attention_mask: Tensor | None, chooser: TokenChooser, seeds: Iterable[int] | None = None
) -> list[Sequence]:
    """The sequences of a batch, padded on either side. ``input_ids``, ``attention_mask`` [B, P]; ``seeds`` of each;
    without them all draw from the device's global random state.

    The filling of ``context`` repeats the prompt's first token, which is in the prompt anyway: a pad token is often an
    end token too, and a repetition penalty would make that less likely.
    """
    sequences, batch = [], input_ids.shape[0]
    for row, seed in enumerate([None] * batch if seeds is None else seeds):
        own = input_ids[row : row + 1]
        prompt = own if attention_mask is None else own[:, attention_mask[row].bool()]
        filling = prompt[:, :1].expand(-1, own.shape[1] - prompt.shape[1])
        generator = None if seed is None else torch.Generator(device=own.device).manual_seed(seed)
        context = torch.cat([filling, prompt], dim=1)
        sequences.append(Sequence(prompt, context, chooser.of_row(row, batch), Noise(generator, own.device)))
    return sequences

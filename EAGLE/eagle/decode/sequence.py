"""One sequence of a request: its prompt and what has been decoded so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from eagle.decode.noise import Noise
from eagle.decode.sampling import Sampler
from eagle.decode.tree import DraftTree


class Pending(NamedTuple):
    """Accepted rows that the draft has not read yet: ``hidden`` [n, F] the target's features, ``tokens`` [n] the token
    that follows each of them."""

    hidden: Tensor
    tokens: Tensor


@dataclass
class Sequence:
    """State of one sequence.

    Attributes:
        prompt: [1, S] ids without padding.
        context: [1, P] the same, padded on the left to the batch's length, from where stopping criteria count.
            Logits processors see ``prompt``, so that a sequence's answer is the one it has alone.
        sampler: chooses this sequence's tokens.
        noise: randomness of this sequence.
        tokens: new tokens.
        finished: the answer has ended.
        next_position: [1] position id of the newest token.
        pending_hidden: rows for the draft to read before it drafts again.
    """

    prompt: Tensor
    context: Tensor
    sampler: Sampler
    noise: Noise
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    next_position: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    pending_hidden: Pending | None = None

    @property
    def length(self) -> int:
        """Prompt tokens."""
        return self.prompt.shape[1]

    def add_pending(self, hidden: Tensor, tokens: Tensor) -> None:
        """Appends rows [n, F] and tokens [n] for the draft to read."""
        if self.pending_hidden is not None:
            hidden = torch.cat([self.pending_hidden.hidden, hidden])
            tokens = torch.cat([self.pending_hidden.tokens, tokens])
        self.pending_hidden = Pending(hidden, tokens)

    def take_pending(self) -> Pending | None:
        """The pending rows, which are then no longer pending."""
        pending, self.pending_hidden = self.pending_hidden, None
        return pending

    def sample_at(self, logits: Tensor) -> Callable[[int, list[int]], int]:
        """A function of (node, tokens that lead to it) that samples the target's next token. ``logits`` [N, V]."""

        def sample(node: int, added: list[int]) -> int:
            new = torch.tensor([self.tokens + added], device=self.context.device)
            noise = self.noise_ahead(1, logits.shape[-1], len(added))
            return int(self.sampler.sample(logits[node : node + 1], torch.cat([self.prompt, new], dim=1), noise))

        return sample

    def prefixes(self, tree: DraftTree) -> Tensor:
        """For each node of a tree the tokens up to it, [N, L] ids; in place of nodes that are not on its path, the
        root's again, so only for processors that read them as a set."""
        new = torch.tensor([self.tokens], device=self.prompt.device)
        known = torch.cat([self.prompt, new], dim=1)  # [1, P]
        path = torch.where(tree.mask, tree.tokens, tree.tokens[0])  # [N, N]
        return torch.cat([known.expand(tree.size, -1), path.to(known.device)], dim=1)

    def noise_ahead(self, count: int, vocabulary: int, after: int = 0) -> Tensor | None:
        """[count, V] noise for the positions after the newest token and ``after`` others. None for greedy decoding."""
        if not self.sampler.do_sample:
            return None
        return self.noise.rows(len(self.tokens) + after, count, vocabulary)


def sequences_of(
    input_ids: Tensor, attention_mask: Tensor | None, sampler: Sampler, seeds: Iterable[int] | None = None
) -> list[Sequence]:
    """The sequences of a batch that is padded on either side.

    The padding of ``context`` repeats the prompt's first token, because a pad token is often an end token too.

    Args:
        input_ids, attention_mask: [B, P].
        seeds: one for each sequence. Without them all draw from the device's global random state.
    """
    sequences, batch = [], input_ids.shape[0]
    for index, seed in enumerate([None] * batch if seeds is None else seeds):
        padded = input_ids[index : index + 1]
        prompt = padded if attention_mask is None else padded[:, attention_mask[index].bool()]
        padding = prompt[:, :1].expand(-1, padded.shape[1] - prompt.shape[1])
        generator = None if seed is None else torch.Generator(device=padded.device).manual_seed(seed)
        context = torch.cat([padding, prompt], dim=1)
        own = sampler.for_sequence(index, batch, prompt, padding.shape[1])
        sequences.append(Sequence(prompt, context, own, Noise(generator, padded.device)))
    return sequences

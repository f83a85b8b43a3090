"""The decode loop: draft → verify → accept → commit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagle.model.accept import Accepted, accept_all_at_once, accept_step_by_step
from eagle.model.config import TreeConfig
from eagle.model.draft import DraftModel
from eagle.model.drafter import Drafter
from eagle.model.masks import MaskBuffer
from eagle.model.sampling import TokenChooser
from eagle.model.stats import Stats
from eagle.model.stopping import Stopper
from eagle.model.targets.base import Target
from eagle.model.tree import DraftTree, root_only, select_nodes


class Decoder:
    """One request. Without a draft it decodes plainly: every tree is its root, and all else is the same.

    Args:
        inputs: the prompt as `Target.prefill` takes it, batch of one.
        chooser, stopper: the target's choice of a token, and the end of the answer.
        tree: bounds of each draft tree.
        streamer: a transformers streamer; gets the prompt, then the new tokens as they are certain.
    """

    def __init__(
        self,
        target: Target,
        draft: DraftModel | None,
        inputs: dict[str, Any],
        chooser: TokenChooser,
        stopper: Stopper,
        tree: TreeConfig,
        streamer: Any = None,
    ) -> None:
        self.target, self.inputs, self.chooser, self.stopper, self.streamer = target, inputs, chooser, stopper, streamer
        self.tree = tree if draft is not None else TreeConfig(depth=0, top_k=1, total_tokens=1)
        self.prompt: Tensor = inputs["input_ids"]  # [1, S]
        length = self.prompt.shape[1] + stopper.max_new_tokens
        rows = length + self.tree.total_tokens
        self.cache = target.new_cache(1, rows)
        self.masks = MaskBuffer(self.tree.total_tokens, rows, target.dtype, target.device)
        self.drafter = None if draft is None else Drafter(draft, target.head, length, self.tree)
        self.certain: tuple[Tensor, Tensor] | None = None  # accepted rows the draft has not read yet
        self.stats = Stats()
        self.tokens: list[int] = []
        self.finished = False

    def run(self) -> list[int]:
        """Decodes to the end; returns the new tokens."""
        with self.stats.phase("prefill"):
            self._prefill()
        while not self.finished:
            tree = self._draft()
            with self.stats.phase("verify"):
                hidden, logits = self._verify(tree)
            with self.stats.phase("accept"):
                accepted = self._accept(tree, logits)
            with self.stats.phase("commit"):
                self._commit(accepted, hidden)
        if self.streamer is not None:
            self.streamer.end()
        return self.tokens

    def _prefill(self) -> None:
        """Target and draft read the prompt; the target chooses the first token."""
        prefill = self.target.prefill(self.inputs, self.cache)
        first = self.chooser.choose(self.target.head(prefill.hidden[:, -1]), self.prompt)  # [1]
        self.next_position = prefill.next_position.unsqueeze(-1)  # [1, 1] of the newest token
        self._emit([int(first)])
        if self.drafter is not None and not self.finished:
            self.drafter.start(prefill, self.prompt, first.to(self.prompt.device))

    def _draft(self) -> DraftTree:
        """The tree below the newest token, no deeper than the tokens that are still wanted."""
        root = torch.tensor(self.tokens[-1:], device=self.target.device)
        bounds = self.tree.shortened(self.stopper.max_new_tokens - len(self.tokens))
        if self.drafter is None or bounds.total_tokens == 1:
            return root_only(root)
        with self.stats.phase("draft"):
            if self.certain is not None:
                self.drafter.extend(*self.certain)
            candidates = self.drafter.expand(bounds)
        with self.stats.phase("tree"):
            return select_nodes(candidates, root.to(candidates.tokens.device), bounds.total_tokens, bounds.depth + 1)

    def _verify(self, tree: DraftTree) -> tuple[Tensor, Tensor]:
        """The target's hidden states [1, N, H] and logits [N, V] at every node, in one forward."""
        self.past = self.cache.length
        tokens, depths, block = (t.to(self.target.device) for t in (tree.tokens, tree.depths, tree.mask))
        mask = self.masks.window(self.past, block) if tree.size > 1 else None
        hidden = self.target.verify(tokens.unsqueeze(0), self.next_position + depths, mask, self.cache)
        return hidden, self.target.head(hidden[0])

    def _accept(self, tree: DraftTree, logits: Tensor) -> Accepted:
        """The drafted path that the target agrees with, and its bonus token."""
        if self.chooser.row_wise:
            chosen = self.chooser.choose(logits, self.prompt)  # [N]
            return accept_all_at_once(tree, chosen.to(tree.tokens.device))

        def choose(node: int, added: list[int]) -> int:
            prefix = torch.tensor([self.tokens + added], device=self.prompt.device)
            return int(self.chooser.choose(logits[node : node + 1], torch.cat([self.prompt, prefix], dim=1)))

        return accept_step_by_step(tree, choose)

    def _commit(self, accepted: Accepted, hidden: Tensor) -> None:
        """Keeps the accepted rows, emits the new tokens and lays out the true hidden states for the draft."""
        self.stats.cycles += 1
        self.stats.accept_lengths.append(len(accepted.path) - 1)
        self.stats.tree_sizes.append(hidden.shape[1])
        self.cache.keep(self.past, accepted.path)
        self.next_position = self.next_position + len(accepted.tokens)
        self._emit(accepted.tokens)
        rows = hidden[:, torch.tensor(accepted.path, device=hidden.device)]  # [1, n, H]
        self.certain = (rows, torch.tensor(accepted.tokens))

    def _emit(self, added: list[int]) -> None:
        kept, self.finished = self.stopper.cut(self.tokens, added)
        self.tokens += kept
        self.stats.new_tokens = len(self.tokens)
        if self.streamer is not None:
            for token in kept:
                self.streamer.put(torch.tensor([token]))

"""The decode loop: draft → verify → accept → commit, for one sequence or a batch.

Each sequence of a batch drafts its own tree, accepts its own number of tokens and ends on its own; the batch then goes
on without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eagle.decode.accept import Accepted, accept_all_at_once, accept_step_by_step
from eagle.decode.adaptive.planner import Floats, Planner
from eagle.decode.compiled.engine import StaticDrafter, StaticEngine
from eagle.decode.compiled.static_cache import StaticCache
from eagle.decode.drafter import Drafter
from eagle.decode.masks import MaskBuffer
from eagle.decode.sampling import TokenChooser
from eagle.decode.sequence import Sequence, sequences_of
from eagle.decode.stats import Stats
from eagle.decode.stopping import Stopper
from eagle.decode.tree import DraftTree, best_part, root_only, select_nodes
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.compression import Compression
from eagle.drafts.msd import DraftModel
from eagle.families.base import Target
from llava.errors import OutOfMemory, UserError
from llava.memory import is_out_of_memory

NO_CHOICE = -1
"""The choice at a node where the target's output is not a number: no token, so nothing is accepted below it."""
OUT_OF_MEMORY = "ask for fewer new tokens, or take a shorter prompt, a smaller batch or --dtype bfloat16"


class Decoder:
    """One request. Without a draft it decodes plainly: every tree is its root, and all else is the same.

    Args:
        inputs: the prompts as `Target.prefill` takes them, padded on either side where they differ in length.
        chooser, stopper: the target's choice of a token, and the end of an answer.
        tree: bounds of each draft tree.
        compression: of image rows in the draft; None is as the draft's config says.
        static: compiled parts of these models, used for a single sequence.
        planner: chooses depth and size within the bounds, for a single sequence; None takes the bounds.
        streamer: a transformers streamer; gets the new tokens as they are certain. For a single sequence. One with a
            method ``put_cycle(tokens, accepted)`` gets those of a cycle together, the first ``accepted`` of which were
            drafted; the prefill's token comes so too.
        wait: waits for the device, for exact times of the phases (`Stats`).
        seeds: of each sequence's chance; None draws from the device's global random state.
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
        planner: Planner | None = None,
        compression: Compression | None = None,
        static: StaticEngine | None = None,
        wait: Callable[[], None] | None = None,
        seeds: Iterable[int] | None = None,
    ) -> None:
        self.planner = planner
        self.target, self.inputs, self.chooser, self.stopper, self.streamer = target, inputs, chooser, stopper, streamer
        self.tree = tree if draft is not None else TreeConfig(depth=0, top_k=1, total_tokens=1)
        self.sequences = sequences_of(inputs["input_ids"], inputs.get("attention_mask"), chooser, seeds)
        self.active = list(self.sequences)
        batch, length = len(self.active), max(sequence.length for sequence in self.active) + stopper.max_new_tokens
        rows = length + self.tree.total_tokens
        self.static = static if batch == 1 else None
        self.cache = self.static.target_caches.take(rows) if self.static else target.new_cache(batch, rows)
        self.masks = MaskBuffer(self.tree.total_tokens, rows, target.dtype, target.device)
        self.scores: Floats = np.zeros(1)  # of the nodes of the newest tree, for the planner
        self.drafter: Drafter | None = None
        if draft is not None and self.static is not None:
            self.drafter = StaticDrafter(self.static, draft, length, self.tree, compression)
        elif draft is not None:
            self.drafter = Drafter(draft, target.head, length, self.tree, batch, compression)
        self.stats = Stats(requests=batch, wait=wait)

    def run(self) -> list[list[int]]:
        """Decodes to the end; returns the new tokens of each sequence."""
        try:
            return self._run()
        finally:
            if self.static is not None:  # also after Ctrl-C: graphs are bound to these caches
                self.static.release(self.cache, self.drafter)

    def _run(self) -> list[list[int]]:
        with self.stats.phase("prefill"):
            self.prefill()
        start = time.perf_counter()
        self._drop_finished()
        while self.active:
            trees = self.draft()
            with self.stats.phase("verify"):
                trees, hidden, logits = self.verify_within_memory(trees)
            with self.stats.phase("accept"):
                accepted = self.accept(trees, hidden, logits)
            with self.stats.phase("commit"):
                self.commit(trees, accepted, hidden)
            self._drop_finished()
        self.stats.loop = time.perf_counter() - start
        if self.streamer is not None:
            self.streamer.end()
        return [sequence.tokens for sequence in self.sequences]

    def prefill(self) -> None:
        """Target and draft read each prompt; the target chooses its first token."""
        for row, prefill in enumerate(self.target.prefill_each(self.inputs, self.cache)):
            sequence = self.sequences[row]
            logits = self.target.head(prefill.hidden[:, -1])  # [1, V]
            check_numbers(logits)
            noise = sequence.noise_ahead(1, logits.shape[-1])
            first = sequence.chooser.choose(logits, sequence.context, noise)  # [1]
            sequence.next_position = prefill.next_position
            self._emit(sequence, [int(first)])
            self.first_token_at = time.perf_counter()
            if self.drafter is not None and not sequence.finished:
                self.drafter.start(row, prefill, sequence.prompt, first.to(sequence.prompt.device))

    def draft(self) -> list[DraftTree]:
        """The tree below each newest token, no deeper than the tokens that are still wanted."""
        roots = torch.tensor([[s.tokens[-1]] for s in self.active], device=self.target.device)  # [B, 1]
        bounds = [self.tree.shortened(self.stopper.max_new_tokens - len(s.tokens)) for s in self.active]
        deepest = max(bounds, key=lambda tree: tree.depth)
        if self.drafter is None or max(tree.total_tokens for tree in bounds) == 1 or not self._pays():
            self.scores = np.zeros(1)
            return [root_only(root) for root in roots]
        with self.stats.phase("draft"):
            if self.active[0].certain is not None:
                rows, tokens = zip(*(s.certain for s in self.active if s.certain is not None), strict=True)
                self.drafter.extend(rows, tokens)
                for sequence in self.active:
                    sequence.certain = None
            candidates = self.drafter.expand(deepest, None if self.planner is None else self._deeper)
        with self.stats.phase("tree"):
            device = candidates.tokens.device
            sizes = [tree.total_tokens for tree in bounds]
            if self.planner is not None:
                scores = on_host(candidates.scores[0])
                sizes = [min(sizes[0], self.planner.size(scores))]
                self.scores = scores_of_tree(scores, sizes[0])
            return [
                select_nodes(candidates.of(row), root.to(device), size, deepest.depth + 1)
                for row, (root, size) in enumerate(zip(roots, sizes, strict=True))
            ]

    def _pays(self) -> bool:
        return self.planner is None or self.planner.drafts()

    def _deeper(self, scores: Tensor) -> bool:
        return self.planner is None or self.planner.deeper(on_host(scores[0]))

    def verify_within_memory(self, trees: list[DraftTree]) -> tuple[list[DraftTree], Tensor, Tensor]:
        """`verify`; where memory does not suffice, of the better half of each tree, and so on down to the root. Later
        trees of the request are no larger. Gives the trees that were verified, too.

        Raises:
            OutOfMemory: it does not suffice for one token.
        """
        while True:
            try:
                hidden, logits = self.verify(trees)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            size = max(tree.size for tree in trees) // 2  # after the handler, which held the failed forward's tensors
            if size == 0:
                raise OutOfMemory("out of memory with a single token", str(self.target.device), OUT_OF_MEMORY)
            self.cache.truncate(self.past)
            self.tree = replace(self.tree, total_tokens=size)
            self.stats.cut_trees += 1
            trees = [best_part(tree, size) if tree.size > size else tree for tree in trees]
            self.scores = on_host(trees[0].scores)
        return trees, hidden, logits

    def verify(self, trees: list[DraftTree]) -> tuple[Tensor, Tensor]:
        """The target's hidden states [B, N, H] and logits [B, N, V] at every node, in one forward. A tree smaller than
        the largest is filled up with rows that nothing looks at."""
        self.past = self.cache.lengths
        tokens, depths, blocks = (part.to(self.target.device) for part in join_trees(trees))
        positions = torch.stack([s.next_position for s in self.active]).to(depths.device) + depths
        if self.static is not None and isinstance(self.cache, StaticCache):
            mask = self.masks.window(self.past, blocks)
            return self.static.verify(tokens, positions, mask, self.cache, self.tree.total_tokens)
        closed = self.masks.window(self.past, blocks) if tokens.numel() > 1 else None
        hidden = self.target.verify(tokens, positions, closed, self.cache)
        return hidden, self.target.head(hidden)

    def accept(self, trees: list[DraftTree], hidden: Tensor, logits: Tensor) -> list[Accepted]:
        """For each sequence the drafted path that the target agrees with, and its bonus token.

        Raises:
            UserError: the target's output there is not a number.
        """
        if self.chooser.row_wise:
            broken = hidden.isnan().any(dim=-1)  # [B, N]; told with the choices, so that nothing waits for it alone
            noise = self._noise(trees, logits.shape[-1])
            chosen = self.chooser.choose(logits.flatten(0, 1), self.active[0].context, noise)  # [B * N]
            rows = chosen.view(logits.shape[:2]).to(trees[0].tokens.device)
            rows = rows.masked_fill(broken.to(rows.device), NO_CHOICE)
            found = accept_all_at_once(trees, [row[: tree.size] for tree, row in zip(trees, rows, strict=True)])
            if any(each.tokens[-1] == NO_CHOICE for each in found):
                raise not_a_number()
            return found
        check_numbers(hidden)
        return [
            accept_step_by_step(tree, sequence.choice_in(rows))
            for tree, sequence, rows in zip(trees, self.active, logits, strict=True)
        ]

    def _noise(self, trees: list[DraftTree], vocabulary: int) -> Tensor | None:
        """[B * N, V] for the token that follows each node; None where nothing is sampled."""
        if not self.chooser.do_sample:
            return None
        rows = []
        for sequence, tree in zip(self.active, trees, strict=True):
            ahead = sequence.noise_ahead(self.tree.depth + 2, vocabulary)  # [D, V]
            assert ahead is not None
            rows.append(ahead[tree.depths.to(ahead.device)])  # [n, V]
        return pad_sequence(rows, batch_first=True).flatten(0, 1)

    def commit(self, trees: list[DraftTree], accepted: list[Accepted], hidden: Tensor) -> None:
        """Keeps the accepted rows, emits the new tokens and lays out the true hidden states for the draft."""
        self.cache.keep(self.past, [each.path for each in accepted])
        if self.planner is not None:
            self.planner.learn(self.scores, accepted[0].path, len(accepted[0].tokens))
        for sequence, each, rows in zip(self.active, accepted, hidden, strict=True):
            self.stats.record_cycle(len(each.path) - 1, hidden.shape[1])
            sequence.next_position = sequence.next_position + len(each.tokens)
            if self.drafter is not None:
                sequence.add_certain(rows[torch.tensor(each.path, device=rows.device)], torch.tensor(each.tokens))
            self._emit(sequence, each.tokens)

    def _emit(self, sequence: Sequence, added: list[int]) -> None:
        kept, sequence.finished = self.stopper.cut(sequence.context, sequence.tokens, added)
        sequence.tokens += kept
        self.stats.new_tokens += len(kept)
        if self.streamer is None:
            return
        if hasattr(self.streamer, "put_cycle"):
            self.streamer.put_cycle(kept, len(added) - 1)
            return
        for token in kept:
            self.streamer.put(torch.tensor([token]))

    def _drop_finished(self) -> None:
        """Goes on without the sequences that have ended."""
        rows = [row for row, sequence in enumerate(self.active) if not sequence.finished]
        if len(rows) == len(self.active):
            return
        self.active = [self.active[row] for row in rows]
        if rows:
            self.cache = self.cache.select(rows)
            if self.drafter is not None:
                self.drafter.select(rows)


def check_numbers(values: Tensor) -> None:
    """Raises `UserError` where the target gives NaN: every later token would be one and the same."""
    if bool(values.isnan().any()):
        raise not_a_number()


def not_a_number() -> UserError:
    """What is said of a target that gives NaN."""
    return UserError(
        "the base model's output is not a number",
        fix="its weights are damaged, or --dtype float16 overflows: try bfloat16 or float32",
    )


def on_host(scores: Tensor) -> Floats:
    """[N] as the planner takes them."""
    return scores.cpu().double().numpy()  # widened here: not every accelerator has 64 bit


def scores_of_tree(scores: Floats, size: int) -> Floats:
    """The scores of the ``size`` nodes that `select_nodes` takes of candidates with these ``scores``, root first,
    without asking the device again."""
    order = np.argsort(-scores, kind="stable")[: size - 1]
    return np.concatenate([[0.0], scores[np.sort(order)]])


def join_trees(trees: list[DraftTree]) -> tuple[Tensor, Tensor, Tensor]:
    """``tokens`` and ``depths`` [B, N], ``mask`` [B, N, N]; a filling row has depth 0 and sees nothing of its tree."""
    if len(trees) == 1:
        return trees[0].tokens[None], trees[0].depths[None], trees[0].mask[None]
    tokens = pad_sequence([tree.tokens for tree in trees], batch_first=True)
    depths = pad_sequence([tree.depths for tree in trees], batch_first=True)
    masks = tokens.new_zeros(*tokens.shape, tokens.shape[1], dtype=torch.bool)
    for row, tree in enumerate(trees):
        masks[row, : tree.size, : tree.size] = tree.mask
    return tokens, depths, masks

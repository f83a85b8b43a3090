"""The decode loop: draft → verify → accept → commit, for one sequence or a batch.

Each sequence of a batch drafts its own tree, accepts its own number of tokens and ends on its own. The batch continues
without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eagle.attention import TwoParts
from eagle.decode.accept import NO_TOKEN, Accepted, accept_all_at_once, accept_step_by_step
from eagle.decode.adaptive.guard import Guard, Pace, Work
from eagle.decode.adaptive.planner import Floats, Planner
from eagle.decode.block import drafter_of
from eagle.decode.compiled.cycle import CycleRun
from eagle.decode.compiled.engine import StaticBlockDrafter, StaticDrafter, StaticEngine
from eagle.decode.compiled.static_cache import StaticCache
from eagle.decode.drafter import Drafter
from eagle.decode.masks import MaskBuffer
from eagle.decode.sampling import Sampler
from eagle.decode.sequence import Sequence, sequences_of
from eagle.decode.stats import Stats
from eagle.decode.stopping import Stopper
from eagle.decode.tree import DraftTree, prune, root_only, select_nodes
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.block import BlockDraft
from eagle.drafts.compression import Compression
from eagle.drafts.head import DraftHead
from eagle.families.base import LayerMasks, Target
from eagle.kv_cache import KVCache
from llava.errors import OutOfMemory, UserError
from llava.memory import within_memory

NEW_TOKENS = 2048
"""New tokens that there is room for at the start. Limits may be far larger than answers are."""
TIE_STEPS = 2
"""Steps of the dtype between two logits that a forward of another number of rows may change places."""
NOT_COMPILED = "out of memory in compiled decoding: this request is answered without"
OUT_OF_MEMORY = "ask for fewer new tokens, or take a shorter prompt, a smaller batch or --dtype bfloat16"


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodingSettings:
    """Settings of one request.

    Attributes:
        sampler, stopper: how the target chooses a token, and when an answer ends.
        tree: bounds of each draft tree.
        planner: chooses depth and size within the bounds, for a single sequence. None uses the bounds themselves.
        pace: without a planner, the durations of cycles with a number of sequences, which say whether to draft. None
            always drafts.
        compression: of image rows in the draft. None follows the draft's config.
        compiled: compiled parts of the two models.
        streamer: a transformers streamer for a single sequence. It gets new tokens as soon as they are verified. If it
            has a method ``put_cycle(tokens, accepted)``, it gets the tokens of a cycle together; the first ``accepted``
            of them were drafted. The prefill's token comes the same way.
        wait: waits for the device, for exact times of the phases (`Stats`).
        seeds: one for each sequence. None draws from the device's global random state.
        two_part_from: cached rows from which verification attends to them without the tree's mask. None: never.
        plain_rows: rows of each forward without a draft. All but one are padding.
        one_row_ties: a choice between two logits that are at most `TIE_STEPS` apart is made by a forward of one row,
            as in plain decoding. For a single sequence.
    """

    sampler: Sampler
    stopper: Stopper
    tree: TreeConfig
    planner: Planner | None = None
    pace: Callable[[int], Pace] | None = None
    compression: Compression | None = None
    compiled: StaticEngine | None = None
    streamer: Any = None
    wait: Callable[[], None] | None = None
    seeds: tuple[int, ...] | None = None
    two_part_from: int | None = None
    plain_rows: int = 1
    one_row_ties: bool = False


class Drafted(NamedTuple):
    """The draft phase's result: a tree for each active sequence; the scores of the first one's nodes on the host, which
    the planner learns from; and whether the guard, if there is one, decided to draft (None: it was not asked)."""

    trees: list[DraftTree]
    scores: Floats
    decision: bool | None = None


class Verified(NamedTuple):
    """The verify phase's result.

    ``drafted``: the trees that were verified, smaller than drafted if memory ran out. ``past``: cached rows of each
    sequence before the trees. ``hidden`` [B, N, H] and ``logits`` [B, N, V] at every node; ``features`` [B, N, F] what
    the draft reads there: ``hidden``, or the streams of several layers.
    """

    drafted: Drafted
    past: list[int]
    hidden: Tensor
    logits: Tensor
    features: Tensor


class Decoder:
    """One request. Without a draft it decodes plainly: every tree is its root, and everything else is the same.

    Args:
        inputs: the prompts as `Target.prefill_each` takes them, padded on either side if their lengths differ.
        settings: of this request.
    """

    def __init__(
        self, target: Target, draft: DraftHead | None, inputs: dict[str, Any], settings: DecodingSettings
    ) -> None:
        self.target, self.inputs, self.settings = target, inputs, settings
        self.sampler, self.stopper, self.planner = settings.sampler, settings.stopper, settings.planner
        self.tree = settings.tree if draft is not None else TreeConfig(depth=0, top_k=1, total_tokens=1)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.sequences = sequences_of(ids, mask, self.sampler, settings.seeds)
        self.active = list(self.sequences)
        batch = len(self.active)
        prompt = max(sequence.length for sequence in self.active)
        self._longest = prompt + self.stopper.max_new_tokens
        self._padded = 1 if draft is not None else settings.plain_rows
        self._room = length = min(self._longest, prompt + NEW_TOKENS)  # accepted rows that there is room for
        largest = max(self.tree.total_tokens, self._padded)
        rows = length + largest
        self.masks = MaskBuffer(largest, rows, target.dtype, target.device)
        self.compiled: StaticEngine | None = None
        self.guard: Guard | None = None
        self.drafter: Drafter | None = None
        engine = settings.compiled
        if engine is not None and engine.serves(batch):
            made = within_memory(partial(self._static_parts, engine, draft, rows, length))
            if made is None:
                log.warning(NOT_COMPILED)
                engine.drop_idle()
            else:
                self.compiled, (self.cache, self.drafter) = engine, made
        if self.compiled is None:
            self.cache = target.new_cache(batch, rows)
            if draft is not None:
                more = (batch, settings.compression)
                self.drafter = drafter_of(draft, target.head, length, self.tree, *more, target_cache=lambda: self.cache)
        self.target_layers = () if draft is None else draft.target_layers
        self.stats = Stats(requests=batch, wait=settings.wait)

    def _static_parts(
        self, engine: StaticEngine, draft: DraftHead | None, rows: int, length: int
    ) -> tuple[KVCache, Drafter | None]:
        """Cache and drafter of a compiled request."""
        batch = len(self.active)
        cache = engine.target_caches.take(rows, batch)
        if draft is None:
            return cache, None
        kind = StaticBlockDrafter if isinstance(draft, BlockDraft) else StaticDrafter
        return cache, kind(engine, draft, length, self.tree, batch, self.settings.compression)

    def _leave_compiled(self) -> None:
        """Continues the request without compiled parts, on the rows that it has. Idle caches are freed."""
        assert self.compiled is not None
        log.warning(NOT_COMPILED)
        self.compiled.drop_idle()
        self.compiled = None
        if isinstance(self.cache, StaticCache):
            self.cache = self.cache.growing()
        if isinstance(self.drafter, StaticDrafter):
            self.drafter.leave_compiled()

    def run(self) -> list[list[int]]:
        """Decodes to the end. Returns the new tokens of each sequence; `stats` has acceptance and times."""
        ended = False
        try:
            tokens, ended = self._run(), True
            return tokens
        finally:
            if self.compiled is not None:  # after Ctrl-C too: CUDA graphs are bound to these caches
                self.compiled.release(self.cache, self.drafter, clear=not ended)

    def _run(self) -> list[list[int]]:
        with self.stats.phase("prefill"):
            self.prefill()
        start = time.perf_counter()
        self._drop_finished()
        at_tie = False
        while self.active:
            if not self._whole_cycles():
                at_tie = self._cycle(at_tie)
            self._drop_finished()
        self.stats.loop = time.perf_counter() - start
        if self.settings.streamer is not None:
            self.settings.streamer.end()
        return [sequence.tokens for sequence in self.sequences]

    def _cycle(self, at_tie: bool) -> bool:
        """One cycle of all sequences.

        Args:
            at_tie: only the root is verified, whose two best logits are nearly equal.

        Returns:
            Whether the next root has two such logits.
        """
        began = time.perf_counter()
        drafted = self.draft(at_tie)
        between = time.perf_counter()
        with self.stats.phase("verify"):
            verified = self.verify_within_memory(drafted)
        with self.stats.phase("accept"):
            accepted = self.accept(verified)
        self._learn(verified, accepted, between - began, time.perf_counter() - between)
        before_tie = self._before_tie(verified, accepted) if self.settings.one_row_ties else None
        with self.stats.phase("commit"):
            self.commit(verified, before_tie or accepted)
        return before_tie is not None

    def _whole_cycles(self) -> bool:
        """Decodes in whole cycles on the device (`eagle.decode.compiled.cycle`) until a sequence ends or drafting
        should pause. False if they do not serve this request, or not its next cycle."""
        cycle = None
        if self.compiled is not None and self.planner is None:
            cycle = self.compiled.cycle(self.tree, len(self.active))
        drafter, cache = self.drafter, self.cache
        if cycle is None or not isinstance(drafter, StaticDrafter) or not isinstance(cache, StaticCache):
            return False
        left = [self._left(sequence) for sequence in self.active]
        served = self.sampler.row_wise and not self.settings.one_row_ties
        if max(left) < 2 or not served or not self._should_draft():
            return False
        with self.stats.phase("draft"):
            self._read_pending(drafter)
        run = drafter.start_cycles(cycle, self.active, left, cache)
        enough_memory = self._follow(run)
        drafter.end_cycles(run)
        if not enough_memory:
            self._leave_compiled()
        return True

    def _follow(self, run: CycleRun) -> bool:
        """Launches whole cycles and looks at their results. Before each result, `CycleRun.ahead` further cycles are
        launched. Returns False if memory ran out."""
        launched, sequences = True, self.active
        began = time.perf_counter()
        while not any(sequence.finished for sequence in sequences):
            while launched and len(run.flights) <= run.ahead(self.settings.wait is None) and self._goes_on(run):
                most = run.most(self._longest)
                launch = partial(run.launch, most, self.stats)
                launched = self._make_room(*most) and within_memory(launch) is not None
            if not run.flights:
                break
            left = self._most_left()
            tokens = self._take(run)
            if self.guard is not None and left > 1:
                mean = sum(map(len, tokens)) / len(tokens)
                self.guard.learn(Work(0.0, time.perf_counter() - began), Work(1.0, 1.0), mean)
            began = time.perf_counter()
        while run.flights and not all(sequence.finished for sequence in sequences):
            self._take(run)
        return launched

    def _take(self, run: CycleRun) -> list[list[int]]:
        """Waits for a cycle and adds its tokens to the answers that have not ended."""
        with self.stats.phase("accept"):
            tokens = run.wait()
        nodes = self.tree.nodes_within(self._most_left())
        for sequence, own in zip(self.active, tokens, strict=True):
            if sequence.finished:
                continue
            if own[-1] == NO_TOKEN:
                raise nan_error()
            with self.stats.phase("commit"):
                self.stats.record_cycle(len(own) - 1, nodes)
                self._emit(sequence, own)
        return tokens

    def _goes_on(self, run: CycleRun) -> bool:
        """Whether another whole cycle is launched: tokens may be left for a draft, and drafting pays."""
        left = self._most_left() - len(run.flights)  # those in flight add at least one each
        return left > 1 and (self.guard is None or self.guard.wants_another(len(run.flights)))

    def _most_left(self) -> int:
        """New tokens that are still wanted, of the sequence that wants most."""
        return max(self._left(sequence) for sequence in self.active)

    def _left(self, sequence: Sequence) -> int:
        """New tokens that are still wanted."""
        return self.stopper.max_new_tokens - len(sequence.tokens)

    def prefill(self) -> None:
        """Target and draft read each prompt; the target chooses its first token."""
        for index, prefill in enumerate(self.target.prefill_each(self.inputs, self.cache, self.target_layers)):
            sequence = self.sequences[index]
            logits = self.target.head(prefill.hidden[:, -1])  # [1, V]
            check_not_nan(logits)
            noise = sequence.noise_ahead(1, logits.shape[-1])
            first = sequence.sampler.sample(logits, sequence.prompt, noise)  # [1]
            sequence.next_position = prefill.next_position
            self._emit(sequence, [int(first)])
            self.stats.first_token_at = time.perf_counter()
            if self.drafter is not None and not sequence.finished:
                self.drafter.start(index, prefill, sequence.prompt, first.to(sequence.prompt.device))

    def _make_room(self, *in_use: int) -> bool:
        """Makes room for the rows of the next cycle, in caches and masks. It doubles, until the longest answer fits.

        Args:
            in_use: rows of target and draft, if the host does not know them exactly.

        Returns:
            False if memory ran out: the request must leave compiled decoding.
        """
        rows = in_use[0] if in_use else self.cache.length
        if rows + self.tree.depth + 2 <= self._room or self._room == self._longest:
            return True
        if in_use and self.drafter is not None:
            for cache, used in zip((self.cache, self.drafter.cache), in_use, strict=True):
                cache.truncate([used] * len(self.active))  # these rows are copied
        grow = partial(self._grow, min(2 * self._room, self._longest))
        return grow() if self.compiled is None else within_memory(grow) is not None

    def _grow(self, room: int) -> bool:
        """Makes room for so many accepted rows. Returns True."""
        largest = max(self.settings.tree.total_tokens, self._padded)
        rows = room + largest
        self.cache.grow(rows)
        self.masks = MaskBuffer(largest, rows, self.target.dtype, self.target.device)
        if self.drafter is not None:
            self.drafter.grow(room)
        self._room = room
        return True

    def draft(self, root_alone: bool = False) -> Drafted:
        """A tree below each newest token, no deeper than the tokens that are still wanted. ``root_alone``: its root."""
        if not self._make_room():
            self._leave_compiled()
            self._make_room()
        roots = torch.tensor([[s.tokens[-1]] for s in self.active], device=self.target.device)  # [B, 1]
        bounds = [self.tree.shortened(self._left(sequence)) for sequence in self.active]
        deepest = max(bounds, key=lambda tree: tree.depth)
        if root_alone:
            return Drafted([root_only(root) for root in roots], np.zeros(1))
        possible = self.drafter is not None and max(tree.total_tokens for tree in bounds) > 1
        decision = self._should_draft() if possible else None
        if self.drafter is None or not decision:
            return Drafted([root_only(root) for root in roots], np.zeros(1), decision)
        with self.stats.phase("draft"):
            self._read_pending(self.drafter)
            candidates = self.drafter.expand(deepest, None if self.planner is None else self._should_deepen)
        with self.stats.phase("tree"):
            device, sizes, scores = candidates.tokens.device, [tree.total_tokens for tree in bounds], np.zeros(1)
            if self.planner is not None:
                candidate_scores = on_host(candidates.scores[0])
                sizes = [min(sizes[0], self.planner.size(candidate_scores))]
                scores = scores_of_tree(candidate_scores, sizes[0])
            trees = [
                select_nodes(candidates.of(index), root.to(device), size, deepest.depth + 1)
                for index, (root, size) in enumerate(zip(roots, sizes, strict=True))
            ]
        return Drafted(trees, scores, decision)

    def _read_pending(self, drafter: Drafter) -> None:
        """The draft reads the rows that were accepted since it last did."""
        pending = [rows for sequence in self.active if (rows := sequence.take_pending()) is not None]
        if pending:
            drafter.extend([rows.hidden for rows in pending], [rows.tokens for rows in pending])

    def _should_draft(self) -> bool:
        if self.planner is not None:
            return self.planner.should_draft()
        if self.settings.pace is None:
            return True
        pace = self.settings.pace(len(self.active))
        if self.guard is None or self.guard.pace is not pace:
            self.guard = Guard(pace)
        return self.guard.should_draft()

    def _learn(self, verified: Verified, accepted: list[Accepted], draft: float, verify: float) -> None:
        """Tells the planner or the guard about this cycle and its seconds."""
        decision, real = verified.drafted.decision, Work(draft, verify)
        if decision is None:
            return
        if self.planner is not None:
            path = accepted[0].path
            self.planner.learn(verified.drafted.scores, path, len(accepted[0].tokens), real, decision)
        elif self.guard is not None:
            tokens = sum(len(each.tokens) for each in accepted) / len(accepted)
            self.guard.learn(real, Work(1.0, 1.0) if decision else Work(0.0, 1.0), tokens)

    def _should_deepen(self, scores: Tensor) -> bool:
        return self.planner is None or self.planner.should_deepen(on_host(scores[0]))

    def verify_within_memory(self, drafted: Drafted) -> Verified:
        """`verify`. If memory runs out, continues without compiled parts if there are any. Then verifies the better
        half of each tree, and so on down to the root. Later trees of the request are no larger.

        Raises:
            OutOfMemory: not even one token fits into memory.
        """
        past = self.cache.lengths
        while (verified := within_memory(partial(self.verify, drafted))) is None:
            self.cache.truncate(past)
            if self.compiled is not None:
                self._leave_compiled()
                continue
            size = max(tree.size for tree in drafted.trees) // 2
            if size == 0:
                raise OutOfMemory("out of memory with a single token", str(self.target.device), OUT_OF_MEMORY)
            self.tree = replace(self.tree, total_tokens=size)
            self.stats.cut_trees += 1
            trees = [prune(tree, size) if tree.size > size else tree for tree in drafted.trees]
            drafted = Drafted(trees, on_host(trees[0].scores), drafted.decision)
        return verified

    def verify(self, drafted: Drafted) -> Verified:
        """The target's hidden states and logits at every node, in one forward. A tree smaller than the largest is
        padded with rows that no other row attends to."""
        past = self.cache.lengths
        tokens, depths, blocks = (part.to(self.target.device) for part in join_trees(drafted.trees))
        if self._padded > 1:
            tokens, depths = (part.expand(-1, self._padded) for part in (tokens, depths))
            blocks = torch.eye(self._padded, dtype=torch.bool, device=tokens.device).expand(len(past), -1, -1)
        position_ids = torch.stack([s.next_position for s in self.active]).to(depths.device) + depths  # [B, N]
        masks: LayerMasks | None = None
        two_parts: TwoParts | None = None
        if self.compiled is not None or tokens.numel() > 1:
            mask = self.masks.window(past, blocks)
            masks = self.target.masks_by_layer(mask, past, depths)
            if (first := self.settings.two_part_from) is not None and min(past) >= first:
                two_parts = TwoParts(mask, min(past))
        if self.compiled is not None and masks is not None and isinstance(self.cache, StaticCache):
            return Verified(
                drafted,
                past,
                *self.compiled.verify(tokens, position_ids, masks, self.cache, self.tree.total_tokens),
            )
        with self.target.streams(self.target_layers) as streams:
            hidden = self.target.verify(tokens, position_ids, masks, self.cache, two_parts)
        features, logits = streams.joined(), self.target.head(hidden)
        features = hidden if features is None else features
        if self._padded > 1:
            hidden, logits, features = (part[:, :1] for part in (hidden, logits, features))
        return Verified(drafted, past, hidden, logits, features)

    def accept(self, verified: Verified) -> list[Accepted]:
        """For each sequence the drafted path that the target agrees with, and its bonus token.

        Raises:
            UserError: the target's output there is NaN.
        """
        trees, hidden, logits = verified.drafted.trees, verified.hidden, verified.logits
        if self.sampler.order_free:
            is_nan = hidden.isnan().any(dim=-1)  # [B, N]; copied to the host with the tokens, not on its own
            per_tree = self._choices(trees, logits).to(trees[0].tokens.device)  # [B, N]
            per_tree = per_tree.masked_fill(is_nan.to(per_tree.device), NO_TOKEN)
            found = accept_all_at_once(trees, [ids[: tree.size] for tree, ids in zip(trees, per_tree, strict=True)])
            if any(each.tokens[-1] == NO_TOKEN for each in found):
                raise nan_error()
            return found
        check_not_nan(hidden)
        return [
            accept_step_by_step(tree, sequence.sample_at(node_logits))
            for tree, sequence, node_logits in zip(trees, self.active, logits, strict=True)
        ]

    def _before_tie(self, verified: Verified, accepted: list[Accepted]) -> list[Accepted] | None:
        """The accepted path up to the first node whose two best logits are nearly equal, None without such a node. That
        node becomes the root of the next forward, alone. Nothing is accepted if it is the root already."""
        (found,) = accepted
        if verified.logits.shape[1] == 1:
            return None
        best, second = verified.logits[0, found.path].topk(2).values.T  # [path]
        tied = (steps_between(best, second) <= TIE_STEPS).cpu().nonzero()[:, 0].tolist()
        if not tied:
            return None
        return [Accepted(found.path[: tied[0]], found.tokens[: tied[0]])]

    def _choices(self, trees: list[DraftTree], logits: Tensor) -> Tensor:
        """The target's choice at each node, [B, N], from its logits [B, N, V]."""
        noise = self._noise(trees, logits.shape[-1])  # [B * N, V]
        if self.sampler.row_wise:
            return self.sampler.sample(logits.flatten(0, 1), self.active[0].prompt, noise).view(logits.shape[:2])
        chosen = []
        for index, (tree, sequence) in enumerate(zip(trees, self.active, strict=True)):
            own = None if noise is None else noise.view(logits.shape)[index, : tree.size]
            chosen.append(sequence.sampler.sample(logits[index, : tree.size], sequence.prefixes(tree), own))
        return pad_sequence(chosen, batch_first=True)

    def _noise(self, trees: list[DraftTree], vocabulary: int) -> Tensor | None:
        """[B * N, V] noise for the token that follows each node. None for greedy decoding."""
        if not self.sampler.do_sample:
            return None
        parts = []
        for sequence, tree in zip(self.active, trees, strict=True):
            ahead = sequence.noise_ahead(self.tree.depth + 2, vocabulary)  # [D, V]
            assert ahead is not None
            parts.append(ahead[tree.depths.to(ahead.device)])  # [n, V]
        return pad_sequence(parts, batch_first=True).flatten(0, 1)

    def commit(self, verified: Verified, accepted: list[Accepted]) -> None:
        """Keeps the accepted rows of the cache, emits the new tokens, and hands the target's features to the draft."""
        self.cache.keep(verified.past, [each.path for each in accepted])
        for sequence, each, features in zip(self.active, accepted, verified.features, strict=True):
            self.stats.record_cycle(max(len(each.path) - 1, 0), verified.features.shape[1])
            if not each.path:
                continue
            sequence.next_position = sequence.next_position + len(each.tokens)
            if self.drafter is not None:
                path = torch.tensor(each.path, device=features.device)
                sequence.add_pending(features[path], torch.tensor(each.tokens))
            self._emit(sequence, each.tokens)

    def _emit(self, sequence: Sequence, added: list[int]) -> None:
        kept, sequence.finished = self.stopper.cut(sequence.context, sequence.tokens, added)
        sequence.tokens += kept
        self.stats.new_tokens += len(kept)
        streamer = self.settings.streamer
        if streamer is None:
            return
        if hasattr(streamer, "put_cycle"):
            streamer.put_cycle(kept, len(added) - 1)
            return
        for token in kept:
            streamer.put(torch.tensor([token]))

    def _drop_finished(self) -> None:
        """Removes the sequences that have ended from the batch."""
        kept = [index for index, sequence in enumerate(self.active) if not sequence.finished]
        if len(kept) == len(self.active):
            return
        self.active = [self.active[index] for index in kept]
        if kept:
            self.cache = self.cache.select(kept)
            if self.drafter is not None:
                self.drafter.select(kept)


def steps_between(first: Tensor, second: Tensor) -> Tensor:
    """Distance of logits in steps of their dtype at their size.

    >>> steps_between(torch.tensor([1.0]).bfloat16(), torch.tensor([1.0078125]).bfloat16())
    tensor([1.])
    """
    size = torch.maximum(first.abs(), second.abs()).float().clamp(min=torch.finfo(first.dtype).tiny)
    return (first.float() - second.float()).abs() / (torch.finfo(first.dtype).eps * size.log2().floor().exp2())


def check_not_nan(values: Tensor) -> None:
    """Raises `UserError` if hidden states or logits [..., X] have NaN: every later token would be the same one."""
    if bool(values.isnan().any()):
        raise nan_error()


def nan_error() -> UserError:
    """The error for a target that gives NaN."""
    return UserError(
        "the base model's output is not a number",
        fix="its weights are damaged, or --dtype float16 overflows: try bfloat16 or float32",
    )


def on_host(scores: Tensor) -> Floats:
    """[N] in the form that the planner takes."""
    return scores.cpu().double().numpy()  # widened here: some accelerators have no 64-bit floats


def scores_of_tree(scores: Floats, size: int) -> Floats:
    """Scores of the ``size`` nodes that `select_nodes` takes from candidates with these ``scores``, root first, without
    another copy from the device."""
    order = np.argsort(-scores, kind="stable")[: size - 1]
    return np.concatenate([[0.0], scores[np.sort(order)]])


def join_trees(trees: list[DraftTree]) -> tuple[Tensor, Tensor, Tensor]:
    """``tokens`` and ``depths`` [B, N], ``mask`` [B, N, N]. A padding row has depth 0 and attends to no tree node."""
    if len(trees) == 1:
        return trees[0].tokens[None], trees[0].depths[None], trees[0].mask[None]
    tokens = pad_sequence([tree.tokens for tree in trees], batch_first=True)
    depths = pad_sequence([tree.depths for tree in trees], batch_first=True)
    masks = tokens.new_zeros(*tokens.shape, tokens.shape[1], dtype=torch.bool)
    for index, tree in enumerate(trees):
        masks[index, : tree.size, : tree.size] = tree.mask
    return tokens, depths, masks

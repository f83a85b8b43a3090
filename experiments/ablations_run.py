"""The measurements of `experiments.ablations`: the optimizations of a cycle, each left out in turn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from eagle import kv_cache as cache
from eagle.benchmark import Answer, Contestant, Work, find_quiet, interleave, with_engine
from eagle.decode import accept, drafter, masks, tree
from eagle.decode import decoder as decode
from eagle.decode.accept import Accepted
from eagle.decode.msd import MSDModel
from eagle.decode.stats import Stats
from eagle.decode.tree import DraftTree
from eagle.drafts.modules import DraftLayer
from eagle.drafts.msd import DraftModel
from eagle.questions import read_questions
from experiments.common import caption, run_record
from llava.errors import UserError
from llava.files import write_json

AS_IT_IS = "as it is"
TOLERANCE = 0.15  # a round that deviates more from the median is noisy
Way = Callable[[MSDModel], AbstractContextManager[None]]


@contextmanager
def projections_apart(pair: MSDModel) -> Iterator[None]:
    """Query, key and value, and the two halves of the feed-forward, as products of their own."""
    assert isinstance(pair.draft, DraftModel)
    layer = cast(DraftLayer, pair.draft.layers[0])
    joined = layer.self_attn.fused, layer.mlp.fused
    layer.self_attn.fused, layer.mlp.fused = [], []
    try:
        yield
    finally:
        layer.self_attn.fused, layer.mlp.fused = joined


@contextmanager
def weights_output_major(pair: MSDModel) -> Iterator[None]:
    """All weights in the layout of `nn.Linear`."""
    assert isinstance(pair.draft, DraftModel)
    layer = cast(DraftLayer, pair.draft.layers[0])
    parts = [pair.target.text_model, pair.target.model.get_output_embeddings(), pair.draft]
    found = [module for part in parts for module in part.modules() if isinstance(module, nn.Linear)]
    changed = [m for m in [*found, *layer.self_attn.fused, *layer.mlp.fused] if not m.weight.is_contiguous()]
    weights = [module.weight.data for module in changed]
    for module in changed:
        module.weight.data = module.weight.data.contiguous()
    try:
        yield
    finally:
        for module, weight in zip(changed, weights, strict=True):
            module.weight.data = weight


def masks_rebuilt(pair: MSDModel) -> AbstractContextManager[None]:
    """A whole mask is made for each forward."""

    def window(self: masks.MaskBuffer, pasts: Sequence[int], blocks: Tensor) -> Tensor:
        return masks.batch_mask(pasts, blocks, self._buffer.dtype)

    return patched((masks.MaskBuffer, "window", window))


def angles_recomputed(pair: MSDModel) -> AbstractContextManager[None]:
    """The draft computes its rotary angles in each forward."""

    def rope(self: drafter.Drafter, offset: int, count: int) -> tuple[Tensor, Tensor]:
        start = self._lengths[0] + self._shift[0] + offset
        positions = torch.arange(start, start + count, device=self.draft.device).unsqueeze(0)
        angles: tuple[Tensor, Tensor] = self.draft.rotary(positions, self.draft.dtype)
        return angles

    return patched((drafter.Drafter, "_rope", rope))


def caches_reselected(pair: MSDModel) -> AbstractContextManager[None]:
    """The accepted rows are kept by selecting all rows of all layers again."""

    def keep(self: cache.KVCache, bases: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        base, path = bases[0], paths[0]
        rows = torch.tensor([*range(base), *(base + node for node in path)])
        for layer in self.layers:
            index, count = rows.to(layer.store_k.device), len(rows)
            layer.store_k[:, :, :count] = layer.store_k.index_select(2, index)
            layer.store_v[:, :, :count] = layer.store_v.index_select(2, index)
        self.truncate([base + len(path)])

    return patched((cache.KVCache, "keep", keep))


def ancestors_by_a_loop(pair: MSDModel) -> AbstractContextManager[None]:
    """The mask of a tree is filled node by node."""

    def ancestor_mask(parents: Tensor, depth: int | None = None) -> Tensor:
        mask = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
        for node, parent in enumerate(parents.tolist()):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask

    return patched((tree, "ancestor_mask", ancestor_mask))


def acceptance_by_a_loop(pair: MSDModel) -> AbstractContextManager[None]:
    """The accepted path is walked node by node, with a copy to the host for each choice."""

    def walk(trees: Sequence[DraftTree], chosen: Sequence[Tensor]) -> list[Accepted]:
        def of(one: DraftTree, choices: Tensor) -> Accepted:
            return accept.accept_step_by_step(one, lambda node, added: int(choices[node]))

        return [of(one, choices) for one, choices in zip(trees, chosen, strict=True)]

    return patched((decode, "accept_all_at_once", walk))


def every_row_of_the_prompt(pair: MSDModel) -> AbstractContextManager[None]:
    """The target's head, and the draft's layer, on all rows of the prompt."""
    forward, head = DraftModel.forward, pair.target.head

    def read(self: DraftModel, *arguments: Any, last_only: bool = False, **named: Any) -> Tensor:
        output = forward(self, *arguments, **named)
        return output[:, -1:] if last_only else output

    each = type(pair.target).prefill_each

    def prefill_each(self: Any, *arguments: Any) -> Iterator[Any]:
        for prefill in each(self, *arguments):
            head(prefill.hidden)
            yield prefill

    return patched((DraftModel, "forward", read), (type(pair.target), "prefill_each", prefill_each))


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """A context in which these attributes are replaced."""
    with ExitStack() as stack:
        for each in changes:
            stack.enter_context(mock.patch.object(*each))
        yield


WAYS: dict[str, Way] = {
    "the draft's projections joined": projections_apart,
    "weights input-major (float32 on a CPU)": weights_output_major,
    "masks are windows on one buffer": masks_rebuilt,
    "the draft's angles kept": angles_recomputed,
    "only accepted rows of the cache moved": caches_reselected,
    "a tree's mask without a loop": ancestors_by_a_loop,
    "acceptance without a loop, one copy to the host": acceptance_by_a_loop,
    "of the prompt, head and draft layer on the last row only": every_row_of_the_prompt,
}
"""Name of each optimization, and how to decode without it."""


def cycle_ms(stats: Stats) -> float:
    """Milliseconds of a cycle."""
    return 1000 * stats.loop / stats.cycles


def prefill_ms(stats: Stats) -> float:
    """Milliseconds of a prompt."""
    return stats.phases_ms["prefill"] / stats.requests


def contestants(pair: MSDModel, tokens: int) -> list[Contestant]:
    """The engine as it is, then without each optimization."""
    settings = {"max_new_tokens": tokens, "temperature": 0.0}
    decode = with_engine(pair, True, settings)

    def within(way: Way) -> Callable[[Work], Answer]:
        def answer(work: Work) -> Answer:
            with way(pair):
                return decode(work)

        return answer

    return [Contestant(AS_IT_IS, decode), *(Contestant(name, within(way)) for name, way in WAYS.items())]


def measure(pair: MSDModel, work: Sequence[Work], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One record for each way.

    Raises:
        UserError: ways give different tokens.
    """
    runners = contestants(pair, tokens)
    with tqdm(total=rounds + 1, unit="round", file=sys.stderr) as bar:
        for _ in interleave(runners, [work] * rounds, 1):
            bar.update()
    for runner in runners:
        if runner.tokens != runners[0].tokens:
            raise UserError(f"without '{runner.name}' the answers differ", fix="this is a bug: please report it")
    quiet = find_quiet(runners, TOLERANCE)
    records: list[dict[str, Any]] = []
    for runner in runners:
        cycle, prefill = (runner.median(value, quiet.rounds) for value in (cycle_ms, prefill_ms))
        spread = runner.spread(cycle_ms, quiet.rounds)
        records.append({"way": runner.name, "cycle_ms": cycle, "spread": spread, "prefill_ms": prefill})
    for record in records:
        record["rounds"], record["doubtful"] = len(quiet.rounds), quiet.doubtful
        record["gain"] = record["cycle_ms"] / records[0]["cycle_ms"]
        record["prefill_gain"] = record["prefill_ms"] / records[0]["prefill_ms"]
    return records


def table(records: list[dict[str, Any]]) -> Table:
    """The figures as a table."""
    shown = Table("without", "cycle", "gain", "prefill", "gain", "spread")
    for record in records:
        shown.add_row(
            record["way"],
            f"{record['cycle_ms']:.2f} ms", f"{record['gain']:.2f}x",
            f"{record['prefill_ms']:.1f} ms", f"{record['prefill_gain']:.2f}x", f"{record['spread']:.0%}",
        )  # fmt: skip
    return shown


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes JSON if asked."""
    work = list(read_questions(options.data))[: options.questions]
    pair = MSDModel.from_pretrained(options.base_model, options.msd_model, tree="fixed")
    records = measure(pair, work, options.max_new_tokens, options.rounds)
    made = run_record(options, pair.device)
    console = Console()
    console.print(table(records))
    noisy = ", noisy" if records[0]["doubtful"] else ""
    console.print(f"tree {pair.tree}, {records[0]['rounds']} quiet rounds{noisy}\n{caption(made)}")
    if options.out:
        write_json(options.out, {**made, "tree": str(pair.tree), "ways": records})

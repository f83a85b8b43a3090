"""Costs of a cycle on this machine: measured once for a pair of models, and kept on disk.

They are measured after `CONTEXT` cached positions and not updated later, so that a request with a seed gives the same
cycles each time.

The record is ``MSD_CACHE`` (or the user's cache folder) ``/costs/<key>.json``; the key is made of the shapes of both
models, dtype, device, threads and the versions of torch and transformers. Delete the file to measure again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eagle.attention import two_part_attention
from eagle.cache import cache_folder
from eagle.decode.adaptive.planner import CostCurve
from eagle.decode.block import drafter_of
from eagle.decode.masks import MaskBuffer
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.head import DraftHead
from eagle.families.base import Target
from eagle.provenance import hardware, now
from llava.errors import OutOfMemory, UserError
from llava.files import write_json
from llava.memory import within_memory

NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
CONTEXT = 256
"""Number of cached positions during the measurement."""
CONTEXTS = (512, 4096)
"""Cached positions at which attention in two parts is compared with masked attention."""
ROUNDS, WARM_UP = 7, 2
BUDGET = 20.0
"""Seconds after which no further round starts."""
DELAY = 2.0
"""Seconds before a progress bar appears."""
SCHEMA = 2
log = logging.getLogger(__name__)


def cost_of(target: Target, draft: DraftHead, tree: TreeConfig) -> CostCurve:
    """The recorded costs of this pair on this machine, measured now if there is no record. If the folder cannot be
    written, every process measures them."""
    described = describe(target, draft, tree)
    path = folder() / f"{key_of(described)}.json"
    known = read(path)
    if known is not None:
        return known
    cost = measure(target, draft, tree)
    if cost.nodes[-1] < tree.total_tokens:
        return cost  # memory ran out; it may be sufficient next time
    record = {
        "schema": SCHEMA, "measured": now(),
        "context": CONTEXT, "rounds": ROUNDS, "described": described, "seconds": asdict(cost),
    }  # fmt: skip
    try:
        write_json(path, record, indent=1)
    except (UserError, OSError) as error:
        log.warning("costs are not kept for next time: %s", error)
    return cost


def folder() -> Path:
    """Where records are kept."""
    return cache_folder("costs")


def describe(target: Target, draft: DraftHead, tree: TreeConfig) -> dict[str, Any]:
    """Everything that the costs depend on, as JSON values."""
    device = target.device
    text = target.config.get_text_config()
    shape = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    return {
        "family": target.family,
        "target": {name: getattr(text, name, None) for name in shape}
        | {"num_key_value_heads": target.cache_shapes[0][0], "vocab_size": target.vocab_size},
        "attention": [text._attn_implementation, torch.backends.cuda.cudnn_sdp_enabled()],
        "draft": {
            "hidden_size": getattr(draft.config, "layer_size", draft.config.hidden_size),
            "intermediate_size": getattr(draft.config, "intermediate_size", None),  # experts have another
            "head_tokens": None if draft.draft_vocab is None else len(draft.draft_vocab),
            **({} if draft.kind == "MSD" else {"kind": draft.kind, "layers": len(draft.layers)}),
            **({} if draft.block_size == 1 else {"block": draft.block_size}),
        },
        "tree": {"depth": tree.depth, "top_k": tree.top_k, "total_tokens": tree.total_tokens},
        "quantisation": str(getattr(target.config, "quantization_config", None)),
        "devices": len({parameter.device for parameter in target.model.parameters()}),
        "dtype": str(target.dtype),
        "device": device.type,
        "hardware": hardware(device),
        "versions": [torch.__version__, transformers.__version__],
    }


def key_of(described: dict[str, Any]) -> str:
    """A short name for a description."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path) -> CostCurve | None:
    """A record. None if it does not exist or cannot be used: the costs are then measured again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        seconds = record["seconds"]
        if record["schema"] != SCHEMA:
            return None
        nodes, verify = tuple(map(int, seconds["nodes"])), tuple(map(float, seconds["verify"]))
        cost = CostCurve(nodes, verify, float(seconds["step"]), float(seconds["extend"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sane = len(nodes) == len(verify) > 0 and min(*verify, cost.step, cost.extend, 1.0) > 0
    return cost if sane else None


@torch.inference_mode()
def measure(
    target: Target, draft: DraftHead, tree: TreeConfig, context: int = CONTEXT, rounds: int = ROUNDS
) -> CostCurve:
    """Times verifications of some sizes and draft steps after ``context`` positions, up to ``rounds`` times each.
    Leaves out sizes that do not fit into memory.

    Raises:
        OutOfMemory: not even a single token fits into memory.
    """
    end = (target.eos_token_ids or (0,))[0]  # not an image token
    ids = torch.full((1, context), end, device=target.device)
    sizes = (*(n for n in NODES if n < tree.total_tokens), tree.total_tokens)
    cache = target.new_cache(1, context + sizes[-1])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (prefill,) = list(target.prefill_each(inputs, cache, draft.target_layers))
    masks = MaskBuffer(sizes[-1], context + sizes[-1], target.dtype, target.device)

    def verify(count: int) -> Callable[[], None]:
        tokens = torch.full((1, count), end, device=target.device)
        block = torch.ones(1, count, count, dtype=torch.bool, device=target.device).tril()
        depths = torch.arange(count, device=target.device)[None]  # [1, n]
        positions = prefill.next_position + depths

        def once() -> None:
            cache.truncate([context])
            mask = None
            if count > 1:
                mask = target.masks_by_layer(masks.window([context], block), [context], depths)
            target.head(target.verify(tokens, positions, mask, cache)).argmax(dim=-1).cpu()

        return once

    room = context + 8 * (rounds + WARM_UP)
    drafter = drafter_of(draft, target.head, room, tree, target_cache=lambda: cache)
    drafter.start(0, prefill, ids, ids[0, :1])
    rows = (prefill.features[0, :4].to(draft.device), ids[0, :4].to(draft.device))

    def draft_levels(depth: int) -> Callable[[], None]:
        levels = TreeConfig(depth, tree.top_k, tree.total_tokens)

        def once() -> None:
            drafter.extend([rows[0]], [rows[1]])
            drafter.expand(levels, lambda scores: len(scores.cpu()) > 0).scores.cpu()  # each level goes to the host

        return once

    deep = max(1, min(tree.depth, 6))
    first = tree.depth if draft.block_size > 1 else 0  # levels that are drafted in any case
    verified = list(itertools.takewhile(has_room, map(verify, sizes)))
    if not verified:
        raise OutOfMemory("out of memory with a single token", str(target.device), "try --dtype bfloat16")
    extend, drafted, *seconds = seconds_of([draft_levels(first), draft_levels(deep), *verified], rounds)
    return CostCurve(sizes[: len(verified)], monotone(seconds), max((drafted - extend) / deep, 1e-7), extend)


def two_part_from(target: Target, nodes: int) -> int | None:
    """Cached rows from which one layer's attention of ``nodes`` tree nodes is faster in two parts (`eagle.attention`)
    than masked, measured at two lengths; None if it is not faster at the longer one either."""
    heads = target.config.get_text_config().num_attention_heads
    key_heads, width = Counter(shape for shape in target.cache_shapes if shape[0]).most_common(1)[0][0]
    layer = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=False)
    new = partial(torch.randn, dtype=target.dtype, device=target.device)

    def gain(context: int) -> float:
        query, mask = new(1, heads, nodes, width), new(1, 1, nodes, context + nodes) * 0
        key, value = (new(1, key_heads, context + nodes, width) for _ in range(2))

        def masked() -> None:
            sdpa_attention_forward(layer, query, key, value, mask)[0][0, 0, 0, 0].cpu()  # type: ignore[arg-type]

        def in_parts() -> None:
            two_part_attention(query, key, value, mask, context)[0, 0, 0, 0].cpu()

        whole, parts = seconds_of([masked, in_parts])
        return whole - parts

    gains = within_memory(lambda: [gain(context) for context in CONTEXTS])
    return None if gains is None else crossing(gains)


def crossing(gains: Sequence[float]) -> int | None:
    """Where a gain that is linear between `CONTEXTS` becomes positive.

    >>> crossing([1.0, 2.0]), crossing([-1.0, 1.0]), crossing([1.0, -1.0])
    (512, 2304, None)
    """
    (short, long), (first, last) = CONTEXTS, gains
    if last <= 0:
        return None
    return short if first > 0 else round(short + (long - short) * -first / (last - first))


def has_room(run: Callable[[], Any]) -> bool:
    """Calls ``run`` once. False if memory runs out."""
    return within_memory(lambda: [run()]) is not None


def seconds_of(runs: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """The median time of each of ``runs``. They take turns, so a slow moment of the machine slows all of them. After
    `BUDGET` seconds no further round starts, but at least one is measured."""
    taken: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    turns = tqdm(range(WARM_UP + rounds), desc="costs of this machine, once", unit="round", delay=DELAY, leave=False)
    for number in turns:
        if number > WARM_UP and time.perf_counter() - start > BUDGET:
            break
        for run, times in zip(runs, taken, strict=True):
            before = time.perf_counter()
            run()
            if number >= WARM_UP:
                times.append(time.perf_counter() - before)
    turns.close()
    return [statistics.median(times) for times in taken]


def monotone(seconds: Sequence[float]) -> tuple[float, ...]:
    """Times of growing sizes. A time above that of a larger size is noise and is lowered to it.

    >>> monotone([2.0, 5.0, 3.0, 4.0])
    (2.0, 3.0, 3.0, 4.0)
    """
    return tuple(itertools.accumulate(reversed(seconds), min))[::-1]

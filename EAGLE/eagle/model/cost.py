"""What a cycle costs on this machine: measured once for a pair of models, kept on disk with a record of how.

The record is ``MSD_CACHE`` (or the user's cache folder) ``/costs/<key>.json``; the key is made of the shapes of both
models, dtype, device, threads and the versions of torch and transformers. Delete the file to measure again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from eagle.hardware import hardware
from eagle.model.config import TreeConfig
from eagle.model.draft import DraftModel
from eagle.model.drafter import Drafter
from eagle.model.masks import MaskBuffer
from eagle.model.planner import CostCurve
from eagle.model.targets.base import Target
from llava.errors import UserError
from llava.files import atomic_write

NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
CONTEXT = 256
"""Positions that are cached while it is measured."""
ROUNDS, WARM_UP = 7, 2
SCHEMA = 2
log = logging.getLogger(__name__)


def cost_of(target: Target, draft: DraftModel, tree: TreeConfig) -> CostCurve:
    """The recorded costs of this pair on this machine, measured now if there is no record. Where the folder cannot be
    written they are measured by every process."""
    described = describe(target, draft, tree)
    path = folder() / f"{key_of(described)}.json"
    known = read(path)
    if known is not None:
        return known
    cost = measure(target, draft, tree)
    record = {
        "schema": SCHEMA, "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "context": CONTEXT, "rounds": ROUNDS, "described": described, "seconds": asdict(cost),
    }  # fmt: skip
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        log.warning("costs are not kept for next time: %s", error)
    return cost


def folder() -> Path:
    """Where records are kept."""
    base = os.environ.get("MSD_CACHE")
    if base:
        return Path(base) / "costs"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msd" / "costs"


def describe(target: Target, draft: DraftModel, tree: TreeConfig) -> dict[str, Any]:
    """Everything that the costs depend on, as JSON values."""
    device = target.device
    text = target.config.get_text_config()
    shape = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "family": target.family,
        "target": {name: getattr(text, name, None) for name in shape} | {"vocab_size": target.vocab_size},
        "attention": text._attn_implementation,
        "draft": {"hidden_size": draft.config.hidden_size, "intermediate_size": draft.config.intermediate_size},
        "tree": {"top_k": tree.top_k, "total_tokens": tree.total_tokens},
        "dtype": str(target.dtype),
        "device": device.type,
        "hardware": hardware(device),
        "versions": [torch.__version__, transformers.__version__],
    }


def key_of(described: dict[str, Any]) -> str:
    """A short name for a description."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path) -> CostCurve | None:
    """A record; None if there is none or it cannot be used, which is no error: it is measured again."""
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
    target: Target, draft: DraftModel, tree: TreeConfig, context: int = CONTEXT, rounds: int = ROUNDS
) -> CostCurve:
    """Times verifications of some sizes and draft steps after ``context`` positions, ``rounds`` times each."""
    end = (target.eos_token_ids or (0,))[0]  # a token that is surely no picture's
    ids = torch.full((1, context), end, device=target.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    nodes = (*(n for n in NODES if n < tree.total_tokens), tree.total_tokens)
    cache = target.new_cache(1, context + nodes[-1])
    (prefill,) = list(target.prefill_each(inputs, cache))
    masks = MaskBuffer(nodes[-1], context + nodes[-1], target.dtype, target.device)

    def verify(count: int) -> Callable[[], None]:
        tokens = torch.full((1, count), end, device=target.device)
        block = torch.ones(1, count, count, dtype=torch.bool, device=target.device).tril()
        positions = prefill.next_position + torch.arange(count, device=target.device)[None]

        def once() -> None:
            mask = masks.window([context], block) if count > 1 else None
            target.head(target.verify(tokens, positions, mask, cache)).argmax(dim=-1).cpu()
            cache.truncate([context])

        return once

    drafter = Drafter(draft, target.head, context + 8 * (rounds + WARM_UP), tree)
    drafter.start(0, prefill, ids, ids[0, :1])
    rows = (prefill.hidden[0, :4].to(draft.device), ids[0, :4].to(draft.device))

    def draft_levels(depth: int) -> Callable[[], None]:
        levels = TreeConfig(depth, tree.top_k, tree.total_tokens)

        def once() -> None:
            drafter.extend([rows[0]], [rows[1]])
            drafter.expand(levels).scores.cpu()

        return once

    deep = max(1, min(tree.depth, 6))
    runs = [draft_levels(0), draft_levels(deep), *(verify(count) for count in nodes)]
    extend, drafted, *verified = seconds_of(runs, rounds)
    return CostCurve(nodes, monotone(verified), max((drafted - extend) / deep, 1e-7), extend)


def seconds_of(runs: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """The median time of each of ``runs``. They take turns, so that a slow moment of the machine is one of them all."""
    taken: list[list[float]] = [[] for _ in runs]
    for number in range(WARM_UP + rounds):
        for run, times in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            if number >= WARM_UP:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def monotone(seconds: Sequence[float]) -> tuple[float, ...]:
    """Times of growing sizes, none above that of a larger one: what was is a disturbance.

    >>> monotone([2.0, 5.0, 3.0, 4.0])
    (2.0, 3.0, 3.0, 4.0)
    """
    return tuple(itertools.accumulate(reversed(seconds), min))[::-1]

"""Costs at the real size on random weights, and the speed-up to expect from published acceptance.

    python -m experiments.real_size                     # LLaVA-1.5-7B's shape, as many layers as memory holds
    python -m experiments.real_size --model 13b --dtype float32 --layers 4
    python -m experiments.real_size --quick             # a tiny shape; its figures mean nothing
    python -m experiments.real_size --simulate-only     # the GPU's figures, which need no measurement

Random weights cost what trained ones cost and accept nothing, so acceptance comes from `published.json`. Where memory
does not hold all layers, times at two depths give the time of a layer, and the figures are scaled to all of them; the
report says so. `experiments/cost_model.py` has the formulas.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration

from benchmarks.report import commit
from eagle.arguments import positive
from eagle.decode.adaptive.cost import measure
from eagle.decode.adaptive.planner import CostCurve
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.msd import DraftModel
from eagle.families.base import Target
from eagle.families.llava.target import LlavaTarget
from eagle.loading import device_map_for
from eagle.provenance import hardware, versions
from experiments.cost_model import FORMULA, Gpu, Times, break_even, to_depth
from experiments.random_pair import RandomPrompt, Shape, random_draft, random_target
from llava.device import dtype_for
from llava.errors import UserError, run_cli
from llava.files import atomic_write, read_json

SHAPES = {
    "7b": ("LLaVA-1.5-7B", Shape(4096, 32, 32, 11_008, 32_000, 4096, (24, 1024), 336)),
    "13b": ("LLaVA-1.5-13B", Shape(5120, 40, 40, 13_824, 32_000, 4096, (24, 1024), 336)),
    "quick": ("LLaVA-1.5-7B", Shape(32, 4, 2, 48, 128, 512)),
}
PUBLISHED = Path(__file__).resolve().parent / "published.json"
MEMORY_SHARE = 0.6
"""Of the free memory, for weights."""
GIGA, TERA = 1e9, 1e12


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m experiments.real_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", choices=("7b", "13b"), default="7b", help="whose shape (default: 7b)")
    add("--quick", action="store_true", help="a tiny shape instead: the smoke test")
    add("--layers", type=positive, help="decoder layers to build (default: as many as memory holds)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="auto: bfloat16, float32 on a CPU without products in bfloat16")  # fmt: skip
    add("--device", default="cpu", help="where costs are measured (default: cpu)")
    add("--prompt", type=positive, default=640, help="positions of the prompt (default: 640)")
    add("--new-tokens", type=positive, default=128, help="of an answer, for whole requests (default: 128)")
    add("--rounds", type=positive, default=5, help="of each measurement (default: 5)")
    add("--no-load", action="store_true", help="do not write the weights and load them again")
    add("--simulate-only", action="store_true", help="measure nothing")
    gpu = made.add_argument_group("the GPU of the simulation (defaults: an A100 of 80 GB by its data sheet)")
    gpu.add_argument("--bandwidth", type=float, default=2.0, help="terabytes a second (default: 2.0)")
    gpu.add_argument("--arithmetic", type=float, default=312.0, help="16-bit TFLOP a second (default: 312)")
    gpu.add_argument("--bandwidth-share", type=float, default=0.8, help="of it that is reached (default: 0.8, a guess)")
    gpu.add_argument("--arithmetic-share", type=float, default=0.5, help="(default: 0.5, a guess)")
    gpu.add_argument("--layer-overhead-us", type=float, default=250.0,
                     help="microseconds to launch a layer from Python (default: 250, a guess)")  # fmt: skip
    gpu.add_argument("--cycle-overhead-ms", type=float, default=1.0,
                     help="milliseconds of a cycle outside forwards (default: 1, a guess)")  # fmt: skip
    add("--out", type=Path, metavar="FILE.json", help="write the report here as JSON too")
    return made


def run(argv: Sequence[str]) -> int:
    """Measures and simulates; returns the exit status."""
    options = parser().parse_args(argv)
    name, shape = SHAPES["quick" if options.quick else options.model]
    published = read_json(PUBLISHED, "published figures")
    device = torch.device(device_map_for(options.device))
    report: dict[str, Any] = {
        "model": name, "shape": asdict(shape), "quick": options.quick, "settings": vars(options) | {"out": None},
        "formula": FORMULA, "published": published, "commit": commit(), "versions": versions(),
        "hardware": hardware(device) | {"memory_bytes": psutil.virtual_memory().total}, "measured": None,
    }  # fmt: skip
    places: dict[str, Times] = {}
    tree = TreeConfig.from_dict(published["tree"])
    if not options.simulate_only:
        report["measured"] = measured = measure_costs(shape, tree, device, options)
        places[f"{device.type}, measured"] = times_of(measured, tree)
    bounds = (tree.depth, tree.top_k, tree.total_tokens)
    places |= {place: gpu.times(shape, bounds, options.prompt) for place, gpu in gpus(options).items()}
    report["simulated"] = {
        place: simulate(times, name, published, options.new_tokens) for place, times in places.items()
    }
    show(report)
    if options.out:
        with atomic_write(options.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    return 0


def gpus(options: argparse.Namespace) -> dict[str, Gpu]:
    """The GPU of the options, without and with its guessed overheads."""
    plain = Gpu(
        bandwidth=options.bandwidth * TERA * options.bandwidth_share,
        arithmetic=options.arithmetic * TERA * options.arithmetic_share,
    )
    layer, cycle = options.layer_overhead_us / 1e6, options.cycle_overhead_ms / 1e3
    return {"GPU, roofline": plain, "GPU, with overheads": replace(plain, layer_overhead=layer, cycle_overhead=cycle)}


def simulate(times: Times, name: str, published: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Speed-up for each published acceptance length of a model."""
    rows = [row for row in published["acceptance"]["rows"] if row["model"] == name]
    return {
        "seconds": asdict(times),
        "break_even_tau": break_even(times.one, times.draft, times.verify),
        "rows": [
            row | {"bound": times.bound(row["tau"]), "request": times.request(row["tau"], new_tokens)} for row in rows
        ],
        "published_speedup": published["speedup"][name],
    }


def measure_costs(shape: Shape, tree: TreeConfig, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Builds as much of the model as fits, and times it."""
    dtype = dtype_for(options.dtype, options.device)
    dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    built = options.layers or layers_that_fit(shape, dtype, free_memory(device))
    if not 2 <= built <= shape.layers:
        raise UserError(f"{built} of {shape.layers} layers", fix="give --layers from 2 to all, or free some memory")
    small = replace(shape, layers=built)
    target = random_target(small, dtype, device)
    load_seconds = None
    if not options.no_load:
        target, load_seconds = write_and_load(target, dtype, device)
    target.prepare_for_decoding()
    draft = random_draft(small, dtype, device).prepare_for_decoding(target.model.get_output_embeddings())
    depths = (max(1, built // 2), built)
    shorter = with_layers(target, depths[0], lambda: costs(target, draft, tree, options))
    whole = costs(target, draft, tree, options)
    pairs = zip(shorter[0].verify, whole[0].verify, strict=True)
    larger = weight_bytes(shape, dtype) / weight_bytes(small, dtype)
    return {
        "dtype": str(dtype).removeprefix("torch."), "layers_built": built, "layers": shape.layers,
        "scaled": built < shape.layers, "depths": depths, "context": options.prompt, "nodes": whole[0].nodes,
        "verify_seconds": [to_depth(*pair, depths, shape.layers) for pair in pairs],
        "draft_step_seconds": whole[0].step, "draft_extend_seconds": whole[0].extend,
        "prompt_seconds": to_depth(shorter[1], whole[1], depths, shape.layers), "draft_prompt_seconds": whole[2],
        "load_seconds": None if load_seconds is None else load_seconds * larger,
        "weight_bytes": weight_bytes(shape, dtype), "peak_memory_bytes": peak_memory(device),
        "as_built": {"verify_seconds": [shorter[0].verify, whole[0].verify], "load_seconds": load_seconds},
    }  # fmt: skip


def costs(
    target: Target, draft: DraftModel, tree: TreeConfig, options: argparse.Namespace
) -> tuple[CostCurve, float, float]:
    """Cost curve after the prompt, seconds for the prompt, and for the draft's reading of it."""
    curve = measure(target, draft, tree, context=options.prompt, rounds=options.rounds)
    inputs = RandomPrompt(options.prompt).inputs(target)
    with torch.inference_mode():
        start = time.perf_counter()
        prefill = target.prefill(inputs)
        prefill.hidden[0, -1, 0].item()
        middle = time.perf_counter()
        rows = draft.fuse(prefill.hidden, prefill.embeds)
        draft(rows, prefill.positions, last_only=True)[0, 0, 0].item()
    return curve, middle - start, time.perf_counter() - middle


def with_layers(target: Target, count: int, run: Any) -> Any:
    """What ``run`` gives while the target has only its first ``count`` layers."""
    text, config = target.text_model, target.config.get_text_config()
    every, depth = text.layers, config.num_hidden_layers
    text.layers, config.num_hidden_layers = every[:count], count
    try:
        return run()
    finally:
        text.layers, config.num_hidden_layers = every, depth


def times_of(measured: dict[str, Any], tree: TreeConfig) -> Times:
    """The measured times of one cycle with ``tree``."""
    nodes, verify = measured["nodes"], measured["verify_seconds"]
    return Times(
        one=verify[nodes.index(1)],
        draft=measured["draft_extend_seconds"] + tree.depth * measured["draft_step_seconds"],
        verify=verify[nodes.index(tree.total_tokens)],
        prompt=measured["prompt_seconds"],
        draft_prompt=measured["draft_prompt_seconds"],
    )


def write_and_load(target: Target, dtype: torch.dtype, device: torch.device) -> tuple[Target, float]:
    """The same target, from a file, and the seconds that loading took; the file is likely in the system's cache."""
    needed, room = sum(each.nbytes for each in target.model.parameters()), shutil.disk_usage(tempfile.gettempdir()).free
    if room < needed:
        where = f"{tempfile.gettempdir()}, {room / GIGA:.0f} of {needed / GIGA:.0f} GB"
        raise UserError("no room to write the weights", where, "set TMPDIR to another folder, or use --no-load")
    with tempfile.TemporaryDirectory(prefix="msd-real-size-") as folder:
        target.model.save_pretrained(folder)
        target.model = None  # type: ignore[assignment]  # one copy in memory at a time
        gc.collect()
        start = time.perf_counter()
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, device_map=str(device))
        seconds = time.perf_counter() - start
    return LlavaTarget(model, processor=None), seconds


def weight_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Of target and draft, the token embeddings of both included."""
    layers, width = shape.tower
    count = shape.layers * shape.layer_parameters + 3 * shape.head_parameters + shape.draft_parameters
    return (count + layers * 12 * width**2) * dtype.itemsize


def layers_that_fit(shape: Shape, dtype: torch.dtype, free: int) -> int:
    """As many of the shape's layers as `MEMORY_SHARE` of ``free`` bytes holds with all else."""
    fixed = weight_bytes(replace(shape, layers=0), dtype)
    count = int((MEMORY_SHARE * free - fixed) // (shape.layer_parameters * dtype.itemsize))
    return max(0, min(count, shape.layers))


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def peak_memory(device: torch.device) -> int:
    """Bytes that the process had at most, on the device where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show(report: dict[str, Any]) -> None:
    """Tables on the terminal."""
    console, measured = Console(), report["measured"]
    if measured is not None:
        note = f"{measured['layers_built']} of {measured['layers']} layers, {measured['dtype']}"
        note += ", scaled to all" if measured["scaled"] else ""
        table = Table("nodes", "T_verify, ms", "break-even τ", title=f"{report['model']}'s shape, random: {note}")
        draft, (one, *_) = measured["draft_extend_seconds"], measured["verify_seconds"]
        depth = report["published"]["tree"]["depth"]
        draft += depth * measured["draft_step_seconds"]
        for nodes, seconds in zip(measured["nodes"], measured["verify_seconds"], strict=True):
            table.add_row(str(nodes), f"{1000 * seconds:.1f}", f"{break_even(one, draft, seconds):.2f}")
        console.print(table)
        load = "not measured" if measured["load_seconds"] is None else f"{measured['load_seconds']:.1f} s"
        console.print(
            f"T_draft {1000 * draft:.1f} ms ({depth} levels after the first); "
            f"prompt {measured['prompt_seconds']:.2f} s; load {load}; "
            f"weights {measured['weight_bytes'] / GIGA:.1f} GB; "
            f"peak memory as built {measured['peak_memory_bytes'] / GIGA:.1f} GB"
        )
    for place, each in report["simulated"].items():
        published = each["published_speedup"]
        table = Table("T", "task", "τ", "bound", "request", title=f"{place}: {FORMULA}; published up to {published}x")
        for row in each["rows"]:
            figures = (f"{row['tau']:.2f}", f"{row['bound']:.2f}x", f"{row['request']:.2f}x")
            table.add_row(str(row["temperature"]), row["task"], *figures)
        console.print(table)


if __name__ == "__main__":
    sys.exit(run_cli(lambda: run(sys.argv[1:])))

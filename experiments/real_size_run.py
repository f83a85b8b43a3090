"""The measurement and the simulation of `experiments.real_size`."""

from __future__ import annotations

import argparse
import gc
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration

from benchmarks.random_pair import RandomPrompt, Shape, random_draft, random_target
from eagle.decode.adaptive.cost import measure
from eagle.decode.adaptive.planner import CostCurve
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.msd import DraftModel
from eagle.families.base import Target
from eagle.families.llava.target import LlavaTarget
from eagle.loading import device_map_for
from experiments.common import run_record
from llava.device import dtype_for
from llava.errors import UserError
from llava.files import read_json, write_json

SHAPES = {
    "7b": ("LLaVA-1.5-7B", Shape(4096, 32, 32, 11_008, 32_000, 4096, (24, 1024), 336)),
    "13b": ("LLaVA-1.5-13B", Shape(5120, 40, 40, 13_824, 32_000, 4096, (24, 1024), 336)),
    "quick": ("LLaVA-1.5-7B", Shape(32, 4, 2, 48, 128, 512)),
}
PUBLISHED = Path(__file__).resolve().parent / "published.json"
FORMULA = "speed-up <= tau * T(1) / (T_draft + T_verify(n))"
MEMORY_SHARE = 0.6  # of the free memory, for weights
PROMPT, NEW_TOKENS, ROUNDS = 640, 128, 5
BYTES = 2  # of a weight in 16 bit
GIGA, TERA = 1e9, 1e12
BANDWIDTH_SHARE, ARITHMETIC_SHARE = 0.8, 0.5  # reached of a GPU's data sheet: guesses
LAYER_OVERHEAD = 250e-6  # seconds to launch a layer from Python: a guess
CYCLE_OVERHEAD = 1e-3  # seconds of a cycle outside forwards: a guess


def break_even(one: float, draft: float, verify: float) -> float:
    """The acceptance length below which speculation loses."""
    return (draft + verify) / one


@dataclass(frozen=True)
class Times:
    """Seconds of one machine: ``one`` token plainly, ``draft`` and ``verify`` of a cycle, the rest of a cycle
    (``other``), and of a request its ``prompt``, and the draft's reading of it (``draft_prompt``)."""

    one: float
    draft: float
    verify: float
    other: float = 0.0
    prompt: float = 0.0
    draft_prompt: float = 0.0

    def bound(self, tau: float) -> float:
        """Speed-up of decoding alone."""
        return tau * self.one / (self.draft + self.verify)

    def request(self, tau: float, new_tokens: int) -> float:
        """Speed-up of a whole request; its first token comes from the prompt."""
        later = new_tokens - 1
        plain = self.prompt + later * self.one
        cycle = self.draft + self.verify + self.other
        return plain / (self.prompt + self.draft_prompt + later / tau * cycle)


@dataclass(frozen=True)
class Gpu:
    """``bandwidth`` bytes a second, ``arithmetic`` floating-point operations a second, both as really reached;
    ``layer_overhead`` seconds that the host needs to launch a layer, where it does not hide behind the device;
    ``cycle_overhead`` seconds of a cycle outside forwards."""

    bandwidth: float
    arithmetic: float
    layer_overhead: float = 0.0
    cycle_overhead: float = 0.0

    def seconds(self, parameters: float, hidden: int, layers: int, rows: int, context: int) -> float:
        """One forward of ``rows`` rows through ``layers`` layers that have ``parameters`` with the head."""
        read = BYTES * parameters + 2 * BYTES * layers * hidden * context
        computed = 2 * rows * parameters + 4 * rows * layers * hidden * context
        return max(read / self.bandwidth, computed / self.arithmetic) + layers * self.layer_overhead

    def forward(self, shape: Shape, rows: int, context: int) -> float:
        """The target's."""
        parameters = shape.layers * shape.layer_parameters + shape.head_parameters
        return self.seconds(parameters, shape.hidden, shape.layers, rows, context)

    def draft_step(self, shape: Shape, rows: int, context: int, head: bool = True) -> float:
        """One level of the draft: one layer, and the target's head unless only the prompt is read."""
        parameters = shape.draft_parameters + (shape.head_parameters if head else 0)
        return self.seconds(parameters, shape.hidden, 1, rows, context)

    def times(self, shape: Shape, tree: tuple[int, int, int], context: int) -> Times:
        """Of a tree of (depth, top-k, nodes) after ``context`` positions. A tree has ``depth`` levels after the first
        one, which comes from reading the accepted rows."""
        depth, top_k, nodes = tree
        return Times(
            one=self.forward(shape, 1, context),
            draft=self.draft_step(shape, depth, context) + depth * self.draft_step(shape, top_k, context),
            verify=self.forward(shape, nodes, context),
            other=self.cycle_overhead,
            prompt=self.forward(shape, context, 0),
            draft_prompt=self.draft_step(shape, context, 0, head=False),
        )


def to_depth(short: float, long: float, depths: tuple[int, int], wanted: int) -> float:
    """Time at ``wanted`` layers from the times at two ``depths``, by the straight line through them: what no layer
    takes, and what each takes."""
    a_layer = max(0.0, (long - short) / (depths[1] - depths[0]))
    return max(long, short) + a_layer * (wanted - depths[1])


def run(options: argparse.Namespace) -> None:
    """Measures and simulates; prints tables, writes JSON if asked."""
    name, shape = SHAPES[options.model]
    prompt, new_tokens = (40, 16) if options.model == "quick" else (PROMPT, NEW_TOKENS)
    published = read_json(PUBLISHED, "published figures")
    device = torch.device(device_map_for(options.device))
    report: dict[str, Any] = {
        **run_record(options, device), "model": name, "shape": asdict(shape), "formula": FORMULA,
        "published": published, "memory_bytes": psutil.virtual_memory().total, "measured": None,
    }  # fmt: skip
    places: dict[str, Times] = {}
    tree = TreeConfig.from_dict(published["tree"])
    if not options.simulate_only:
        report["measured"] = measured = measure_costs(shape, tree, device, prompt)
        places[f"{device.type}, measured"] = times_of(measured, tree)
    bounds = (tree.depth, tree.top_k, tree.total_tokens)
    places |= {place: gpu.times(shape, bounds, prompt) for place, gpu in gpus(options).items()}
    report["simulated"] = {place: simulate(times, name, published, new_tokens) for place, times in places.items()}
    show(report)
    if options.out:
        write_json(options.out, report)


def gpus(options: argparse.Namespace) -> dict[str, Gpu]:
    """The GPU of the options, without and with its guessed overheads."""
    plain = Gpu(
        bandwidth=options.bandwidth * TERA * BANDWIDTH_SHARE, arithmetic=options.arithmetic * TERA * ARITHMETIC_SHARE
    )
    overheads = replace(plain, layer_overhead=LAYER_OVERHEAD, cycle_overhead=CYCLE_OVERHEAD)
    return {"GPU, roofline": plain, "GPU, with overheads": overheads}


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


def measure_costs(shape: Shape, tree: TreeConfig, device: torch.device, prompt: int) -> dict[str, Any]:
    """Builds as many layers of the model as fit, and times them.

    Raises:
        UserError: memory does not hold two layers.
    """
    dtype = dtype_for("auto", str(device))
    dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    built = layers_that_fit(shape, dtype, free_memory(device))
    if built < 2:
        raise UserError(f"memory for {built} of {shape.layers} layers", fix="free some memory: two are needed")
    small = replace(shape, layers=built)
    target, load_seconds = write_and_load(random_target(small, dtype, device), dtype, device)
    target.prepare_for_decoding()
    draft = random_draft(small, dtype, device).prepare_for_decoding(target.model.get_output_embeddings())
    depths = (max(1, built // 2), built)
    shorter = with_layers(target, depths[0], lambda: costs(target, draft, tree, prompt))
    whole = costs(target, draft, tree, prompt)
    pairs = zip(shorter[0].verify, whole[0].verify, strict=True)
    larger = weight_bytes(shape, dtype) / weight_bytes(small, dtype)
    return {
        "dtype": str(dtype).removeprefix("torch."), "layers_built": built, "layers": shape.layers,
        "scaled": built < shape.layers, "depths": depths, "context": prompt, "nodes": whole[0].nodes,
        "verify_seconds": [to_depth(*pair, depths, shape.layers) for pair in pairs],
        "draft_step_seconds": whole[0].step, "draft_extend_seconds": whole[0].extend,
        "prompt_seconds": to_depth(shorter[1], whole[1], depths, shape.layers), "draft_prompt_seconds": whole[2],
        "load_seconds": load_seconds * larger,
        "weight_bytes": weight_bytes(shape, dtype), "peak_memory_bytes": peak_memory(device),
        "as_built": {"verify_seconds": [shorter[0].verify, whole[0].verify], "load_seconds": load_seconds},
    }  # fmt: skip


def costs(target: Target, draft: DraftModel, tree: TreeConfig, prompt: int) -> tuple[CostCurve, float, float]:
    """Cost curve after the prompt, seconds for the prompt, and for the draft's reading of it."""
    curve = measure(target, draft, tree, context=prompt, rounds=ROUNDS)
    inputs = RandomPrompt(prompt).inputs(target)
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
        raise UserError("no room to write the weights", where, "set TMPDIR to a folder on a larger disk")
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
        console.print(
            f"T_draft {1000 * draft:.1f} ms ({depth} levels after the first); "
            f"prompt {measured['prompt_seconds']:.2f} s; load {measured['load_seconds']:.1f} s; "
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

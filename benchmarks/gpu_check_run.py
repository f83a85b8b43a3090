"""The parts of `benchmarks.gpu_check`, and its report."""

from __future__ import annotations

import argparse
import gc
import html
import itertools
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.random_pair import RandomPrompt, Shape, random_pair
from eagle.benchmark import Contestant, Work, interleave, strongest, with_engine, with_transformers
from eagle.decode.adaptive.cost import measure
from eagle.decode.msd import MSDModel
from eagle.decode.tree_config import TreeConfig
from eagle.exactness import MANY_STEPS, first_difference, logit_gap
from eagle.provenance import record
from eagle.questions import Question, read_questions
from llava.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
PAIRS = {"pocket LLaVA": "llava", "pocket Qwen2-VL": "qwen2vl"}
SHAPES = {
    "7b": Shape(4096, 32, 32, 11_008, 32_000, 20_480, (24, 1024), 336),
    "tiny": Shape(64, 4, 2, 128, 512, 4096),
}
CONTEXTS = {"7b": (700, 2_000, 4_000, 16_000), "tiny": (100, 300)}
BATCHES = (1, 4, 8, 16)
COMPILED_BATCH = 4
"""Of the part about compiling; that about batches has those of `BATCHES`."""
PUBLISHED_TAU = 4.75
"""τ of the published LLaVA-1.5-7B draft in a third party's run (MMSpec, 723 turns, T = 0), for the speed to expect."""
MOST_LAUNCHES = 40
"""Of a compiled cycle (docs/long-visual-context.md)."""
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Part:
    """One part of the report. ``verdicts``: (what was expected, whether it holds, what was found)."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    verdicts: list[tuple[str, bool, str]] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0

    def expect(self, what: str, holds: bool, found: str) -> None:
        self.verdicts.append((what, holds, found))


def run_parts(arguments: argparse.Namespace) -> int:
    """Runs all parts within the time and writes the report. Exit status 1 if a part failed."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(arguments.device or found or "cpu")
    arguments.device = str(device)
    arguments.dtype = arguments.dtype or ("float32" if device.type == "cpu" else "float16")
    arguments.out.mkdir(parents=True, exist_ok=True)
    console, parts = Console(width=None if sys.stdout.isatty() else 160), []
    deadline = time.perf_counter() + 60 * arguments.minutes
    for name, run in plan(arguments, device):
        part = Part(name)
        parts.append(part)
        start = time.perf_counter()
        if start > deadline:
            part.error = "not run: the time is over (--minutes)"
            continue
        console.print(f"[bold]{name}[/bold]")
        try:
            run(part)
        except Exception as error:  # the other parts still run, and the report says what happened
            part.error = f"{type(error).__name__}: {str(error)[:500]}"
            traceback.print_exc(file=sys.stderr)
        part.seconds = time.perf_counter() - start
        release(device)
        print_part(console, part)
        save(arguments, device, parts)
    odd = sum(not holds for part in parts for _, holds, _ in part.verdicts)
    failed = sum(part.error is not None for part in parts)
    console.print(f"{len(parts)} parts: {failed} failed, {odd} figures not as expected (worth a report, not an error)")
    console.print(f"written: {arguments.out / 'gpu_check.json'}, {arguments.out / 'gpu_check.html'}")
    return 1 if any(part.error for part in parts) else 0


def plan(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Callable[[Part], None]]]:
    """The parts in order of importance."""
    dtype = getattr(torch, arguments.dtype)
    pairs = {name: (ROOT / "pocket" / stem, ROOT / "pocket" / f"{stem}-msd") for name, stem in PAIRS.items()}
    if arguments.base:
        pairs = {"real pair": (arguments.base, arguments.draft), **pairs}
    for name, (base, draft) in pairs.items():

        def answers(part: Part, base: Any = base, draft: Any = draft) -> None:
            check_answers(part, load(base, draft, dtype, device), questions_of(arguments), arguments.new_tokens)

        yield f"{name}: identity of answers", answers
    shape = SHAPES[arguments.shape]
    yield f"random weights, {arguments.shape}: costs", lambda part: check_costs(part, arguments, shape, dtype, device)
    if device.type != "cpu" or arguments.quick:
        yield (
            f"random weights, {arguments.shape}: compiled parts",
            lambda part: check_compiled(part, arguments, shape, dtype, device),
        )
    for name, (base, draft) in pairs.items():

        def speed(part: Part, base: Any = base, draft: Any = draft) -> None:
            check_speed(part, base, draft, dtype, device, arguments)

        yield f"{name}: speed", speed
    yield "batches", lambda part: check_batches(part, arguments, dtype, device)
    yield "training", lambda part: check_training(part, shape, device)


def questions_of(arguments: argparse.Namespace) -> list[Question]:
    return read_questions(ROOT / "pocket" / "data" / "heldout.jsonl", arguments.questions)


def load(base: Any, draft: Any, dtype: torch.dtype, device: torch.device, **settings: Any) -> MSDModel:
    return MSDModel.from_pretrained(base, draft, dtype=dtype, device_map=str(device), **settings)


def check_answers(part: Part, model: MSDModel, questions: Sequence[Question], length: int) -> None:
    """Greedy answers against `generate`, with the logit gap at the first difference of each."""
    gaps = []
    model.warm_up()
    for question in questions:
        inputs = question.inputs(model.target)
        expected = model.target.model.generate(**inputs, max_new_tokens=length, do_sample=False)[0]
        found = model.generate(**inputs, max_new_tokens=length, temperature=0.0).sequences[0]
        if (place := first_difference(expected, found)) is not None and place < min(len(expected), len(found)):
            gap = logit_gap(model.target, inputs, expected, place, int(found[place]))
            gaps.append({"id": question.id, "place": place - inputs["input_ids"].shape[1], **gap._asdict()})
        elif place is not None:
            gaps.append({"id": question.id, "place": place - inputs["input_ids"].shape[1], "steps": float("inf")})
    part.figures |= {"questions": len(questions), "differ": len(gaps), "gaps": gaps, "device": str(model.device)}
    part.figures["compiled"] = model.backend or "no"
    far = sum(gap["steps"] > MANY_STEPS for gap in gaps)
    part.expect("answers differ only where two logits are nearly equal", far == 0, f"{far} of {len(gaps)} are not")
    if model.dtype == torch.float32:
        part.expect("float32 answers are identical", not gaps, f"{len(gaps)} of {len(questions)} differ")


def check_costs(
    part: Part, arguments: argparse.Namespace, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    """Time of a plain step, of a verification by its nodes and of a draft step, for each context, without compiling."""
    start = time.perf_counter()
    tree = TreeConfig.for_device(device)
    model = random_pair(shape, dtype, device, tree)
    part.figures["seconds to load"] = time.perf_counter() - start
    part.figures["allocated GB"] = allocated(device)
    rows = []
    for context in CONTEXTS[arguments.shape]:
        cost = measure(model.target, model.draft, tree, context, rounds=2 if arguments.quick else 5)  # type: ignore[arg-type]
        verify = dict(zip(cost.nodes, cost.verify, strict=True))
        cycle = cost.extend + tree.depth * cost.step + verify[max(verify)]
        rows.append(
            {
                "context": context,
                **{f"verify {nodes}": 1000 * seconds for nodes, seconds in verify.items()},
                "draft step": 1000 * cost.step,
                "extend": 1000 * cost.extend,
                f"speed-up at tau {PUBLISHED_TAU}": PUBLISHED_TAU * verify[min(verify)] / cycle,
            }
        )
    part.figures["eager, ms"] = rows
    ratio = rows[0][f"verify {max(verify)}"] / rows[0][f"verify {min(verify)}"]
    if device.type != "cpu":
        part.expect("a whole tree costs little more than one token", ratio < 1.5, f"{ratio:.2f}x at the first context")
    part.figures |= {"launches and waits": events_of(model, device)}


def check_compiled(
    part: Part, arguments: argparse.Namespace, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    """Compilations, graph breaks and skipped CUDA graphs of compiled decoding, and its speed beside eager decoding.
    After the warm-up requests have other contexts, capacities and trees."""
    from torch._dynamo.utils import counters

    model = random_pair(shape, dtype, device, TreeConfig.for_device(device))
    backend = "inductor" if device.type != "cpu" else "eager"
    compiled = MSDModel(model.target, model.draft, model.tree, compile=backend)
    counters.clear()
    lengths = CONTEXTS[arguments.shape][:3]
    start = time.perf_counter()
    compiled.warm_up(batch_sizes=[1, COMPILED_BATCH])
    before = counters["stats"]["unique_graphs"]
    part.figures |= {"warm-up s": time.perf_counter() - start, "functions compiled": before}
    rows = []
    trees = [model.tree, TreeConfig(3, 4, 16), TreeConfig(4, 1, 5)]
    for length, tree in itertools.product(lengths, trees):
        known, start = counters["stats"]["unique_graphs"], time.perf_counter()
        prompt = RandomPrompt(length).inputs(model.target)
        compiled.generate(**prompt, max_new_tokens=16, temperature=0.0, tree=tree)
        rows.append(
            {
                "context": length,
                "tree": f"{tree.depth}/{tree.top_k}/{tree.total_tokens}",
                "functions compiled": counters["stats"]["unique_graphs"] - known,
                "first request s": time.perf_counter() - start,
            }
        )
    known, start = counters["stats"]["unique_graphs"], time.perf_counter()
    batch = RandomPrompt(lengths[0], COMPILED_BATCH).inputs(model.target)
    answers = compiled.generate(**batch, max_new_tokens=16, temperature=0.0).tokens
    compiled.generate(**batch, max_new_tokens=16, temperature=0.0, eos_token_id=[answers[0][2], answers[1][6]])
    rows.append(
        {
            "context": lengths[0],
            "tree": f"batch of {COMPILED_BATCH}, sequences end one by one",
            "functions compiled": counters["stats"]["unique_graphs"] - known,
            "first request s": time.perf_counter() - start,
        }
    )
    contestants = [
        Contestant("eager", with_engine(model, True, {"max_new_tokens": 32, "temperature": 0.0})),
        Contestant("compiled", with_engine(compiled, True, {"max_new_tokens": 32, "temperature": 0.0})),
    ]
    for _ in interleave(contestants, [[RandomPrompt(length)] for length in lengths], warm_up=len(lengths)):
        pass
    late = counters["stats"]["unique_graphs"] - before
    part.figures |= {
        "after the warm-up": rows,
        "graph breaks": dict(counters["graph_break"]),
        "skipped CUDA graphs": counters["inductor"]["cudagraph_skips"],
        "phases ms a cycle": {
            each.name: {phase: ms / max(each.total.cycles, 1) for phase, ms in each.total.phases_ms.items()}
            for each in contestants
        },
    }
    if device.type != "cpu":
        seen = part.figures["launches and waits, compiled"] = events_of(compiled, device)
        part.expect(f"at most {MOST_LAUNCHES} launches a cycle", seen["launches"] <= MOST_LAUNCHES, str(seen))
        part.expect("one wait a cycle", round(seen["waits"]) <= 1, str(seen))
    part.expect("no compilation after warm-up", late == 0, f"{late} functions")
    part.expect("no graph breaks", not counters["graph_break"], f"{sum(counters['graph_break'].values())}")
    if device.type != "cpu":
        skips = counters["inductor"]["cudagraph_skips"]
        part.expect("no skipped CUDA graphs", skips == 0, str(skips))


def check_speed(
    part: Part, base: Any, draft: Any, dtype: torch.dtype, device: torch.device, arguments: argparse.Namespace
) -> None:
    """MSD, eager and compiled, against plain decoding by our loop and by `generate`, with both kinds of its cache."""
    settings = {"max_new_tokens": arguments.new_tokens, "temperature": 0.0}
    model = load(base, draft, dtype, device, compile=False)
    plain = [
        Contestant("autoregressive", with_engine(model, False, settings), plain=True),
        Contestant("generate, dynamic cache", with_transformers(model, settings), plain=True),
    ]
    ways = [Contestant("MSD", with_engine(model, True, settings))]
    if device.type != "cpu":
        static = with_transformers(model, settings, cache_implementation="static")
        plain.append(Contestant("generate, static cache, compiled", static, plain=True))
        compiled = MSDModel(model.target, model.draft, compile=True)
        compiled.warm_up()
        plain.append(Contestant("autoregressive, compiled", with_engine(compiled, False, settings), plain=True))
        ways.append(Contestant("MSD, compiled", with_engine(compiled, True, settings)))
    questions: list[list[Work]] = [[question] for question in questions_of(arguments)]
    for _ in interleave([*ways, *plain], questions, warm_up=1 if arguments.quick else 3):
        pass
    best = strongest(plain)
    part.figures["baseline"] = best.name
    part.figures["ways"] = [
        {
            "way": each.name,
            "tokens/s": each.total.tokens_per_second,
            "first token ms": 1000 * each.total.first_token / each.total.requests,
            "tau": each.total.tau if each.total.cycles else None,
            "speed-up of totals": each.total.tokens_per_second / best.total.tokens_per_second,
            "mean of paired speed-ups": statistics.fmean(
                own.tokens_per_second / other.tokens_per_second
                for own, other in zip(each.rounds, best.rounds, strict=True)
            ),
            "after the first token": each.total.decoding_speed / best.total.decoding_speed,
        }
        for each in [*plain, *ways]
    ]
    fastest = strongest(ways).total.tokens_per_second / best.total.tokens_per_second
    part.expect("MSD is faster than the strongest plain way", fastest > 1, f"{fastest:.2f}x over {best.name}")


def check_batches(part: Part, arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> None:
    """Tokens per second of batches with MSD and without, eager and on an accelerator also compiled."""
    model = load(ROOT / "pocket" / "llava", ROOT / "pocket" / "llava-msd", dtype, device, compile=False)
    settings = {"max_new_tokens": min(arguments.new_tokens, 64), "temperature": 0.0}
    sizes, rows = BATCHES if not arguments.quick else BATCHES[:2], []
    models = {"": model}
    if device.type != "cpu":
        models[", compiled"] = MSDModel(model.target, model.draft, compile=True)
        models[", compiled"].warm_up(batch_sizes=sizes)
    for size in sizes:
        prompts = [RandomPrompt(64 + 8 * number, size, seed=number) for number in range(3)]
        ways = [
            Contestant(f"{name}{how}", with_engine(each, not plain, settings), plain=plain)
            for how, each in models.items()
            for name, plain in (("MSD", False), ("plain", True))
        ]
        for _ in interleave(ways, [[prompt] for prompt in prompts], warm_up=1):
            pass
        speeds = {f"{way.name} tokens/s": way.total.tokens_per_second for way in ways}
        msd, plain = (strongest([way for way in ways if way.plain is kind]).total for kind in (False, True))
        rows.append({"batch": size, **speeds, "ratio": msd.tokens_per_second / plain.tokens_per_second})
    part.figures["random prompts"] = rows
    worst = min(row["ratio"] for row in rows)
    part.expect("a batch is not slower with MSD than without", worst > 0.95, f"worst ratio {worst:.2f}")


def check_training(part: Part, shape: Shape, device: torch.device) -> None:
    """Seconds of one training step of a draft of this shape on stored hidden states in memory."""
    from eagle.drafts.config import DraftConfig
    from eagle.drafts.msd import DraftModel
    from eagle.families.base_weights import BaseTensors
    from eagle.hidden_states.shards import Sample
    from eagle.train.collate import collate
    from eagle.train.engine import PlainEngine
    from eagle.train.loss import DraftObjective
    from eagle.train.schedule import BatchSizes
    from eagle.train.settings import TrainConfig

    torch.manual_seed(0)
    length, size = (64, 2) if shape == SHAPES["tiny"] else (1024, 4)
    config = DraftConfig.from_dict(
        {"model_type": "llava", "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
         "num_attention_heads": shape.heads, "vocab_size": shape.vocabulary}
    )  # fmt: skip
    table = torch.randn(shape.vocabulary, shape.hidden, dtype=torch.bfloat16) * 0.02
    objective = DraftObjective(DraftModel(config), BaseTensors(table, table), TrainConfig()).to(device)
    no = torch.zeros(length, dtype=torch.bool)
    samples = [
        Sample(str(number), torch.randint(3, shape.vocabulary, (length,)), ~no, no,
               torch.randn(length, shape.hidden).bfloat16(), torch.zeros(0, shape.hidden).bfloat16(),
               torch.empty(0, 3, dtype=torch.int64))
        for number in range(size)
    ]  # fmt: skip
    engine = PlainEngine(objective, TrainConfig(), {"gradient_clipping": 0.5}, BatchSizes(size, 1, 1))
    collated, taken = [], []
    for _ in range(8):
        start = time.perf_counter()
        batch = collate(samples, shape.vocabulary, length)
        collated.append(time.perf_counter() - start)
        synchronize(device)
        start = time.perf_counter()
        engine.step([batch], learning_rate=1e-5)
        synchronize(device)
        taken.append(time.perf_counter() - start)
    step, loading = statistics.median(taken[2:]), statistics.median(collated[2:])
    part.figures |= {
        "samples": size, "tokens of each": length, "step s": step, "collating s": loading,
        "samples/s": size / step, "limit": "collating" if loading > step else "the step",
    }  # fmt: skip
    part.expect("collating one batch is faster than a step", loading < step, f"{loading:.3f} s and {step:.3f} s")


class Operations(TorchDispatchMode):
    """Counts the operations that reach the device, and the reads of a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts["waits" if func is torch.ops.aten._local_scalar_dense.default else "operations"] += 1
        return func(*args, **(kwargs or {}))


def events_of(model: MSDModel, device: torch.device) -> dict[str, float]:
    """Launches and waits of one decoding cycle: of CUDA by the profiler, elsewhere operations by dispatch."""
    inputs = RandomPrompt(64).inputs(model.target)
    settings: dict[str, Any] = {"temperature": 0.0}

    def cycles_and_counts(length: int) -> tuple[int, Counter[str]]:
        if device.type == "cuda":
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                output = model.generate(**inputs, max_new_tokens=length, **settings)
            counts: Counter[str] = Counter()
            for event in profile.key_averages():
                counts["launches"] += event.count if event.key in LAUNCHES else 0
                counts["waits"] += event.count if event.key in WAITS else 0
            return output.stats.cycles, counts
        with Operations() as seen:
            output = model.generate(**inputs, max_new_tokens=length, **settings)
        return output.stats.cycles, seen.counts

    cycles_and_counts(4)  # warm
    (few, first), (many, second) = cycles_and_counts(4), cycles_and_counts(12)
    return {name: (second[name] - first[name]) / max(many - few, 1) for name in second}


def allocated(device: torch.device) -> float | None:
    return torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def release(device: torch.device) -> None:
    """Frees what a part has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def print_part(console: Console, part: Part) -> None:
    for what, holds, found in part.verdicts:
        console.print(f"  {'[green]ok[/green]' if holds else '[red]NOT as expected[/red]'}  {what}: {found}")
    if part.error:
        console.print(f"  [red]failed[/red]  {part.error}")
    for name, value in part.figures.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            table = Table(title=name)
            for column in value[0]:
                table.add_column(str(column), justify="right")
            for row in value:
                table.add_row(*(shown(row.get(column)) for column in value[0]))
            console.print(table)
        else:
            console.print(f"  {name}: {shown(value)}")


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items()) or "none"
    return "" if value is None else str(value)


def save(arguments: argparse.Namespace, device: torch.device, parts: Sequence[Part]) -> None:
    """The JSON and the page, after each part."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    made = {**record(device), "settings": settings, "parts": [asdict(part) for part in parts]}
    write_json(arguments.out / "gpu_check.json", made)
    write_text(arguments.out / "gpu_check.html", page(made))


def page(made: dict[str, Any]) -> str:
    """One page without scripts or links."""
    out = ["<!doctype html><meta charset=utf-8><title>MSD on this GPU</title>"]
    out.append("<style>body{font:15px sans-serif;max-width:70em;margin:auto;padding:1em}td,th{padding:.2em .7em;")
    out.append("text-align:right;border-bottom:1px solid #ccc}.bad{color:#b00}.ok{color:#060}</style>")
    out.append(f"<h1>MSD on {html.escape(shown(made['hardware']))}</h1><p>{html.escape(shown(made['versions']))}</p>")
    for part in made["parts"]:
        out.append(f"<h2>{html.escape(part['name'])}</h2><p>{part['seconds']:.1f} s</p><ul>")
        for what, holds, found in part["verdicts"]:
            word = "ok" if holds else "bad"
            out.append(
                f"<li class={word}>{'as expected' if holds else 'NOT as expected'}: {html.escape(f'{what}: {found}')}"
            )
        if part["error"]:
            out.append(f"<li class=bad>failed: {html.escape(part['error'])}")
        out.append("</ul>")
        for name, value in part["figures"].items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                head = "".join(f"<th>{html.escape(str(column))}" for column in value[0])
                body = "".join(
                    "<tr>" + "".join(f"<td>{html.escape(shown(row.get(column)))}" for column in value[0])
                    for row in value
                )
                out.append(f"<h3>{html.escape(name)}</h3><table><tr>{head}{body}</table>")
            else:
                out.append(f"<p>{html.escape(name)}: {html.escape(shown(value))}</p>")
    return "\n".join(out) + "\n"

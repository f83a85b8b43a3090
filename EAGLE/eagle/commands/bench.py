"""Measure speed and acceptance against plain decoding, in one interleaved run."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from eagle.arguments import (
    add_data_options,
    add_length_option,
    add_model_options,
    add_sampling_options,
    load_model,
    positive,
    sampling_settings,
)
from eagle.benchmark import Contestant, baselines, interleave, strongest, versions, with_engine, with_prompt_lookup
from eagle.decode.stats import Stats
from eagle.decode.tree_config import TreeConfig
from eagle.provenance import hardware
from eagle.questions import read_questions
from llava.files import atomic_write

PLAIN_WIDTH = 120  # of the tables where they go to a file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd bench`."""
    add_model_options(parser)
    add_data_options(parser)
    add_length_option(parser)
    add_sampling_options(parser)
    parser.add_argument(
        "--baseline-dtype", action="append", help="baselines in this dtype too; may be repeated (default: MSD's dtype)"
    )
    parser.add_argument(
        "--also-tree", action="append", type=tree_bounds, default=[], metavar="D/K/N",
        help="MSD with this fixed tree too (depth, top-k, nodes), such as 5/10/60; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-lookup", type=positive, metavar="N",
        help="transformers' prompt-lookup decoding with N tokens too: speculation without a draft",
    )  # fmt: skip
    parser.add_argument(
        "--exact-phases", action="store_true",
        help="wait for the accelerator at the ends of phases: right phases, less speed (no difference on a CPU)",
    )  # fmt: skip
    parser.add_argument("--warm-up", type=int, default=2, help="questions answered first, not counted (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the report here as JSON too")


def run(arguments: argparse.Namespace) -> int:
    """Prints a table; writes the JSON report if asked."""
    questions = read_questions(arguments.data, arguments.limit)
    settings = {"max_new_tokens": arguments.max_new_tokens, **sampling_settings(arguments)}
    model = load_model(arguments)
    model.exact_phases = arguments.exact_phases
    own = str(model.dtype).removeprefix("torch.")
    dtypes = [name for name in dict.fromkeys(arguments.baseline_dtype or []) if name != own]
    plain = [model, *(load_model(arguments, need_draft=False, dtype=name) for name in dtypes)]
    msd = Contestant(f"MSD {own}", with_engine(model, True, settings))
    rivals = baselines(plain, settings)
    others = [Contestant(f"MSD {own}, tree {name_of(tree)}", with_engine(model, True, settings, tree))
              for tree in arguments.also_tree]  # fmt: skip
    if arguments.prompt_lookup:
        others.append(Contestant(f"prompt lookup {own}", with_prompt_lookup(model, settings, arguments.prompt_lookup)))
    progress = tqdm(total=len(questions), desc="bench", unit="question", file=sys.stderr)
    for _ in interleave([msd, *others, *rivals], questions, arguments.warm_up):
        progress.update()
    progress.close()
    asked = {name: value for name, value in vars(arguments).items() if name not in ("command", "out")}
    asked["also_tree"] = [name_of(tree) for tree in arguments.also_tree]
    report = make_report(msd, rivals, {**asked, "tree": vars(model.tree)}, hardware(model.device))
    report["others"] = {
        other.name: {"tokens_per_second": other.total.tokens_per_second, "tau": other.total.tau} for other in others
    }
    print_report(report, msd, [*rivals, *others])
    if arguments.out:
        with atomic_write(arguments.out) as temporary:
            temporary.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return 0


def tree_bounds(text: str) -> TreeConfig:
    """An argparse type: depth/top-k/nodes."""
    try:
        depth, top_k, total_tokens = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not like 5/10/60") from None
    return TreeConfig(depth, top_k, total_tokens)


def name_of(tree: TreeConfig) -> str:
    """As `tree_bounds` reads it."""
    return f"{tree.depth}/{tree.top_k}/{tree.total_tokens}"


def make_report(
    msd: Contestant, rivals: list[Contestant], settings: dict[str, Any], machine: dict[str, Any]
) -> dict[str, Any]:
    """The JSON report; speed-up is against the strongest baseline of the same run."""
    best, total = strongest(rivals), msd.total
    return {
        "speedup": total.tokens_per_second / best.total.tokens_per_second,
        "tau": total.tau,
        "tokens_per_second": {"msd": total.tokens_per_second, "baseline": best.total.tokens_per_second},
        "baseline_name": best.name,
        "baselines": {rival.name: rival.total.tokens_per_second for rival in rivals},
        "phases_ms": {name: ms / max(total.cycles, 1) for name, ms in total.phases_ms.items() if name != "prefill"}
        | {"prefill": total.phases_ms["prefill"] / total.requests},
        "phases_share": total.shares(),
        "first_token_ms": {each.name: first_token_ms(each.total) for each in [msd, *rivals]},
        "decoding_tokens_per_second": {each.name: each.total.decoding_speed for each in [msd, *rivals]},
        "new_tokens": total.new_tokens,
        "cycles": total.cycles,
        "questions": total.requests,
        "histogram": total.histogram,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": machine,
        "settings": settings,
    }


def first_token_ms(total: Stats) -> float:
    """Milliseconds from a request to its first token, on average."""
    return 1000 * total.first_token / total.requests


def print_report(report: dict[str, Any], msd: Contestant, rivals: list[Contestant]) -> None:
    """The same as tables on the terminal."""
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    table = Table(title=f"{report['questions']} questions, {report['new_tokens']} new tokens")
    for column in ("decoding", "tokens/s", "spread (IQR)", "first token", "τ", "speed-up"):
        table.add_column(column, justify="left" if column == "decoding" else "right")
    best = report["tokens_per_second"]["baseline"]
    for contestant in [*rivals, msd]:
        total = contestant.total
        tau = f"{total.tau:.2f}" if total.tau > 1 else ""
        speed = total.tokens_per_second
        first = f"{first_token_ms(total):.0f} ms"
        table.add_row(contestant.name, f"{speed:.1f}", f"{contestant.spread:.0%}", first, tau, f"{speed / best:.2f}x")
    console.print(table)
    phases = ", ".join(f"{name} {ms:.2f}" for name, ms in report["phases_ms"].items())
    console.print(f"ms a cycle (prefill: a question): {phases}")
    for whole, shares in report["phases_share"].items():
        console.print(f"share of a {whole}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    console.print(f"cycles by accepted drafted tokens: {report['histogram']}")

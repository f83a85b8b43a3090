"""Measure speed and acceptance against plain decoding, in one interleaved run; or measure a server.

With --server the models are not loaded: the questions are sent to an OpenAI-style server at several levels of load.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle.arguments import (
    DTYPES,
    add_data_options,
    add_length_option,
    add_model_options,
    add_report_option,
    add_sampling_options,
    count,
    positive,
    tree_limits,
)
from eagle.commands.output import console
from eagle.questions import read_questions
from llava.errors import UserError
from llava.files import check_writable, write_json

if TYPE_CHECKING:
    from eagle.benchmark import Contestant
    from eagle.decode.stats import Stats

NOT_SETTINGS = ("command", "out", "server", "plain_server", "concurrency", "rate", "plot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd bench`."""
    add_model_options(parser, required=False)
    add_data_options(parser)
    add_length_option(parser)
    add_sampling_options(parser)
    parser.add_argument(
        "--baseline-dtype", action="append", choices=DTYPES[1:],
        help="also measure the baselines in this dtype; may be repeated (default: the dtype of MSD)",
    )  # fmt: skip
    parser.add_argument(
        "--compiled-baselines", action=argparse.BooleanOptionalAction,
        help="also measure compiled plain decoding, by our loop and by transformers with its static cache (default: on "
        "an accelerator, and where MSD is compiled)",
    )  # fmt: skip
    parser.add_argument(
        "--also-tree", action="append", type=tree_limits, default=[], metavar="D/K/N",
        help="also measure MSD with this fixed tree (depth, top-k, nodes), such as 5/10/60; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-lookup", type=positive, metavar="N",
        help="also measure transformers' prompt-lookup decoding with N tokens (speculation without a draft)",
    )  # fmt: skip
    parser.add_argument(
        "--exact-phases", action="store_true",
        help="synchronize the accelerator after each phase: exact phase times, lower speed (no difference on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--warm-up", type=count, default=2, metavar="N", help="questions answered first, not counted (default: 2)"
    )
    add_report_option(parser)
    server = parser.add_argument_group("servers")
    server.add_argument("--server", metavar="URL", help="measure this OpenAI-style server, such as one of msd serve")
    server.add_argument("--plain-server", metavar="URL", help="the same model without a draft, asked in turns")
    server.add_argument(
        "--concurrency", type=levels(positive), default=None, metavar="N,N,...",
        help="requests at a time (default: 1,2,4,8,16; none with --rate)",
    )  # fmt: skip
    server.add_argument(
        "--rate", type=levels(above_zero), default=[], metavar="R,R,...", help="requests a second, at random moments"
    )
    server.add_argument("--plot", type=Path, metavar="FILE.png", help="tokens/s of each level as a picture")


def levels(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: several values, separated by commas."""

    def read(text: str) -> list[Any]:
        return [kind(each) for each in text.split(",")]

    read.__name__ = f"list of {kind.__name__} numbers"
    return read


def above_zero(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def run_on_servers(arguments: argparse.Namespace) -> int:
    """As `run`, with ``--server``."""
    from eagle.provenance import record
    from eagle.serving.bench import bench_servers, plot, table_of
    from eagle.serving.client import Load, Server

    for name in ("base_model", "msd_model"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} does not go with --server", fix="the server has the models")
    concurrency = arguments.concurrency or ([] if arguments.rate else [1, 2, 4, 8, 16])
    loads = [*(Load(concurrency=each) for each in concurrency), *(Load(rate=each) for each in arguments.rate)]
    settings = {"max_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    sampling = {name: getattr(arguments, name) for name in ("top_p", "top_k", "seed")}
    settings |= {name: value for name, value in sampling.items() if value is not None}
    report = bench_servers(
        read_questions(arguments.data, arguments.limit),
        loads,
        Server(arguments.server),
        Server(arguments.plain_server) if arguments.plain_server else None,
        settings,
        arguments.warm_up,
    )
    report |= {"settings": {**settings, "warm_up": arguments.warm_up, "data": str(arguments.data)}, **record()}
    console().print(table_of(report))
    if arguments.plot:
        plot(report, arguments.plot)
    if arguments.out:
        write_json(arguments.out, report)
    return 1 if any(level["failed"] for level in report["levels"]) else 0


def run(arguments: argparse.Namespace) -> int:
    """Prints a table; writes the JSON report if ``--out`` is given."""
    if arguments.out:
        check_writable(arguments.out)
    if arguments.server is not None:
        return run_on_servers(arguments)
    for name in ("plain_server", "concurrency", "rate", "plot"):
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} needs --server", fix="name a server")
    if arguments.base_model is None:
        raise UserError("no base model", "--base-model", "name a folder or hub repository, or a server with --server")
    from tqdm import tqdm

    from eagle.benchmark import Contestant, baselines, interleave, with_engine, with_prompt_lookup
    from eagle.decode.tree_config import TreeConfig
    from eagle.loading import load_model, sampling_settings
    from eagle.provenance import record

    questions = read_questions(arguments.data, arguments.limit)
    settings = {"max_new_tokens": arguments.max_new_tokens, **sampling_settings(arguments)}
    model = load_model(arguments)
    model.exact_phases = arguments.exact_phases
    own = str(model.dtype).removeprefix("torch.")
    dtypes = [name for name in dict.fromkeys(arguments.baseline_dtype or []) if name != own]
    plain = [model, *(load_model(arguments, need_draft=False, dtype=name) for name in dtypes)]
    msd = Contestant(f"MSD {own}", with_engine(model, True, settings))
    rivals = baselines(plain, settings, arguments.compiled_baselines)
    trees = {"/".join(map(str, limits)): TreeConfig(*limits) for limits in arguments.also_tree}
    others = [
        Contestant(f"MSD {own}, tree {name}", with_engine(model, True, settings, tree)) for name, tree in trees.items()
    ]
    if arguments.prompt_lookup:
        others.append(Contestant(f"prompt lookup {own}", with_prompt_lookup(model, settings, arguments.prompt_lookup)))
    model.warm_up()
    with tqdm(total=arguments.warm_up + len(questions), desc="bench", unit="question", file=sys.stderr) as progress:
        for _ in interleave([msd, *others, *rivals], [[question] for question in questions], arguments.warm_up):
            progress.update()
    asked = {name: value for name, value in vars(arguments).items() if name not in NOT_SETTINGS}
    asked |= {"also_tree": list(trees), "tree": vars(model.tree)}
    report = make_report(msd, rivals, asked, record(model.device))
    report["others"] = {
        other.name: {"tokens_per_second": other.total.tokens_per_second, "tau": other.total.tau} for other in others
    }
    print_report(report, msd, [*rivals, *others])
    if arguments.out:
        write_json(arguments.out, report)
    return 0


def make_report(
    msd: Contestant, rivals: list[Contestant], settings: dict[str, Any], made: dict[str, Any]
) -> dict[str, Any]:
    """The JSON report; the speed-up is over the strongest baseline of the same run.

    Args:
        made: `eagle.provenance.record`.
    """
    from eagle.benchmark import identical, paired_speedup, strongest

    best, total = strongest(rivals), msd.total
    later = max(rivals, key=lambda rival: rival.total.decoding_speed)

    def decoding(stats: Any) -> float:
        return stats.decoding_speed

    reference = next((rival for rival in rivals if rival.name.startswith("transformers")), best)
    return {
        "speedup": total.tokens_per_second / best.total.tokens_per_second,
        "paired_speedup": paired_speedup(msd, best)._asdict(),
        "after_first_token": {
            "speedup": total.decoding_speed / later.total.decoding_speed,
            "paired_speedup": paired_speedup(msd, later, decoding)._asdict(),
            "baseline_name": later.name,
        },
        "tau": total.tau,
        "accepted_per_cycle": total.accepted_per_cycle,
        "acceptance_by_position": total.acceptance_by_position,
        "identical": {"answers": identical(msd, reference), "of": len(msd.answers), "to": reference.name},
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
        **made,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
    }


def first_token_ms(total: Stats) -> float:
    """Milliseconds from a request to its first token, on average."""
    return 1000 * total.first_token / total.requests


def print_report(report: dict[str, Any], msd: Contestant, rivals: list[Contestant]) -> None:
    """Prints the report as tables."""
    from rich.table import Table

    out = console()
    table = Table(title=f"{report['questions']} questions, {report['new_tokens']} new tokens")
    for column in ("decoding", "tokens/s", "spread (IQR)", "first token", "τ", "speed-up"):
        table.add_column(column, justify="left" if column == "decoding" else "right")
    best = report["tokens_per_second"]["baseline"]
    for contestant in [*rivals, msd]:
        total = contestant.total
        tau = f"{total.tau:.2f}" if total.tau > 1 else ""
        speed = total.tokens_per_second
        first = f"{first_token_ms(total):.0f} ms"
        table.add_row(contestant.name, f"{speed:.1f}", f"{contestant.spread():.0%}", first, tau, f"{speed / best:.2f}x")
    out.print(table)
    paired, after = report["paired_speedup"], report["after_first_token"]
    out.print(
        f"speed-up over {report['baseline_name']}: of totals {report['speedup']:.2f}x, mean of questions "
        f"{paired['mean']:.2f}x [{paired['low']:.2f}, {paired['high']:.2f}]"
    )
    paired = after["paired_speedup"]
    out.print(
        f"after the first token, over {after['baseline_name']}: {after['speedup']:.2f}x, mean of questions "
        f"{paired['mean']:.2f}x [{paired['low']:.2f}, {paired['high']:.2f}]"
    )
    shares = " ".join(f"{share:.2f}" for share in report["acceptance_by_position"])
    out.print(
        f"tokens per verification: {report['tau']:.2f} with the bonus token, {report['accepted_per_cycle']:.2f} "
        f"without; accepted at position 1, 2, …: {shares}"
    )
    same = report["identical"]
    out.print(f"answers identical to {same['to']}: {same['answers']} of {same['of']}")
    phases = ", ".join(f"{name} {ms:.2f}" for name, ms in report["phases_ms"].items())
    out.print(f"ms a cycle (prefill: a question): {phases}")
    for whole, shares in report["phases_share"].items():
        out.print(f"share of a {whole}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    out.print(f"cycles by accepted drafted tokens: {report['histogram']}")

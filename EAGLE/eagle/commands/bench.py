"""Measure speed and acceptance against plain decoding, in one interleaved run; or measure a server.

With --server the models are not loaded: the questions are sent to an OpenAI-style server at several levels of load.
"""

from __future__ import annotations

import argparse
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
from eagle.questions.suites import SUBSETS, SUITES
from llava.errors import UserError
from llava.files import check_writable, write_json

if TYPE_CHECKING:
    from eagle.bench_report import Bench
    from eagle.benchmark import Contestant

FILES = ("out", "html", "csv", "markdown")
SERVER_OPTIONS = ("plain_server", "plain_results", "concurrency", "rate", "plot")
NOT_SETTINGS = ("command", *FILES, "server", *SERVER_OPTIONS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd bench`."""
    add_model_options(parser, required=False)
    add_data_options(parser, required=False)
    parser.add_argument(
        "--suite", choices=tuple(SUITES), help="the questions of a published suite, fetched once (instead of --data)"
    )
    parser.add_argument("--subset", choices=tuple(SUBSETS), help="of the suite (default: test)")
    add_length_option(parser)
    add_sampling_options(parser)
    parser.add_argument(
        "--baseline-dtype", action="append", choices=DTYPES[1:],
        help="also measure the baselines in this dtype; may be repeated (default: the dtype of MSD)",
    )  # fmt: skip
    parser.add_argument(
        "--compiled-baselines", action=argparse.BooleanOptionalAction,
        help="also measure compiled plain decoding, by our loop and by transformers with its static cache (default: on "
        "an accelerator, and always where MSD is compiled)",
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
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="also write a page with plots and all answers")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="also write a line for each source of questions")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="also write a table of one row in Markdown")
    server = parser.add_argument_group("servers")
    server.add_argument("--server", metavar="URL", help="measure this OpenAI-style server, such as one of msd serve")
    plain = server.add_mutually_exclusive_group()
    plain.add_argument("--plain-server", metavar="URL", help="the same model without a draft, asked in turns")
    plain.add_argument(
        "--plain-results",
        type=Path,
        metavar="FILE.json",
        help="report (--out) of an earlier run on a server without it",
    )
    server.add_argument(
        "--concurrency", type=levels(positive), default=None, metavar="N,N,...",
        help="requests at a time, one of each conversation (default: 1,2,4,8,16; none with --rate)",
    )  # fmt: skip
    server.add_argument(
        "--rate",
        type=levels(above_zero),
        default=[],
        metavar="R,R,...",
        help="requests a second, at random moments; a conversation counts once",
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
    from eagle.serving.bench import bench_servers, earlier, plot, table_of
    from eagle.serving.client import Load, Server

    for name in ("base_model", "msd_model", "html", "csv", "markdown"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} does not go with --server", fix="leave it out")
    concurrency = arguments.concurrency or ([] if arguments.rate else [1, 2, 4, 8, 16])
    loads = [*(Load(concurrency=each) for each in concurrency), *(Load(rate=each) for each in arguments.rate)]
    settings = {"max_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    sampling = {name: getattr(arguments, name) for name in ("top_p", "top_k", "seed")}
    settings |= {name: value for name, value in sampling.items() if value is not None}
    questions = read_questions(arguments.data, arguments.limit, turns=True)
    asked = {**settings, "data": str(arguments.data), "questions": len(questions)}
    plain: Any = Server(arguments.plain_server) if arguments.plain_server else None
    if arguments.plain_results:
        plain = earlier(arguments.plain_results, loads, asked)
    report = bench_servers(questions, loads, Server(arguments.server), plain, settings, arguments.warm_up)
    other = arguments.plain_server or arguments.plain_results
    report |= {"plain": other and str(other), "settings": {**asked, "warm_up": arguments.warm_up}, **record()}
    console().print(table_of(report))
    if arguments.plot:
        plot(report, arguments.plot)
    if arguments.out:
        write_json(arguments.out, report)
    return 1 if any(level["failed"] for level in report["levels"]) else 0


def run(arguments: argparse.Namespace) -> int:
    """Prints a table; writes the JSON report if ``--out`` is given."""
    paths = [path for name in FILES if (path := getattr(arguments, name))]
    for path in paths:
        check_writable(path)
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"the same file for two of --{', --'.join(FILES)}", fix="give each a file of its own")
    if (arguments.data is None) == (arguments.suite is None):
        what = "no questions" if arguments.data is None else "both --data and --suite"
        raise UserError(what, fix="give --data FILE.jsonl or --suite NAME")
    if arguments.suite is not None:
        from eagle.questions.fetch import fetch

        arguments.data = fetch(arguments.suite, arguments.subset or "test")
    elif arguments.subset is not None:
        raise UserError("--subset needs --suite", fix="name a suite")
    if arguments.server is not None:
        return run_on_servers(arguments)
    for name in SERVER_OPTIONS:
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} needs --server", fix="name a server")
    if arguments.base_model is None:
        raise UserError("no base model", "--base-model", "name a folder or hub repository, or a server with --server")
    from eagle.bench_report import Bench, make_report
    from eagle.benchmark import Contestant, baselines, interleave_with_bar, with_engine, with_prompt_lookup
    from eagle.decode.sampling import SamplingSettings
    from eagle.decode.tree_config import TreeConfig
    from eagle.loading import load_model, sampling_settings
    from eagle.provenance import record
    from eagle.report.bench import write_csv, write_html, write_markdown

    questions = read_questions(arguments.data, arguments.limit, turns=True)
    settings = {"max_new_tokens": arguments.max_new_tokens, **sampling_settings(arguments)}
    model = load_model(arguments)
    if model.compiled and arguments.compiled_baselines is False:
        fix = "leave it out, or give --no-compile"
        raise UserError("MSD is compiled, and its baselines would not be", "--no-compiled-baselines", fix)
    model.exact_phases = arguments.exact_phases
    own = str(model.dtype).removeprefix("torch.")
    dtypes = [name for name in dict.fromkeys(arguments.baseline_dtype or []) if name != own]
    plain = [model, *(load_model(arguments, need_draft=False, dtype=name) for name in dtypes)]
    msd = Contestant(f"MSD {own}", with_engine(model, True, settings, log=True))
    rivals = baselines(plain, settings, arguments.compiled_baselines)
    trees = {"/".join(map(str, limits)): TreeConfig(*limits) for limits in arguments.also_tree}
    others = [
        Contestant(f"MSD {own}, tree {name}", with_engine(model, True, settings, tree)) for name, tree in trees.items()
    ]
    if arguments.prompt_lookup:
        others.append(Contestant(f"prompt lookup {own}", with_prompt_lookup(model, settings, arguments.prompt_lookup)))
    model.warm_up()
    work = [[question] for question in questions]
    for _ in interleave_with_bar([msd, *others, *rivals], work, arguments.warm_up, "bench", "question"):
        pass
    asked = {name: value for name, value in vars(arguments).items() if name not in NOT_SETTINGS}
    asked |= {"also_tree": list(trees), "tree": vars(model.tree)}
    sampled = SamplingSettings(arguments.temperature).greedy is False
    bench = Bench(model, msd, rivals, questions, sampled, seeded=arguments.seed is not None)
    report = make_report(bench, asked, record(model.device))
    report["others"] = {
        other.name: {"tokens_per_second": other.total.tokens_per_second, "tau": other.total.tau} for other in others
    }
    print_report(report, bench, [*rivals, *others])
    for path, write in ((arguments.out, write_report), (arguments.html, write_html), (arguments.csv, write_csv),
                        (arguments.markdown, write_markdown)):  # fmt: skip
        if path:
            write(report, path)
    return 0


def write_report(report: dict[str, Any], path: Path) -> None:
    """The report as JSON."""
    write_json(path, report)


def print_report(report: dict[str, Any], bench: Bench, rivals: list[Contestant]) -> None:
    """Prints the report as tables."""
    from rich.table import Table

    from eagle.bench_report import first_token_ms
    from eagle.report.bench import identical_text, mean_text, row, setting

    out = console()
    out.print(", ".join(f"{name} {value}" for name, value in setting(report).items()), highlight=False)
    table = Table(title=f"{report['questions']} questions, {report['new_tokens']} new tokens")
    for column in ("decoding", "tokens/s", "spread (IQR)", "first token", "τ", "speed-up"):
        table.add_column(column, justify="left" if column == "decoding" else "right")
    best = report["tokens_per_second"]["baseline"]
    for contestant in [*rivals, bench.msd]:
        total = contestant.total
        tau = f"{total.tau:.2f}" if total.tau > 1 else ""
        speed = total.tokens_per_second
        first = f"{first_token_ms(total):.0f} ms"
        table.add_row(contestant.name, f"{speed:.1f}", f"{contestant.spread():.0%}", first, tau, f"{speed / best:.2f}x")
    out.print(table)
    if report["sources"]:
        cells = {name: row(report, figures) for name, figures in (*report["sources"].items(), ("total", report))}
        by_source = Table("source", *(name for name in cells["total"] if "plain" not in name), title="by source")
        for source, texts in cells.items():
            by_source.add_row(source, *(text for name, text in texts.items() if "plain" not in name))
        out.print(by_source)
    out.print(
        f"speed-up over {report['baseline_name']}: of totals {report['speedup']:.2f}x, mean of questions "
        f"{mean_text(report['paired_speedup'])}"
    )
    after = report["after_first_token"]
    if after["speedup"] is not None:
        out.print(
            f"after the first token, over {after['baseline_name']}: {after['speedup']:.2f}x, mean of questions "
            f"{mean_text(after['paired_speedup'])}"
        )
    shares = " ".join(f"{share:.2f}" for share in report["acceptance_by_position"])
    out.print(
        f"tokens per verification: {report['tau']:.2f} with the bonus token, {report['accepted_per_cycle']:.2f} "
        f"without; accepted at position 1, 2, …: {shares}"
    )
    same = report["identical"]
    out.print(f"answers identical to {same['to'] if same else 'plain decoding'}: {identical_text(same)}")
    phases = ", ".join(f"{name} {ms:.2f}" for name, ms in report["phases_ms"].items())
    out.print(f"ms a cycle (prefill: a question): {phases}")
    for whole, shares in report["phases_share"].items():
        out.print(f"share of a {whole}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    out.print(f"cycles by accepted drafted tokens: {report['histogram']}")

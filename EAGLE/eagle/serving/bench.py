"""`msd bench --server`: levels of load on one server, or on two in turns, as a report, a table and a plot."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle.extras import require
from eagle.questions import Question
from eagle.serving.client import Load, Server, conversations, measure, run_load
from llava.errors import UserError
from llava.files import atomic_write, read_object

if TYPE_CHECKING:
    from rich.table import Table


def bench_servers(
    questions: Sequence[Question],
    loads: Sequence[Load],
    server: Server,
    plain: Server | Mapping[Load, dict[str, Any]] | None,
    settings: dict[str, Any],
    warm_up: int,
) -> dict[str, Any]:
    """Asks all questions at each load. In a conversation the server is asked after its own earlier answers.

    Args:
        server: the one that is measured.
        plain: the same model without a draft. A server is asked right after ``server`` at each load, so that both have
            the same machine; or rows of `earlier`. None if there is nothing to compare with.
        settings: ``max_tokens`` and sampling of each request.
        warm_up: questions asked first, not counted.

    Returns:
        ``server``, ``model`` and ``levels``: a row of `measure` for each load, with ``speedup``, ``equal_answers`` and
        the row ``plain`` if there is one.

    Raises:
        UserError: a server does not answer.
    """
    from tqdm import tqdm

    servers = [server, *([plain] if isinstance(plain, Server) else [])]
    models = {each.url: each.model() for each in servers}
    requests = {url: conversations(questions, model, settings) for url, model in models.items()}
    for each in servers if warm_up else []:
        run_load(each, conversations(questions[:warm_up], models[each.url], settings), Load(concurrency=1))
    levels = []
    for load in tqdm(loads, desc="bench", unit="level", file=sys.stderr):
        row = measure(server, requests[server.url], load)
        if plain is not None:
            other = measure(plain, requests[plain.url], load) if isinstance(plain, Server) else plain[load]
            row["plain"], row["speedup"] = other, row["tokens_per_second"] / other["tokens_per_second"]
            pairs = zip(row["answers"], other["answers"], strict=True)
            row["equal_answers"] = sum(a is not None and a == b for a, b in pairs)
        levels.append(row)
    return {"server": server.url, "model": models[server.url], "levels": levels}


def earlier(path: Path, loads: Sequence[Load], settings: Mapping[str, Any]) -> dict[Load, dict[str, Any]]:
    """Rows of an earlier report, of a server without the draft.

    Args:
        settings: what the report must have under ``settings``, apart from the number of questions to warm up.

    Raises:
        UserError: it is not such a report, has other settings or questions, or lacks a load.
    """
    report = read_object(path, "report of a server")
    try:
        rows = {Load(row["concurrency"], row["rate"]): row for row in report["levels"] if row["answers"]}
        theirs = dict(report["settings"])
    except (KeyError, TypeError):
        raise UserError("not a report of msd bench --server", path, "measure the server without the draft") from None
    for name in sorted((settings.keys() | theirs.keys()) - {"warm_up"}):
        if settings.get(name) != theirs.get(name):
            what = f"made with {name} {theirs.get(name)}, this run has {settings.get(name)}"
            raise UserError(what, path, "measure both servers with the same options")
    for load in loads:
        if load not in rows:
            raise UserError(f"has no level '{load}'", path, f"it has {', '.join(map(str, rows))}")
    return rows


def table_of(report: dict[str, Any]) -> Table:
    """One row for each load and server."""
    from rich.table import Table

    table = Table(title=f"{report['model']} at {report['server']}")
    columns = ("load", "server", "failed", "tokens/s", "first token", "between tokens", "tokens a cycle", "speed-up")
    for column in columns:
        table.add_column(column, justify="left" if column in ("load", "server") else "right")
    for level in report["levels"]:
        load = str(Load(level["concurrency"], level["rate"]))
        for name, row in (("plain", level.get("plain")), ("with draft" if "plain" in level else "", level)):
            if row is None:
                continue
            length, speedup = row.get("acceptance_length"), row.get("speedup")
            table.add_row(
                load, name, f"{row['failed']} of {row['requests']}", f"{row['tokens_per_second']:.1f}",
                _ms(row["first_token_ms"]), _ms(row["between_tokens_ms"]), f"{length:.2f}" if length else "",
                f"{speedup:.2f}x" if speedup else "",
            )  # fmt: skip
    return table


def _ms(spread: dict[str, float] | None) -> str:
    return f"{spread['median']:.0f} ms (p95 {spread['p95']:.0f})" if spread else ""


def plot(report: dict[str, Any], path: Path) -> None:
    """Tokens a second by load, for each server, as a picture.

    Raises:
        UserError: matplotlib is not installed, or it cannot write such a file.
    """
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure

    names = [str(Load(level["concurrency"], level["rate"])) for level in report["levels"]]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines = {"with draft": report["levels"], "plain": [level.get("plain") for level in report["levels"]]}
    for label, rows in lines.items():
        if all(rows):
            axes.plot(names, [row["tokens_per_second"] for row in rows], marker="o", label=label)
    axes.set(xlabel="requests", ylabel="tokens/s", ylim=(0, None), title=report["model"])
    axes.legend()
    with atomic_write(path) as temporary:
        try:
            figure.savefig(temporary)
        except ValueError as error:
            raise UserError(f"the plot cannot be written ({error})", path, "name it .png, .svg or .pdf") from None

"""Answer questions about pictures with the embedded pocket models, with MSD and with plain decoding, and compare."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from eagle.arguments import add_data_options, add_length_option, add_model_options, positive, use_pocket_defaults
from eagle.commands.output import console
from eagle.questions import Question, pick_questions, read_questions

if TYPE_CHECKING:
    from rich.table import Table

    from eagle.decode.msd import MSDModel
    from eagle.decode.stats import Stats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd demo`; without any it uses the repository's pocket models."""
    add_model_options(parser, required=False)
    add_data_options(parser, required=False)
    add_length_option(parser)
    parser.add_argument("--pictures", type=positive, default=6, metavar="N", help="number of pictures (default: 6)")


def run(arguments: argparse.Namespace) -> int:
    """Streams each answer and ends with one summary table."""

    from eagle.decode.stats import Stats
    from eagle.loading import load_model

    use_pocket_defaults(arguments)
    chosen = pick_questions(read_questions(arguments.data, arguments.limit), arguments.pictures)
    model = load_model(arguments)
    model.warm_up()
    out = console()
    out.print(f"base model  {arguments.base_model}\ndraft head  {arguments.msd_model}\ntree        {model.tree}\n")
    answer(model, chosen[0], arguments.max_new_tokens, stream=False)  # warm-up
    rows, sums = [], (Stats.empty(), Stats.empty())
    for question in chosen:
        out.rule(f"[bold]{question.images[0].name}")
        out.print(f"[dim]{question.question}[/dim]")
        fast = answer(model, question, arguments.max_new_tokens, stream=True)
        plain = answer(model, question, arguments.max_new_tokens, stream=False, use_msd=False)
        ratio = fast.tokens_per_second / plain.tokens_per_second
        out.print(f"[green]τ {fast.tau:.2f}, {ratio:.2f}x plain decoding[/green]\n")
        rows.append((question.images[0].name, fast, ratio))
        sums[0].merge(fast)
        sums[1].merge(plain)
    rows.append(("all", sums[0], sums[0].tokens_per_second / sums[1].tokens_per_second))
    out.print(summary(rows))
    return 0


def answer(model: MSDModel, question: Question, max_new_tokens: int, stream: bool, use_msd: bool = True) -> Stats:
    """Answers one question greedily; returns the statistics."""
    from transformers import TextStreamer

    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    inputs = question.inputs(model.target)
    return model.generate(
        **inputs, temperature=0.0, max_new_tokens=max_new_tokens, use_msd=use_msd, streamer=streamer
    ).stats


def summary(rows: list[tuple[str, Stats, float]]) -> Table:
    """One line for each picture."""
    from rich.table import Table

    table = Table(title="MSD against plain decoding, same run, same answers (greedy)")
    for column in ("picture", "tokens", "cycles", "τ", "tokens/s", "speed-up"):
        table.add_column(column, justify="left" if column == "picture" else "right")
    for name, stats, ratio in rows:
        table.add_row(
            name, str(stats.new_tokens), str(stats.cycles), f"{stats.tau:.2f}", f"{stats.tokens_per_second:.0f}",
            f"{ratio:.2f}x",
        )  # fmt: skip
    return table

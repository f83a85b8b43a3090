"""Answer held-out pictures of the embedded pocket models, with MSD and plainly, and compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import TextStreamer

from eagle.arguments import add_data_options, add_length_option, add_model_options, load_model, positive
from eagle.decode.msd import MSDModel
from eagle.decode.stats import Stats
from eagle.questions import Question, read_questions
from llava.errors import UserError

POCKET = Path(__file__).resolve().parents[3] / "pocket"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd demo`; without any it uses the repository's pocket models."""
    add_model_options(parser, required=False)
    add_data_options(parser, required=False)
    add_length_option(parser)
    parser.add_argument("--pictures", type=positive, default=6, help="how many (default: 6)")


def run(arguments: argparse.Namespace) -> int:
    """Streams each answer and ends with one summary table."""
    use_pocket_defaults(arguments)
    chosen = choose(read_questions(arguments.data), arguments.pictures)
    model = load_model(arguments)
    console = Console()
    console.print(f"base model  {arguments.base_model}\ndraft head  {arguments.msd_model}\ntree        {model.tree}\n")
    answer(model, chosen[0], arguments.max_new_tokens, stream=False)  # warm-up
    rows, sums = [], (Stats.empty(), Stats.empty())
    for question in chosen:
        console.rule(f"[bold]{question.images[0].name}")
        console.print(f"[dim]{question.question}[/dim]")
        fast = answer(model, question, arguments.max_new_tokens, stream=True)
        plain = answer(model, question, arguments.max_new_tokens, stream=False, use_msd=False)
        ratio = fast.tokens_per_second / plain.tokens_per_second
        console.print(f"[green]τ {fast.tau:.2f}, {ratio:.2f}x plain decoding[/green]\n")
        rows.append((question.images[0].name, fast, ratio))
        sums[0].merge(fast)
        sums[1].merge(plain)
    rows.append(("all", sums[0], sums[0].tokens_per_second / sums[1].tokens_per_second))
    console.print(summary(rows))
    return 0


def use_pocket_defaults(arguments: argparse.Namespace) -> None:
    """Fills in the embedded models and their held-out questions."""
    defaults = {"base_model": "llava", "msd_model": "llava-msd", "data": "data/heldout.jsonl"}
    for name, place in defaults.items():
        if getattr(arguments, name) is None:
            if not (POCKET / place).exists():
                raise UserError(
                    f"the embedded {place} is not here", where=POCKET, fix="run in a clone, or name models and data"
                )
            setattr(arguments, name, POCKET / place)


def choose(questions: list[Question], count: int) -> list[Question]:
    """The questions with the longest reference answers, one a picture, evenly spread over the file."""
    pictures: dict[Path, Question] = {}
    for question in questions:
        if question.images:
            kept = pictures.setdefault(question.images[0], question)
            if len(question.answer) > len(kept.answer):
                pictures[question.images[0]] = question
    if not pictures:
        raise UserError("no question with a picture", fix="name another file with --data")
    long = sorted(pictures.values(), key=lambda question: -len(question.answer))[: max(count, len(pictures) // 2)]
    order = sorted(long, key=questions.index)
    step = max(len(order) // count, 1)
    return order[::step][:count]


def answer(model: MSDModel, question: Question, max_new_tokens: int, stream: bool, use_msd: bool = True) -> Stats:
    """One greedy answer; returns its statistics."""
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    inputs = question.inputs(model.target)
    return model.generate(
        **inputs, temperature=0.0, max_new_tokens=max_new_tokens, use_msd=use_msd, streamer=streamer
    ).stats


def summary(rows: list[tuple[str, Stats, float]]) -> Table:
    """One line a picture."""
    table = Table(title="MSD against plain decoding, same run, same answers (greedy)")
    for column in ("picture", "tokens", "cycles", "τ", "tokens/s", "speed-up"):
        table.add_column(column, justify="left" if column == "picture" else "right")
    for name, stats, ratio in rows:
        numbers = (
            stats.new_tokens,
            stats.cycles,
            f"{stats.tau:.2f}",
            f"{stats.tokens_per_second:.0f}",
            f"{ratio:.2f}x",
        )
        table.add_row(name, *map(str, numbers))
    return table

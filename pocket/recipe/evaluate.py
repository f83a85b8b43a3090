"""How many facts the model states rightly about held-out pictures.

python -m pocket.recipe.evaluate --model pocket/llava --data pocket/data/heldout.jsonl
python -m pocket.recipe.evaluate --model pocket/llava --data pocket/data/heldout.jsonl --exchange

With --exchange every question is asked again about another picture and scored against the facts of the right one;
"chance" is what the right answer for that other picture would score.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.arguments import OneLineParser
from llava.errors import run_cli

from .facts import is_right

Item = dict[str, Any]
Answerer = Callable[[list[tuple[str, list[Path]]]], list[str]]


@dataclass
class Score:
    """Right and asked facts."""

    right: int = 0
    asked: int = 0

    def add(self, facts: list[dict[str, Any]], answer: str) -> None:
        """Check the facts in an answer."""
        self.right += sum(is_right(f, answer) for f in facts)
        self.asked += len(facts)

    def __str__(self) -> str:
        """Percent, or a dash if nothing was asked."""
        return f"{100 * self.right / self.asked:5.1f}%" if self.asked else "    -"


@dataclass
class Report:
    """Scores by kind for the right picture, the exchanged one and chance."""

    scores: dict[str, dict[str, Score]] = field(
        default_factory=lambda: defaultdict(lambda: {c: Score() for c in ("right", "exchanged", "chance")})
    )

    def add(self, column: str, item: Item, answer: str) -> None:
        """Score an answer in the rows of its kind, its picture kind and all."""
        for row in {item["kind"], item["kind"].split()[0], "all pictures" if item["images"] else "text"}:
            self.scores[row][column].add(item["facts"], answer)

    def lines(self) -> list[str]:
        """The table."""
        out = [f"{'kind':24} {'facts':>5} {'right':>7} {'exchanged':>9} {'chance':>7}"]
        for row in sorted(self.scores, key=lambda r: (r == "all pictures", r)):
            s = self.scores[row]
            out.append(f"{row:24} {s['right'].asked:5} {s['right']!s:>7} {s['exchanged']!s:>9} {s['chance']!s:>7}")
        return out


def read_items(path: Path) -> list[Item]:
    """The questions of a jsonl file."""
    if not path.exists():
        raise SystemExit(f"error: no such file: {path}")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise SystemExit(f"error: {path} is not JSON lines: {error}") from None


def load_answerer(model_path: str, threads: int, max_new_tokens: int) -> Answerer:
    """Greedy answers of a model, a batch at a time."""
    import torch

    from eagle.families import load_target

    torch.set_num_threads(threads)
    target = load_target(model_path)

    def answer(batch: list[tuple[str, list[Path]]]) -> list[str]:
        prompts = [target.chat_prompt(question, num_images=len(paths)) for question, paths in batch]
        inputs = target.prepare(prompts, [path for _, paths in batch for path in paths])
        with torch.no_grad():
            out = target.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return list(target.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


def answers_for(answerer: Answerer, asked: list[tuple[str, list[Path]]], batch: int) -> list[str]:
    """Answers in the order asked; questions with and without pictures do not share a batch."""
    order = sorted(range(len(asked)), key=lambda i: (not asked[i][1], len(asked[i][0])))
    answers = [""] * len(asked)
    while order:
        kind = bool(asked[order[0]][1])
        now = [i for i in order[:batch] if bool(asked[i][1]) == kind]
        order = order[len(now) :]
        for i, text in zip(now, answerer([asked[i] for i in now]), strict=True):
            answers[i] = text.strip()
    return answers


def evaluate(answerer: Answerer, items: list[Item], folder: Path, exchanged: bool, batch: int) -> tuple[Report, list]:
    """The report and the answers about the right pictures."""
    report = Report()
    answers = answers_for(answerer, [(i["question"], [folder / p for p in i["images"]]) for i in items], batch)
    for item, text in zip(items, answers, strict=True):
        report.add("right", item, text)
    if exchanged:
        twins = [i for i in items if "exchange" in i]
        asked = [(i["question"], [folder / p for p in i["exchange"]["images"]]) for i in twins]
        for item, text in zip(twins, answers_for(answerer, asked, batch), strict=True):
            report.add("exchanged", item, text)
            report.add("chance", item, item["exchange"]["answer"])
    return report, answers


def main() -> None:
    """Command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--exchange", action="store_true", help="ask about exchanged pictures too")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--answers", type=Path, help="write the answers to this jsonl file")
    args = parser.parse_args()
    items = read_items(args.data)[: args.limit]
    answerer = load_answerer(args.model, args.threads, args.max_new_tokens)
    report, answers = evaluate(answerer, items, args.data.parent, args.exchange, args.batch)
    sys.stdout.write("\n".join(report.lines()) + "\n")
    if args.answers:
        rows = [json.dumps({"id": i["id"], "answer": a}) for i, a in zip(items, answers, strict=True)]
        args.answers.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""Writes our question files as the data set that lmms-eval's task `chartqa` reads, so that the real task runs offline.

    python -m lmms_eval_msd.offline --jsonl pocket/data/heldout.jsonl --out DIR
    cd DIR && HF_HUB_OFFLINE=1 lmms-eval --model llava_msd ... --tasks chartqa

lmms-eval loads `lmms-lab-encoder/ChartQA`; a folder of that relative path in the working directory is read instead of
the hub. Columns: type, question, answer, image; split test. Each line of the input is one object
`{"id", "images": [path relative to the file], "question", "answer"}`, optionally with "type".
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle.questions import iter_questions
from llava.arguments import OneLineParser, positive
from llava.errors import UserError, run_cli
from llava.files import atomic_write
from llava.image import load_image

DATASET = Path("lmms-lab-encoder", "ChartQA")
PARQUET = Path("data", "test-00000-of-00001.parquet")
HUMAN = "human_test"  # the type of questions people wrote; the other one is augmented_test


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of the data set, one for each question of the file with one picture.

    Raises:
        UserError: as `eagle.questions.read_questions`; a question has no answer, or a picture cannot be read.
    """
    for number, (question, record) in enumerate(iter_questions(path), start=1):
        if "answer" not in record:
            raise UserError("no 'answer'", f"{path}, question {number}", "ChartQA compares answers with it")
        if len(question.images) != 1:
            continue
        buffer = io.BytesIO()
        load_image(question.images[0]).save(buffer, format="PNG")
        image = {"bytes": buffer.getvalue(), "path": question.images[0].name}
        yield {
            "type": record.get("type", HUMAN),
            "question": question.question,
            "answer": question.answer,
            "image": image,
        }


def write_chartqa(questions: Path, out: Path, limit: int | None = None) -> tuple[Path, int]:
    """Writes the data set's folder below ``out``.

    Returns:
        The folder, and how many questions it has.

    Raises:
        UserError: no question has exactly one picture; or as `read_rows`.
    """
    from datasets import Dataset, Features, Image, Value

    rows: list[dict[str, Any]] = []
    for row in read_rows(questions):
        if limit is not None and len(rows) == limit:
            break
        rows.append(row)
    if not rows:
        raise UserError("no question with one picture", questions)
    text = Value("string")
    features = Features({"type": text, "question": text, "answer": text, "image": Image()})
    folder = out / DATASET
    with atomic_write(folder / PARQUET) as temporary:
        Dataset.from_list(rows, features=features).to_parquet(str(temporary))
    return folder, len(rows)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = OneLineParser(prog="python -m lmms_eval_msd.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--jsonl", type=Path, required=True, help="question file")
    parser.add_argument("--out", type=Path, required=True, help="folder to run lmms-eval in")
    parser.add_argument("--limit", type=positive, help="first so many questions")
    args = parser.parse_args(argv)
    folder, count = write_chartqa(args.jsonl, args.out, args.limit)
    print(f"{count} questions in {folder}; run lmms-eval in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

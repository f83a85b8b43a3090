"""Check that MSD's answers equal those of transformers' `generate`, token for token.

At the first token that differs, the distance of the two tokens' logits is printed in steps of the dtype. In 16 bit a
distance of a few steps is rounding; more is a bug. ``--reference padded`` compares with plain decoding whose forwards
have as many rows as the largest tree, so that they round alike. With a temperature, transformers searches greedily in
processed scores to which the same noise is added as in MSD.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from eagle.arguments import add_data_options, add_length_option, add_model_options
from eagle.questions import Conversations, read_questions
from llava.arguments import temperature
from llava.errors import UserError
from llava.inputs import seed_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd verify`."""
    add_model_options(parser)
    add_data_options(parser)
    add_length_option(parser)
    parser.add_argument(
        "--reference", choices=("generate", "padded"), default="generate",
        help="what answers are compared with: transformers' generate (default), or plain decoding in this loop, with "
        "each forward padded to the rows of the largest tree",
    )  # fmt: skip
    parser.add_argument(
        "--one-row-ties", action="store_true", help="decide near ties with a forward of one row (greedy only)"
    )
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=seed_option, default=0, help="of sampled answers (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Prints ``mismatches/N``; exit status 1 if there is any."""
    import torch
    from tqdm import tqdm

    from eagle.benchmark import with_stop_strings
    from eagle.decode.sampling import SamplingSettings
    from eagle.exactness import MANY_STEPS, first_difference, logit_gap, noise_processors
    from eagle.loading import load_model

    questions = read_questions(arguments.data, arguments.limit, turns=True)
    sampling = SamplingSettings(arguments.temperature, seed=arguments.seed)
    temperature, sampled = sampling.temperature, not sampling.greedy
    model = load_model(arguments)
    if model.dtype == torch.float32 and (precision := torch.get_float32_matmul_precision()) != "highest":
        what = f"float32 products are rounded here (float32_matmul_precision is {precision})"
        raise UserError(what, fix="set it to highest, and unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
    stop = with_stop_strings(model)
    mismatches, far, conversations = 0, 0, Conversations(model)
    for question in tqdm(questions, desc="verify", unit="question", file=sys.stderr):
        question = conversations.ask(question)
        inputs = question.inputs(model.target)
        settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
        noise = noise_processors(temperature, arguments.seed, inputs["input_ids"]) if sampled else None
        own = {**sampling.for_engine(), **settings}
        expected: Any
        if arguments.reference == "padded":
            expected = model.generate(**inputs, use_msd=False, plain_rows=model.tree.total_tokens, **own).sequences
        else:
            choose: dict[str, Any] = {"do_sample": False, "logits_processor": noise, **stop}
            expected = model.target.model.generate(**inputs, **choose, **settings)
        conversations.keep(question, expected[0, inputs["input_ids"].shape[1] :])
        actual = model.generate(**inputs, one_row_ties=arguments.one_row_ties, **own).sequences
        if (place := first_difference(expected[0], actual[0])) is not None:
            mismatches += 1
            line = f"{question.id}: differs at new token {place - inputs['input_ids'].shape[1]}"
            if not sampled and place < min(expected.shape[1], actual.shape[1]):
                gap = logit_gap(model.target, inputs, expected[0], place, int(actual[0, place]))
                far += gap.steps > MANY_STEPS
                line += f", logits {gap.logits[0]:.6g} and {gap.logits[1]:.6g}, {gap.steps:.1f} steps apart"
            tqdm.write(line, file=sys.stderr)
    how = f"temperature {temperature:g}, seed {arguments.seed}" if sampled else "greedy"
    print(f"{mismatches}/{len(questions)} mismatches ({model.dtype}, {how}, {arguments.max_new_tokens} new tokens)")
    if mismatches and not sampled:
        print(f"{far} of {mismatches} differ by more than {MANY_STEPS} steps of {model.dtype}: not rounding")
    return 1 if mismatches else 0

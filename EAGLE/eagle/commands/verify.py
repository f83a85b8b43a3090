"""Check that MSD's answers equal transformers' `generate`, token for token.

Sampled ones too: transformers then searches greedily in processed scores with the noise added that MSD samples with.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper

from eagle.arguments import add_data_options, add_length_option, add_model_options, load_model
from eagle.decode.noise import Noise
from eagle.decode.sampling import SamplingSettings
from eagle.questions import read_questions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd verify`. float32 by default, where equality is exact."""
    add_model_options(parser, dtype="float32")
    add_data_options(parser)
    add_length_option(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="of sampled answers (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Prints ``mismatches/N``; exit status 1 if there is any."""
    questions = read_questions(arguments.data, arguments.limit)
    sampling = SamplingSettings(arguments.temperature, seed=arguments.seed)
    temperature, sampled = sampling.temperature, not sampling.greedy
    model = load_model(arguments)
    mismatches = 0
    for question in tqdm(questions, desc="verify", unit="question", file=sys.stderr):
        inputs = question.inputs(model.target)
        settings = {"max_new_tokens": arguments.max_new_tokens}
        noisy = noisy_processors(temperature, arguments.seed, inputs["input_ids"]) if sampled else None
        expected = model.target.model.generate(**inputs, do_sample=False, logits_processor=noisy, **settings)
        actual = model.generate(**inputs, **sampling.for_engine(), **settings).sequences
        if (place := first_difference(expected[0], actual[0])) is not None:
            mismatches += 1
            tqdm.write(f"{question.id}: differs at new token {place - inputs['input_ids'].shape[1]}", file=sys.stderr)
    how = f"temperature {temperature:g}, seed {arguments.seed}" if sampled else "greedy"
    print(f"{mismatches}/{len(questions)} mismatches ({model.dtype}, {how}, {arguments.max_new_tokens} new tokens)")
    return 1 if mismatches else 0


class AddNoise(LogitsProcessor):
    """Adds the noise of one sequence: a greedy search in these scores samples, as MSD does with the same seed.

    Args:
        prompt: [1, P] ids.
    """

    def __init__(self, seed: int, prompt: Tensor) -> None:
        generator = torch.Generator(device=prompt.device).manual_seed(seed)
        self.start, self.noise = prompt.shape[1], Noise(generator, prompt.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] for the token after ``input_ids`` [1, S]."""
        return scores + self.noise.rows(input_ids.shape[1] - self.start, 1, scores.shape[-1])


def noisy_processors(temperature: float, seed: int, prompt: Tensor) -> LogitsProcessorList:
    """What makes transformers' greedy search sample at this temperature."""
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), AddNoise(seed, prompt)])


def first_difference(expected: Tensor, actual: Tensor) -> int | None:
    """Index of the first token at which two sequences [S] differ, in content or length; None if they are equal."""
    shared = min(len(expected), len(actual))
    differing = (expected[:shared] != actual[:shared]).nonzero()
    if len(differing):
        return int(differing[0])
    return None if len(expected) == len(actual) else shared

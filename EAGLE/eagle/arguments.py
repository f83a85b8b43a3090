"""Command-line options that several commands share. Does not import torch or transformers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava.arguments import count as count
from llava.arguments import port as port
from llava.arguments import positive as positive
from llava.arguments import temperature
from llava.errors import UserError
from llava.inputs import seed_option

NO_SELF_CHECK: dict[str, Any] = {
    "dest": "self_check",
    "action": "store_false",
    "help": "do not compare the engine with transformers' generate when a base model is loaded for the first time",
}
"""The flag ``--no-self-check``, as `argparse.ArgumentParser.add_argument` takes it."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
POCKET = Path(__file__).resolve().parents[2] / "pocket"
"""Folder of the embedded models and their data, in a clone of the repository."""


def add_model_options(parser: argparse.ArgumentParser, dtype: str = "auto", required: bool = True) -> None:
    """The models, their dtype and device, and the limits of the draft tree."""
    parser.add_argument("--base-model", required=required, help="base model: folder or hub name")
    parser.add_argument("--msd-model", help="draft head: folder or hub name")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"dtype of both models (default: {dtype})")
    parser.add_argument("--device-map", default="auto", help="as in transformers; 'cpu', 'cuda:0', ... (default: auto)")
    parser.add_argument(
        "--attn-implementation", choices=("sdpa", "eager"), default="sdpa", help="attention kernel (default: sdpa)"
    )
    parser.add_argument("--revision", help="hub revision of the base model")
    parser.add_argument(
        "--tree", choices=("auto", "fixed"),
        help="auto: depth and size of each tree follow from measured costs, up to the limits below; fixed: always the "
        "limits below (default: fixed if a limit is given, else auto)",
    )  # fmt: skip
    parser.add_argument("--tree-depth", type=int, help="draft steps after the first one")
    parser.add_argument("--tree-top-k", type=int, help="nodes kept at each level, and children tried for each node")
    parser.add_argument("--tree-tokens", type=int, help="nodes verified in one forward pass, including the root")
    parser.add_argument(
        "--draft-image-tokens", metavar="M",
        help="image tokens that the draft reads of each picture, 0 for none or 'all' (default: see the draft's config)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND",
        help="compile both models with torch.compile (default: on CUDA for models that can be, except in "
        "msd generate)",
    )  # fmt: skip
    parser.add_argument(
        "--no-compile", dest="compile", action="store_const", const=False, help="never compile, also on CUDA"
    )
    parser.add_argument("--no-self-check", **NO_SELF_CHECK)


def add_length_option(parser: argparse.ArgumentParser, default: int = 256) -> None:
    parser.add_argument(
        "--max-new-tokens", type=positive, default=default, metavar="N", help=f"length limit (default: {default})"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Temperature, top-p, top-k and seed; greedy by default."""
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, help="sample from the smallest set of tokens with this probability")
    parser.add_argument("--top-k", type=int, help="sample from this many most probable tokens")
    parser.add_argument("--seed", type=seed_option, help="makes sampling repeatable")


def add_data_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--data", required=required, type=Path, help="questions, one JSON object a line")
    parser.add_argument("--limit", type=positive, metavar="N", help="use only the first N questions")


def add_report_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results to this file as JSON")


def tree_limits(text: str) -> tuple[int, int, int]:
    """An argparse type: ``depth/top-k/nodes`` of a draft tree, such as 5/10/60."""
    try:
        depth, top_k, total_tokens = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not like 5/10/60") from None
    return depth, top_k, total_tokens


def use_pocket_defaults(arguments: argparse.Namespace) -> None:
    """Sets ``base_model``, ``msd_model`` and ``data``, where not given, to the embedded models and their held-out data.

    Raises:
        UserError: the package is not installed from a clone, so there are no embedded models.
    """
    defaults = {"base_model": "llava", "msd_model": "llava-msd", "data": "data/heldout.jsonl"}
    for name, place in defaults.items():
        if getattr(arguments, name) is None:
            if not (POCKET / place).exists():
                raise UserError(
                    f"the embedded {place} is not here", where=POCKET, fix="run in a clone, or name models and data"
                )
            setattr(arguments, name, POCKET / place)

"""Options that several commands share, and what they mean."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eagle.decode.msd import MSDModel
from eagle.decode.sampling import SamplingSettings
from eagle.decode.tree_config import TreeConfig
from llava.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_options(parser: argparse.ArgumentParser, dtype: str = "auto", required: bool = True) -> None:
    """Which models, in which dtype, where, and the draft tree's bounds."""
    parser.add_argument("--base-model", required=required, help="base model: folder or hub name")
    parser.add_argument("--msd-model", help="draft head: folder or hub name")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"dtype of both models (default: {dtype})")
    parser.add_argument("--device-map", default="auto", help="as in transformers; 'cpu', 'cuda:0', ... (default: auto)")
    parser.add_argument("--attn-implementation", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--revision", help="hub revision of the base model")
    parser.add_argument(
        "--tree", choices=("auto", "fixed"),
        help="auto: depth and size by cycle, within the bounds below, from costs measured once; fixed: these bounds in "
        "each cycle (default: fixed with a bound or --compile, else auto)",
    )  # fmt: skip
    parser.add_argument("--tree-depth", type=int, help="draft steps after the first one")
    parser.add_argument("--tree-top-k", type=int, help="nodes kept a level, and children tried for each")
    parser.add_argument("--tree-tokens", type=int, help="nodes verified in one forward, root included")
    parser.add_argument(
        "--draft-image-tokens", metavar="M",
        help="rows that the draft reads of each picture, 0 for none or 'all' (default: as the draft's config says)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", nargs="?", const="inductor", default=False, metavar="BACKEND",
        help="compile the models' parts of a cycle (torch.compile; the first answers are slow)",
    )  # fmt: skip


def add_length_option(parser: argparse.ArgumentParser, default: int = 256) -> None:
    parser.add_argument("--max-new-tokens", type=positive, default=default, help=f"(default: {default})")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Temperature and friends; greedy by default."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, help="sample from the smallest set of tokens of this probability")
    parser.add_argument("--top-k", type=int, help="sample from this many most probable tokens")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")


def add_data_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--data", required=required, type=Path, help="questions, one JSON object a line")
    parser.add_argument("--limit", type=positive, help="use only the first N questions")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def sampling_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `MSDModel.generate`. Without a limit the checkpoint's own is not used either."""
    given = SamplingSettings(arguments.temperature, arguments.top_p or None, arguments.top_k, arguments.seed)
    return given.for_engine()


def tree_from(arguments: argparse.Namespace, device: torch.device) -> TreeConfig:
    """The tree asked for; what is not asked for is the default of the device."""
    given = (arguments.tree_depth, arguments.tree_top_k, arguments.tree_tokens)
    fixed = bool(arguments.compile) or any(value is not None for value in given)
    default = TreeConfig.named(arguments.tree or ("fixed" if fixed else "auto"), device)
    named = zip(("depth", "top_k", "total_tokens"), given, strict=True)
    return replace(default, **{name: value for name, value in named if value is not None})


def load_model(arguments: argparse.Namespace, need_draft: bool = True, dtype: str | None = None) -> MSDModel:
    """The pair that the options name."""
    if need_draft and not arguments.msd_model:
        raise UserError("no draft head", where="--msd-model", fix="name a folder or hub repository, or use --no-msd")
    dtype = dtype or arguments.dtype
    extra = {"revision": arguments.revision} if arguments.revision else {}
    model = MSDModel.from_pretrained(
        arguments.base_model,
        arguments.msd_model if need_draft else None,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        device_map=device_map_for(arguments.device_map),
        attn_implementation=arguments.attn_implementation,
        draft_image_tokens=arguments.draft_image_tokens,
        compile=arguments.compile,
        **extra,
    )
    model.tree = tree_from(arguments, model.device)
    return model


def device_map_for(name: str) -> str:
    """'auto' without an accelerator is the CPU."""
    return "cpu" if name == "auto" and not torch.accelerator.is_available() else name

"""What the command-line options of `eagle.arguments` name: models, tree and sampling settings."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch

from eagle.decode.msd import MSDModel
from eagle.decode.sampling import SamplingSettings
from eagle.decode.tree_config import TreeConfig
from llava.errors import UserError


def load_model(arguments: argparse.Namespace, need_draft: bool = True, dtype: str | None = None) -> MSDModel:
    """The base model and, if ``need_draft``, the draft of `eagle.arguments.add_model_options`.

    Args:
        dtype: in place of ``--dtype``.

    Raises:
        UserError: no draft was named, or a model cannot be loaded.
    """
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
        self_check=arguments.self_check,
        **extra,
    )
    for line in (model.target.placement, model.compile_note):
        if line:
            print(line, file=sys.stderr)
    given = (arguments.tree_depth, arguments.tree_top_k, arguments.tree_tokens)
    kind = arguments.tree or ("auto" if given == (None, None, None) else "fixed")
    model.tree = tree_from(arguments, model.device, "fixed" if model.backend else kind)
    model.guarded = kind == "auto"
    return model


def tree_from(arguments: argparse.Namespace, device: torch.device, kind: str) -> TreeConfig:
    """The tree of a kind, "auto" or "fixed", with the limits that the options give in place of the device's."""
    given = (arguments.tree_depth, arguments.tree_top_k, arguments.tree_tokens)
    default = TreeConfig.named(kind, device)
    named = zip(("depth", "top_k", "total_tokens"), given, strict=True)
    return replace(default, **{name: value for name, value in named if value is not None})


def sampling_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `MSDModel.generate`."""
    return SamplingSettings(arguments.temperature, arguments.top_p, arguments.top_k, arguments.seed).for_engine()


def device_map_for(name: str) -> str:
    """'cpu' for 'auto' without an accelerator."""
    return "cpu" if name == "auto" and not torch.accelerator.is_available() else name

"""Loads LLaVA-1.5 checkpoints, of the liuhaotian and of the llava-hf layout, into the stock transformers class.

    model, processor = load_pretrained("liuhaotian/llava-v1.5-7b", dtype="auto", device_map="auto")

Loading is strict: a tensor that is missing, unexpected or of another shape is an error that names it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from .device import dtype_for
from .errors import UserError
from .files import read_object
from .generation import check_generation_config, check_special_tokens
from .hub import Source, split_hub_options
from .layout import Checkpoint, build_config, open_checkpoint
from .loading import load_errors
from .processor import LlavaProcessor
from .weights import (
    check_size,
    check_unquantised,
    find_weights,
    from_clip,
    from_liuhaotian,
    has_tower,
    is_old_buffer,
    quantisation_of,
    read_shapes,
    read_tensors,
)

_NAMES_SHOWN = 8


def load_pretrained(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    **options: Any,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model and processor of one checkpoint; arguments as of `load_model`."""
    hub, _ = split_hub_options(options)
    processor = load_processor(path, **hub)
    return load_model(path, dtype, device_map, attn_implementation, **options), processor


def load_config(path: str | Path, **hub: Any) -> LlavaConfig:
    """The stock config of a checkpoint of either layout.

    Args:
        path: model folder, or name of a hub repository.
        hub: see `llava.hub.HUB_KEYS`.

    Raises:
        UserError: nothing is there, or it is not LLaVA-1.5.
    """
    return build_config(open_checkpoint(Source.of(path, hub)))


def load_processor(path: str | Path, **hub: Any) -> LlavaProcessor:
    """Tokenizer and image processor of a checkpoint of either layout; arguments and errors as of `load_config`."""
    return LlavaProcessor.from_pretrained(path, **hub)


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    **options: Any,
) -> LlavaForConditionalGeneration:
    """The model in the stock class, in evaluation mode.

    Args:
        path: model folder, or name of a hub repository.
        dtype: a torch dtype or its name; "auto" is the checkpoint's own (float32 on a CPU that is slow in 16 bit).
        device_map: as in transformers (needs accelerate).
        attn_implementation: "sdpa", "eager", ... as in transformers.
        options: those of `llava.hub.HUB_KEYS` go to the hub; the rest (quantization_config,
            max_memory, ...) goes to `from_pretrained`.

    Raises:
        UserError: not LLaVA-1.5; damaged files; tensors missing, unexpected or of another shape (named).
    """
    hub, rest = split_hub_options(options)
    dtype = dtype_for(dtype, device_map)
    checkpoint = open_checkpoint(Source.of(path, hub))
    config = build_config(checkpoint)
    check_quantisation(config, checkpoint.source.name)
    rest |= {"config": config, "device_map": device_map, "attn_implementation": attn_implementation}
    rest = {name: value for name, value in rest.items() if value is not None}
    if checkpoint.layout == "llava-hf":
        place: str | None = checkpoint.source.name
        rest |= dict(checkpoint.source.hub) | {"dtype": dtype}
        shapes = read_shapes(find_weights(checkpoint.source))
    else:
        place = None
        state = _liuhaotian_state(checkpoint)
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        rest |= {"state_dict": state, "dtype": _checkpoint_dtype(config, state) if dtype == "auto" else dtype}
    with load_errors("model cannot be loaded", checkpoint.source.name, weights=True):
        check_special_tokens(checkpoint.source, config.get_text_config().vocab_size)
        check_size(LlavaForConditionalGeneration, config, shapes, checkpoint.source.name)
        check_unquantised(config, find_weights(checkpoint.source))
        with quiet_transformers():
            check_generation_config(checkpoint.source, config.get_text_config().vocab_size)
            model, info = LlavaForConditionalGeneration.from_pretrained(
                place, output_loading_info=True, ignore_mismatched_sizes=True, **rest
            )
        _check_complete(info, checkpoint)
        if checkpoint.layout == "liuhaotian":
            _finish_liuhaotian(model, checkpoint)
    return model


def check_quantisation(config: Any, name: str) -> None:
    """Checks the quantisation that a config names, before weights are downloaded.

    Args:
        name: of the checkpoint, for the message.

    Raises:
        UserError: transformers does not know it, and would read the packed weights as they are; or this machine lacks
            its package or a device for it.
    """
    if (found := quantisation_of(config)) is None:
        return
    with load_errors("quantised model cannot be loaded", name), quiet_transformers():
        if not AutoHfQuantizer.supports_quant_method(found):
            fix = "install a release of transformers that has it, or use a checkpoint in 16 or 32 bit"
            raise UserError(f"unknown quantisation {found['quant_method']!r}", name, fix)
        AutoHfQuantizer.from_config(found).validate_environment(device_map=None, weights_only=True)


def _liuhaotian_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors under llava-hf names; those of the tower from its own files if the shards have none."""
    state = from_liuhaotian(read_tensors(find_weights(checkpoint.source)))
    if not has_tower(state):
        assert checkpoint.tower is not None
        state |= from_clip(read_tensors(find_weights(checkpoint.tower)))
    return state


def _checkpoint_dtype(config: LlavaConfig, state: dict[str, torch.Tensor]) -> torch.dtype:
    """The config's dtype, else that of the language model's weights (a separate tower may have another)."""
    if config.dtype is not None:
        return config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype)
    return next((value.dtype for value in state.values() if value.is_floating_point()), torch.get_default_dtype())


def _finish_liuhaotian(model: LlavaForConditionalGeneration, checkpoint: Checkpoint) -> None:
    """Sets what `from_pretrained` reads from a folder: name and generation config.

    The layout pads with `<unk>`, which is the image id here, so generation pads with the end token.
    """
    model.config.name_or_path = model.name_or_path = checkpoint.source.name
    if (path := checkpoint.source.find("generation_config.json")) is not None:
        fields = read_object(path, "generation config")
        fields.pop("max_length", None)  # the context length of old releases; it would conflict with max_new_tokens
        model.generation_config = GenerationConfig.from_dict(fields)
    end = model.generation_config.eos_token_id
    model.generation_config.pad_token_id = end[0] if isinstance(end, list) else end


def _check_complete(info: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raises UserError if `from_pretrained` reports tensors that do not fit."""
    reshaped = [f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    groups = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(name for name in info["unexpected_keys"] if not is_old_buffer(name)),
        "of another shape": sorted(reshaped),
    }
    found = [f"{len(names)} {kind}: {_shorten(names)}" for kind, names in groups.items() if names]
    if found:
        raise UserError("tensors do not fit the model", checkpoint.source.name, "; ".join(found))


def _shorten(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' table of missing tensors, and its progress bar if stderr is not a terminal.

    The caller names the tensors in one line.
    """
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()

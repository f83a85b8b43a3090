"""Reads the files of a LLaVA-1.5 processor: image processor, tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from .errors import UserError
from .files import read_json, read_object
from .hub import Source
from .image import MAX_SQUARE_SIDE
from .layout import Checkpoint, build_config, count_image_tokens, open_checkpoint
from .loading import load_errors
from .processor_config import check_picture_fields, check_processor_files
from .tokenizer import load_tokenizer

try:
    from transformers import CLIPImageProcessorPil as ImageProcessor
except ImportError:  # before transformers had two backends, the plain name was the PIL one
    from transformers import CLIPImageProcessor as ImageProcessor  # type: ignore[assignment]

SAVED = ("image_token_id", "image_token_count", "aspect", "template")
"""Numbers and choices of `LlavaProcessor` that its `save_pretrained` writes."""


def read_processor(path: str | Path, **hub: Any) -> dict[str, Any]:
    """Arguments of `LlavaProcessor` for a checkpoint of either layout, or a folder that its `save_pretrained` wrote.

    Args:
        path: model folder, or name of a hub repository.
        hub: see `llava.hub.HUB_KEYS`.

    Raises:
        UserError: nothing is there, it is not LLaVA-1.5, or a setting is wrong.
    """
    with load_errors("processor cannot be loaded", path):
        source = Source.of(path, hub)
        check_processor_files(source)
        if (saved := _saved_processor(source)) is not None:
            return saved
        checkpoint = open_checkpoint(source)
        config = build_config(checkpoint)
        return {
            "tokenizer": load_tokenizer(checkpoint.source),
            "image_processor": _image_processor(checkpoint, config),
            "image_token_id": config.image_token_id,
            "image_token_count": count_image_tokens(config.vision_config, config.vision_feature_select_strategy),
            "aspect": checkpoint.aspect,
            # liuhaotian's models are trained with Vicuna's conversation, whatever their tokenizer brings
            "chat_template": _chat_template(source) if checkpoint.layout == "llava-hf" else None,
        }


def _saved_processor(source: Source) -> dict[str, Any] | None:
    """What `LlavaProcessor.save_pretrained` wrote; None if the folder has none."""
    path = source.find("processor_config.json")
    fields = {} if path is None else read_object(path, "processor config")
    if path is None or "image_token_count" not in fields:
        return None
    try:
        image_processor = ImageProcessor.from_dict(fields["image_processor"])
        options = {name: fields[name] for name in SAVED}
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"processor config is not valid ({error})", path) from None
    template, tokenizer = _chat_template(source), load_tokenizer(source)
    return {"tokenizer": tokenizer, "image_processor": image_processor, "chat_template": template, **options}


def _chat_template(source: Source) -> str | None:
    """A checkpoint's own chat template: the processor's, else the tokenizer's."""
    if (path := source.find("chat_template.jinja")) is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat template cannot be read ({error})", path) from None
    for file in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (path := source.find(file)) is None:
            continue
        fields = read_json(path, "chat template")
        found = fields.get("chat_template") if isinstance(fields, dict) else None
        if isinstance(found, list):  # several, with names
            found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def _image_processor(checkpoint: Checkpoint, config: LlavaConfig) -> Any:
    """CLIP's image processor, from the tower in the liuhaotian layout, checked against the size the tower takes."""
    sources = [checkpoint.source] if checkpoint.tower is None else [checkpoint.tower, checkpoint.source]
    for source in sources:
        for file in ("preprocessor_config.json", "processor_config.json"):
            if (path := source.find(file)) is None:
                continue
            fields = read_json(path, "image processor config")
            fields = fields.get("image_processor", fields) if isinstance(fields, dict) else {}
            if "image_mean" in fields:
                return _build_image_processor(fields, path, config)
    raise UserError("no image processor config", sources[0].name, "preprocessor_config.json with image_mean")


def _build_image_processor(fields: dict[str, Any], path: Path, config: LlavaConfig) -> Any:
    check_picture_fields(fields, path)
    try:
        processor = ImageProcessor.from_dict(fields)
        crop = dict(processor.crop_size)
        sides = [side for side in dict(processor.size).values() if side is not None]
    except Exception as error:  # what the settings say decides what is raised
        raise UserError("image processor config is not valid", path, str(error)) from None
    if not all(type(side) is int and 1 <= side <= MAX_SQUARE_SIDE for side in sides):
        raise UserError(f"image processor's size {sides}", path, f"give whole numbers from 1 to {MAX_SQUARE_SIDE}")
    size = config.vision_config.image_size
    if crop.get("height") != size or crop.get("width") != size:
        raise UserError(f"image processor makes {crop} pixels, the vision tower takes {size}", path)
    return processor

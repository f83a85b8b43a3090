"""What stands in `--model_args`: switches, numbers, the draft tree, and settings for loading and for prompts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eagle import TreeConfig
from llava.errors import UserError
from llava.hub import HUB_KEYS
from lmms_eval_msd.families import Family

OWN = (
    "pretrained", "use_msd", "msd_model_path", "msd_baseline", "dtype", "device", "device_map", "batch_size",
    "system_prompt",
)  # fmt: skip
TREE = {"msd_depth": "depth", "msd_top_k": "top_k", "msd_total_tokens": "total_tokens"}
LOADING = (
    "attn_implementation", "revision", "draft_revision", "cache_dir", "local_files_only", "token", "draft_image_tokens",
    "compile",
)  # fmt: skip
LLAVA_PROMPTS = ("chat_template", "image_aspect")
QWEN_PROMPTS = ("min_pixels", "max_pixels", "max_num_frames", "interleave_visuals", "reasoning_prompt")


@dataclass(frozen=True)
class Options:
    """``tree``: bounds, None for the default; ``loading``: for `MSDModel.from_pretrained`; ``prompts``: the rest."""

    tree: TreeConfig | None = None
    loading: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Mapping[str, Any], family: Family) -> Options:
        """Sorts the arguments of `--model_args`.

        Raises:
            UserError: one of them is unknown, or is not of this family.
        """
        prompts = QWEN_PROMPTS if family.pixels else LLAVA_PROMPTS
        known = (*OWN, *TREE, *LOADING, *prompts)
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
                raise UserError(f"{family.model} has no model argument '{key}'", fix=hint)
        bounds = {name: given[key] for key, name in TREE.items() if key in given}
        return cls(
            TreeConfig(**bounds) if bounds else None,
            {key: given[key] for key in LOADING if key in given},
            {key: given[key] for key in prompts if key in given},
        )

    @property
    def hub(self) -> dict[str, Any]:
        """Where on the hub the base model is, and how it is fetched."""
        return {key: value for key, value in self.loading.items() if key in HUB_KEYS}


def as_bool(name: str, value: Any) -> bool:
    """A switch from `--model_args`, where lmms-eval leaves anything but True and False as text."""
    if isinstance(value, bool):
        return value
    texts = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if str(value).lower() not in texts:
        raise UserError(f"{name} is neither True nor False", where=str(value))
    return texts[str(value).lower()]


def as_count(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    if not str(value).isdigit() or int(value) < 1:
        raise UserError(f"{name} is not a whole number of at least 1", where=str(value))
    return int(value)


def as_batch_size(value: int | str) -> int:
    """A batch size; lmms-eval's `auto` is one."""
    return 1 if str(value).startswith("auto") else as_count("batch_size", value)

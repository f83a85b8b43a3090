"""The families that can be evaluated, and where lmms-eval's own model of each differs from the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eagle.families import family_of
from llava.errors import UserError

QWEN_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Family:
    """Defaults of one family, those of the model in lmms-eval that its scores are compared with.

    Args:
        model: our name of it, for `--model`.
        target: the engine's name of it.
        max_new_tokens: length of an answer where the task sets none.
        ignored_stops: `until` texts of a task that lmms-eval's model does not stop at.
        system: system prompt; None leaves it to the conversation's template.
        strips: white space around an answer is dropped.
        pixels: fewest and most pixels of a picture or a frame; None where pictures have one size.
    """

    model: str
    target: str
    max_new_tokens: int
    ignored_stops: frozenset[str] = frozenset()
    system: str | None = None
    strips: bool = False
    pixels: tuple[int, int] | None = None


LLAVA = Family("llava_msd", "llava", max_new_tokens=1024)
LLAVA_NEXT = Family("llava_next_msd", "llava_next", max_new_tokens=1024)
QWEN2_VL = Family(
    "qwen2_vl_msd", "qwen2_vl", max_new_tokens=128, system=QWEN_SYSTEM, strips=True, pixels=(3136, 602112)
)
QWEN2_5_VL = Family(
    "qwen2_5_vl_msd",
    "qwen2_5_vl",
    max_new_tokens=32768,
    ignored_stops=frozenset({"\n\n"}),
    system=QWEN_SYSTEM,
    pixels=(256 * 28 * 28, 1605632),
)
FAMILIES = (LLAVA, LLAVA_NEXT, QWEN2_VL, QWEN2_5_VL)


def check_family(family: Family, pretrained: str, hub: Mapping[str, Any]) -> None:
    """Reads the base model's config.json.

    Raises:
        UserError: the base model is of another family than ``family``, or of none of ours.
    """
    found = family_of(pretrained, **hub).family
    if found == family.target:
        return
    names = [other.model for other in FAMILIES if other.target == found]
    raise UserError(
        f"--model {family.model} evaluates {family.target} models, and this is a {found} model",
        where=pretrained,
        fix=f"use --model {names[0]}" if names else None,
    )

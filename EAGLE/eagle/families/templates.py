"""The conversation template of each family."""

from __future__ import annotations

from typing import Any

from eagle.families.llava.template import LlavaTemplate
from eagle.families.qwen2_vl.template import Qwen2_5Template, QwenTemplate
from eagle.families.template import Template
from llava.errors import UserError

KNOWN: tuple[type[Template], ...] = (LlavaTemplate, QwenTemplate, Qwen2_5Template)
TEMPLATES = {template.family: template for template in KNOWN}
FAMILIES = {"llava_v15": "llava", "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl"}
"""Names of the families on the command line."""


def template_class(family: str) -> type[Template]:
    """The template of a family of models.

    Raises:
        UserError: the family has none.
    """
    if family not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise UserError("no conversation template for this family of models", family, f"known: {known}")
    return TEMPLATES[family]


def template_of(target: Any) -> Template:
    """The template of a `Target`'s family.

    Raises:
        UserError: the family has none.
    """
    config = target.config
    made = template_class(target.family)
    return made(target.processor, config.image_token_id, getattr(config, "video_token_id", None))

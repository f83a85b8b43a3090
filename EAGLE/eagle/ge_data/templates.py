"""The conversation template of each family."""

from __future__ import annotations

from typing import Any

from eagle.ge_data.template import Template
from eagle.ge_data.template_llava import LlavaTemplate
from eagle.ge_data.template_qwen import Qwen2_5Template, QwenTemplate
from llava.errors import UserError

KNOWN: tuple[type[Template], ...] = (LlavaTemplate, QwenTemplate, Qwen2_5Template)
TEMPLATES = {template.family: template for template in KNOWN}
FAMILIES = {"llava_v15": "llava", "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl"}
"""Names of the families on the command line."""


def template_of(target: Any) -> Template:
    """The template of a `Target`'s family.

    Raises:
        UserError: the family has none.
    """
    if target.family not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise UserError("no conversation template for this family of models", target.family, f"known: {known}")
    config = target.config
    return TEMPLATES[target.family](target.processor, config.image_token_id, getattr(config, "video_token_id", None))

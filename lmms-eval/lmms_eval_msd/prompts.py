"""The conversation of a base model, chosen by its family and `--model_args`."""

from __future__ import annotations

from eagle.families import Target
from eagle.families.stock import load_processor
from lmms_eval_msd.conversation import Conversation
from lmms_eval_msd.conversation_llava import LlavaConversation
from lmms_eval_msd.conversation_qwen import QwenConversation
from lmms_eval_msd.families import Family
from lmms_eval_msd.options import Options, as_bool, as_count

FRAMES = 32  # of a video, as in lmms-eval's Qwen models


def conversation_for(
    family: Family, target: Target, pretrained: str, options: Options, system: str | None = None
) -> Conversation:
    """The conversation with one base model.

    A Qwen model gets its processor a second time, with the limits of a picture's size in it.

    Args:
        family: of the base model.
        target: the base model, loaded from ``pretrained``.
        options: of `--model_args`.
        system: system prompt instead of the family's.
    """
    given = options.prompts
    system = family.system if system is None else system
    if family.pixels is None:
        return LlavaConversation(target, system, given.get("chat_template"), given.get("image_aspect"))
    fewest = as_count("min_pixels", given.get("min_pixels", family.pixels[0]))
    most = as_count("max_pixels", given.get("max_pixels", family.pixels[1]))
    target.processor = load_processor(pretrained, min_pixels=fewest, max_pixels=most, **options.hub)
    return QwenConversation(
        target,
        system or "",
        (fewest, most),
        as_count("max_num_frames", given.get("max_num_frames", FRAMES)),
        as_bool("interleave_visuals", given.get("interleave_visuals", False)),
        given.get("reasoning_prompt"),
    )

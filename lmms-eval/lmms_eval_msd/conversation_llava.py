"""LLaVA-1.5 and LLaVA-1.6, written as lmms-eval's `llava_hf` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eagle.families import Target
from llava.conversation import build_prompt
from llava.errors import UserError
from lmms_eval_msd.conversation import IMAGE_MARK, Conversation, Prompt
from lmms_eval_msd.visuals import Visual, pictures_only

ASPECTS = ("pad", "crop")
PROCESSORS = "processor"  # as `chat_template`: the one that the checkpoint's processor brings along


class LlavaConversation(Conversation):
    """Pictures are `<image>` marks in the text of one turn.

    Args:
        target: the base model.
        system: system prompt instead of the conversation's own.
        template: chat template (Jinja) instead of the tokenizer's, or "processor" for the processor's.
        aspect: LLaVA-1.5: "pad" makes pictures square with a border, "crop" cuts their middle out as `llava_hf` does;
            None leaves it to the checkpoint.
    """

    def __init__(
        self, target: Target, system: str | None = None, template: str | None = None, aspect: str | None = None
    ) -> None:
        self.target, self.system, self.template = target, system, template
        if template == PROCESSORS and not getattr(target.processor, "chat_template", None):
            raise UserError("the processor of this base model has no chat template", fix="leave chat_template out")
        if aspect is not None:
            if aspect not in ASPECTS or not hasattr(target.processor, "aspect"):
                raise UserError(
                    "image_aspect cannot be used", aspect, f"it is one of {', '.join(ASPECTS)}, for llava_msd"
                )
            target.processor.aspect = aspect

    def write(self, context: str, visuals: Sequence[Visual]) -> Prompt:
        pictures = pictures_only(visuals, self.target.family)
        question = context
        if context.count(IMAGE_MARK) != len(pictures):
            question = context.replace(IMAGE_MARK, "")
            if pictures:
                question = " ".join([IMAGE_MARK] * len(pictures)) + "\n" + question
        return Prompt(self._around(question, len(pictures)), tuple(pictures))

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        texts = [prompt.text for prompt in prompts]
        pictures = [visual for prompt in prompts for visual in prompt.visuals]
        return self.target.prepare(texts if len(texts) > 1 else texts[0], pictures)

    def _around(self, question: str, num_images: int) -> str:
        """The first of these that there is: the chosen template, the tokenizer's, LLaVA-1.5's own, as in `llava_hf`.

        A tokenizer's template that expects a list of parts would lose the question, and is passed over.
        """
        if self.template == PROCESSORS:
            return self.target.chat_prompt(_without_marks(question), num_images, system=self.system)
        template = self.template or getattr(self.target.tokenizer, "chat_template", None)
        if template:
            text = self._rendered(question, template)
            if question.strip() in text:
                return text
            if self.template:
                raise UserError("chat_template does not write the question", template[:60])
        return build_prompt(question, system=self.system)

    def _rendered(self, question: str, template: str) -> str:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": question})
        return self.target.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )


def _without_marks(question: str) -> str:
    """The processor's template places the pictures itself, before the text."""
    return question.replace(f"{IMAGE_MARK}\n", "").replace(IMAGE_MARK, "").lstrip(" ")

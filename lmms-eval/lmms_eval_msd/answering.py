"""From prompts to answers: one batch through the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from transformers import StopStringCriteria

from eagle import MSDModel, Stats
from lmms_eval_msd.conversation import Conversation, Prompt
from lmms_eval_msd.settings import GenerationSettings


class Answerer:
    """Decodes prompts.

    Args:
        msd: the engine.
        conversation: makes model inputs of prompts.
        use_msd: decode with the draft.
        strips: drop white space around an answer.
    """

    def __init__(self, msd: MSDModel, conversation: Conversation, use_msd: bool, strips: bool = False) -> None:
        self.msd, self.conversation, self.use_msd, self.strips = msd, conversation, use_msd, strips
        self._stops: dict[tuple[str, ...], StopStringCriteria] = {}

    def answer(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> tuple[list[GenerationResult], Stats]:
        """The answers, each up to the first of the settings' `until`, and the statistics of all of them together."""
        inputs = self.conversation.inputs(prompts)
        engine: dict[str, Any] = {**inputs, **settings.engine, "stopping_criteria": self._stopping(settings.until)}
        output = self.msd.generate(**engine, use_msd=self.use_msd)
        length = inputs["input_ids"].shape[1]
        mask = inputs.get("attention_mask")
        asked = [length] * len(prompts) if mask is None else mask.sum(dim=1).tolist()
        results = []
        for count, new in zip(asked, output.tokens, strict=True):
            text = settings.cut(self.msd.tokenizer.decode(new, skip_special_tokens=True))
            text = text.strip() if self.strips else text
            results.append(GenerationResult(text, TokenCounts(input_tokens=int(count), output_tokens=len(new))))
        return results, output.stats

    def _stopping(self, until: tuple[str, ...]) -> list[StopStringCriteria]:
        """The stock criterion, made once for each set of texts: it reads the whole vocabulary when it is made."""
        if not until:
            return []
        if until not in self._stops:
            self._stops[until] = StopStringCriteria(self.msd.tokenizer, list(until))
        return [self._stops[until]]

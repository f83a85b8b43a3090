"""What every family's conversation with a task offers: a prompt from a context, and model inputs from prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmms_eval_msd.visuals import Visual

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Prompt:
    """``text``: the whole prompt; ``visuals``: its pictures and videos, in the order of their marks in the text."""

    text: str
    visuals: tuple[Visual, ...] = ()


class Conversation(ABC):
    """Writes prompts as the model of lmms-eval that a family's scores are compared with."""

    @abstractmethod
    def write(self, context: str, visuals: Sequence[Visual]) -> Prompt:
        """The conversation around one request.

        Args:
            context: few-shot examples and question, as the task wrote them.
            visuals: of the request.

        Raises:
            UserError: the family cannot see one of the ``visuals``.
        """

    @abstractmethod
    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Model inputs of prompts, padded on the left where there are several, on the model's device."""

"""Tasks of several rounds: the task sees the answers so far and asks on, until it says that it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lmms_eval_msd.visuals import Visual, visuals_of


@dataclass
class Dialogue:
    """One request of several rounds.

    Args:
        doc: the task's document.
        ask: the task's `doc_to_text`, which from the second round on gives (visuals, context, whether it is over,
            answers so far, what it wants to be told next time).
        context: what is asked now.
        visuals: what is shown now.
    """

    doc: Any
    ask: Callable[..., Any]
    context: str
    visuals: list[Visual]
    answers: list[str] = field(default_factory=list)
    memory: Any = None
    rounds: int = 0
    over: bool = False

    def hear(self, answer: str) -> None:
        """Takes the model's answer and lets the task ask on. A task may rewrite the answers so far."""
        self.answers.append(answer)
        self.rounds += 1
        visuals, context, over, answers, self.memory = self.ask(
            self.doc, previous_output=list(self.answers), round_idx=self.rounds, previous_round_info=self.memory
        )
        if answers is not None:
            self.answers = list(answers)
        self.over = bool(over)
        if not self.over:
            self.context, self.visuals = str(context), visuals_of(visuals)

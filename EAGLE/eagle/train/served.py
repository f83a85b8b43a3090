"""Evaluation in training by the real decoding loop, with the draft as a checkpoint would hold it.

Only the main process answers; the others wait. The base model is loaded once more for it, because decoding arranges its
weights in another way than the forwards of online training. Random states are put back, so training is the same
with and without.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eagle.decode.cycle_log import CycleLog, logged_answer
from eagle.decode.msd import MSDModel
from eagle.decode.stats import Stats
from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.head import TrainedHead
from eagle.ge_data.extract import load_base
from eagle.questions import Question
from eagle.train.checkpoint import TEMPORARY


class ServedEvaluation:
    """Answers questions greedily and with the fixed tree of the device, so that two evaluations of a draft are equal.

    Args:
        base: the base model, folder or hub name.
        folder: where the draft is written to be loaded; removed after each evaluation.
        length: new tokens of an answer at most.
        main: False on processes that only wait.
        check: whether to do the self-check of `eagle.decode.self_check`.

    Raises:
        UserError: the base model cannot be loaded or fails the self-check, or a question is too long for it.
    """

    def __init__(
        self,
        base: str,
        questions: Sequence[Question],
        folder: Path,
        length: int,
        device: torch.device,
        main: bool,
        check: bool = True,
    ) -> None:
        self.questions, self.folder, self.length, self.device, self.main = questions, folder, length, device, main
        if not main:
            return
        with same_random_state(device):
            self.target = load_base(base, None, "auto", device, check)
            self.inputs = [question.inputs(self.target) for question in questions]
            for question, inputs in zip(questions, self.inputs, strict=True):
                self.target.check_length(inputs, length, where=f"question {question.id}")

    def __call__(self, draft: TrainedHead) -> dict[str, Any] | None:
        """τ of all answers together, and each answer with its cycles, as in a report of `msd bench`. None on processes
        that only wait."""
        if not self.main:
            return None
        start = time.perf_counter()
        with same_random_state(self.device), tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=self.folder) as folder:
            head = load_draft(save_draft(draft, folder), dtype=self.target.dtype, device=self.target.head_device)
            model = MSDModel(self.target, head, "fixed")
            total, answers = Stats.empty(), []
            for question, inputs in zip(self.questions, self.inputs, strict=True):
                log = CycleLog()
                output = model.generate(**inputs, temperature=0.0, max_new_tokens=self.length, streamer=log)
                total.merge(output.stats)
                answers.append(logged_answer(question, log.cycles, output.stats.accept_lengths, self.target.tokenizer))
        return {
            "tau": total.tau,
            "accepted_per_cycle": total.accepted_per_cycle,
            "acceptance_by_position": total.acceptance_by_position,
            "new_tokens": total.new_tokens,
            "cycles": total.cycles,
            "seconds": time.perf_counter() - start,
            "answers": answers,
        }


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Puts torch's random states back at the end."""
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        yield

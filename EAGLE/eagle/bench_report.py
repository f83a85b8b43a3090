"""The report of `msd bench`: figures in total and for each source of the questions, and a log of every answer.

The log has the new tokens of each cycle and the time of each answer, so everything else can be computed again from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eagle.benchmark import Contestant, decoding_speed, identical, speedups, strongest
from eagle.decode.cycle_log import logged_answer
from eagle.decode.msd import MSDModel
from eagle.decode.stats import Stats
from eagle.exactness import MANY_STEPS, logit_gap
from eagle.questions import Conversations, Question

SCHEMA = 1


@dataclass
class Bench:
    """A finished run: each contestant has answered each question once, in this order.

    Attributes:
        msd: with logged cycles.
        rivals: plain decoding; the strongest one is the baseline.
        sampled: whether answers were sampled, and ``seeded`` whether with a seed.
    """

    model: MSDModel
    msd: Contestant
    rivals: Sequence[Contestant]
    questions: Sequence[Question]
    sampled: bool = False
    seeded: bool = False

    @property
    def reference(self) -> Contestant | None:
        """What answers have to be equal to: transformers' `generate` if greedy; our loop with the same seed if sampled,
        because transformers draws other random numbers; None without a seed."""
        if self.sampled:
            return self.rivals[0] if self.seeded else None
        return next((rival for rival in self.rivals if rival.name.startswith("transformers")), self.rivals[0])

    @cached_property
    def differences(self) -> dict[int, dict[str, Any]]:
        """For each answer that is not the reference's: the first token that differs, and how far apart the logits of
        the two tokens are there, in steps of the dtype. A near tie is a distance that rounding explains."""
        if self.reference is None:
            return {}
        pairs = enumerate(zip(self.msd.answers, self.reference.answers, strict=True))
        found: dict[int, dict[str, Any]] = {}
        for number, (own, plain) in pairs:
            if own != plain:
                found[number] = self._difference(number, own, plain, self._before(number, found))
        return found

    @cached_property
    def asked(self) -> list[Question]:
        """The questions as the reference was asked: turns of a conversation with its answers to the turns before."""
        conversations, found = Conversations(self.model), []
        for number, question in enumerate(self.questions):
            found.append(conversations.ask(question))
            if self.reference is not None:
                conversations.keep(found[-1], self.reference.answers[number])
        return found

    def _before(self, number: int, found: Mapping[int, dict[str, Any]]) -> dict[str, Any] | None:
        """The first difference in an earlier turn of the same conversation."""
        name = self.questions[number].conversation
        turns = (n for n in found if name and self.questions[n].conversation == name)
        return next((found[n] for n in turns), None)

    def _difference(
        self, number: int, own: list[int], plain: list[int], before: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        shared = min(len(own), len(plain))
        place = next((n for n in range(shared) if own[n] != plain[n]), shared)
        if before is not None:  # both were asked after other answers: as near a tie as the first difference
            return {"place": place, "steps": None, "near_tie": before["near_tie"]}
        if place == shared or self.sampled:  # one answer ends earlier, or noise was added to the logits
            return {"place": place, "steps": None, "near_tie": False}
        inputs = self.asked[number].inputs(self.model.target)
        expected = torch.cat([inputs["input_ids"][0], torch.tensor(plain, device=inputs["input_ids"].device)])
        gap = logit_gap(self.model.target, inputs, expected, inputs["input_ids"].shape[1] + place, own[place])
        return {"place": place, "steps": gap.steps, "near_tie": gap.steps <= MANY_STEPS}

    @cached_property
    def best(self) -> Contestant:
        """The strongest baseline of the whole run."""
        return strongest(self.rivals)

    @cached_property
    def best_after_first(self) -> Contestant:
        """The baseline that is strongest after the first token."""
        return strongest(self.rivals, decoding_speed)

    def figures(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Figures of the questions with these numbers. The baseline is that of the whole run."""
        msd, best, later = (each.part(numbers) for each in (self.msd, self.best, self.best_after_first))
        total, plain = msd.total, best.total
        return {
            "questions": total.requests,
            "new_tokens": total.new_tokens,
            "cycles": total.cycles,
            "tokens_per_second": {"msd": total.tokens_per_second, "baseline": plain.tokens_per_second},
            "first_token_ms": {
                each.name: first_token_ms(each.part(numbers).total) for each in (self.msd, *self.rivals)
            },
            **speedups(msd, best, later),
            "tau": total.tau,
            "accepted_per_cycle": total.accepted_per_cycle,
            "acceptance_by_position": total.acceptance_by_position,
            "histogram": total.histogram,
            "identical": self._identical(numbers),
        }  # fmt: skip

    def _identical(self, numbers: Sequence[int]) -> dict[str, Any] | None:
        if self.reference is None:
            return None
        return {
            "answers": identical(self.msd.part(numbers), self.reference.part(numbers)),
            "of": len(numbers),
            "near_ties": sum(self.differences[n]["near_tie"] for n in numbers if n in self.differences),
            "to": self.reference.name,
        }

    def sources(self) -> dict[str, list[int]]:
        """Numbers of the questions of each source, in the order of the file; empty if no question names its source."""
        found: dict[str, list[int]] = {}
        for number, question in enumerate(self.questions):
            found.setdefault(question.source or "unnamed", []).append(number)
        return found if any(question.source for question in self.questions) else {}

    def logged(self, number: int) -> dict[str, Any]:
        """One answer: its tokens by cycle, its text by pieces, the plain answer, and the times of both."""
        question, own, plain = self.questions[number], self.msd.rounds[number], self.best.rounds[number]
        cycles = [list(tokens) for tokens in self.msd.cycles[number]]
        entry: dict[str, Any] = {
            **logged_answer(question, cycles, own.accept_lengths, self.model.tokenizer),
            "seconds": {"msd": own.seconds, "baseline": plain.seconds},
            "first_token_seconds": {"msd": own.first_token, "baseline": plain.first_token},
            "baseline_tokens": plain.new_tokens,
        }
        if self.reference is not None:
            tokens = self.reference.answers[number]
            entry["plain"] = tokens
            entry["plain_text"] = self.model.tokenizer.decode(tokens, skip_special_tokens=True)
            entry["difference"] = self.differences.get(number)
        return entry

    def setting(self, temperature: float) -> dict[str, Any]:
        """What a figure of speed depends on, beside the models."""
        target = self.model.target
        device = target.device
        return {
            "card": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": target.model.config.get_text_config()._attn_implementation,
            "compiled": self.model.compiled,
            "batch": 1,
            "temperature": temperature,
        }


def first_token_ms(total: Stats) -> float:
    """Milliseconds from a request to its first token, on average."""
    return 1000 * total.first_token / total.requests


def make_report(bench: Bench, settings: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """The report as plain data: figures of all questions, of each source, and each answer.

    Args:
        settings: the options of the command.
        made: `eagle.provenance.record`.
    """
    total, rivals = bench.msd.total, bench.rivals
    return {
        "schema": SCHEMA,
        "setting": bench.setting(settings["temperature"]),
        **bench.figures(range(len(bench.questions))),
        "baseline_name": bench.best.name,
        "baselines": {rival.name: rival.total.tokens_per_second for rival in rivals},
        "phases_ms": {name: ms / max(total.cycles, 1) for name, ms in total.phases_ms.items() if name != "prefill"}
        | {"prefill": total.phases_ms["prefill"] / total.requests},
        "phases_share": total.shares(),
        "decoding_tokens_per_second": {each.name: each.total.decoding_speed for each in [bench.msd, *rivals]},
        "sources": {name: bench.figures(numbers) for name, numbers in bench.sources().items()},
        **made,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "answers": [bench.logged(number) for number in range(len(bench.questions))],
    }

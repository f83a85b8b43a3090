"""Published figures of other measurements, to show beside one's own: never in the same table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from llava.errors import UserError
from llava.files import read_json
from llava.strict import read_strict, strict_dataclass

PUBLISHED = Path(__file__).resolve().parents[2] / "benchmarks" / "published.json"
"""In a clone of the repository."""


@strict_dataclass
class Published:
    """One figure as its source states it; None where the source does not say.

    ``bonus``: whether ``tau`` counts the bonus token; ``speedup_of``: totals (tokens per second of all answers), paired
    (mean of the ratios of each answer), time per token (ratio of its averages), or the largest of
    several; ``identical``: share of answers equal to plain decoding; ``checked``: how the figure was looked up.
    """

    method: str
    base: str
    set: str
    temperature: float | None
    batch: int | None
    dtype: str | None
    attention: str | None
    hardware: str | None
    tau: float | None
    bonus: bool | None
    speedup: float | None
    speedup_of: Literal["totals", "paired", "time per token", "largest"] | None
    identical: float | None
    source: str
    checked: str

    @property
    def counted(self) -> str:
        """τ with what it counts, such as ``4.75 with bonus``; empty if there is none."""
        if self.tau is None:
            return ""
        words = {True: "with bonus", False: "without bonus", None: "bonus not stated"}
        return f"{self.tau:.2f} {words[self.bonus]}"

    @property
    def faster(self) -> str:
        """The speed-up with what it is of; empty if there is none."""
        return "" if self.speedup is None else f"{self.speedup:.2f}x {self.speedup_of or 'not stated of what'}"

    @property
    def setting(self) -> str:
        """What the source states of the setting, but for the temperature."""
        batch = None if self.batch is None else f"batch {self.batch}"
        return ", ".join(filter(None, (self.hardware, self.dtype, self.attention, batch)))

    def is_of(self, base: str, draft: str) -> bool:
        """Whether the row is of this base model, and of this kind of draft if its name tells the kind.

        >>> row = Published("EAGLE-2", "LLaVA-1.5-7B", "s", *[None] * 10, source="", checked="")
        >>> [row.is_of("llava-hf/llava-1.5-7b-hf", draft) for draft in ("o/EAGLE-LLaVA", "o/MSD-LLaVA", "final")]
        [True, False, True]
        >>> row.is_of("llava-hf/llava-1.5-13b-hf", "final"), row.is_of("pocket/llava", "final")
        (False, False)
        """
        words = iter(_words(base.rstrip("/").rpartition("/")[2]))
        if not all(word in words for word in _words(self.base)):  # in this order
            return False
        name = draft.rstrip("/").rpartition("/")[2].lower()
        kind = next((kind for kind, pattern in DRAFTS.items() if re.search(pattern, name)), None)
        return kind is None or re.fullmatch(kind, self.method) is not None

    @property
    def stated(self) -> dict[str, float | int | str | None]:
        """The row's settings under the names of `eagle.report.runs`, None where the source does not state one."""
        return {
            "temperature": self.temperature, "dtype": self.dtype, "attention": self.attention, "batch": self.batch,
            "machine": self.hardware,
        }  # fmt: skip

    def differs(self, settings: Mapping[str, str]) -> list[str]:
        """The settings of a run that are not those that the source states."""
        found = [
            f"{name} {settings.get(name, 'not recorded')}"
            for name, value in self.stated.items()
            if value is not None and str(value) != settings.get(name)
        ]
        same = self.set.partition(",")[0].lower() in settings.get("data", "").lower()
        return found if same and f" {settings.get('questions')} turns" in self.set else [*found, "other questions"]


DRAFTS = {"MSD": "(?<![a-z])msd", "ViSpec": "vispec", "EAGLE-3": r"eagle-?3", "EAGLE-[12]": "eagle"}
"""Methods, as patterns, and what the name of such a draft has."""


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+|\d+(?:\.\d+)?", name.lower())


def published_rows(path: Path = PUBLISHED) -> list[Published]:
    """All rows of the file, in its order.

    Raises:
        UserError: the file is not there (the package is not installed from a clone), or has a wrong row.
    """
    rows = read_json(path, "published figures")
    if not isinstance(rows, list):
        raise UserError("published figures are not a list", path)
    return [read_strict(Published, row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]

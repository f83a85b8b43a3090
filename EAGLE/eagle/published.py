"""Published figures of other measurements, to show beside one's own: never in the same table."""

from __future__ import annotations

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


def published_rows(path: Path = PUBLISHED) -> list[Published]:
    """All rows of the file, in its order.

    Raises:
        UserError: the file is not there (the package is not installed from a clone), or has a wrong row.
    """
    rows = read_json(path, "published figures")
    if not isinstance(rows, list):
        raise UserError("published figures are not a list", path)
    return [read_strict(Published, row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]

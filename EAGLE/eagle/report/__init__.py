"""Results of runs: intervals, readers of the JSON files that commands write, comparisons, and pages of HTML.

Does not import torch, so that stored results can be read anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """
    >>> markdown_table(["a", "b"], [["1", "2|3"]]).splitlines()
    ['| a | b |', '| --- | --- |', '| 1 | 2\\\\|3 |']
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)

"""docs/method-inputs.png: what the draft reads at each position, and what comes out.

    python -m experiments.figure_inputs

A drawing, not a measurement. `eagle.drafts.msd` (fuse) and `eagle.decode.drafter` (start) are what it shows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common import REPO
from llava.arguments import OneLineParser
from llava.errors import run_cli
from llava.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUT = REPO / "docs" / "method-inputs.png"
TOKENS = ("USER:", "image", "image", "image", "What", "is", "it?", "A", "bus")
"""The text so far; four positions of a picture would be hundreds."""
IMAGE = "image"
NEXT = "on"
TEXT, PICTURE, HIDDEN, LAYER, PREDICTED = "#cfe1f5", "#f2c57c", "#d9ead3", "#e6e6e6", "#e8c9e4"
WIDTH, DPI = 10.0, 110
HALF = 0.43  # half the width of a position's box
ROWS = {"token": 6.5, "hidden": 5.2, "input": 3.4, "layer": 2.1, "predicted": 0.95, "head": -0.05, "guess": -1.05}


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = HALF, height: float = 0.32) -> None:
    """A labelled box around a point."""
    from matplotlib.patches import FancyBboxPatch

    patch = FancyBboxPatch(
        (x - width, y - height), 2 * width, 2 * height, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="0.4"
    )
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "0.35") -> None:
    """An arrow between two points."""
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.0})


def draw_positions(axes: Axes) -> None:
    """Tokens, the target's hidden states, and the draft's input at every position that has a next token."""
    for t, token in enumerate(TOKENS):
        box(axes, t, ROWS["token"], token, PICTURE if token == IMAGE else TEXT)
        axes.text(t, ROWS["token"] + 0.62, f"$x_{{{t + 1}}}$", ha="center", fontsize=9)
        if t + 1 == len(TOKENS):
            continue
        image = TOKENS[t + 1] == IMAGE
        box(axes, t, ROWS["hidden"], f"$h_{{{t + 1}}}$", "white" if image else HIDDEN)
        following = f"$g_{{{t + 2}}}$" if image else f"fc([$e_{{{t + 2}}}$; $h_{{{t + 1}}}$])"
        box(axes, t, ROWS["input"], following, PICTURE if image else TEXT)
        lower = ROWS["input"] + 0.36
        arrow(axes, (t + 1 - 0.25, ROWS["token"] - 0.36), (t + 0.22, lower), "#b06f00" if image else "#2563a8")
        if not image:
            arrow(axes, (t - 0.12, ROWS["hidden"] - 0.36), (t - 0.12, lower), "#3d7a2f")
        arrow(axes, (t, ROWS["input"] - 0.36), (t, ROWS["layer"] + 0.36))


def draw_output(axes: Axes) -> None:
    """The layer, and what becomes of its last row."""
    last = len(TOKENS) - 2
    middle = last / 2
    box(axes, middle, ROWS["layer"], "the draft: one decoder layer (each row sees the rows before it)", LAYER,
        width=middle + HALF)  # fmt: skip
    size = len(TOKENS)
    arrow(axes, (last, ROWS["layer"] - 0.36), (last, ROWS["predicted"] + 0.36))
    box(axes, last, ROWS["predicted"], rf"$\hat{{h}}_{{{size}}}$", PREDICTED)
    arrow(axes, (last, ROWS["predicted"] - 0.36), (last, ROWS["head"] + 0.36))
    box(axes, last, ROWS["head"], "the target's lm_head", HIDDEN, width=0.95)
    arrow(axes, (last, ROWS["head"] - 0.36), (last, ROWS["guess"] + 0.36))
    box(axes, last, ROWS["guess"], f"{NEXT}, in, …", TEXT, width=0.6)
    axes.text(last + 0.72, ROWS["guess"], f"guesses of $x_{{{size + 1}}}$,\nfor the tree", fontsize=8.5, va="center")


def draw_notes(axes: Axes) -> None:
    """Names of the rows on the left, and the key below."""
    for row, text in (("token", "text so far"), ("hidden", "target's\nhidden state"), ("input", "input of the\ndraft")):
        axes.text(-0.62, ROWS[row], text, ha="right", va="center", fontsize=9)
    key = (
        "followed by text (blue):  the embedding e of the next token, and the target's hidden state h, through fc\n"
        "followed by a picture (orange):  the projected image feature g of the next position, and no h (white)\n"
        f"one more guess deep:  the predicted $\\hat{{h}}_{{{len(TOKENS)}}}$ takes the place of h, a guess that of e"
    )
    axes.text(-1.5, -0.1, key, ha="left", va="center", fontsize=8.5, linespacing=1.7)


def main() -> None:
    """Draws the figure."""
    made = OneLineParser(
        prog="python -m experiments.figure_inputs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--out", type=Path, default=OUT, help="the PNG (default: docs/method-inputs.png)")
    options = made.parse_args()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    axes = figure.subplots()
    draw_positions(axes)
    draw_output(axes)
    draw_notes(axes)
    axes.set_xlim(-1.6, len(TOKENS) - 0.3)
    axes.set_ylim(ROWS["guess"] - 0.5, ROWS["token"] + 1.0)
    axes.set_axis_off()
    with atomic_write(options.out) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(run_cli(main))

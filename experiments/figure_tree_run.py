"""The drawing of `experiments.figure_tree`: a question is answered, and one cycle is drawn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eagle.decode.accept import Accepted
from eagle.decode.decoder import Decoder, DecodingSettings, Verified
from eagle.decode.msd import MSDModel
from eagle.decode.sampling import Sampler
from eagle.decode.stopping import Stopper
from eagle.decode.tree import DraftTree
from eagle.decode.tree_config import TreeConfig
from eagle.hidden_states.index import sha256
from eagle.questions import Question, read_questions
from experiments.common import REPO
from llava.errors import UserError
from llava.files import atomic_write
from llava.image import load_image

BASE, DRAFT = REPO / "pocket" / "llava", REPO / "pocket" / "llava-msd"
DATA = REPO / "pocket" / "data" / "heldout.jsonl"
MAX_NEW_TOKENS = 128
DRAFTED, ACCEPTED, ROOT, BONUS = "#e6e6e6", "#9cc3ea", "#2563a8", "#f2c57c"
WIDTH = 10.0  # inches; at DPI a README's width
DPI = 110
SPACES = "▁Ġ"  # how SentencePiece and byte-level BPE write a space
ASKED, SEEN = 70, 60  # characters of the question, and of the answer so far


class Cycle(NamedTuple):
    """One cycle: the ``tree`` that was drafted, what the target ``accepted``, and the tokens ``before`` its root."""

    tree: DraftTree
    accepted: Accepted
    before: list[int]


class RecordingDecoder(Decoder):
    """The decode loop, recording its cycles."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycles: list[Cycle] = []

    def accept(self, verified: Verified) -> list[Accepted]:
        """The base's, of the only sequence."""
        accepted = super().accept(verified)
        self.cycles.append(Cycle(verified.drafted.trees[0], accepted[0], self.active[0].tokens[:-1]))
        return accepted


def record(msd: MSDModel, question: Question, tree: TreeConfig, max_new_tokens: int) -> list[Cycle]:
    """The cycles of a greedy answer."""
    decoders: list[RecordingDecoder] = []

    def decode(
        model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **inputs: Any,
    ) -> torch.Tensor:  # fmt: skip
        sampler, stopper = Sampler(logits_processor, False), Stopper(stopping_criteria, input_ids.shape[1])
        decoders.append(
            RecordingDecoder(
                msd.target, msd.draft, {"input_ids": input_ids, **inputs}, DecodingSettings(sampler, stopper, tree)
            )
        )
        with torch.inference_mode():
            decoders[0].run()
        return input_ids

    inputs = question.inputs(msd.target)
    inputs |= msd.target.complete_inputs(inputs["input_ids"], inputs)
    msd.target.model.generate(**inputs, custom_generate=decode, do_sample=False, max_new_tokens=max_new_tokens)
    return decoders[0].cycles


def typical(cycles: Sequence[Cycle]) -> int:
    """Of the cycles whose number of new tokens is nearest to the mean the one with most leaves; the first of these."""
    drafted = [number for number, cycle in enumerate(cycles) if cycle.tree.size > 1]
    if not drafted:
        raise UserError("no cycle of this answer drafted anything", fix="ask another question, or for more tokens")
    tau = sum(len(cycles[number].accepted.tokens) for number in drafted) / len(drafted)

    def rank(number: int) -> tuple[float, int]:
        tree, accepted = cycles[number].tree, cycles[number].accepted
        return abs(len(accepted.tokens) - tau), len(set(tree.parents.tolist())) - tree.size

    return min(drafted, key=rank)


def rows_of(tree: DraftTree, accepted: Accepted) -> tuple[list[float], float]:
    """The height of each node, leaves one below the other, an inner node at its first child; and that of the bonus
    token, the first child of the last accepted node."""
    parents = tree.parents.tolist()
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    heights, bonus, used = [0.0] * len(parents), 0.0, 0
    path = set(accepted.path)

    def place(node: int) -> None:
        nonlocal bonus, used
        heights[node] = float(used)
        if node == accepted.path[-1]:
            bonus, used = float(used), used + 1
        elif not children[node]:
            used += 1
        for child in sorted(children[node], key=lambda child: (child not in path, -float(tree.scores[child]))):
            place(child)

    place(0)
    return heights, bonus


def spelling(tokenizer: Any, token: int) -> str:
    """A token as it is in the vocabulary, its space visible."""
    text = str(tokenizer.convert_ids_to_tokens(token))
    for sign in SPACES:
        text = text.replace(sign, "␣")
    return text.replace("$", r"\$")


def likelihood(probability: float) -> str:
    """Two digits.

    >>> likelihood(0.137), likelihood(0.999), likelihood(0.002)
    ('0.14', '>0.99', '<0.01')
    """
    rounded = f"{probability:.2f}"
    return {"0.00": "<0.01", "1.00": ">0.99"}.get(rounded, rounded)


def draw_tree(axes: Axes, cycle: Cycle, tokenizer: Any) -> None:
    """Nodes by depth from left to right: text and probability of the path so far."""
    tree, accepted = cycle.tree, cycle.accepted
    heights, bonus_height = rows_of(tree, accepted)
    depths, parents, path = tree.depths.tolist(), tree.parents.tolist(), set(accepted.path)
    texts = [spelling(tokenizer, token) for token in [*tree.tokens.tolist(), accepted.tokens[-1]]]
    places = [*zip(depths, heights, strict=True), (depths[accepted.path[-1]] + 1, bonus_height)]
    parents = [*parents, accepted.path[-1]]
    for node, (x, y) in enumerate(places):
        bonus, certain = node == tree.size, node in path
        notes = {0: "newest", tree.size: "bonus"}
        note = notes[node] if node in notes else likelihood(float(tree.scores[node].exp()))
        colour = BONUS if bonus else ROOT if node == 0 else ACCEPTED if certain else DRAFTED
        if node > 0:
            left, height = places[parents[node]]
            axes.plot(
                [left, left + 0.5, left + 0.5, x], [height, height, y, y], zorder=2.0 if certain or bonus else 1.0,
                color=ROOT if certain else BONUS if bonus else "0.7", lw=2.2 if certain or bonus else 1.0,
                ls="--" if bonus else "-",
            )  # fmt: skip
        box = {"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": ROOT if certain else "0.5"}
        axes.text(x, y, f"{texts[node]}\n{note}", ha="center", va="center", fontsize=8.5, linespacing=1.15,
                  color="white" if node == 0 else "black", bbox=box)  # fmt: skip
    axes.set_xlim(-0.55, max(x for x, _ in places) + 0.55)
    axes.set_ylim(max(y for _, y in places) + 0.6, -0.6)
    axes.set_axis_off()


def draw(cycle: Cycle, title: str, question: Question, tokenizer: Any) -> Figure:
    """The picture on the left, the tree on the right."""
    lines = max(rows_of(cycle.tree, cycle.accepted)[0]) + 2
    figure = Figure(figsize=(WIDTH, 1.4 + 0.52 * lines), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 3.6))
    if question.images:
        left.imshow(load_image(question.images[0]), interpolation="bilinear")
    left.set_axis_off()
    left.set_title("the picture", fontsize=9)
    draw_tree(right, cycle, tokenizer)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    return figure


def title_of(cycles: Sequence[Cycle], number: int, question: Question, tokenizer: Any) -> str:
    """Question, answer so far, and what came of the cycle."""
    cycle = cycles[number]
    so_far = str(tokenizer.decode([*cycle.before, int(cycle.tree.tokens[0])], skip_special_tokens=True))
    shown = so_far if len(so_far) <= SEEN else "…" + so_far[-SEEN:]
    return (
        f"“{shorten(question.question, ASKED, placeholder=' …')}”   answer so far: “{shown}”\n"
        f"cycle {number + 1} of {len(cycles)}: {cycle.tree.size - 1} tokens drafted, {len(cycle.accepted.path) - 1} "
        "accepted (blue), and the bonus token (dashed)"
    )


def run(options: argparse.Namespace) -> None:
    """Answers the question and draws one cycle."""
    known = {question.id: question for question in read_questions(DATA)}
    if options.question not in known:
        raise UserError(f"no question '{options.question}'", DATA, "give the id of one of its lines")
    question = known[options.question]
    tree = TreeConfig(*options.tree) if options.tree else TreeConfig.for_device("cpu")
    msd = MSDModel.from_pretrained(BASE, DRAFT, dtype=torch.float32, tree=tree)
    cycles = record(msd, question, tree, MAX_NEW_TOKENS)
    number = typical(cycles) if options.cycle is None else options.cycle - 1
    if not 0 <= number < len(cycles):
        raise UserError(f"no cycle {options.cycle}", fix=f"this answer has {len(cycles)}")
    title = title_of(cycles, number, question, msd.tokenizer)
    figure = draw(cycles[number], title, question, msd.tokenizer)
    origin = {"Software": None, "Source": sha256(DRAFT / "model.safetensors")}
    with atomic_write(options.out) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata=origin)

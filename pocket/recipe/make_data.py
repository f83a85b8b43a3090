"""Write conversations in LLaVA's format and text conversations in ShareGPT's format.

python -m pocket.recipe.make_data --out DIR --images 200 --texts 100 --seed 1
python -m pocket.recipe.make_data --out pocket/data --heldout 150 --seed 1   (the held-out questions)
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from llava.arguments import OneLineParser
from llava.errors import run_cli
from llava.files import write_json, write_text

from .draw import draw
from .english import ask_text
from .facts import is_right
from .phrases import Turn
from .sample import ASKERS, KINDS, ask, converse, draw_picture_data
from .spec import Chart, Picture, Scene

TEXT_EVERY = 16  # one held-out question in so many has no picture
PROPOSALS = 60
TRIES = 40
GENERAL = ("describe", "title", "extremes", "order start", "order end", "count")


def save_picture(image: Image.Image, path: Path) -> None:
    """A small palette PNG with exactly the colours the model is trained on, as far as 256 colours allow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _turns(turns: list[Turn], has_image: bool) -> list[dict[str, str]]:
    out = []
    for i, turn in enumerate(turns):
        mark = "<image>\n" if has_image and i == 0 else ""
        out += [{"from": "human", "value": mark + turn.question}, {"from": "gpt", "value": turn.answer}]
    return out


def write_train(out: Path, images: int, texts: int, seed: int) -> None:
    """train_v.json with its pictures and train_t.json."""
    entries: list[dict[str, Any]] = []
    for i in range(images):
        talk = converse(Random(f"data-{seed}-{i}"), text_share=0.0)
        assert talk.picture is not None
        name = f"images/train/v{i:05d}.png"
        save_picture(draw(talk.picture), out / name)
        entries.append({"id": f"v{i:05d}", "image": name, "conversations": _turns(talk.turns, True)})
    write_json(out / "train_v.json", entries, indent=0)
    text = [{"id": f"t{i:05d}", "conversations": _turns(ask_text(Random(f"text-{seed}-{i}")), False)}
            for i in range(texts)]  # fmt: skip
    write_json(out / "train_t.json", text, indent=0)


def _is_general(turn: Turn) -> bool:
    """True for questions which name nothing that only some pictures have."""
    return turn.kind in GENERAL


def _subjects(turn: Turn) -> tuple[str, ...]:
    return tuple(sorted({f"{f['slot']} {f['subject']}" for f in turn.facts}))


def _other_chart(rng: Random, chart: Chart, keep_names: bool) -> Chart:
    """A real chart of the same kind, under the names of this one if the question needs them."""
    while True:
        other = draw_picture_data(rng, True, chart.kind)
        assert isinstance(other, Chart)
        if not keep_names:
            return other
        if len(other.names) == len(chart.names):
            return replace(other, names=chart.names)


def _other_scene(rng: Random, scene: Scene) -> Scene:
    """Another scene, or the things of this one at other places."""
    if rng.random() < 0.5:
        other = draw_picture_data(rng, True, "scene")
        assert isinstance(other, Scene)
        return other
    places = sorted(rng.sample(range(9), len(scene.things)))
    things = rng.sample(scene.things, len(scene.things))
    return Scene(tuple(replace(t, place=p) for t, p in zip(things, places, strict=True)))


def _asked_there(rng: Random, picture: Picture, turn: Turn) -> Turn | None:
    """The same question about the other picture, or None if it cannot be asked there."""
    for _ in range(TRIES):
        for asker, _ in ASKERS[picture.kind]:
            found = asker(rng, picture)
            if found is None or found.kind != turn.kind:
                continue
            if _is_general(turn) or _subjects(found) == _subjects(turn):
                return found
    return None


def _other(rng: Random, picture: Picture, keep_names: bool) -> Picture:
    return _other_scene(rng, picture) if isinstance(picture, Scene) else _other_chart(rng, picture, keep_names)


def exchanged(rng: Random, picture: Picture, turn: Turn) -> tuple[Picture, str] | None:
    """Another picture for a question, whose right answer differs most from this one's, with that answer; None if there
    is none.

    The other picture holds the same names where the question needs them, but other data: the values of another real
    chart, or other shapes. So a model that does not look at the picture cannot pass, and the right answer for the other
    picture, scored against the facts of this one, is the level of chance.
    """
    best: tuple[float, Picture, str] | None = None
    for _ in range(PROPOSALS):
        other = _other(rng, picture, not _is_general(turn))
        found = _asked_there(rng, other, turn)
        if found is None:
            continue
        shared = sum(is_right(f, found.answer) for f in turn.facts) / len(turn.facts)
        if best is None or shared < best[0]:
            best = (shared, other, found.answer)
        if shared == 0:
            break
    return None if best is None or best[0] == 1 else (best[1], best[2])


def heldout_text(rng: Random, number: int) -> dict[str, Any]:
    """A question without a picture."""
    while True:
        turn = ask_text(rng)[0]
        if turn.facts:
            break
    return {"id": f"h{number:04d}", "kind": "text", "images": [], "question": turn.question, "answer": turn.answer,
            "facts": turn.facts}  # fmt: skip


def heldout_picture(rng: Random, out: Path, number: int) -> dict[str, Any]:
    """A question about a held-out picture, and the picture to exchange it for."""
    kind = KINDS[number % len(KINDS)]
    while True:
        picture: Picture = draw_picture_data(rng, True, kind)
        turns = ask(rng, picture, 1)
        other = exchanged(rng, picture, turns[0]) if turns else None
        if other is not None:
            break
    turn, name = turns[0], f"images/heldout/h{number:04d}.png"
    save_picture(draw(picture), out / name)
    other_name = f"images/heldout/x{number:04d}.png"
    save_picture(draw(other[0]), out / other_name)
    return {
        "id": f"h{number:04d}", "kind": f"{kind} {turn.kind}", "images": [name], "question": turn.question,
        "answer": turn.answer, "facts": turn.facts, "exchange": {"images": [other_name], "answer": other[1]},
    }  # fmt: skip


def write_heldout(out: Path, number: int, seed: int) -> None:
    """heldout.jsonl with its pictures."""
    lines = []
    for i in range(number):
        rng = Random(f"heldout-{seed}-{i}")
        is_text = i % TEXT_EVERY == TEXT_EVERY - 1
        lines.append(json.dumps(heldout_text(rng, i) if is_text else heldout_picture(rng, out, i)))
    write_text(out / "heldout.jsonl", "\n".join(lines) + "\n")


def main() -> None:
    """Command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=0, help="conversations with a picture")
    parser.add_argument("--texts", type=int, default=0, help="conversations without")
    parser.add_argument("--heldout", type=int, default=0, help="held-out questions")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.images < 0 or args.texts < 0 or args.heldout < 0:
        parser.error("--images, --texts and --heldout must not be negative")
    if not args.images + args.texts + args.heldout:
        parser.error("nothing to write: give --images, --texts or --heldout")
    if args.images or args.texts:
        write_train(args.out, args.images, args.texts, args.seed)
    if args.heldout:
        write_heldout(args.out, args.heldout, args.seed)


if __name__ == "__main__":
    sys.exit(run_cli(main))

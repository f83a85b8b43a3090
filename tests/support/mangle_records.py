"""Damaged records of annotation files, each with the reason for which it must be skipped. Does not import pytest."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tiny_llava import make_image

Record = dict[str, Any]
HALF = "\ud83e"
"""Half of a surrogate pair: JSON can write it, UTF-8 cannot."""

JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 7, 1.5, float("nan"), float("inf"), 10**40, "", " ", "\x00", HALF, "word", "<image>",
    [], [[]], [None], [[["human", "hi"]]], {}, {"a": 1}, {"from": "human"}, {"from": "gpt", "value": None},
)  # fmt: skip
NO_TURNS = (5, 1.5, True, float("nan"), "USER: q", {}, {"human": "q"}, [None], [5], ["q", "a"], [[]], [["human", "q"]])
NO_TEXT = (None, 5, 1.5, False, [], ["q"], {}, {"text": "q"})
NO_SPEAKER = (None, 5, True, "Human", "", "gpt ", "narrator", ["human"], {"a": "gpt"}, HALF)
NO_ID = (1.5, True, float("nan"), [], [1], {}, {"a": 1}, "x" * 257, "x" * 100_000)
NO_NAME = (5, 1.5, True, False, {"a.png": 1}, [None], [["a.png"]], [5], [""], [True], ["a.png", 5])
OUTSIDE = ("../a.png", "/a.png", "x/../../a.png", "..", "./../pictures/a.png", "x/..", ["a.png", "../b.png"])
NOT_THERE = ("nothing.png", "folder", ".", "a.png/b", "a\x00.png", "x" * 5000, HALF + ".png", " a.png")
BLANK = ("", " ", "\n\t ", "\u2003", "\r\n")


class Mangled(NamedTuple):
    """A record, its half of the data (t or v), and why it must be skipped."""

    record: Record
    kind: str
    reason: str


def good_record(rng: Random, kind: str) -> Record:
    """A valid record."""
    name = rng.choice(("a.png", "b.png"))
    question = "<image>\nWhat colours?" if kind == "v" else "Name two rivers."
    said = [question, f"Red and {rng.randrange(99)}.", "More?", "No."]
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
    record: Record = {"id": f"r{rng.randrange(10**6)}", "conversations": turns}
    return {**record, "image": name} if kind == "v" else record


def make_pictures(folder: Path) -> Path:
    """Two valid pictures and many damaged ones."""
    folder.mkdir()
    make_image(folder / "a.png", 60, 60, seed=1)
    make_image(folder / "b.png", 112, 60, seed=2)
    (folder / "folder").mkdir()
    whole = (folder / "b.png").read_bytes()
    files = {
        "empty.png": b"",
        "signature.png": whole[:8],
        "half.png": whole[: len(whole) // 2],
        "text.png": b"no picture at all\n" * 9,
        "page.jpg": b"<html><body>404</body></html>",
        "jpeg.jpg": b"\xff\xd8\xff\xe0" + b"\0" * 60,
        "bomb.png": png(60_000, 60_000),
        "strip.png": png(60_000, 1),
        "nothing.gif": b"GIF89a" + b"\0" * 7,
        "zeros.bmp": b"BM" + b"\0" * 60,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


BROKEN = ("empty.png", "signature.png", "half.png", "text.png", "page.jpg", "jpeg.jpg", "bomb.png", "nothing.gif")
"""Pictures that no family can read. `strip.png` and `zeros.bmp` depend on the family."""


def png(width: int, height: int) -> bytes:
    """A PNG of one colour that claims this size. Data for at most 4 rows of pixels is there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * (width + 1) * min(height, 4))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def put_text(record: Record, rng: Random, text: str, speaker: str | None = None) -> None:
    """Sets the text of a turn, of ``speaker`` if given. A question keeps its mark."""
    turn = rng.choice([turn for turn in record["conversations"] if speaker in (None, turn["from"])])
    turn["value"] = text + ("<image>" if "<image>" in turn["value"] else "")


def set_turns(record: Record, rng: Random) -> str:
    record["conversations"] = rng.choice(NO_TURNS)
    return "no_conversation"


def drop_turns(record: Record, rng: Random) -> str:
    del record["conversations"]
    if rng.random() < 0.5:
        record[rng.choice(("items", "messages", "Conversations"))] = rng.choice((None, 5, {}, "q"))
    return "no_conversation"


def junk_turn(record: Record, rng: Random) -> str:
    record["conversations"][rng.randrange(4)] = rng.choice(JUNK)
    return "no_conversation"


def drop_key(record: Record, rng: Random) -> str:
    del rng.choice(record["conversations"])[rng.choice(("from", "value"))]
    return "no_conversation"


def set_text(record: Record, rng: Random) -> str:
    rng.choice(record["conversations"])["value"] = rng.choice(NO_TEXT)
    return "no_conversation"


def set_speaker(record: Record, rng: Random) -> str:
    rng.choice(record["conversations"])["from"] = rng.choice(NO_SPEAKER)
    return "no_conversation"


def repeat_speaker(record: Record, rng: Random) -> str:
    place = rng.randrange(3)
    record["conversations"].insert(place + 1, {**record["conversations"][place], "value": "Again."})
    return "not_alternating"


def late_system(record: Record, rng: Random) -> str:
    record["conversations"].insert(rng.randrange(1, 5), {"from": "system", "value": "Be brief."})
    return "not_alternating"


def two_systems(record: Record, rng: Random) -> str:
    record["conversations"][:0] = [{"from": "system", "value": str(rng.random())}] * 2
    return "not_alternating"


def one_side(record: Record, rng: Random) -> str:
    speaker = rng.choice(("human", "gpt"))
    record["conversations"] = [turn for turn in record["conversations"] if turn["from"] == speaker][:1]
    return "empty"


def no_turns(record: Record, rng: Random) -> str:
    record["conversations"] = []
    return "empty"


def blank_answers(record: Record, rng: Random) -> str:
    for turn in record["conversations"][1::2]:
        turn["value"] = rng.choice(BLANK)
    return "empty"


def blank_question(record: Record, rng: Random) -> str:
    record["conversations"][2]["value"] = rng.choice(BLANK)
    return "empty"


def half_character(record: Record, rng: Random) -> str:
    if rng.random() < 0.3:
        record["conversations"].insert(0, {"from": "system", "value": f"Be {HALF} brief."})
    else:
        put_text(record, rng, f"What {HALF}?")
    return "text"


def huge_question(record: Record, rng: Random) -> str:
    put_text(record, rng, rng.choice(("word ", "\n", "9", "日", "🦙", "a\u0301", "\x00")) * 20_000)
    for turn in record["conversations"]:
        if "<image>" in turn["value"]:  # the picture comes first, the answer is what has no room
            turn["value"] = "<image>" + turn["value"].replace("<image>", "")
    first, *others = record["conversations"]
    record["conversations"] = [{**first, "value": first["value"] + "long " * 2000}, *others]
    return "answer_cut"


def wrong_id(record: Record, rng: Random) -> str:
    record["id"] = rng.choice(NO_ID)
    return "id"


def more_marks(record: Record, rng: Random) -> str:
    rng.choice(record["conversations"])["value"] += " <image>" * rng.randrange(1, 4)
    return "too_many_marks"


def no_mark(record: Record, rng: Random) -> str:
    record["conversations"][0]["value"] = rng.choice(("What?", "<Image>", "<image", "< image >", "&lt;image&gt;"))
    return "no_mark"


def fewer_marks(record: Record, rng: Random) -> str:
    record["image"] = ["a.png"] * rng.randrange(2, 5)
    return "too_few_marks"


def thousand_pictures(record: Record, rng: Random) -> str:
    count = rng.randrange(1000, 2000)
    record["image"] = ["a.png"] * count
    record["conversations"][0]["value"] = "<image>" * count
    return "image_cut"


def names_from(names: tuple[Any, ...], reason: str) -> Callable[[Record, Random], str]:
    def change(record: Record, rng: Random) -> str:
        name = rng.choice(names)
        if isinstance(name, list):
            record["conversations"][0]["value"] = "<image>" * len(name)
        record.pop("image")
        record[rng.choice(("image", "images"))] = name
        return reason

    return change


ANY = (set_turns, drop_turns, junk_turn, drop_key, set_text, set_speaker, repeat_speaker, late_system, two_systems,
       one_side, no_turns, blank_answers, blank_question, half_character, huge_question, wrong_id,
       more_marks)  # fmt: skip
PICTURES = (no_mark, fewer_marks, thousand_pictures, names_from(NO_NAME, "image_name"),
            names_from(OUTSIDE, "outside_picture"), names_from(NOT_THERE, "missing_picture"),
            names_from(BROKEN, "broken_picture"))  # fmt: skip


def mangled_records(seed: int, each: int) -> list[Mangled]:
    """``each`` records of every kind of damage, half of them with a picture if the damage allows both."""
    found = []
    for number, change in enumerate((*ANY, *PICTURES)):
        for count in range(each):
            rng = Random(seed * 100_003 + number * 101 + count)
            kind = "v" if change in PICTURES or count % 2 else "t"
            record = good_record(rng, kind)
            found.append(Mangled(record, kind, change(record, rng)))
    return found


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a record."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in ((value, key), *places(value[key]))]


def junk_somewhere(rng: Random) -> Record:
    """A valid record with junk at one to three random places."""
    record = good_record(rng, rng.choice("tv"))
    for _ in range(rng.randrange(1, 4)):
        container, key = rng.choice(places(record))
        container[key] = deepcopy(rng.choice(JUNK))
        if not places(record):
            break
    return record

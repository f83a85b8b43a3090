"""Pictures, conversations, their split and the files made of them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from llava.errors import UserError
from pocket.recipe import make_data
from pocket.recipe.draw import SIDE, draw
from pocket.recipe.english import topics
from pocket.recipe.sample import KINDS, converse, draw_picture_data
from pocket.recipe.spec import Chart, is_heldout

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws(kind: str) -> None:
    image = draw(draw_picture_data(Random(1), heldout=False, kind=kind))
    assert image.mode == "RGB" and max(image.size) == SIDE
    assert len(image.getcolors(65536) or []) >= 3


def test_training_never_sees_heldout_data() -> None:
    pictures = [converse(Random(i), text_share=0.0, turns=1).picture for i in range(300)]
    assert not any(is_heldout(p) for p in pictures if p is not None)
    train = {p.key() for p in pictures if p is not None}
    held = {draw_picture_data(Random(i), heldout=True).key() for i in range(100)}
    assert not train & held


def test_split_ignores_order_and_colours() -> None:
    chart = draw_picture_data(Random(5), heldout=True, kind="vbar")
    assert isinstance(chart, Chart)
    turned = Chart(chart.kind, chart.field, chart.period, chart.unit, chart.names[::-1], chart.values[::-1],
                   chart.colours, chart.axis)  # fmt: skip
    assert is_heldout(turned)
    as_rows = Chart("hbar", chart.field, chart.period, chart.unit, chart.names, chart.values, chart.colours)
    assert is_heldout(as_rows)


def test_conversations_depend_on_the_seed_alone() -> None:
    first, second = converse(Random("a")), converse(Random("a"))
    assert first == second
    assert converse(Random("b")) != first


def test_pie_shares_make_a_hundred() -> None:
    for seed in range(30):
        chart = draw_picture_data(Random(seed), heldout=False, kind="pie")
        assert isinstance(chart, Chart)
        assert sum(v[0] for v in chart.values) == 100


def test_english_is_plain_prose() -> None:
    assert len(topics()) > 40
    assert all(p.isascii() and "\n" not in p for t in topics() for p in t.paragraphs)


def test_files_are_written_and_repeatable(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        make_data.write_train(folder, images=4, texts=2, seed=3)
        make_data.write_heldout(folder, number=3, seed=3)
    for name in ("train_v.json", "train_t.json", "heldout.jsonl"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    entries = json.loads((tmp_path / "a" / "train_v.json").read_text())
    assert entries[0]["conversations"][0]["value"].startswith("<image>\n")
    assert entries[0]["conversations"][1]["from"] == "gpt"
    Image.open(tmp_path / "a" / entries[0]["image"]).verify()


def test_heldout_file() -> None:
    lines = [json.loads(line) for line in (DATA / "heldout.jsonl").read_text().splitlines()]
    pictures = [i for i in lines if i["images"]]
    assert len(lines) >= 120 and len({i["images"][0] for i in pictures}) >= 100
    assert any(not i["images"] for i in lines)
    assert all(i["facts"] and (DATA / name).exists() for i in lines for name in i["images"])


def test_bad_counts_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["make_data", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="nothing to write"):
        make_data.main()

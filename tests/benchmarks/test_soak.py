"""The soak run on a tiny pair: every kind takes part, answers are compared, memory is fitted, and it can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian

from benchmarks import soak
from eagle.decode.decoder import Decoder
from eagle.families import load_target
from llava.errors import UserError, run_cli


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("soak")
    base = make_liuhaotian(folder / "base")
    make_draft(folder / "draft", load_target(base, dtype=torch.float32))
    rows = []
    for number in range(3):
        make_image(folder / f"{number}.png", seed=number)
        rows.append({"id": str(number), "images": [f"{number}.png"], "question": f"How many {number}?", "answer": "3"})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    models = ["--base-model", str(base), "--msd-model", str(folder / "draft")]
    data = ["--data", str(folder / "questions.jsonl"), "--max-new-tokens", "8", "--long-tokens", "60"]
    return [*models, *data, "--generations", "12", "--every", "6", "--max-slope", "1e9"]


def test_every_kind_takes_part_and_answers_are_the_plain_ones(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    assert soak.main([*options, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["kinds"] == dict.fromkeys(soak.KINDS, 2) and found["generations"] == 12 == len(found["rss_mib"])
    assert found["greedy_answers_compared"] == 2 * (4 + soak.BATCH) and found["requests_with_another_answer"] == []
    assert found["peak_mib"] >= found["rss_mib"][0] > 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_another_answer_and_growth_have_a_status(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert soak.main([*options, "--out", str(tmp_path / "a.json"), "--max-slope=-1e9"]) == 1
    commit = Decoder.commit

    def spoilt(self, verified, accepted):
        if self.drafter is not None:
            accepted = [each._replace(tokens=[5] * len(each.tokens)) for each in accepted]
        commit(self, verified, accepted)

    monkeypatch.setattr(Decoder, "commit", spoilt)
    assert soak.main([*options, "--out", str(tmp_path / "b.json")]) == 1
    found = json.loads((tmp_path / "b.json").read_text())
    assert set(found["requests_with_another_answer"]) == {n for n in range(12) if soak.KINDS[n % 6] != "sampled"}


def test_slope_is_the_least_squares_line() -> None:
    rising = [soak.MIB * (100 + number // 2) for number in range(100)]
    found = soak.slope(rising)
    assert found["first"] == 10 and found["mib_per_1000"] == pytest.approx(500, rel=0.01)
    assert found["start_mib"] == pytest.approx(105, abs=0.5) and 0 < found["standard_error"] < 5
    assert soak.slope([soak.MIB] * 10)["mib_per_1000"] == 0
    with pytest.raises(UserError, match="a line through 2"):
        soak.slope([1, 2])


def test_bad_options_are_one_line(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.jsonl").write_text('{"id": "a", "images": [], "question": "Why?", "answer": ""}\n')
    assert run_cli(lambda: soak.main([*options, "--data", str(tmp_path / "q.jsonl")])) == 2
    assert "no question with a picture" in capsys.readouterr().err

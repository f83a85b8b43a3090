"""Suites: tiny copies of the published sets, with their columns, become question files; and conversations are asked."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from file_server import FileServer
from hub_server import COMMIT, HubServer
from PIL import Image as Picture
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian, make_llava_hf
from tiny_stock import make_llava_next, make_qwen

from eagle import extras
from eagle.benchmark import with_engine, with_transformers
from eagle.cli import main as msd
from eagle.decode.msd import MSDModel
from eagle.families import load_target
from eagle.questions import fetch as fetching
from eagle.questions import read_questions
from eagle.questions.fetch import fetch, main
from eagle.questions.suites import DESCRIBE, EXPLAIN, MMSPEC, MMSPEC_FOLDER, MMSPEC_REVISION, SUITES
from llava import UserError

REPO = Path(__file__).resolve().parents[2]
POCKET = REPO / "pocket"
ROWS: dict[str, dict[str, Any]] = {
    "ChartQA": {"type": "human_test", "question": "How many?", "answer": "4"},
    "GQA": {"id": "20", "imageId": "n1", "question": "Is it red?", "answer": "no", "fullAnswer": "No."},
    "MME": {"question_id": "code/1.png", "question": "Is it code?", "answer": "No", "category": "code_reasoning"},
    "TextVQA": {"image_id": "a", "question_id": 1, "question": "what is it?", "answers": ["x"] * 10},
    "VQAv2": {"question_id": 1, "question": "Where?", "answers": [{"answer": "x", "answer_id": 1}], "image_id": 5},
    "SQA": {"question": "Which?", "choices": ["salt", "iron"], "answer": 1, "hint": "Look.", "lecture": ""},
    "MM-Vet": {"id": "v1_0", "question": "What is x?", "answer": "-1", "capability": ["math"]},
    "COCO Caps": {"question_id": "1.jpg", "question": "Caption?", "answer": ["a cat"]},
    "VizWiz": {"question_id": "1", "question": "What?", "answers": ["can"], "category": "other"},
    "SEED-Bench": {"question": "Who?", "choice_a": "I", "choice_b": "you", "choice_c": "he", "choice_d": "no",
                   "answer": "A", "data_type": "image", "question_id": "1"},
}  # fmt: skip
"""A row of each set of the hub without its picture."""


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Picture.new("RGB", (8, 8), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Dataset.from_list([{k: v for k, v in row.items() if k != "image"} for row in rows]).features
    if "image" in rows[0]:
        many = isinstance(rows[0]["image"], list)
        features["image"] = datasets.Sequence(datasets.Image()) if many else datasets.Image()
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))


def make_sets(root: Path, suite: str, count: int = 3) -> Path:
    """Copies of a suite's sets with ``count`` rows each."""
    for each in SUITES[suite].sets:
        row, shown = ROWS[each.name], [{"bytes": png(number), "path": None} for number in range(count)]
        rows = [{**row, "question": f"{row['question']} {number}"} for number in range(count)]
        place = root / each.repository
        if each.pictures is not None:
            write_parquet(place / each.pictures.replace("*", "00000-of-00001"), [{"id": "n1", "image": shown[0]}])
        elif each.only is not None:
            rows = [{**row, "image": [picture]} for row, picture in zip(rows, shown, strict=True)]
            rows.append({**rows[0], "image": shown[:2], "data_type": "video"})
        else:
            rows = [{**row, "image": picture} for row, picture in zip(rows, shown, strict=True)]
        write_parquet(place / each.files.replace("*", "00000-of-00001"), rows)
    return root


def make_mmspec(root: Path, picture: bytes | None = None, each: int = 2) -> Path:
    """A copy of MMSpec's testmini with ``each`` samples a topic; those of the last topic are conversations."""
    folder = root / MMSPEC / MMSPEC_FOLDER / "testmini"
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(6 * each):
        topic = SUITES["mmspec"].topics[number // each]
        name, turns = f"mmspec_{number:03d}", ["Describe the picture.", "How many bars?", "And why?"]
        (folder / "images" / f"{name}.jpg").write_bytes(picture or png(number))
        lines.append({"id": name, "image": f"{name}.jpg", "turns": turns if number >= 5 * each else turns[:1],
                      "category": "default", "topic": topic})  # fmt: skip
    (folder / "mmspec.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_mmspec_keeps_its_turns_and_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies, out = make_mmspec(tmp_path / "copies"), tmp_path / "out"
    assert main(["fetch", "mmspec", "--subset", "testmini", "--out", str(out), "--copies", str(copies)]) == 0
    said = capsys.readouterr().out
    assert "general vqa: 2 of github.com/killthefullmoon/MMSpec@" in said and "licence: not stated" in said
    assert "read from copies" in said
    questions = read_questions(out / "questions.jsonl", turns=True)
    assert len(questions) == 16 and {len(each.images) for each in questions} == {1}
    last = questions[-1]
    assert (last.id, last.conversation, last.source) == ("mmspec_011/3", "mmspec_011", "multi-turn conversation")
    assert last.question == "And why?" and last.earlier == ("Describe the picture.", "How many bars?")
    with pytest.raises(UserError, match=r"several turns.*questions\.jsonl:11"):
        read_questions(out / "questions.jsonl")
    before = (out / "questions.jsonl").stat().st_mtime_ns
    assert fetch("mmspec", "testmini", out) == out / "questions.jsonl", "without copies, and without network"
    assert (out / "questions.jsonl").stat().st_mtime_ns == before
    last.images[0].unlink()
    assert fetch("mmspec", "testmini", out, copies) and last.images[0].exists()
    with pytest.raises(UserError, match="another suite"):
        fetch("mmspec", "test", out)


@pytest.mark.parametrize("suite", ["vispec", "seed"])
def test_sets_of_the_hub(tmp_path: Path, suite: str) -> None:
    path = fetch(suite, "testmini", tmp_path / "out", make_sets(tmp_path / "copies", suite))
    questions = read_questions(path)
    assert [each.source for each in questions] == [name for name in SUITES[suite].sources for _ in range(3)]
    asked = {each.source: each.question for each in questions if each.id.endswith("2")}
    end = EXPLAIN if suite == "seed" else ""
    assert asked["GQA"] == f"Is it red? 2{end}" and asked["MME"] == f"Is it code? 2{end}"
    if suite == "vispec":
        assert asked["SQA"] == "Context: Look.\nWhich? 2\nA. salt\nB. iron"
        assert asked["SEED-Bench"] == "Who? 2\nA. I\nB. you\nC. he\nD. no"
        assert asked["COCO Caps"] == DESCRIBE
    colours = [Picture.open(each.images[0]).getpixel((0, 0))[0] for each in questions if each.source == "TextVQA"]
    assert colours == [0, 1, 2] and questions[0].images[0].suffix == ".png"
    assert not [each for each in (tmp_path / "out").iterdir() if each.name.startswith("tmp")]


def test_rows_are_spread_over_a_larger_set(tmp_path: Path) -> None:
    path = fetch("seed", "testmini", tmp_path / "out", make_sets(tmp_path / "copies", "seed", count=25))
    taken = [each.id for each in read_questions(path) if each.source == "MME"]
    assert taken == [f"mme-{place:05d}" for place in (0, 2, 5, 7, 10, 12, 15, 17, 20, 22)]


def test_the_request_for_long_answers_is_that_of_the_lmms_eval_tasks() -> None:
    for task in (REPO / "lmms-eval" / "lmms_eval_msd" / "tasks").glob("*_msd.yaml"):
        assert EXPLAIN.replace("\n", "\\n") in task.read_text()


def test_a_broken_run_resumes(tmp_path: Path) -> None:
    copies, out = make_mmspec(tmp_path / "copies"), tmp_path / "out"
    last = copies / MMSPEC / MMSPEC_FOLDER / "testmini" / "images" / "mmspec_011.jpg"
    last.write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"mmspec_011\.jpg"):
        fetch("mmspec", "testmini", out, copies)
    assert not (out / "questions.jsonl").exists()
    written = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert len(written) == 11
    last.write_bytes(png(1))
    read_questions(fetch("mmspec", "testmini", out, copies), turns=True)
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": "../a.jpg"}, "outside the set"),
        ({"turn": []}, "unknown key 'turn'"),
        ({"topic": "other"}, "unknown source other"),
        ({"turns": "What?"}, "give a list"),
    ],
    ids=str,
)
def test_what_mmspec_never_had_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    copies = make_mmspec(tmp_path / "copies")
    file = copies / MMSPEC / MMSPEC_FOLDER / "testmini" / "mmspec.jsonl"
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | change), *rest]))
    with pytest.raises(UserError, match=said):
        fetch("mmspec", "testmini", tmp_path / "out", copies)
    assert not (tmp_path / "out" / "questions.jsonl").exists()


def test_mmspec_over_http_has_its_published_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_mmspec(tmp_path / "copies") / MMSPEC / MMSPEC_FOLDER
    with FileServer() as server:
        for path in folder.rglob("*.*"):
            name = path.relative_to(folder)
            server.put(f"{MMSPEC}/{MMSPEC_REVISION}/{MMSPEC_FOLDER}/{name}", path.read_bytes())
        monkeypatch.setattr(fetching, "GITHUB", server.url("").rstrip("/"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with pytest.raises(UserError, match=r"general vqa has 2, .* not 10"):
            fetch("mmspec", "testmini", tmp_path / "out")
        monkeypatch.setitem(fetching.SUBSETS, "testmini", 2)
        assert len(read_questions(fetch("mmspec", "testmini", tmp_path / "out"), turns=True)) == 16
        with pytest.raises(UserError, match="--copies"):
            fetch("mmspec", "test", tmp_path / "other")


def test_mmspec_is_not_asked_for_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(fetching, "fetch_bytes", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*--copies"):
        fetch("mmspec", "testmini", tmp_path / "out")


@pytest.mark.slow
def test_sets_come_from_the_hub_at_their_commit(tmp_path: Path) -> None:
    root = make_sets(tmp_path / "hub", "seed")
    code = f"""
from dataclasses import replace
from pathlib import Path
import sys
from eagle.questions import fetch, suites as table
sets = tuple(replace(each, revision="{COMMIT}", rows=int(sys.argv[1])) for each in table.SUITES["seed"].sets)
table.SUITES["seed"] = replace(table.SUITES["seed"], sets=sets)
table.SUBSETS["testmini"] = 3
raise SystemExit(fetch.main(["fetch", "seed", "--subset", "testmini", *sys.argv[2:]]))
"""
    with HubServer(root) as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "cache")}

        def run(rows: int, *more: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", code, str(rows), *more]
            return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

        refused = run(4)
        assert refused.returncode == 2 and "ChartQA has 3 rows, not 4" in refused.stderr
        done = run(3)
        assert done.returncode == 0, done.stderr
        assert f"GQA: 3 of lmms-lab/GQA@{COMMIT}; licence: MIT" in done.stdout
        asked = [path for _, path in hub.requests if "/resolve/" in path]
        assert asked and all("/datasets/lmms-lab/" in path and COMMIT in path for path in asked)
    path = tmp_path / "cache" / "msd-suites" / "seed-testmini" / "questions.jsonl"
    assert len(read_questions(path)) == 15


def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"msd-eagle\[suites\]"):
        fetch("seed", "testmini", tmp_path / "out", tmp_path)


def test_bench_measures_a_suite_turn_by_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Offline, from the cache of the hub's library, on the pocket pair."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    picture = next((POCKET / "data" / "images" / "heldout").glob("*.png")).read_bytes()
    fetch("mmspec", "testmini", copies=make_mmspec(tmp_path / "copies", picture, each=1))
    pair = ["--base-model", str(POCKET / "llava"), "--msd-model", str(POCKET / "llava-msd"), "--dtype", "float32"]
    command = ["bench", *pair, "--suite", "mmspec", "--subset", "testmini", "--max-new-tokens", "4", "--warm-up", "0"]
    assert msd([*command, "--out", str(tmp_path / "report.json")]) == 0
    assert "multi-turn conversation: 1 of" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["questions"] == 8 and report["identical"]["answers"] == report["identical"]["of"] == 8
    assert report["settings"]["suite"] == "mmspec" and report["settings"]["subset"] == "testmini"


def test_bench_wants_one_source_of_questions(capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in ([], "no questions"), (["--data", "q.jsonl", "--suite", "seed"], "both"), (
        ["--data", "q.jsonl", "--subset", "test"], "--subset needs --suite",
    ):  # fmt: skip
        assert msd(["bench", "--base-model", "none", *options]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("make", [make_liuhaotian, make_llava_hf, make_llava_next, make_qwen])
def test_the_pictures_stand_in_the_first_turn(tmp_path: Path, make: Any) -> None:
    target = load_target(make(tmp_path / "base"), dtype="float32")
    first = target.chat_prompt("What is it?", 1)
    later = target.chat_prompt("And why?", 1, [("What is it?", "A cat.")])
    mark = first[: first.index("What is it?")]
    assert later.startswith(mark) and later.index("What is it?") < later.index("A cat.") < later.index("And why?")
    inputs = target.prepare(later, [make_image()])
    alone = target.prepare(first, [make_image()])
    image = target.config.image_token_id
    assert (inputs["input_ids"] == image).sum() == (alone["input_ids"] == image).sum() > 0


def test_each_model_continues_its_own_answers(tmp_path: Path) -> None:
    base = make_liuhaotian(tmp_path / "base")
    make_draft(tmp_path / "draft", load_target(base, dtype="float32"))
    model = MSDModel.from_pretrained(base, tmp_path / "draft", dtype="float32")
    make_image(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "t", "image": "a.png", "turns": ["What?", "Why?"]}))
    first, second = read_questions(tmp_path / "q.jsonl", turns=True)
    asked: list[str] = []
    prompt = model.target.chat_prompt
    model.target.chat_prompt = lambda *args, **more: asked.append(prompt(*args, **more)) or asked[-1]  # type: ignore
    settings = {"max_new_tokens": 5, "temperature": 0.0}
    for way in (with_engine(model, True, settings), with_transformers(model, settings)):
        said = model.tokenizer.decode(way(first).tokens[0], skip_special_tokens=True).strip()
        way(second)
        assert asked[-1] == prompt("Why?", 1, [("What?", said)])
    with pytest.raises(ValueError):
        second.inputs(model.target)


def test_verify_takes_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_liuhaotian(tmp_path / "base")
    make_draft(tmp_path / "draft", load_target(base, dtype="float32"))
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "t", "turns": ["What?", "Why?", "How?"]}))
    pair = ["--base-model", str(base), "--msd-model", str(tmp_path / "draft"), "--data", str(tmp_path / "q.jsonl")]
    assert msd(["verify", *pair, "--max-new-tokens", "5"]) == 0
    assert "0/3 mismatches" in capsys.readouterr().out
    assert msd(["exactness", *pair]) == 2
    assert "several turns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"turns": []}, "give a list of the user's turns"),
        ({"turns": ["a", 1]}, "give a list of the user's turns"),
        ({"turns": ["a"], "question": "b"}, "both 'question' and 'turns'"),
        ({"question": "a", "source": 3}, "'source' is 3"),
    ],
    ids=str,
)
def test_bad_turns_are_one_line(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=said):
        read_questions(tmp_path / "q.jsonl", turns=True)

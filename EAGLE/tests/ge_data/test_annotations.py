"""Annotation files: read in pieces of any size as json.loads reads the whole, and broken ones say where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from eagle.conversations import read_conversation
from eagle.ge_data.annotations import RecordFile, iter_records
from eagle.ge_data.convert import convert, main
from llava.errors import UserError, run_cli

RECORDS = [
    {"id": 1, "text": 'Größe 日本 🦙 \\ " [{,}]', "number": -1.5e3, "flags": [True, None, {}]},
    {"id": "b", "long": "x" * 300},
    {},
    {"id": 3, "escaped": "\U0001f999"},
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("layout", ["dense", "indented", "utf8", "bom"])
def test_pieces_of_any_size(tmp_path: Path, chunk: int, layout: str) -> None:
    path = tmp_path / "records.json"
    if layout == "dense":
        path.write_text(json.dumps(RECORDS, separators=(",", ":")))
    elif layout == "indented":
        path.write_text("\n " + json.dumps(RECORDS, indent=2) + " \n")
    else:
        records = RECORDS[:3]
        text = json.dumps(records, ensure_ascii=False, indent=1)
        path.write_text(text, encoding="utf-8-sig" if layout == "bom" else "utf-8")
    placed = list(iter_records(path, chunk))
    assert [record.value for record in placed] == (RECORDS if layout in ("dense", "indented") else RECORDS[:3])
    data = path.read_bytes()
    assert [json.loads(data[record.start : record.end]) for record in placed] == [record.value for record in placed]


def test_rows_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS, ensure_ascii=True, indent=1))
    records = RecordFile(path, lambda record: "id" in record)
    assert (len(records), records.total, list(records.numbers)) == (3, 4, [0, 1, 3])
    assert [records[2], records[0], records[1]] == [RECORDS[3], RECORDS[0], RECORDS[1]]


BROKEN = {
    "": "but the file ends, line 1 column 1, byte 0",
    '{"id": 1}': "expected a JSON array",
    '[{"id": 1},\n {"id": }]': "Expecting value, line 2 column 9, byte 20",
    '[{"id": 1}\n {"id": 2}]': "expected ',' or ']' after a record, line 2 column 2",
    '[{"id": 1},]': "expected a record",
    '[{"id": 1}': "but the file ends",
    '[{"id": 1}, 7]': "expected a record .a JSON object., line 1 column 13",
    '[{"id": "abc}]': "Unterminated string",
    '[{"id": 1},\n {"id": 2, "image": "a.png", "image": "b.png"}]': "key 'image' is there twice, line 2 column 2",
    '[{"id": 1, "conversations": [{"from": "human", "from": "gpt"}]}]': "key 'from' is there twice, line 1 column 2",
    '[{"id": 1}] more': "unexpected text after the array, line 1 column 13",
    '[{"ä": 1},\n{"ö" 1}]': "line 2 column 6, byte 18",
}


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_broken_file_says_where(tmp_path: Path, text: str, chunk: int) -> None:
    path = tmp_path / "records.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=BROKEN[text]):
        list(iter_records(path, chunk))


def test_not_text_and_not_there(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(b'[{"a": "\xe4\xf6"}]')
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 8\)"):
        list(iter_records(path, 4))
    with pytest.raises(UserError, match="cannot be read"):
        list(iter_records(tmp_path / "nothing.json"))


def test_error_early_in_a_large_file_is_found_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagle.ge_data.annotations.MAX_RECORD", 1000)
    path = tmp_path / "records.json"
    path.write_text('[{"a": "' + "x" * 5000)
    with pytest.raises(UserError, match="record of more than 1000 characters"):
        list(iter_records(path, 100))


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {"id": 5, "image": "a.jpg", "conversations": [{"from": "human", "value": "Größe?"}], "extra": [1.0, None]},
        {"id": "x", "items": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a", "markdown": 1}]},
        {"items": [{"from": s, "value": "t"} for s in ("system", "assistant", "bing", "gpt", "nobody")]},
    ]
    source, output = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps(records))
    assert main(["--input", str(source), "--output", str(output)]) == 0
    fixed = json.loads(output.read_text())
    assert fixed[0] == {**records[0], "id": "5"} and list(fixed[0]) == list(records[0])
    assert fixed[1]["conversations"] == [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a", "markdown": 1},
    ]
    assert fixed[2]["id"] == "2" and "items" not in fixed[1]
    assert [turn["from"] for turn in fixed[2]["conversations"]] == ["system", "gpt", "gpt", "gpt", "nobody"]
    shown = capsys.readouterr().out
    assert "3 records" in shown and "ids made text" in shown and "'chatgpt' renamed 'gpt'" in shown
    again = tmp_path / "again.json"
    assert not convert(output, again)[1]
    assert again.read_text() == output.read_text()


def test_convert_makes_no_id_good_that_is_none(tmp_path: Path) -> None:
    """Records that the allocation skips for their id are the same records after it."""
    ids = [None, [1], {"a": 1}, 1.5, True, 7, "x", 10**30]
    source, output = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps([{"id": value, "conversations": []} for value in ids] + [{"conversations": []}]))
    _, changes = convert(source, output)
    assert [record.value["id"] for record in iter_records(output)] == ["0", *ids[1:5], "7", "x", str(10**30), "8"]
    assert changes == {"ids made text": 2, "ids added (the record's number)": 2}


def test_convert_reads_messages_with_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}]
    records = [
        {"id": "m", "system": "Be brief.", "messages": [
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"id": "p", "messages": [{"role": "user", "content": picture}, {"role": "assistant", "content": "A cat."}]},
        {"id": "n", "conversations": [], "tools": []},
    ]  # fmt: skip
    source, output = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps(records))
    assert main(["--input", str(source), "--output", str(output)]) == 0
    fixed = json.loads(output.read_text())
    for record, made in zip(records[:2], fixed, strict=False):
        assert read_conversation(made, 0) == read_conversation(record, 0) and "messages" not in made
    assert fixed[0]["conversations"][0] == {"from": "human", "value": "q"} and fixed[1]["image"] == ["a.png"]
    assert "keys that are not read: 'tools' (1 records)" in capsys.readouterr().out


def test_convert_keeps_turns_that_contradict_themselves(tmp_path: Path) -> None:
    """The allocation skips their records, for the same reason."""
    calls = {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}
    turns = [{"from": "human", "value": "q", "content": "other"}, calls, {"from": "human", "role": "gpt", "value": "q"}]
    source, output = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps([{"id": "a", "conversations": turns}]))
    convert(source, output)
    assert json.loads(output.read_text())[0]["conversations"] == turns


def test_convert_refuses_a_file_without_turns(tmp_path: Path) -> None:
    source, output = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps([{"id": 1, "dialogue": []}] * 3))
    with pytest.raises(UserError, match="no record has a list of turns"):
        convert(source, output)
    assert not output.exists()


def test_convert_empty_array(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text("[ ]")
    assert convert(tmp_path / "in.json", tmp_path / "out.json")[0] == 0
    assert json.loads((tmp_path / "out.json").read_text()) == []


def test_broken_input_leaves_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text('[{"id": 1},\n{"id": }]')
    output.write_text("old")
    assert run_cli(lambda: main(["--input", str(source), "--output", str(output)])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "line 2 column 8" in error
    assert output.read_text() == "old" and sorted(tmp_path.iterdir()) == [source, output]
    assert run_cli(lambda: main(["--input", str(source), "--output", str(source)])) == 2
    assert "the same file" in capsys.readouterr().err


def test_convert_in_bounded_memory(tmp_path: Path) -> None:
    source = tmp_path / "in.json"
    record = json.dumps({"id": 1, "conversations": [{"from": "human", "value": "x" * 2000}] * 4})
    source.write_text("[" + ",".join([record] * 1500) + "]")
    assert source.stat().st_size > 12e6
    tracemalloc.start()
    convert(source, tmp_path / "out.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


PEAK = """
from pathlib import Path
from eagle.ge_data.convert import main
main(["--input", "in.json", "--output", "out.json"])
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_convert_a_gigabyte_in_bounded_memory(tmp_path: Path) -> None:
    """The peak of a process of its own, Python and all."""
    source, output = tmp_path / "in.json", tmp_path / "out.json"
    record = json.dumps({"id": 1, "conversations": [{"from": "human", "value": "x" * 2000}] * 4})
    block, count = ",".join([record] * 1000), 130
    try:
        with source.open("w") as file:
            file.write("[")
            for number in range(count):
                file.write(("," if number else "") + block)
            file.write("]")
        assert source.stat().st_size > 1e9
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", PEAK]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert f"{count * 1000} records" in done.stdout and output.stat().st_size > 1e9
        assert int(done.stdout.split("VmHWM:")[1].split()[0]) < 100_000, "kB"
    finally:
        source.unlink(missing_ok=True)
        output.unlink(missing_ok=True)

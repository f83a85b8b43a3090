"""Question files: what is read, and what is one line of error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eagle.questions import KEYS, read_questions
from llava import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    return tmp_path


def read(folder: Path, *records: Any) -> list[Any]:
    path = folder / "q.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in records))
    return read_questions(path)


@pytest.mark.parametrize("pictures", [{"images": ["a.png"]}, {"image": "a.png"}, {"image": ["a.png"]}], ids=str)
def test_pictures_in_every_spelling(folder: Path, pictures: dict[str, Any]) -> None:
    (question,) = read(folder, {"question": "What?", **pictures})
    assert question.images == (folder / "a.png",)


@pytest.mark.parametrize("pictures", [{}, {"images": None}, {"images": []}, {"image": None}], ids=str)
def test_no_picture(folder: Path, pictures: dict[str, Any]) -> None:
    assert read(folder, {"question": "What?", **pictures})[0].images == ()


def test_a_line_separator_within_a_text_is_text(folder: Path) -> None:
    (question,) = read(folder, json.dumps({"question": "a\u2028b"}, ensure_ascii=False))
    assert question.question == "a\u2028b"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "What?", "pictures": ["a.png"]}, "unknown key 'pictures'"),
        ({"question": "What?", "imges": ["a.png"]}, "did you mean 'images'"),
        ({"question": "What?", "images": "a.png", "image": "a.png"}, "both 'images' and 'image'"),
        ({"question": "What?", "images": {"a": 1}}, 'give "images": [paths]'),
        ({"question": "What?", "images": [1]}, 'give "images": [paths]'),
        ({"question": "What?", "images": ["b.png"]}, "picture not found"),
        ({"question": "What?", "images": ["\0"]}, "picture not found"),
        ({"images": []}, "no 'question'"),
        ('{"question": "half \\ud83d emoji"}', "lone surrogate"),
        ('{"question": "half \\ud83d", "id": 1}', "lone surrogate"),
        ('{"question": "What?", "answer": "half \\ud83d"}', "lone surrogate"),
        ('{"question": "What?", "id": "half \\ud83d"}', "'id' has half of a character"),
        ({"question": "What?", "id": {"a": 1}}, "'id' is {'a': 1}"),
        ({"question": "What?", "id": True}, "'id' is True"),
        ('{"question": "What?", "question": "Where?"}', "key 'question' is there twice"),
        ('{"question": "What?", "facts": {"a": 1, "a": 2}}', "key 'a' is there twice"),
        ([1], "not a JSON object"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=str,
)
def test_bad_lines_are_named(folder: Path, record: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        read(folder, {"question": "Fine?"}, record)
    assert said in str(raised.value) and "q.jsonl:2" in str(raised.value)


def test_a_missing_file(folder: Path) -> None:
    with pytest.raises(UserError) as raised:
        read_questions(folder / "missing.jsonl")
    assert str(raised.value).startswith(f"question file cannot be read (No such file or directory): {folder}")


def test_text_of_another_encoding_is_named_by_line(folder: Path) -> None:
    path = folder / "q.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "Fine?"}\r\n{"question": "caf\xe9?"}\n')
    assert read_questions(path, limit=1)[0].question == "Fine?"
    with pytest.raises(UserError, match=r"q\.jsonl:2:18: not UTF-8 text|not UTF-8 text.*q\.jsonl:2:18"):
        read_questions(path)


@pytest.mark.parametrize("key", KEYS)
def test_any_json_at_any_key_is_a_question_or_a_line(folder: Path, key: str) -> None:
    for value in (None, True, 0, 1.5, 10**30, "", "a.png", "\ud83d", [], [None], [["a.png"]], {}, {"a": []}):
        try:
            read(folder, {"question": "What?", key: value})
        except UserError as error:
            assert "\n" not in str(error)

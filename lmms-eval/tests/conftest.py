"""Tiny models and question files for the tests of the lmms-eval plugin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian

from eagle.model.targets import load_target


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_liuhaotian(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def draft(base: Path) -> Path:
    return make_draft(base.parent / "draft", load_target(base))


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question file of four lines; the last one has two pictures."""
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for number, pictures in enumerate((["0.png"], ["1.png"], ["2.png"], ["0.png", "1.png"])):
        for seed, name in enumerate(pictures, start=number):
            make_image(folder / name, seed=seed)
        entry = {"id": str(number), "images": pictures, "question": f"How many shapes {number}?", "answer": str(number)}
        lines.append(json.dumps(entry))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"

"""Tiny models and question files for the tests of the lmms-eval plugin; makes `eval_support` importable."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_draft import make_draft
from tiny_families import FAMILY_MAKERS, make_gemma3, make_internvl, make_onevision, make_qwen3_5, make_qwen3_vl
from tiny_llava import make_image, make_liuhaotian, make_llava_hf
from tiny_stock import make_llava_next, make_qwen

from eagle.families import load_target

sys.path.insert(0, str(Path(__file__).parent))
from eval_support import QWEN3_TEMPLATE, QWEN_TEMPLATE, write_llava_processor

FIXTURES = {
    "llava_msd": "base",
    "llava_next_msd": "llava_next",
    "llava_onevision_msd": "onevision",
    "qwen2_vl_msd": "qwen2",
    "qwen2_5_vl_msd": "qwen2_5",
    "qwen3_vl_msd": "qwen3",
    "qwen3_vl_moe_msd": "qwen3_moe",
    "qwen3_5_msd": "qwen3_5",
    "qwen3_5_moe_msd": "qwen3_5_moe",
    "gemma3_msd": "gemma3",
    "internvl_msd": "internvl",
}
"""Of families whose bases are used by many tests."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def base(models: Path) -> Path:
    return make_liuhaotian(models / "base")


@pytest.fixture(scope="session")
def draft(base: Path) -> Path:
    return make_draft(base.parent / "draft", load_target(base))


@pytest.fixture(scope="session")
def llava_hf(models: Path) -> Path:
    """LLaVA-1.5 in the layout that lmms-eval's own model reads."""
    return write_llava_processor(make_llava_hf(models / "llava-hf"))


@pytest.fixture(scope="session")
def llava_next(models: Path) -> Path:
    return make_llava_next(models / "llava-next", seed=2)


def qwen_with_its_template(folder: Path, version: str) -> Path:
    make_qwen(folder, version=version, max_position_embeddings=2048)
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def qwen2(models: Path) -> Path:
    return qwen_with_its_template(models / "qwen2", "2")


@pytest.fixture(scope="session")
def qwen2_5(models: Path) -> Path:
    return qwen_with_its_template(models / "qwen2_5", "2.5")


def qwen3_with_its_template(folder: Path, make: Callable[..., Path] = make_qwen3_vl, **settings: Any) -> Path:
    make(folder, patch=16, max_position_embeddings=2048, **settings)
    (folder / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def qwen3(models: Path) -> Path:
    return qwen3_with_its_template(models / "qwen3")


@pytest.fixture(scope="session")
def qwen3_moe(models: Path) -> Path:
    """Its name says that it has experts, which lmms-eval reads."""
    return qwen3_with_its_template(models / "Qwen3-VL-A3B", moe=True)


@pytest.fixture(scope="session")
def qwen3_5(models: Path) -> Path:
    return qwen3_with_its_template(models / "qwen3_5", make_qwen3_5, seed=3)


@pytest.fixture(scope="session")
def qwen3_5_moe(models: Path) -> Path:
    return qwen3_with_its_template(models / "Qwen3.5-A3B", make_qwen3_5, moe=True, seed=3)


@pytest.fixture(scope="session")
def gemma3(models: Path) -> Path:
    return make_gemma3(models / "gemma3")


@pytest.fixture(scope="session")
def internvl(models: Path) -> Path:
    return make_internvl(models / "internvl", seed=1, max_position_embeddings=2048)


@pytest.fixture(scope="session")
def onevision(models: Path) -> Path:
    return make_onevision(models / "onevision", seed=1, max_position_embeddings=2048)


@pytest.fixture
def family_bases(request: pytest.FixtureRequest, models: Path) -> Mapping[str, Path]:
    """A base model for each name of `--model`, made when it is asked for."""

    class Bases(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            if name in FIXTURES:
                return request.getfixturevalue(FIXTURES[name])
            self[name] = FAMILY_MAKERS[name.removesuffix("_msd")](models / name)
            return self[name]

    return Bases()


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

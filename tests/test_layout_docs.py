"""docs/layout.md has a line for every file of the packages, the recipe, the measurements and the scripts."""

from __future__ import annotations

import ast
import re

import pytest
from repository import REPO, repository_files

PAGE = (REPO / "docs" / "layout.md").read_text(encoding="utf-8")
ROOTS = ("LLaVA/llava", "EAGLE/eagle", "lmms-eval/lmms_eval_msd", "pocket", "benchmarks", "scripts")
MODELS = tuple(f"pocket/{name}/" for name in ("llava", "llava-msd", "qwen2vl", "qwen2vl-msd"))


def named() -> list[str]:
    """The files of the page's tables, from the repository's root."""
    found, folder = [], ""
    for line in PAGE.splitlines():
        if heading := re.match(r"###? `([^`]+)/`", line):
            folder = heading[1]
        elif row := re.match(r"\| `([^`]+)` \| .{5,} \|$", line):
            found.append(f"{folder}/{row[1]}")
    return found


def on_disk(root: str) -> list[str]:
    """Files below a root that the page is about: no tests, no pictures, no weights."""
    names = (path.relative_to(REPO).as_posix() for path in repository_files() if path.suffix != ".png")
    return [name for name in names if name.startswith(f"{root}/") and "/tests/" not in name
            and not name.startswith(MODELS)]  # fmt: skip


def row_for(name: str) -> str:
    """A row to begin with: the file's own first paragraph."""
    text = (REPO / name).read_text(encoding="utf-8") if name.endswith(".py") else ""
    about = (ast.get_docstring(ast.parse(text)) or "what it is").split("\n\n")[0].replace("\n", " ")
    return f"| `{name}` | {about} |"


@pytest.mark.parametrize("root", ROOTS)
def test_every_file_has_a_line(root: str) -> None:
    files, rows = on_disk(root), named()
    assert len(files) > 4
    assert [row_for(name) for name in files if name not in rows] == [], "add these to docs/layout.md"


def test_every_line_is_of_a_file() -> None:
    rows = named()
    assert len(rows) == len(set(rows))
    assert [name for name in rows if not (REPO / name).is_file()] == []
    assert sorted(rows) == sorted(name for root in ROOTS for name in on_disk(root))


def test_the_models_are_named() -> None:
    assert all(f"`{folder}`" in PAGE and (REPO / folder).is_dir() for folder in MODELS)

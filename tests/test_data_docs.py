"""docs/data.md says what the code has: commands with real flags, scripts that are there, measured by what exists."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from eagle.ge_data import allocation, convert, inspect
from eagle.ge_data.download import __main__ as download
from experiments import allocation as allocation_benchmark
from experiments import training_study
from experiments.study_cells import choose

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.sub(r"\\\n", " ", "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)))
WRITTEN = [*re.split(r"\n|&&", BLOCKS), *re.findall(r"`((?:python -m|pytest|[A-Z_]+=)[^`]*)`", PAGE)]
PARSERS = {
    "eagle.ge_data.download": download.parser,
    "eagle.ge_data.convert": convert.parser,
    "eagle.ge_data.allocation": allocation.parser,
    "eagle.ge_data.inspect": inspect.parser,
    "experiments.allocation": allocation_benchmark.parser,
}


def commands(start: str) -> list[list[str]]:
    """The words of the page's commands that begin so, with what stands in brackets and a number for N."""
    lines = (line.strip() for line in WRITTEN)
    return [shlex.split(re.sub(r"[\[\]]", "", line).replace(" N", " 9")) for line in lines if line.startswith(start)]


@pytest.mark.parametrize("module", PARSERS)
def test_commands_parse(module: str) -> None:
    found = commands(f"python -m {module} ")
    assert found, f"{module} has no command on the page"
    for words in found:
        assert PARSERS[module]().parse_args(words[3:])


def test_every_module_of_a_command_is_checked() -> None:
    named = {words[2] for words in commands("python -m ")}
    assert named == {*PARSERS, "experiments.training_study"}


def test_the_training_study_trains_cells_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = commands("python -m experiments.training_study ")
    monkeypatch.setattr(sys, "argv", words[2:])
    assert choose(training_study.parse_args().cells)


def test_settings_of_the_scripts_reach_them() -> None:
    """The states go where the study reads them, and the shipped draft stays."""
    (words,) = [words for words in commands("") if words and words[-1].endswith("train_draft.sh")]
    given = dict(word.split("=", 1) for word in words[:-1])
    texts = "".join((REPO / name).read_text(encoding="utf-8") for name in (words[-1], "scripts/3_allocate.sh"))
    assert "STATES_ONLY" in given and all(f"${{{name}:" in texts for name in given)
    (study,) = commands("python -m experiments.training_study ")
    assert study[study.index("--data") + 1] == given["BUILD"]


def test_files_of_the_page_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if not link.startswith("http")]
    tests = [word for words in commands("pytest ") for word in words if word.endswith(".py")]
    assert links and tests
    assert all((REPO / "docs" / link).exists() for link in links) and all((REPO / name).is_file() for name in tests)

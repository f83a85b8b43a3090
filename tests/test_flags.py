"""Flags of all commands are read in both spellings, and a wrong one is one line that names the right one."""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable
from typing import Any

import pytest
from repository import REPO

from eagle.cli import COMMANDS
from eagle.cli import main as msd
from llava.arguments import OneLineParser
from llava.errors import UserError, run_cli

MODULES = {
    "llava.chat": ("--imgae_file", "--image-file"),
    "eagle.ge_data.convert": ("--ouput", "--output"),
    "eagle.ge_data.allocation": ("--json_data", "--json_data_path"),
    "eagle.ge_data.export_questions": ("--reqeusts", "--requests"),
    "eagle.ge_data.import_answers": ("--anwsers", "--answers"),
    "eagle.ge_data.vocabulary": ("--szie", "--size"),
    "eagle.ge_data.inspect": ("--smaple", "--sample"),
    "eagle.ge_data.download.__main__": ("--chek", "--check"),
    "eagle.questions.fetch": ("--copeis", "--copies"),
    "lmms_eval_msd.compare": ("--require_equals", "--require-equal"),
    "lmms_eval_msd.offline": ("--josnl", "--jsonl"),
}
"""A flag that each does not have, and the one that is meant."""


def command(module: str, *words: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(module).main(list(words))


def training(monkeypatch: pytest.MonkeyPatch, *words: str) -> Callable[[], Any]:
    script = str(REPO / "EAGLE" / "eagle" / "train" / "main_deepspeed.py")
    monkeypatch.setattr("sys.argv", [script, *words])
    return lambda: runpy.run_path(script, run_name="__main__")


def test_every_parser_of_the_repository_is_the_shared_one() -> None:
    rooms = ("LLaVA/llava", "EAGLE/eagle", "lmms-eval/lmms_eval_msd", "benchmarks", "experiments", "pocket")
    files = [path for room in rooms for path in (REPO / room).rglob("*.py")]
    assert len(files) > 100
    assert [path for path in files if "ArgumentParser(" in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_wrong_flag_of_a_module_is_one_line(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, meant = MODULES[module]
    assert run_cli(command(module, wrong, "x")) == 2
    assert capsys.readouterr().err == f"error: unknown flag {wrong} (did you mean {meant}?)\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_flag_of_msd_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert msd([name, "--msd_modle", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    hint = "see --help" if name == "report" else "did you mean --"  # msd report takes no models
    assert line.startswith(f"error: unknown flag --msd_modle ({hint}")


def test_a_wrong_flag_of_training_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        training(monkeypatch, "--learning_rat", "1")()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unknown flag --learning_rat (did you mean --learning-rate?)\n"


def test_a_wrong_command_of_msd_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert msd(["genrate", "--prompt", "x"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'genrate' (did you mean generate?)\n"


def both_spellings(parser: OneLineParser) -> None:
    """Every long flag of a parser, with ``-`` and with ``_``, is known."""
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--") and flag != "--help"]
    assert flags
    for flag in flags:
        for spelled in (flag.replace("_", "-"), "--" + flag[2:].replace("-", "_")):
            try:
                parser.parse_args([spelled])
            except UserError as error:
                assert "unknown flag" not in str(error) and "unrecognized" not in str(error)


def test_both_spellings_of_every_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[OneLineParser] = []

    def keep(self: OneLineParser, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(OneLineParser, "parse_known_args", keep)
        for module in MODULES:
            run_cli(command(module))
        with pytest.raises(SystemExit):
            training(patch)()
        msd(["help"])
    *others, top = seen
    subparsers = next(action.choices for action in top._actions if action.choices)
    assert len(others) == len(MODULES) + 1 and subparsers is not None
    for parser in (*others, *subparsers.values()):
        both_spellings(parser)

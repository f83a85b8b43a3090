"""The parser of all commands: both spellings of a flag, and one line for one that is not known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llava.arguments import OneLineParser, count, port, positive
from llava.errors import UserError, run_cli


def parser() -> OneLineParser:
    made = OneLineParser()
    made.add_argument("--base-model")
    made.add_argument("--model_type")
    made.add_argument("--limit", type=int)
    made.add_argument("--again", action="store_true")
    made.add_argument("words", nargs="*")
    return made


def test_complains_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(lambda: parser().parse_args(["--limit", "x"]) and None) == 2
    assert capsys.readouterr().err == "error: argument --limit: invalid int value: 'x' (see --help)\n"


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (positive, str(10**30), "is above 2147483647"),
        (positive, "9" * 5000, "is not a whole number"),
        (positive, "0", "0 is not at least 1"),
        (positive, "1.5", "'1.5' is not a whole number"),
        (count, "-1", "-1 is not at least 0"),
        (port, "70000", "70000 is above 65535"),
    ],
)
def test_whole_numbers_out_of_range(
    kind: Callable[[str], int], value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = OneLineParser()
    made.add_argument("--limit", type=kind)
    assert run_cli(lambda: made.parse_args(["--limit", value]) and None) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: argument --limit: ") and said in line and len(line) < 120
    assert kind("4") == 4


@pytest.mark.parametrize("words", [["--base_model", "a_b"], ["--base-model=a_b"], ["--base_mod", "a_b"]])
def test_dash_and_underscore_are_the_same(words: list[str]) -> None:
    assert parser().parse_args(words).base_model == "a_b"
    assert parser().parse_args(["--model-type", "x_y"]).model_type == "x_y"


def test_values_and_words_after_the_flags_stay() -> None:
    read = parser().parse_args(["--base-model=--model-type", "--", "--model-type", "--nope"])
    assert read.base_model == "--model-type" and read.words == ["--model-type", "--nope"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--bsae-model", "x"], "unknown flag --bsae-model (did you mean --base-model?)"),
        (["--modle-type=x"], "unknown flag --modle-type (did you mean --model_type?)"),
        (["--zzz"], "unknown flag --zzz (see --help for those known)"),
        (["--nope", "--limit", "x"], "unknown flag --nope (see --help for those known)"),
        (["--limit", "--agian"], "unknown flag --agian (did you mean --again?)"),
        (["-q"], "unrecognized arguments: -q (see --help)"),
    ],
)
def test_unknown_flags_name_the_nearest(words: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        parser().parse_args(words)
    assert str(error.value) == line


def test_subcommands_and_abbreviations() -> None:
    top = OneLineParser()
    sub = top.add_subparsers(dest="command", required=True).add_parser("go", allow_abbrev=False)
    sub.add_argument("--max-steps", type=int, required=True)
    assert top.parse_args(["go", "--max_steps", "3"]).max_steps == 3
    for words, near in ((["go", "--max-step", "3"], "--max-steps"), (["go", "--mx-steps", "3"], "--max-steps")):
        with pytest.raises(UserError, match=f"unknown flag .*did you mean {near}"):
            top.parse_args(words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["genrate"], "unknown command 'genrate' (did you mean generate?)"),
        (["zzz", "--dtype", "x"], "unknown command 'zzz' (known are generate, bench)"),
        (["bench", "--dtype", "flaot32"], "unknown --dtype 'flaot32' (did you mean float32?)"),
        (["bench", "--dtype", "x"], "unknown --dtype 'x' (known are auto, float32)"),
    ],
)
def test_unknown_commands_and_choices_name_the_nearest(words: list[str], line: str) -> None:
    top = OneLineParser()
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("generate")
    commands.add_parser("bench").add_argument("--dtype", choices=("auto", "float32"))
    with pytest.raises(UserError) as error:
        top.parse_args(words)
    assert str(error.value) == line

"""The command `msd`: generate, bench, report, throughput, verify, exactness, demo, web, doctor, push, export, serve.

A command is a module of `eagle.commands` with `add_arguments(parser)` and `run(arguments)`. Its module imports heavy
packages (torch, transformers, rich) inside `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module

from llava.arguments import OneLineParser
from llava.errors import USER_ERROR_STATUS, run_cli

NAMES = "generate bench report throughput verify exactness demo web doctor push export serve"
COMMANDS = {name: f"eagle.commands.{name}" for name in NAMES.split()}


def parser(names: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of the commands ``names``."""
    top = OneLineParser(prog="msd", description="Lossless speculative decoding for vision-language models.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name in names:
        module = import_module(COMMANDS[name])
        summary = (module.__doc__ or "").strip().splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2 for bad input). Only the module of that command is imported. Without
    a command it prints the help."""
    given = sys.argv[1:] if argv is None else list(argv)
    if not given:
        parser().print_help()
        return USER_ERROR_STATUS
    names = given[:1] if given[:1] and given[0] in COMMANDS else COMMANDS

    def run() -> int | None:
        arguments = parser(names).parse_args(given)
        return import_module(COMMANDS[arguments.command]).run(arguments)

    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())

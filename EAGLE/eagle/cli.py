"""The command `msd`: generate, bench, throughput, verify, exactness, demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from eagle.commands import bench, demo, exactness, generate, throughput, verify
from llava.errors import run_cli

COMMANDS = {
    "generate": generate,
    "bench": bench,
    "throughput": throughput,
    "verify": verify,
    "exactness": exactness,
    "demo": demo,
}


def parser() -> argparse.ArgumentParser:
    """The whole command line; each command adds its own options."""
    top = argparse.ArgumentParser(prog="msd", description="Multimodal speculative decoding: same answers, sooner.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2 for bad input)."""
    arguments = parser().parse_args(argv)
    return run_cli(lambda: COMMANDS[arguments.command].run(arguments))


if __name__ == "__main__":
    sys.exit(main())

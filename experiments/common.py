"""Parts that the experiments share: the record of a run, and processes with the repository's packages."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.arguments import OneLineParser

if TYPE_CHECKING:
    import torch

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("LLaVA", "EAGLE", "lmms-eval")


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of an experiment, with ``--out``."""
    made = OneLineParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here")
    return made


def add_parts(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """``PART ...``, some of these names; ``options.parts`` is empty without any, which means all."""

    def part(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"no part '{text}': there are {', '.join(names)}")
        return text

    parser.add_argument("parts", nargs="*", type=part, metavar="PART", help=f"{', '.join(names)} (default: all)")


def run_record(options: argparse.Namespace | None = None, device: torch.device | None = None) -> dict[str, Any]:
    """Date, commit, command, hardware and versions of this run, with its settings if given."""
    from eagle.provenance import record

    settings = {} if options is None else {name: str(value) for name, value in vars(options).items() if name != "out"}
    return {**record(device), **({"settings": settings} if settings else {})}


def caption(run: Mapping[str, Any]) -> str:
    """Date, hardware, versions and commit of a record in one line."""
    machine, packages = run["hardware"], run["versions"]
    device = machine.get("gpu") or f"{machine['cpu']} ({machine['cores']} cores, {machine['threads']} threads)"
    software = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    return f"{run['date'][:10]}, {device}, {software}, commit {str(run['commit'])[:12]}"


def environment() -> dict[str, str]:
    """The environment of a child process that finds the repository's packages first."""
    paths = [str(REPO), *(str(REPO / name) for name in PACKAGES), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

"""What long measurements share: steps in processes of their own, marks on disk, and a record of how it was made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eagle.provenance import record
from llava.errors import UserError
from llava.files import read_json, write_json

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("LLaVA", "EAGLE", "lmms-eval")
TAIL = 12
"""Lines of a failed step's log that are shown."""


def about() -> dict[str, Any]:
    """Hardware, versions, date, commit and command line of a measurement."""
    return record()


def told(record: Mapping[str, Any]) -> str:
    """A line with what `about` knows, to stand below a table."""
    machine, packages = record["hardware"], record["versions"]
    device = machine.get("gpu") or f"{machine['cpu']} ({machine['cores']} cores, {machine['threads']} threads)"
    software = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    return f"{record['date'][:10]}, {device}, {software}, commit {str(record['commit'])[:12]}"


def environment() -> dict[str, str]:
    """This process's, with the repository's packages found first."""
    paths = [str(REPO), *(str(REPO / name) for name in PACKAGES), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def launch(module: str, argv: Sequence[str], log: Path) -> None:
    """Runs ``python -m module argv`` in a process of its own; its output is appended to ``log``.

    Raises:
        UserError: it ended with another status than 0; the message has the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        command = [sys.executable, "-m", module, *argv]
        status = subprocess.run(command, env=environment(), stdout=output, stderr=subprocess.STDOUT, check=False)
    if status.returncode:
        end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        print("\n".join(end), file=sys.stderr)
        raise UserError(
            f"{module} ended with status {status.returncode}", where=log, fix="put it right and start the same again"
        )


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes ``folder`` the place of a study with these settings; what is in it already must have the same.

    Raises:
        UserError: the folder holds a study with other settings; the message names the first that differs.
    """
    file, given = folder / "study.json", json.loads(json.dumps(settings))
    if file.is_file():
        known = read_json(file, "settings of the study")
        for key in {**given, **known}:
            if given.get(key) != known.get(key):
                raise UserError(
                    f"the study here had {key}={known.get(key)}, this one has {given.get(key)}",
                    where=folder,
                    fix="give the same settings, or another --out",
                )
    write_json(file, given)


def bench(base: str | Path, draft: Path, questions: Path, tokens: int, depth: int, out: Path, log: Path) -> dict:
    """The report of `msd bench`, measured unless ``out`` has it already. With the device's fixed tree, so that τ does
    not depend on time, and with a chain of ``depth`` drafted tokens beside it."""
    if not out.is_file():
        argv = ["bench", "--base-model", str(base), "--msd-model", str(draft), "--data", str(questions)]
        argv += [
            "--max-new-tokens",
            str(tokens),
            "--baseline-dtype",
            "float32",
            "--tree",
            "fixed",
            "--also-tree",
            chain(depth),
        ]
        launch("eagle.cli", [*argv, "--out", str(out)], log)
    return read_json(out, "report of msd bench")


def chain(depth: int) -> str:
    """The tree of `msd bench --also-tree` that is a chain of ``depth`` drafted tokens below the root.

    >>> chain(6)
    '5/1/7'
    """
    return f"{depth - 1}/1/{depth + 1}"


def chain_tau(report: Mapping[str, Any], depth: int) -> float:
    """τ of the chain in a report of `bench`."""
    (found,) = (values["tau"] for name, values in report["others"].items() if name.endswith(f"tree {chain(depth)}"))
    return float(found)

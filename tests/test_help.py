"""`--help` of every command answers at once: no parser imports torch, transformers or another heavy package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from repository import REPO

from eagle.cli import COMMANDS

HEAVY = {
    "torch", "transformers", "deepspeed", "matplotlib", "accelerate", "datasets", "rich", "starlette", "lmms_eval",
    "huggingface_hub",
}  # fmt: skip
ROOMS = {"LLaVA": "llava", "EAGLE": "eagle", "lmms-eval": "lmms_eval_msd", ".": ("benchmarks", "experiments", "pocket")}
SCRIPT = """
import contextlib, io, json, runpy, sys
heavy = set(sys.argv[1].split(","))
for name, *argv in json.loads(sys.argv[2]):
    before, out = set(sys.modules), io.StringIO()
    sys.argv = [name, *argv]
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    loaded = {module.partition(".")[0] for module in set(sys.modules) - before}
    print(json.dumps([name, status, out.getvalue()[:7], sorted(loaded & heavy)]))
"""


def modules() -> list[str]:
    """Names of the modules that are run as commands and read arguments, without the single steps of the pocket recipe,
    which train for hours."""
    found = []
    for root, packages in ROOMS.items():
        for package in [packages] if isinstance(packages, str) else packages:
            for path in sorted((REPO / root / package).rglob("*.py")):
                text = path.read_text(encoding="utf-8")
                if '__name__ == "__main__"' in text and "parse" in text:
                    found.append(module_name(path, REPO / root))
    return [name for name in found if not name.startswith("pocket.recipe.")]


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")


def test_help_imports_nothing_heavy() -> None:
    names = modules()
    assert {"eagle.cli", "eagle.train.main_deepspeed", "lmms_eval_msd", "benchmarks.suite", "pocket.recipe"} <= set(
        names
    )
    calls = [[name, "--help"] for name in names] + [["eagle.cli", command, "--help"] for command in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(HEAVY), json.dumps(calls)],
        cwd=REPO, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(calls)
    wrong = [answer for answer in answers if answer[1:] != [0, "usage: ", []]]
    assert not wrong, wrong

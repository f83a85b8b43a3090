"""Check packages, devices, models and data: what is ready, what is not, and how to fix it. Loads no weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eagle.commands.output import console
from eagle.doctor import Check, State
from eagle.doctor.environment import (
    Machine,
    check_devices,
    check_disk,
    check_hub,
    check_memory,
    check_packages,
    check_pictures,
    check_python,
)

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {State.OK: "green", State.WARNING: "yellow", State.PROBLEM: "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd doctor`."""
    parser.add_argument("--base-model", help="base model: folder or hub name")
    parser.add_argument("--msd-model", help="draft head: folder or hub name")
    parser.add_argument("--data", type=Path, metavar="image_data", help="folder of the training pictures")
    parser.add_argument(
        "--vllm-python", default=sys.executable, metavar="FILE",
        help="Python of the environment with vLLM, for msd serve (default: this one)",
    )  # fmt: skip
    parser.add_argument(
        "--hub", action="store_true", help="also check that the hub can be reached (at HF_ENDPOINT if that is set)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints one table; exit status 1 if anything in it is a problem."""

    checks = [check_python(), *check_packages()]
    checks += machine_checks(arguments)
    if arguments.data is not None:
        checks += check_pictures(arguments.data)
    console().print(table_of(checks))
    problems = sum(check.state is State.PROBLEM for check in checks)
    print(f"{problems} problem(s), {sum(check.state is State.WARNING for check in checks)} warning(s)")
    return 1 if problems else 0


def machine_checks(arguments: argparse.Namespace) -> list[Check]:
    """Checks that need torch, transformers and huggingface_hub; if one cannot be imported, that is the finding."""
    try:
        from huggingface_hub import constants

        from eagle.doctor.serving import check_vllm

        machine, checks = check_devices()
        checks += [check_memory(machine.free)] if machine.device == "cpu" else []
        checks.append(check_disk(Path(constants.HF_HUB_CACHE)))
        checks.append(check_vllm(arguments.vllm_python))
        hub = check_hub() if arguments.hub else None
        checks += [hub] if hub else []
        return checks + model_checks(arguments, machine, hub is not None and hub.state is State.OK)
    except ImportError as error:
        reason = " ".join(str(error).split())
        return [Check("imports", State.PROBLEM, reason, "fix the packages first; devices and models were not checked")]


def model_checks(arguments: argparse.Namespace, machine: Machine, hub: bool) -> list[Check]:
    """Findings on the models that were named, and room for them and for the published ones."""
    from eagle.doctor import models
    from eagle.doctor.memory import PUBLISHED, check_fit
    from eagle.doctor.serving import check_served_draft

    checks: list[Check] = []
    base = draft = None
    if arguments.base_model:
        base, checks = models.check_base(arguments.base_model, hub)
    if arguments.msd_model:
        draft, found = models.check_draft(arguments.msd_model, hub)
        checks += found
        checks += [check_served_draft(draft)] if draft is not None else []
    if base is not None and draft is not None:
        checks += models.check_pair(base, draft)
    if base is not None and (size := models.footprint(base, draft)) is not None:
        checks.append(check_fit("room for these models", size, machine))
    return checks + [check_fit(f"room for {name}", size, machine) for name, size in PUBLISHED.items()]


def table_of(checks: Sequence[Check]) -> Table:
    """One row for each finding; the last column says how to fix it."""
    from rich.markup import escape
    from rich.table import Table

    caption = "room: weights of base and draft and a cache of 4 096 positions, computed from configs, not measured"
    table = Table("what", "state", "found", "how to fix it", title="msd doctor", caption=caption)
    for check in checks:
        state = f"[{STYLES[check.state]}]{check.state.value}[/]"
        table.add_row(escape(check.topic), state, escape(check.found), escape(check.fix))
    return table

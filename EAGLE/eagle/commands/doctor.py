"""Check packages, devices, models and data: what is ready, what is not, and how to fix it. Loads no weights,
except with ``--self-check``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eagle.commands.output import console
from eagle.doctor import Check, State
from eagle.doctor.environment import check_devices, check_disk, check_hub, check_memory, check_packages, check_pictures
from llava.errors import UserError

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
        "--served-by", choices=("vllm",),
        help="also compare what --msd-model was trained with and what this engine does: layers, positions, norms, "
        "image rows, vocabulary (with --base-model more of it)",
    )  # fmt: skip
    parser.add_argument(
        "--self-check", action="store_true",
        help="also load the base model and compare the engine with transformers' generate on one short prompt",
    )  # fmt: skip
    parser.add_argument(
        "--hub", action="store_true", help="also check that the hub can be reached (at HF_ENDPOINT if that is set)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints one table; exit status 1 if anything in it is a problem."""
    if arguments.self_check and not arguments.base_model:
        raise UserError("--self-check without a base model", fix="name one with --base-model")
    if arguments.served_by and not arguments.msd_model:
        raise UserError("--served-by without a draft", fix="name one with --msd-model")
    checks = check_packages()
    try:
        checks += machine_checks(arguments)
        checks += check_pictures(arguments.data) if arguments.data is not None else []
    except ImportError as error:
        fix = "fix the packages first; devices and models were not checked"
        checks.append(Check("imports", State.PROBLEM, " ".join(str(error).split()), fix))
    console().print(table_of(checks))
    count = {state: sum(check.state is state for check in checks) for state in State}
    print(f"{count[State.PROBLEM]} problem(s), {count[State.WARNING]} warning(s)")
    return 1 if count[State.PROBLEM] else 0


def machine_checks(arguments: argparse.Namespace) -> list[Check]:
    """Checks that need torch, transformers and huggingface_hub: devices, disk, hub, the models that were named, and
    memory for them.

    Raises:
        ImportError: one of these packages cannot be imported.
    """
    from huggingface_hub import constants

    from eagle.doctor import models
    from eagle.doctor.memory import check_fit
    from eagle.doctor.serving import check_served_by_vllm, check_served_draft, look_for_vllm
    from eagle.loading import device_map_for

    machine, checks = check_devices()
    if machine.device == "cpu":
        checks.append(check_memory(machine.free))
    checks.append(check_disk(Path(constants.HF_HUB_CACHE)))
    vllm, runner = look_for_vllm(arguments.vllm_python)
    checks.append(vllm)
    ask_hub, base, draft = False, None, None
    if arguments.hub:
        checks.append(check_hub())
        ask_hub = checks[-1].state is State.OK
    if arguments.base_model:
        base, found = models.check_base(arguments.base_model, ask_hub)
        checks += found
    if arguments.msd_model:
        draft, found = models.check_draft(arguments.msd_model, ask_hub)
        checks += found
        if draft is not None and arguments.served_by:
            checks += check_served_by_vllm(draft, arguments.msd_model, base, runner)
        elif draft is not None:
            checks.append(check_served_draft(draft, arguments.msd_model))
    if base is not None and draft is not None:
        checks += models.check_pair(base, draft)
    if base is not None and arguments.self_check:
        checks.append(models.check_engine(arguments.base_model, device_map_for("auto")))
    if base is not None:
        checks.append(check_fit("room for these models", models.footprint(base, draft), machine))
    elif not arguments.base_model:
        hint = "name models with --base-model and --msd-model; docs/real-models.md has the sizes of the published ones"
        checks.append(Check("models", State.OK, "none named, so none checked", hint))
    return checks


def table_of(checks: Sequence[Check]) -> Table:
    """One row for each finding; the last column says how to fix it."""
    from rich.markup import escape
    from rich.table import Table

    judged = any(check.topic.startswith("room") for check in checks)
    caption = "room: weights and a cache of 4 096 positions, computed from configs, not measured" if judged else None
    table = Table("what", "state", "found", "how to fix it", title="msd doctor", caption=caption)
    for check in checks:
        state = f"[{STYLES[check.state]}]{check.state.value}[/]"
        table.add_row(escape(check.topic), state, escape(check.found), escape(check.fix))
    return table

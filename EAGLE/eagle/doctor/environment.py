"""Python, packages, devices, memory, disk, the hub, and the folder of training pictures."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from eagle.doctor import Check, State
from llava.errors import reason_of

EVALUATION = "msd-lmms-eval"
OWN = {"msd-eagle": "./EAGLE", "msd-llava": "./LLaVA", EVALUATION: "./lmms-eval"}
"""Our packages and their folders."""
SHOWN = ("torch", "transformers", "huggingface-hub", "deepspeed")
GIB = 2**30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
LITTLE_MEMORY, LITTLE_DISK, NO_DISK = 4 * GIB, 20 * GIB, GIB  # a 7B base and its draft are a download of about 16 GB
PICTURE_GUIDE = "image_data/README.md says how to fetch it"


@dataclass(frozen=True)
class Machine:
    """Where models will run. ``free``: bytes of memory, of all CUDA devices together or of the CPU."""

    device: str
    free: int
    slow_in_16_bit: bool = False


def gib(count: float) -> str:
    """Bytes as text in GiB."""
    return f"{count / GIB:.1f} GiB"


def check_packages() -> list[Check]:
    """A finding for Python and for each package outside the range that ours declare, and one for the rest."""
    checks: list[Check] = []
    wanted: dict[str, Requirement] = {}
    for owner, folder in OWN.items():
        if _version(owner) is None:
            fix = f"pip install -e {folder}"
            if owner == EVALUATION:
                checks.append(Check(f"package {owner}", State.OK, "not installed; only evaluations need it", fix))
            else:
                checks.append(Check(f"package {owner}", State.PROBLEM, "not installed", fix))
            continue
        python = f"Python{metadata.metadata(owner)['Requires-Python'] or ''}"
        for requirement in map(Requirement, [python, *(metadata.requires(owner) or [])]):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted[requirement.name] = requirement
    for name, requirement in wanted.items():
        version = platform.python_version() if name == "Python" else _version(name)
        if name in OWN or (version is not None and requirement.specifier.contains(version, prereleases=True)):
            continue
        found = f"{version or 'not installed'}, wanted {requirement.specifier or 'any version'}"
        fix = "make an environment with another Python" if name == "Python" else f"pip install '{requirement}'"
        checks.append(Check(f"package {name}", State.PROBLEM, found, fix))
    if any(check.state is State.PROBLEM for check in checks):
        return checks
    versions = ", ".join(f"{name} {version}" for name in SHOWN if (version := _version(name)))
    found = f"Python {platform.python_version()}; {len(wanted)} in range; {versions}"
    return [Check("packages", State.OK, found), *checks]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_devices() -> tuple[Machine, list[Check]]:
    """The machine, and a finding for each device."""
    import torch

    from llava.device import cpu_has_bfloat16

    if torch.cuda.is_available():
        checks, free = [], 0
        for number in range(torch.cuda.device_count()):
            topic, name = f"device cuda:{number}", torch.cuda.get_device_name(number)
            try:
                own_free, total = torch.cuda.mem_get_info(number)
            except RuntimeError as error:  # too full even for the driver's own memory
                fix = "stop the process that fills it, or hide the device with CUDA_VISIBLE_DEVICES"
                checks.append(Check(topic, State.PROBLEM, f"{name}: {reason_of(error)}", fix))
            else:
                free += own_free
                checks.append(Check(topic, State.OK, f"{name}, {gib(own_free)} of {gib(total)} free"))
        return Machine("cuda", free), checks
    machine = Machine("cpu", free_cpu_memory(), slow_in_16_bit=not cpu_has_bfloat16())
    found = f"no CUDA device; CPU with {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    state, fix = State.OK, ""
    if shutil.which("nvidia-smi"):
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        found += f"; this torch, {build}, cannot use the driver"
        state = State.WARNING
        fix = "install a torch built for the CUDA version that nvidia-smi shows; check CUDA_VISIBLE_DEVICES"
    elif machine.slow_in_16_bit:
        found += "; no instructions for 16 bit, which is slow here"
        fix = "--dtype auto uses float32"
    return machine, [Check("device", state, found, fix)]


def free_cpu_memory() -> int:
    """Bytes that a new process can use, at most the limit of its control group."""
    free = psutil.virtual_memory().available
    limit = CGROUP_LIMIT.read_text(encoding="ascii").strip() if CGROUP_LIMIT.is_file() else "max"
    return min(free, int(limit)) if limit.isdecimal() else free


def check_memory(free: int) -> Check:
    """The CPU's free memory."""
    if free >= LITTLE_MEMORY:
        return Check("memory", State.OK, f"{gib(free)} free")
    return Check("memory", State.WARNING, f"{gib(free)} free", "enough for the pocket models; close other programs")


def check_disk(folder: Path) -> Check:
    """Free disk space for the hub's cache in ``folder``, which may not exist yet."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    state = State.PROBLEM if free < NO_DISK else State.OK
    fix = "" if free >= LITTLE_DISK else "too little for a 7B model; free some, or set HF_HOME to another disk"
    return Check("disk", state, f"{gib(free)} free for {folder}", fix)


def check_hub() -> Check:
    """One request to the hub, at the address in HF_ENDPOINT if that is set."""
    from huggingface_hub import constants, get_session, get_token

    address = constants.ENDPOINT
    try:
        get_session().get(f"{address}/api/models?limit=1", timeout=10).raise_for_status()
    except Exception as error:  # releases of huggingface_hub use different HTTP libraries
        fix = "check the network, a proxy, HF_ENDPOINT; without the hub, models come from folders or the cache"
        return Check("hub", State.PROBLEM, f"{address} cannot be reached ({reason_of(error)})", fix)
    account = "a token is set" if get_token() else "no token: public models only, no push"
    return Check("hub", State.OK, f"{address} answers; {account}")


def check_pictures(root: Path) -> list[Check]:
    """A finding for each folder of the training sets."""
    from eagle.ge_data.download.inventory import count_pictures
    from eagle.ge_data.download.sources import PICTURE_SETS

    if not root.is_dir():
        what = f"not a folder: {root}" if root.exists() else f"no such folder: {root}"
        return [Check("data", State.PROBLEM, f"{what} (--data is the folder of the training pictures)", PICTURE_GUIDE)]
    checks = []
    for source in PICTURE_SETS:
        count, state, fix = count_pictures(root, source), State.OK, ""
        if count.missing:
            state = State.WARNING if count.there else State.PROBLEM
            fix = f"{PICTURE_GUIDE}; conversations of missing pictures are skipped"
        found = f"{count.there} of {count.expected} pictures" + (
            f", {count.gone} gone from the web" if count.gone else ""
        )
        checks.append(Check(f"data {source.path}", state, found, fix))
    return checks

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
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from eagle.doctor import Check, State
from eagle.picture_sources import SOURCES, PictureSet

ENGINE = "msd-eagle"
OWN = {  # folder, and how bad it is if the package is not installed
    ENGINE: ("./EAGLE", State.PROBLEM),
    "msd-llava": ("./LLaVA", State.PROBLEM),
    "msd-lmms-eval": ("./lmms-eval", State.WARNING),
}
SHOWN = ("torch", "transformers", "huggingface-hub", "deepspeed")
GIB = 2**30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
LITTLE_MEMORY, LITTLE_DISK, NO_DISK = 4 * GIB, 20 * GIB, GIB  # a 7B base and its draft are a download of about 16 GB
PICTURES = {source.path: source.pictures for source in SOURCES if isinstance(source, PictureSet)}
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp")
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


def check_python() -> Check:
    """The version of Python against ``requires-python``."""
    version = platform.python_version()
    if _version(ENGINE) is None:
        return Check("Python", State.WARNING, f"{version}; {ENGINE} is not installed, so its range is not known")
    wanted = metadata.metadata(ENGINE)["Requires-Python"] or ""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("Python", State.OK, version)
    return Check("Python", State.PROBLEM, f"{version}, wanted {wanted}", "make an environment with another Python")


def check_packages() -> list[Check]:
    """A finding for each package that is missing or outside the range that ours declare, and one for the rest."""
    checks: list[Check] = []
    ranges: dict[str, SpecifierSet] = {}
    for owner, (folder, state) in OWN.items():
        if _version(owner) is None:
            checks.append(Check(f"package {owner}", state, "not installed", f"pip install -e {folder}"))
            continue
        for requirement in map(Requirement, metadata.requires(owner) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                key = canonicalize_name(requirement.name)
                ranges[key] = ranges.get(key, SpecifierSet()) & requirement.specifier
    for name, wanted in ranges.items():
        version = _version(name)
        if version is None and name in OWN:
            continue  # reported above
        if version is None or not wanted.contains(version, prereleases=True):
            found = f"{version or 'not installed'}, wanted {wanted or 'any version'}"
            checks.append(Check(f"package {name}", State.PROBLEM, found, f"pip install '{name}{wanted}'"))
    if any(check.state is State.PROBLEM for check in checks):
        return checks
    versions = ", ".join(f"{name} {version}" for name in SHOWN if (version := _version(name)))
    return [Check("packages", State.OK, f"{len(ranges)} in range; {versions}"), *checks]


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
                found = f"{name}: {next(iter(str(error).splitlines()), 'cannot be used')}"
                fix = "stop the process that fills it, or hide the device with CUDA_VISIBLE_DEVICES"
                checks.append(Check(topic, State.PROBLEM, found, fix))
                continue
            free += own_free
            checks.append(Check(topic, State.OK, f"{name}, {gib(own_free)} of {gib(total)} free"))
        return Machine("cuda", free), checks
    machine = Machine("cpu", free_cpu_memory(), slow_in_16_bit=not cpu_has_bfloat16())
    found = f"no CUDA device; CPU with {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    state, fix = State.OK, ""
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        found, state, fix = f"{found}; this torch has no CUDA", State.WARNING, "install a torch built for CUDA"
    elif shutil.which("nvidia-smi"):
        found, state = f"{found}; this torch (CUDA {torch.version.cuda}) cannot use the driver", State.WARNING
        fix = "see nvidia-smi and CUDA_VISIBLE_DEVICES; use a newer driver, or a torch built for an older CUDA"
    elif machine.slow_in_16_bit:
        found, state = f"{found}; no instructions for 16 bit, which is slow here", State.WARNING
        fix = "use --dtype float32 (--dtype auto does)"
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
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    found = f"{gib(free)} free for {folder}"
    if free < NO_DISK:
        return Check("disk", State.PROBLEM, found, "free some, or set HF_HOME to another disk")
    if free < LITTLE_DISK:
        return Check("disk", State.WARNING, found, "too little for a 7B model; set HF_HOME to another disk")
    return Check("disk", State.OK, found)


def check_hub() -> Check:
    """One request to the hub, at the address in HF_ENDPOINT if that is set."""
    from huggingface_hub import constants, get_session, get_token

    address = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return Check("hub", State.PROBLEM, "HF_HUB_OFFLINE is set, so the hub is not asked", "unset HF_HUB_OFFLINE")
    try:
        status = get_session().get(f"{address}/api/models?limit=1", timeout=10).status_code
    except Exception as error:  # releases of huggingface_hub use different HTTP libraries
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        fix = "check the network, a proxy, HF_ENDPOINT; without the hub, models come from folders or the cache"
        return Check("hub", State.PROBLEM, f"{address} cannot be reached ({reason})", fix)
    if status != 200:
        return Check("hub", State.PROBLEM, f"{address} answers with status {status}", "is HF_ENDPOINT a hub?")
    account = "a token is set" if get_token() else "no token: public models only, no push"
    return Check("hub", State.OK, f"{address} answers; {account}")


def check_pictures(root: Path) -> list[Check]:
    """A finding for each folder of the training sets."""
    if not root.is_dir():
        return [Check("data", State.PROBLEM, f"no such folder: {root}", PICTURE_GUIDE)]
    return [_check_picture_set(root / name, f"data {name}", expected) for name, expected in PICTURES.items()]


def _check_picture_set(folder: Path, topic: str, expected: int) -> Check:
    if not folder.is_dir():
        return Check(topic, State.PROBLEM, "no such folder", PICTURE_GUIDE)
    with os.scandir(folder) as entries:
        count = sum(entry.name.lower().endswith(PICTURE_ENDINGS) for entry in entries)
    found = f"{count:,} of {expected:,} pictures".replace(",", " ")
    if count == 0:
        return Check(topic, State.PROBLEM, found, PICTURE_GUIDE)
    if count < expected:
        return Check(topic, State.WARNING, found, f"{PICTURE_GUIDE}; conversations of missing pictures are skipped")
    return Check(topic, State.OK, found)

"""Devices, memory and disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from eagle.doctor.check import Check, State

GIB = 2**30
GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
LITTLE_MEMORY, LITTLE_DISK, NO_DISK = 4 * GIB, 20 * GIB, GIB  # a 7B base and its draft are about 16 GB to download


@dataclass(frozen=True)
class Machine:
    """Where models will run. ``free`` bytes of memory for them: of all CUDA devices together, or of the CPU."""

    device: str
    free: int
    slow_in_16_bit: bool = False


def look() -> tuple[Machine, list[Check]]:
    """What is here, and a row for each device."""
    import torch

    from llava.device import cpu_has_bfloat16

    if torch.cuda.is_available():
        checks, free = [], 0
        for number in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(number)
            try:
                own_free, total = torch.cuda.mem_get_info(number)
            except RuntimeError as error:  # not even the driver's own memory fits
                mend = "end what fills it, or hide it by CUDA_VISIBLE_DEVICES"
                found = f"{name}: {next(iter(str(error).splitlines()), 'cannot be used')}"
                checks.append(Check(f"device cuda:{number}", State.PROBLEM, found, mend))
                continue
            free += own_free
            found = f"{name}, {gib(own_free)} of {gib(total)} free"
            checks.append(Check(f"device cuda:{number}", State.OK, found))
        return Machine("cuda", free), checks
    machine = Machine("cpu", free_cpu_memory(), slow_in_16_bit=not cpu_has_bfloat16())
    found = f"no CUDA device; CPU with {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if shutil.which("nvidia-smi"):
        why, mend = "this torch has no CUDA", "install a torch built for CUDA"
        if torch.version.cuda is not None:
            why = f"this torch (CUDA {torch.version.cuda}) cannot use the driver"
            mend = "see nvidia-smi and CUDA_VISIBLE_DEVICES; take a newer driver, or a torch built for an older CUDA"
        return machine, [Check("device", State.WARNING, f"{found}; {why}", mend)]
    if machine.slow_in_16_bit:
        mend = "use --dtype float32 (--dtype auto does)"
        found += "; no instructions for 16 bit, which is slow here"
        return machine, [Check("device", State.WARNING, found, mend)]
    return machine, [Check("device", State.OK, found)]


def free_cpu_memory() -> int:
    """Bytes that a new process can use, at most the limit of its control group."""
    free = psutil.virtual_memory().available
    limit = GROUP_LIMIT.read_text(encoding="ascii").strip() if GROUP_LIMIT.is_file() else "max"
    return min(free, int(limit)) if limit.isdecimal() else free


def check_memory(free: int) -> Check:
    """The CPU's free memory."""
    if free >= LITTLE_MEMORY:
        return Check("memory", State.OK, f"{gib(free)} free")
    return Check("memory", State.WARNING, f"{gib(free)} free", "enough for the pocket models; close other programs")


def check_disk(folder: Path) -> Check:
    """Free disk where the hub's cache lies (or will lie)."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{gib(free)} free for {folder}"
    if free < NO_DISK:
        return Check("disk", State.PROBLEM, found, "free some, or set HF_HOME to another disk")
    if free < LITTLE_DISK:
        return Check("disk", State.WARNING, found, "too little for a 7B model; set HF_HOME to another disk")
    return Check("disk", State.OK, found)


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB"

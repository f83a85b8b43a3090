"""What the machine is called, for records of measurements."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch


def hardware(device: torch.device) -> dict[str, Any]:
    """What numbers were measured on."""
    found: dict[str, Any] = {"machine": platform.machine(), "cpu": cpu_name(), "threads": torch.get_num_threads()}
    found["cores"] = os.cpu_count()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def cpu_name() -> str:
    """The processor's name where the system tells it, from /proc/cpuinfo where there is one."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

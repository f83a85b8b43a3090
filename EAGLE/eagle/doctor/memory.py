"""Whether weights and caches of a base and its draft fit into the memory of this machine. Computed, not measured."""

from __future__ import annotations

from dataclasses import dataclass

from eagle.doctor import Check, State
from eagle.doctor.environment import Machine, gib

POSITIONS = 4096  # of one sequence: prompt, pictures and answer
DTYPES = {"bfloat16": 2, "float32": 4}  # bytes of an element; float16 takes as many as bfloat16


@dataclass(frozen=True)
class Footprint:
    """Elements that have to be in memory: ``base`` and ``draft`` weights; ``cache``, the keys and values of one
    position in all layers of both."""

    base: int
    draft: int
    cache: int

    def bytes(self, dtype: str) -> int:
        """Memory for one sequence of `POSITIONS`."""
        return (self.base + self.draft + self.cache * POSITIONS) * DTYPES[dtype]


def check_fit(topic: str, footprint: Footprint, machine: Machine) -> Check:
    """Whether the models fit into the free memory, and in which dtype."""
    need = {dtype: footprint.bytes(dtype) for dtype in DTYPES}
    fits = [dtype for dtype, size in need.items() if size <= machine.free]
    sizes = ", ".join(f"{dtype} {gib(size)}" for dtype, size in need.items())
    found = f"needs {sizes}; {gib(machine.free)} free on {machine.device}"
    if not fits:
        fix = "use a smaller model, several devices (--device-map auto), or a quantised target"
        return Check(topic, State.WARNING, f"fits in no dtype: {found}", fix)
    if fits == ["bfloat16"] and machine.slow_in_16_bit:
        return Check(topic, State.WARNING, f"fits in bfloat16 only, which is slow on this CPU: {found}", "add memory")
    return Check(topic, State.OK, f"fits in {' and '.join(fits)}: {found}")

"""The tensors and generators of a pretended GPU (`pretended_gpu.py`). No pytest in here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

HOST = torch.device("cpu")
GENERATORS: dict[int, torch.device] = {}
"""Device of each pretended generator, by the address of its state: all that an operation is handed of it."""


class DeviceMix(RuntimeError):
    """CUDA would refuse this."""


class OnGPU(Tensor):
    """A tensor on a pretended device.

    ``memory``: the numbers, in the host's memory; ``place``: the device, None where C++ code made it without saying;
    ``on_read``: called where one number is read, which `PretendedGPU` counts.
    """

    memory: Tensor
    place: torch.device | None
    on_read: Callable[[], None] = staticmethod(lambda: None)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, memory: Tensor, place: torch.device | None) -> OnGPU:
        made: OnGPU = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, memory.size(), strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype,
            device=torch.device("meta"),  # the one device that autograd runs without a driver
        )  # fmt: skip
        made.memory, made.place = memory, place
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place or torch.device("cuda", 0)

    @property
    def data(self) -> OnGPU:  # type: ignore[override]
        return OnGPU(self.memory, self.place)

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, OnGPU):
            raise DeviceMix("a tensor of a GPU gets data of the host (CUDA would take it, this one cannot)")
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.memory, self.place = new.memory, new.place

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise DeviceMix(f"{func}: a tensor of a pretended GPU where none is pretended")

    def item(self) -> Any:  # type: ignore[override]
        self.on_read()
        return self.memory.item()  # C++ code that makes a tensor of a list reads it where no mode is on

    def tolist(self) -> Any:  # type: ignore[override]
        return self.cpu().tolist()

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.to(HOST)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.memory}, {self.place})"


class PretendedGenerator(torch.Generator):
    """A generator of any device; its numbers are those of a generator of the host."""

    place: torch.device
    _cdata: int

    def __new__(cls, device: Any = HOST) -> PretendedGenerator:
        made = super().__new__(cls)
        made.place = full(device)
        GENERATORS[made._cdata] = made.place
        return made

    def __init__(self, device: Any = HOST) -> None:
        """`__new__` has done it."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    def __del__(self) -> None:
        GENERATORS.pop(self._cdata, None)


def is_on_gpu(value: Any) -> bool:
    return isinstance(value, OnGPU)


def placed(tensors: Iterable[Tensor]) -> torch.device | None:
    """The device of the first pretended tensor that has one."""
    return next((tensor.place for tensor in tensors if isinstance(tensor, OnGPU) and tensor.place), None)


def full(device: Any) -> torch.device:
    """The device with its number: ``cuda`` is ``cuda:0``."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def changed(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same lists, tuples and dicts with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: changed(change, part) for name, part in value.items()}
    return type(value)(changed(change, part) for part in value) if type(value) in (list, tuple) else value


def in_memory(value: Any) -> Any:
    """The same with host tensors in place of pretended ones."""
    return changed(lambda tensor: tensor.memory if isinstance(tensor, OnGPU) else tensor, value)

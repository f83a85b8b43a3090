"""Pretended CUDA devices on a machine that has none: tensors in the host's memory that behave as if they were elsewhere.

Inside ``with PretendedGPU() as gpu`` a tensor that is made on, or moved to, ``cuda:N`` is an `OnGPU`. Its numbers are an
ordinary tensor of the host, so results are those of the CPU. What CUDA would refuse raises `DeviceMix`:

* an operation on tensors of different devices. As on CUDA, a number (no dimensions) of the host may stand in a pointwise
  operation or be written with an index, an index may come from the host, and a copy may cross;
* random numbers from a generator of another device.

What makes the host wait for a device is counted in ``gpu.waits``, by kind and by the function of ours that asked:

``to host``   a copy of a tensor, `.cpu()`, `.to("cpu")`, `.tolist()`
``number``    one value is read: `.item()`, `int()`, `bool()`, `if tensor`
``size``      a result whose size depends on values: `nonzero`, a boolean index, `unique`, ...
``to GPU``    a copy from the host's ordinary memory: `torch.tensor(list, device=gpu)`, `.to(gpu)`, an index of the host

Copies from one device to another are counted in ``gpu.transfers``: they wait for nothing.

What is not pretended: streams and time, memory that ends, kernels (CUDA's rounding, bfloat16), CUDA graphs, compiled
code, `torch.cuda.is_available()`, which stays false. A tensor that C++ code makes without an input to go by belongs to
no device, and is taken everywhere; numbers in the memory of a module go over with `module.to(device)`.
No pytest in here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from repository import REPO
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

HOST = torch.device("cpu")
OURS = tuple(str(REPO / folder) for folder in ("LLaVA/llava", "EAGLE/eagle", "lmms-eval/lmms_eval_msd"))
COPIES = {"copy_", "_to_copy", "_local_scalar_dense", "lift_fresh", "detach", "is_same_size"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
TAKE_NUMBERS = {"masked_fill", "masked_fill_", "index_fill", "index_fill_", "fill_", "where"}
NUMBERS = {"_local_scalar_dense", "equal"}
SIZED_BY_VALUES = {
    "nonzero", "unique", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount",
    "repeat_interleave",
}  # fmt: skip
NO_TENSOR = {*NUMBERS, "is_same_size"}
GENERATORS: dict[int, torch.device] = {}
"""Device of each pretended generator, by the address of its state: all that an operation is handed of it."""


class DeviceMix(RuntimeError):
    """CUDA would refuse this."""


class OnGPU(Tensor):
    """A tensor on a pretended device.

    ``memory``: the numbers, in the host's memory; ``place``: the device, None where C++ code made it without saying.
    """

    memory: Tensor
    place: torch.device | None
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, memory: Tensor, place: torch.device | None) -> OnGPU:
        made: OnGPU = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, memory.size(), strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype,
            device="meta",  # the one device that autograd runs without a driver
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
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise DeviceMix(f"{func}: a tensor of {PretendedGPU.__name__} outside of it")

    def item(self) -> Any:  # type: ignore[override]
        if PretendedGPU.active is not None:
            PretendedGPU.active.waits["number: " + asker()] += 1
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


class Calls(TorchFunctionMode):
    """What has to be caught before C++ code has it, which would ask a driver or take the "meta" device at its word."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to:
            args = [full(part) if isinstance(part, str | torch.device) else part for part in args]
            kwargs = {name: full(part) if name == "device" and part is not None else part for name, part in kwargs.items()}
        elif func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])
        elif func is scaled_dot_product_attention and is_on_gpu(args[0]) and not args[0].requires_grad:
            tensors = tensors_in((args, kwargs))
            refuse_mix("attention", tensors)  # computed as on the CPU, and not the slow way of a strange device
            with _disable_current_modes():
                return OnGPU(func(*in_memory(args), **in_memory(kwargs)), placed(tensors))
        return func(*args, **kwargs)


class PretendedGPU(TorchDispatchMode):
    """Pretends that there are GPUs. ``waits``, ``transfers``: counts of "kind: file function" since the last
    `forget`; ``active``: the one that pretends now."""

    active: PretendedGPU | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        self._undo = ExitStack()

    def forget(self) -> None:
        """Counts from nothing."""
        self.waits.clear()
        self.transfers.clear()

    def __enter__(self) -> PretendedGPU:
        grad_mode = torch.inference_mode  # on inference tensors the parts of an operation do not come by here
        for holder, name, instead in (
            (torch, "Generator", PretendedGenerator),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "empty_cache", lambda: None),
            (grad_mode, "__enter__", enter_no_grad),
            (grad_mode, "__exit__", exit_no_grad),
        ):
            self._undo.enter_context(mock.patch.object(holder, name, instead))
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        self._undo.callback(torch._C._set_only_lift_cpu_tensors, False)  # type: ignore[attr-defined]
        self._undo.enter_context(mock.patch.object(PretendedGPU, "active", self))
        self._undo.enter_context(Calls())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = tensors_in((args, kwargs))
        refuse_mix(name, bound(func, args, tensors))
        on_gpu, place, wanted = any(map(is_on_gpu, tensors)), placed(tensors), kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "meta":  # C++ code: where its input seems to be
            on_gpu = True
        elif wanted is not None:
            place = full(wanted)
            on_gpu = place.type == "cuda"
        if wanted is not None:
            kwargs["device"] = HOST
        refuse_generator(name, kwargs.get("generator"), place if on_gpu else HOST)
        self._count(name, args, place if on_gpu else HOST, bool(kwargs.get("non_blocking")))
        kwargs.pop("pin_memory", None)
        out = func(*in_memory(args), **in_memory(kwargs))
        if not on_gpu or name in NO_TENSOR:
            return out
        if func._schema.is_mutable and args and is_on_gpu(args[0]):  # in place: the same tensor comes back
            return args[0]
        return changed(lambda tensor: OnGPU(tensor, place), out)

    def _count(self, name: str, args: Sequence[Any], to: torch.device | None, non_blocking: bool) -> None:
        if name == "_to_copy":
            self._count_copy(args[0], to, non_blocking)
        elif name == "copy_":
            self._count_copy(args[1], args[0].device, non_blocking)
        elif name in INDEXING and is_on_gpu(args[0]):
            for index in tensors_in(args[1]):
                if not is_on_gpu(index):
                    self.waits["to GPU: " + asker()] += 1
                if index.dtype in (torch.bool, torch.uint8):
                    self.waits["size: " + asker()] += 1
        elif (name in NUMBERS or name in SIZED_BY_VALUES) and is_on_gpu(args[0]):
            self.waits[("number: " if name in NUMBERS else "size: ") + asker()] += 1

    def _count_copy(self, source: Tensor, target: torch.device | None, non_blocking: bool) -> None:
        start = source.place if isinstance(source, OnGPU) else HOST
        if None in (start, target) or start == target:
            return
        if HOST not in (start, target):
            self.transfers["between GPUs: " + asker()] += 1
        elif target == HOST:
            self.waits["to host: " + asker()] += 1
        elif not (non_blocking and source.is_pinned()):
            self.waits["to GPU: " + asker()] += 1


def bound(func: Any, args: Sequence[Any], tensors: list[Tensor]) -> list[Tensor]:
    """Those of an operation's tensors that CUDA wants on one device."""
    name = func.overloadpacket.__name__
    if name in COPIES:
        return []
    if name in INDEXING and is_on_gpu(args[0]):
        tensors = [args[0], *filter(is_on_gpu, tensors_in(args[1]))]
        return [*tensors, *(value for value in tensors_in(args[2:]) if value.dim() or is_on_gpu(value))]
    if torch.Tag.pointwise in func.tags or name in TAKE_NUMBERS:
        return [tensor for tensor in tensors if tensor.dim() or is_on_gpu(tensor)]
    return tensors


def refuse_mix(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises `DeviceMix` where they are not on one device."""
    known = [tensor for tensor in tensors if not (isinstance(tensor, OnGPU) and tensor.place is None)]
    if len({tensor.device for tensor in known}) > 1:
        lie = ", ".join(f"{list(tensor.shape)} {tensor.device}" for tensor in known)
        raise DeviceMix(f"{name} of tensors on different devices: {lie} ({asker()})")


def refuse_generator(name: str, generator: torch.Generator | None, device: torch.device | None) -> None:
    """Raises `DeviceMix` where random numbers for ``device`` are to come from a generator of another."""
    if generator is None or device is None:
        return
    own = GENERATORS.get(generator._cdata, HOST)
    if own != device:
        raise DeviceMix(f"{name} on {device} with a generator of {own} ({asker()})")


def asker() -> str:
    """File and function of ours that is nearest to the operation; "elsewhere" where none of ours is in the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OURS):
            return f"{Path(code.co_filename).name} {code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


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


def enter_no_grad(self: Any) -> None:
    self.no_grad = torch.no_grad()
    self.no_grad.__enter__()


def exit_no_grad(self: Any, *error: Any) -> None:
    self.no_grad.__exit__(*error)

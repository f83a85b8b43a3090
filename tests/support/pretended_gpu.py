"""Pretended CUDA devices on a machine that has none: device mixes raise, and what makes the host wait is counted.

Inside ``with PretendedGPU() as gpu`` a tensor that is made on, or moved to, ``cuda:N`` is an `OnGPU`. Its numbers are
an ordinary tensor of the host, so results are those of the CPU. What CUDA would refuse raises `DeviceMix`:

* an operation on tensors of different devices. As on CUDA, a number (no dimensions) of the host may stand in a
  pointwise operation or be written with an index, an index may come from the host, and a copy may cross;
* random numbers from a generator of another device.

What makes the host wait for a device is counted in ``gpu.waits``, by kind and by the function of ours that asked:

``to host``   a copy of a tensor, `.cpu()`, `.to("cpu")`, `.tolist()`
``stream``    copies that were sent are waited for
``number``    one value is read: `.item()`, `int()`, `bool()`, `if tensor`
``size``      a result whose size depends on values: `nonzero`, a boolean index, `unique`, ...
``to GPU``    a copy from the host's ordinary memory: `torch.tensor(list, device=gpu)`, `.to(gpu)`, an index of the host

Copies from one GPU to another are counted in ``gpu.transfers``: the host does not wait for them.

Not pretended: work beside the host's, time, memory that ends, kernels (their rounding, bfloat16), CUDA graphs, compiled
code, `torch.load` onto a GPU, other threads, and `torch.cuda.is_available()`, which stays false. A tensor that C++ code
makes without an input to go by belongs to no device, and is taken everywhere. No pytest in here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from pretended_tensor import (
    GENERATORS,
    HOST,
    DeviceMix,
    OnGPU,
    PretendedGenerator,
    changed,
    full,
    in_memory,
    is_on_gpu,
    placed,
    tensors_in,
)
from repository import REPO
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

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


class Calls(TorchFunctionMode):
    """What has to be caught before C++ code has it, which would ask a driver or take the "meta" device at its word."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to:
            args = [full(part) if isinstance(part, str | torch.device) else part for part in args]
            kwargs = {name: full(part) if name == "device" and part else part for name, part in kwargs.items()}
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
    `forget`."""

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
            (OnGPU, "on_read", staticmethod(self._read)),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.cuda, "current_stream", self._stream),
            (torch.cuda, "Stream", self._stream),
            (torch.cuda, "stream", nullcontext),
            (grad_mode, "__enter__", enter_no_grad),
            (grad_mode, "__exit__", exit_no_grad),
        ):
            self._undo.enter_context(mock.patch.object(holder, name, instead))
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        self._undo.callback(torch._C._set_only_lift_cpu_tensors, False)  # type: ignore[attr-defined]
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

    def _stream(self, device: Any = None) -> SimpleNamespace:
        event = SimpleNamespace(synchronize=self._wait)
        return SimpleNamespace(synchronize=self._wait, wait_stream=lambda other: None, record_event=lambda: event)

    def _wait(self) -> None:
        self.waits["stream: " + asker()] += 1

    def _read(self) -> None:
        self.waits["number: " + asker()] += 1

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
    own = GENERATORS.get(generator._cdata, HOST)  # type: ignore[attr-defined]
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


def enter_no_grad(self: Any) -> None:
    self.no_grad = torch.no_grad()
    self.no_grad.__enter__()


def exit_no_grad(self: Any, *error: Any) -> None:
    self.no_grad.__exit__(*error)

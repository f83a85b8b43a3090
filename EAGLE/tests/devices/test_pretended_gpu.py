"""The pretended GPU itself: what CUDA refuses is refused, what it takes is taken, what waits is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretended_gpu import PretendedGPU
from pretended_tensor import DeviceMix, OnGPU
from torch import Tensor

GPU = "cuda:0"


def here() -> Tensor:
    return torch.arange(6.0).view(2, 3)


def there(device: str = GPU) -> Tensor:
    return here().to(device)


REFUSED: dict[str, Callable[[], Any]] = {
    "add": lambda: there() + here(),
    "product": lambda: here() @ there().T,
    "two GPUs": lambda: there() + there("cuda:1"),
    "cat": lambda: torch.cat([there(), here()]),
    "stack of numbers": lambda: torch.stack([there()[0, 0], here()[0, 0]]),
    "embedding": lambda: torch.nn.functional.embedding(torch.tensor([1]), there()),
    "index from the GPU": lambda: here()[torch.tensor([1], device=GPU)],
    "written rows from the host": lambda: there().__setitem__(torch.tensor([1], device=GPU), here()[:1]),
    "a GPU's number in a host tensor": lambda: here().add_(torch.ones((), device=GPU)),
    "gather": lambda: there().gather(1, torch.zeros(2, 1, dtype=torch.long)),
    "host generator": lambda: torch.empty(3, device=GPU).exponential_(generator=torch.Generator()),
    "generator of a GPU": lambda: torch.rand(3, generator=torch.Generator(device="cuda")),
    "generator of another GPU": lambda: torch.rand(3, device="cuda:1", generator=torch.Generator("cuda:0")),
    "multinomial": lambda: torch.multinomial(there() + 1, 1, generator=torch.Generator()),
    "randn": lambda: torch.randn(3, device=GPU, generator=torch.Generator()),
    "randperm": lambda: torch.randperm(3, device=GPU, generator=torch.Generator()),
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(there()[None], there()[None], here()[None]),
}  # fmt: skip
TAKEN: dict[str, Callable[[], Tensor]] = {
    "number of the host": lambda: there() * torch.tensor(2.0),
    "where": lambda: torch.where(there() > 2, there(), torch.tensor(0.0)),
    "masked fill": lambda: there().masked_fill(there() > 2, torch.tensor(0.0)),
    "index from the host": lambda: there()[torch.tensor([1, 0])],
    "view": lambda: there().view(3, 2).T.contiguous().flatten(),
    "new": lambda: there().new_ones(2),
    "like": lambda: torch.zeros_like(there()),
    "pad": lambda: torch.nn.utils.rnn.pad_sequence([there()[0], there()[1, :2]]),
    "generator": lambda: torch.rand(3, device=GPU, generator=torch.Generator("cuda").manual_seed(1)),
    "linear": lambda: torch.nn.Linear(3, 2).to(GPU)(there()),
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(there()[None], there()[None], there()[None]),
    "inference": lambda: torch.inference_mode()(lambda: there().roll(1, 0))(),
}  # fmt: skip
WAITS: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "cpu": (lambda: there().cpu(), {"to GPU": 1, "to host": 1}),
    "tolist": (lambda: there().tolist(), {"to GPU": 1, "to host": 1}),
    "made from a list": (lambda: torch.tensor([1, 2], device=GPU), {"to GPU": 1}),
    "made on the GPU": (lambda: torch.arange(3, device=GPU) + torch.zeros(3, device="cuda"), {}),
    "item": (lambda: torch.ones((), device=GPU).item(), {"number": 1}),
    "bool": (lambda: bool(torch.ones(2, device=GPU).all()), {"number": 1}),
    "int": (lambda: range(torch.ones((), device=GPU, dtype=torch.long)), {"number": 1}),
    "if": (lambda: 1 if torch.ones((), device=GPU) > 0 else 2, {"number": 1}),
    "nonzero": (lambda: torch.ones(2, device=GPU).nonzero(), {"size": 1}),
    "boolean index": (lambda: (ones := torch.ones(2, device=GPU))[ones > 0], {"size": 1}),
    "index of the host": (lambda: torch.ones(2, device=GPU)[[0, 1]], {"to GPU": 1}),
    "slice": (lambda: torch.ones(2, device=GPU)[1:], {}),
    "copied in": (lambda: torch.ones(2, device=GPU).copy_(torch.zeros(2)), {"to GPU": 1}),
    "copied out": (lambda: torch.ones(2).copy_(torch.zeros(2, device=GPU)), {"to host": 1}),
    "same device": (lambda: torch.ones(2, device=GPU).to("cuda"), {}),
    "another dtype": (lambda: torch.ones(2, device=GPU).long(), {}),
    "another GPU": (lambda: torch.ones(2, device=GPU).to("cuda:1"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses(gpu: PretendedGPU, name: str) -> None:
    with pytest.raises(DeviceMix):
        REFUSED[name]()


@pytest.mark.parametrize("name", TAKEN)
def test_what_cuda_takes(gpu: PretendedGPU, name: str) -> None:
    made = TAKEN[name]()
    assert isinstance(made, OnGPU) and made.device == torch.device(GPU)


@pytest.mark.parametrize("name", WAITS)
def test_what_waits(gpu: PretendedGPU, name: str) -> None:
    call, expected = WAITS[name]
    call()
    assert len(gpu.transfers) == (name == "another GPU")
    assert {key.split(":")[0]: count for key, count in gpu.waits.items()} == expected


def test_writes_and_views_share_memory(gpu: PretendedGPU) -> None:
    whole = torch.zeros(2, 3, device=GPU)
    part = whole[:, 1:]
    assert part.fill_(7) is part
    whole[0, torch.tensor([0], device=GPU)] = 5.0
    assert whole.tolist() == [[5, 7, 7], [0, 7, 7]]


def test_a_parameter_gets_other_data(gpu: PretendedGPU) -> None:
    layer, rows = torch.nn.Linear(3, 2, bias=False).to(GPU), torch.ones(4, 3, device="cuda:1")
    layer.weight.data = rows[1:3]
    assert layer.weight.device == torch.device("cuda:1") and layer(rows).tolist() == [[3.0, 3.0]] * 4
    rows.fill_(2.0)
    assert layer.weight.tolist() == [[2.0] * 3] * 2
    layer.to(GPU)
    assert layer.weight.device == torch.device(GPU) and isinstance(layer.weight, torch.nn.Parameter)


def test_gradients(gpu: PretendedGPU) -> None:
    layer = torch.nn.Linear(3, 2)
    layer(here()).square().sum().backward()
    expected = layer.weight.grad
    moved = torch.nn.Linear(3, 2).to(GPU)
    moved.load_state_dict(layer.state_dict())
    moved(there()).square().sum().backward()
    assert isinstance(moved.weight, torch.nn.Parameter) and moved.weight.grad.device == torch.device(GPU)
    assert torch.equal(moved.weight.grad.cpu(), expected)


def test_nothing_stays_behind() -> None:
    made, generator, lazy = torch.inference_mode.__enter__, torch.Generator, torch.cuda._lazy_init
    with PretendedGPU():
        assert torch.Generator(device="cuda").device == torch.device(GPU)
    assert (torch.inference_mode.__enter__, torch.Generator, torch.cuda._lazy_init) == (made, generator, lazy)
    with torch.inference_mode():
        assert torch.ones(1).is_inference()

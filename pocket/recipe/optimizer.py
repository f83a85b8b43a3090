"""Muon for the matrices of the layers, AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): the momentum of a matrix is made orthogonal
before it is applied. `torch.optim.Muon` does that in bfloat16, in which many CPUs are slow; this one keeps the weights'
dtype and takes matrices of one shape together.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

MATRIX_RATE, OTHER_RATE = 2e-3, 1.5e-3
MOMENTUM, DECAY = 0.95, 0.05
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(number, rows, columns): about the nearest matrices whose singular values are 1, by Newton-Schulz."""
    wide = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if wide else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if wide else x


class Muon(torch.optim.Optimizer):
    """Steps as large as AdamW's at the same rate (0.2 times the root of the larger side)."""

    def __init__(self, weights: list[torch.Tensor], rate: float) -> None:
        """`weights` are matrices."""
        super().__init__(weights, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step over all matrices that have a gradient."""
        shapes: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes[weight.shape].append(weight)
        rate = self.param_groups[0]["lr"]
        for shape, weights in shapes.items():
            momenta = []
            for weight in weights:
                state = self.state[weight]
                momentum = state.setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                momenta.append(weight.grad.lerp(momentum, MOMENTUM))
            steps = orthogonal(torch.stack(momenta)) * (0.2 * max(shape) ** 0.5 * rate)
            for weight, step in zip(weights, steps, strict=True):
                weight.mul_(1 - rate * DECAY).sub_(step)


class Optimizers:
    """Both optimizers as one object to step, save and load."""

    def __init__(self, model: Any) -> None:
        """For all that is to be learnt."""
        matrices = [w for w in model.model.language_model.layers.parameters() if w.ndim == 2]
        taken = {id(w) for w in matrices}
        others = [w for w in model.parameters() if w.requires_grad and id(w) not in taken]
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, MATRIX_RATE),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, share: float) -> None:
        """One step at a share of the full rates; clears the gradients."""
        for part, rate in zip(self.parts, (MATRIX_RATE, OTHER_RATE), strict=True):
            for group in part.param_groups:
                group["lr"] = rate * share
            part.step()
            part.zero_grad(set_to_none=True)

    def has_trained(self, weight: torch.Tensor) -> bool:
        """Whether a matrix has been part of a step."""
        return bool(self.parts[0].state.get(weight))

    def state_dict(self) -> list[dict[str, Any]]:
        """The states of both."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take over what `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)

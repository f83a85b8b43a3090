"""What an engine trains: a draft and its loss, as one module.

`Objective` walks over the rollout steps. Its classes, one for each kind of draft (`eagle.train.kinds`), say what the
loss of their rows is and how a token is drafted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle.drafts.head import TrainedHead
from eagle.families.base_weights import BaseTensors
from eagle.train.collate import Batch
from eagle.train.rollout import predict_steps
from eagle.train.settings import TrainConfig

TOP = 3  # accuracies reported: top-1 .. top-3
Head = TypeVar("Head", bound=TrainedHead, covariant=True)


class Losses(NamedTuple):
    """``total`` the weighted loss with gradient; the others are detached. ``hits`` [3]: rows whose target arg-max is
    among the draft's first 1, 2, 3 tokens; ``rows``: those that count. The other scalars are masked means; ``hidden``
    is 0 without a ``hidden_weight``."""

    total: Tensor
    hidden: Tensor
    token: Tensor
    hits: Tensor
    rows: Tensor


class Objective(nn.Module, ABC, Generic[Head]):
    """``forward(batch)`` gives the loss. ``head`` [V, H] is the base's ``lm_head``, a buffer that no checkpoint
    holds; ``cap`` is of its logits."""

    draft: Head
    head: Tensor

    def __init__(self, draft: Head, base: BaseTensors, config: TrainConfig) -> None:
        self.check(draft.config, base, config)
        super().__init__()
        self.draft, self.config, self.cap = draft, config, base.cap
        draft.requires_grad_(True)
        self.register_buffer("head", base.head.to(draft.dtype, copy=True), persistent=False)

    @staticmethod
    @abstractmethod
    def check(draft: Any, base: BaseTensors, config: TrainConfig) -> None:
        """Raises `UserError` if a draft with the config ``draft`` does not fit the base, or cannot be trained so."""

    def begin(self, conversations: Iterable[Any]) -> None:
        """What a new draft takes from the base and from the training data, prepared conversations or samples."""

    @property
    def dtype(self) -> torch.dtype:
        return self.draft.dtype

    @abstractmethod
    def embeds(self, batch: Batch) -> Tensor:
        """[B, S, H] what stands for each token in the draft's input rows."""

    @abstractmethod
    def loss(self, predicted: Sequence[Tensor], target: Sequence[Tensor]) -> Losses:
        """The mean of the rollout steps' losses, weighted by ``rollout_decay^(k-1)``. The loss of a step is the mean of
        its rows, 0 if there are none; the values reported beside the total are those of step 1.

        Args:
            predicted: [N_k, H] of each step, the draft's hidden states of the rows that count; ``target`` [N_k, H] the
                base's of the same tokens, after its final norm.
        """

    @abstractmethod
    def drafted(self, predicted: Tensor) -> Tensor:
        """The tokens that a chain drafts from predicted hidden states [N, H], [N]."""

    def predict(self, batch: Batch, inputs: Tensor, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """`predict_steps` for a batch. ``inputs`` [B, S, F]: its features, with noise or without."""
        positions = batch.positions
        if positions is not None and self.draft.positions == "temporal":
            positions = positions[:1].expand(3, -1, -1)
        embeds = self.embeds(batch)
        yield from predict_steps(
            self.draft, inputs.to(self.dtype), embeds, batch.image_mask, batch.loss_mask, steps, positions
        )

    def trained_steps(self, batch: Batch) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What a training step predicts, as `predict` gives it."""
        yield from self.predict(batch, batch.inputs, self.config.rollout_steps)

    def forward(self, batch: Batch) -> Losses:
        """The loss of a training step."""
        predicted, target = [], []
        for step, rows, hidden in self.trained_steps(batch):
            predicted.append(hidden)
            target.append(targets_of(batch, step, rows))
        return self.loss(predicted, target)


def targets_of(batch: Batch, step: int, rows: Tensor) -> Tensor:
    """``h_{t+step}`` of the rows [B, S-1] that count at ``step``, [N, H]."""
    following = batch.hidden[:, step:]
    return following[rows[:, : following.shape[1]]]


def cast_once(weight: Tensor) -> Tensor:
    """A frozen weight as autocast uses it, which would cast it again in each product."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


@torch.no_grad()
def best_tokens(hidden: Tensor, head: Tensor, chunk: int = 512) -> Tensor:
    """Arg-max of ``lm_head``. ``hidden`` [N, H] → [N] ids."""
    parts = [F.linear(part.to(head.dtype), head).argmax(dim=-1) for part in hidden.split(chunk)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=hidden.device)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without its frozen parameters."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def load_trained(state: Mapping[str, Tensor], module: nn.Module) -> None:
    """Loads what `trained_state` gave. Frozen parameters may be there too, as in older checkpoints.

    Raises:
        RuntimeError: a tensor is missing, unexpected or of another shape.
    """
    if missing := trained_state(module).keys() - state.keys():
        raise RuntimeError(f"missing {', '.join(sorted(missing))}")
    module.load_state_dict({**module.state_dict(), **state})


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]

"""What an engine trains: a draft and its loss, as one module.

`Objective` walks over the rollout steps. Its classes, one for each kind of draft (`eagle.train.kinds`), say what the
loss of a step is and how a token is drafted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle.drafts.head import TrainedHead
from eagle.families.base_weights import BaseTensors
from eagle.train.collate import Batch
from eagle.train.rollout import predict_steps, rollout_loss_mask, shift_left
from eagle.train.settings import TrainConfig

TOP = 3  # accuracies reported: top-1 .. top-3
Head = TypeVar("Head", bound=TrainedHead, covariant=True)


class Losses(NamedTuple):
    """``total`` the weighted loss with gradient; the others are detached. ``hits`` [3]: rows whose target arg-max is
    among the draft's first 1, 2, 3 tokens; ``rows``: those of the loss mask. The other scalars are masked means."""

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
    def loss(self, predicted: Tensor, target: Tensor, loss_mask: Tensor) -> Losses:
        """The loss of one step, means over the rows of the loss mask; 0 if there are none.

        Args:
            predicted: [B, R, H] the draft's hidden states; ``target`` [B, R, H] the base's of the same tokens, after
                its final norm; ``loss_mask`` [B, R] bool.
        """

    @abstractmethod
    def drafted(self, predicted: Tensor) -> Tensor:
        """The tokens that a chain drafts from predicted hidden states [N, H], [N]."""

    def predict(self, batch: Batch, inputs: Tensor, steps: int) -> Iterator[tuple[int, Tensor]]:
        """`predict_steps` for a batch. ``inputs`` [B, S, F]: its features, with noise or without."""
        positions = batch.positions
        if positions is not None and self.draft.positions == "temporal":
            positions = positions[:1].expand(3, -1, -1)
        yield from predict_steps(
            self.draft, inputs.to(self.dtype), self.embeds(batch), batch.image_mask, steps, positions
        )

    def trained_steps(self, batch: Batch) -> Iterator[tuple[int, Tensor, slice]]:
        """What a training step predicts: (k, predicted [B, r, H], which of the rows 0..S-2 these are)."""
        for step, predicted in self.predict(batch, batch.inputs, self.config.rollout_steps):
            yield step, predicted, slice(None)

    def forward(self, batch: Batch) -> Losses:
        """Loss of the batch: the mean of the rollout steps' losses, weighted by ``rollout_decay^(k-1)``; the values
        reported beside it are those of step 1."""
        config = self.config
        parts: list[tuple[float, Losses]] = []
        count = batch.hidden.shape[1] - 1
        for step, predicted, rows in self.trained_steps(batch):
            target = shift_left(batch.hidden, step, count)[:, rows]
            losses = self.loss(predicted, target, rollout_loss_mask(batch.loss_mask, step)[:, rows])
            parts.append((config.rollout_decay ** (step - 1), losses))
        total = torch.stack([weight * losses.total for weight, losses in parts]).sum()
        return parts[0][1]._replace(total=total / sum(weight for weight, _ in parts))


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

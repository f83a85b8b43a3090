"""Training of block heads: cross-entropy of each depth.

One forward reads all rows of a sample, and the mask rows behind some that count, the anchors. Three rows, anchors
0 and 2, and two mask rows of each (columns: sample rows | mask rows 1 | mask rows 2)::

    1 . . | . . | . .        sample rows
    1 1 . | . . | . .
    1 1 1 | . . | . .
    1 . . | 1 . | . .        mask rows 1
    1 1 1 | . 1 | . .
    1 . . | 1 . | 1 .        mask rows 2
    1 1 1 | . 1 | . 1

In a training step one of `STRIDE` rows is an anchor, others in each epoch (a batch without seeds has all rows), so that
a block of eight costs less than three steps of a rollout. P-EAGLE samples chains for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eagle.drafts.block import BlockDraft
from eagle.drafts.config import BlockConfig, DraftConfig
from eagle.drafts.modules import take
from eagle.families.base_weights import BaseTensors
from eagle.train.collate import Batch
from eagle.train.loss import DraftObjective, check_base
from eagle.train.rollout import pack, places_of, rollout_loss_mask
from eagle.train.settings import TrainConfig
from llava.errors import UserError

STRIDE = 4


class BlockObjective(DraftObjective):
    """Trains a block head as an MSD draft, of which each rollout step is a depth of the block."""

    draft: BlockDraft

    @staticmethod
    def check(draft: DraftConfig, base: BaseTensors, config: TrainConfig) -> None:
        assert isinstance(draft, BlockConfig)
        check_base(draft, base)
        size = draft.block.size
        if config.rollout_steps != size:
            raise UserError(
                f"rollout_steps={config.rollout_steps} for a block of {size} tokens",
                fix=f"leave it out: each of the {size} is trained",
            )
        if config.simulated_depth > size:
            raise UserError(
                f"simulated_depth={config.simulated_depth} for a block of {size} tokens", fix=f"give at most {size}"
            )

    def predict(self, batch: Batch, inputs: Tensor, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        parts = [self._depths(batch, inputs, steps, slice(first, None, STRIDE)) for first in range(STRIDE)]
        for depth in range(steps):
            counted = rollout_loss_mask(batch.loss_mask, depth + 1)
            predicted = parts[0][0][1].new_zeros(*counted.shape, batch.hidden.shape[-1])  # [B, R, H]
            for part in parts:
                rows, hidden = part[depth]
                predicted[rows] = hidden
            yield depth + 1, counted, predicted[counted]

    def trained_steps(self, batch: Batch) -> Iterator[tuple[int, Tensor, Tensor]]:
        anchors = slice(batch.seeds[0] % STRIDE, None, STRIDE) if batch.seeds else slice(None)
        for depth, part in enumerate(self._depths(batch, batch.inputs, self.config.rollout_steps, anchors)):
            yield depth + 1, *part

    def _depths(self, batch: Batch, inputs: Tensor, steps: int, chosen: slice) -> list[tuple[Tensor, Tensor]]:
        """Of ``steps`` depths, rows [B, R] and their predictions [N, H]: of the first the rows that count, of others
        the anchors among them, which are ``chosen``."""
        draft, rows = self.draft, inputs.shape[1] - 1
        x = draft.fuse(inputs[:, :rows].to(self.dtype), self.embeds(batch)[:, 1:], batch.image_mask[:, 1:])  # [B, R, X]
        counted = [batch.loss_mask]
        for depth in range(1, steps):
            counted.append(torch.zeros_like(batch.loss_mask))
            counted[depth][:, chosen] = rollout_loss_mask(batch.loss_mask, depth + 1)[:, chosen]
        first, anchors = pack(counted[0]), pack(counted[min(1, steps - 1)])  # [B, C], [B, A]
        block = draft.block_rows(take(x, anchors))[:, :, : steps - 1]  # [B, A, m, X]
        behind = block.transpose(1, 2).flatten(1, 2)  # [B, m * A, X]
        every = torch.arange(rows + behind.shape[1], device=x.device).expand(len(x), -1)
        numbers = torch.cat([every[:, :rows], *(anchors + depth for depth in range(1, steps))], dim=1)
        output = draft.forward_rows(
            torch.cat([x, behind], dim=1),
            places_of(batch.positions, numbers),
            block_mask(anchors, rows, steps - 1),
            cache=None,
            kept=torch.cat([first, every[:, rows:]], dim=1),
        )  # [B, C + m * A, H]
        parts = output.split([first.shape[1], *[anchors.shape[1]] * (steps - 1)], dim=1)
        owners = [first, *[anchors] * (steps - 1)]
        return [(mask, part[take(mask, own)]) for mask, part, own in zip(counted, parts, owners, strict=True)]


def block_mask(anchors: Tensor, rows: int, masks: int) -> Tensor:
    """[B, 1, R + masks * A, R + masks * A] bool, true where a row may look; see the picture above.

    Args:
        anchors: [B, A] their numbers.
        rows: number of sample rows R.
    """
    batch, count = anchors.shape
    columns = torch.arange(rows, device=anchors.device)
    causal = columns <= columns.unsqueeze(-1)  # [R, R]
    before = (columns <= anchors.unsqueeze(-1)).repeat(1, masks, 1)  # [B, masks * A, R]
    depths = torch.ones(masks, masks, device=anchors.device).tril()
    own = torch.kron(depths, torch.eye(count, device=anchors.device)).bool()  # [masks * A, masks * A]
    upper = torch.cat([causal, causal.new_zeros(rows, masks * count)], dim=1)
    lower = torch.cat([before, own.expand(batch, -1, -1)], dim=2)
    return torch.cat([upper.expand(batch, -1, -1), lower], dim=1).unsqueeze(1)

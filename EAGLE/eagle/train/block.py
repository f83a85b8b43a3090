"""Training of block heads: cross-entropy of each depth.

One forward reads all rows of a sample, and the mask rows behind some of them, the anchors. Three rows, anchors
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
from eagle.families.base_weights import BaseTensors
from eagle.train.collate import Batch
from eagle.train.loss import DraftObjective, check_base
from eagle.train.rollout import shift_left, shift_positions_left
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

    def predict(self, batch: Batch, inputs: Tensor, steps: int) -> Iterator[tuple[int, Tensor]]:
        parts = [self._depths(batch, inputs, steps, slice(first, None, STRIDE)) for first in range(STRIDE)]
        for depth in range(steps):
            predicted = parts[0][0].clone()  # [B, R, H]
            for first, part in enumerate(parts if depth else []):
                predicted[:, first::STRIDE] = part[depth]
            yield depth + 1, predicted

    def trained_steps(self, batch: Batch) -> Iterator[tuple[int, Tensor, slice]]:
        anchors = slice(batch.seeds[0] % STRIDE, None, STRIDE) if batch.seeds else slice(None)
        depths = self._depths(batch, batch.inputs, self.config.rollout_steps, anchors)
        for depth, predicted in enumerate(depths):
            yield depth + 1, predicted, anchors if depth else slice(None)

    def _depths(self, batch: Batch, inputs: Tensor, steps: int, anchors: slice) -> list[Tensor]:
        """Predictions of ``steps`` depths: of the first for all R rows [B, R, H], of others for anchors [B, A, H]."""
        draft, rows = self.draft, inputs.shape[1] - 1
        embeds, is_image = shift_left(self.embeds(batch), 1, rows), shift_left(batch.image_mask, 1, rows)
        x = draft.fuse(inputs[:, :rows].to(self.dtype), embeds, is_image)  # [B, R, X]
        block = draft.block_rows(x[:, anchors])[:, :, : steps - 1]  # [B, A, m, X]
        behind = block.transpose(1, 2).flatten(1, 2)  # [B, m * A, X]
        plain = torch.arange(rows, device=x.device).unsqueeze(0)  # [1, R]
        positions = [
            plain + depth if batch.positions is None else shift_positions_left(batch.positions, depth, rows)
            for depth in range(steps)
        ]  # [1, R], or [3, B, R] each
        numbers = torch.cat([positions[0], *(part[..., anchors] for part in positions[1:])], dim=-1)
        output = draft(torch.cat([x, behind], dim=1), numbers, block_mask(rows, steps - 1, anchors, x.device))
        return list(output.split([rows, *[block.shape[1]] * (steps - 1)], dim=1))


def block_mask(rows: int, masks: int, anchors: slice, device: torch.device | str = "cpu") -> Tensor:
    """[1, 1, R + masks * A, R + masks * A] bool, true where a row may look; see the picture above."""
    causal = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    before = causal[anchors]  # [A, R]
    depths = torch.ones(masks, masks, device=device).tril()
    own = torch.kron(depths, torch.eye(len(before), device=device)).bool()  # [masks * A, masks * A]
    nothing = causal.new_zeros(rows, len(own))
    return torch.cat([torch.cat([causal, nothing], 1), torch.cat([before.repeat(masks, 1), own], 1)])[None, None]

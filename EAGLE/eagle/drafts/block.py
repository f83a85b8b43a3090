"""A block head: an MSD draft that drafts several tokens in one forward.

Row ``t`` of an MSD draft drafts the token after ``x_{t+1}``. Behind the newest row stand ``size - 1`` mask rows, for
tokens that nobody knows yet, at the positions that follow. Each drafts the token after its own place, and none depends
on what the others drafted:

==============  =======================================  =====================
row             input                                    drafts
==============  =======================================  =====================
``t``           as of an MSD draft                       token ``t + 2``
mask row ``d``  input of row ``t`` plus learnt ``m_d``   token ``t + 2 + d``
==============  =======================================  =====================

Attention is causal: a mask row sees the rows up to ``t`` and the mask rows before it. P-EAGLE has such mask
rows too; there the input of all is one learnt vector.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor, nn
from typing_extensions import Self

from eagle.drafts.config import BlockConfig, BlockOptions
from eagle.drafts.modules import DraftLayer
from eagle.drafts.msd import DraftModel


class BlockDraft(DraftModel):
    """A block head. Layers behind the first are ordinary ones, with an input norm."""

    kind = "block"
    config: BlockConfig

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        self.block_size = config.block.size
        self.mask_rows = nn.Parameter(torch.zeros(config.block.size - 1, config.layer_size))
        sizes = replace(config, hidden_size=config.layer_size)
        self.layers.extend(DraftLayer(sizes, index) for index in range(1, config.block.layers))

    @classmethod
    def begun_from(cls, draft: DraftModel, block: BlockOptions) -> Self:
        """A head with the weights of an MSD draft, to be trained; its mask rows are zeros, further layers random."""
        shape = {each.name: getattr(draft.config, each.name) for each in fields(draft.config)}
        own = cls(BlockConfig(**{**shape, "block": block}))
        own.load_state_dict({**own.state_dict(), **draft.state_dict()})
        own.draft_vocab = draft.draft_vocab
        return own

    def conventions(self) -> str:
        block = self.config.block
        rows = f"{block.size} tokens in one forward, by {block.size - 1} mask rows"
        return f"{super().conventions()}; {rows}; layers: {block.layers}"

    def block_rows(self, newest: Tensor) -> Tensor:
        """Inputs of the mask rows behind rows with the inputs ``newest`` [..., X], [..., size - 1, X]."""
        return newest.unsqueeze(-2) + self.mask_rows

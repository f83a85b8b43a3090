"""Training of ViSpec heads: their input rows. The loss is that of MSD drafts.

The compressor is trained through the rows of pictures and through the global vectors. In a batch without pictures it
reads a picture of zeros that no row uses, so that its weights have a gradient in every process.
"""

from __future__ import annotations

from torch import Tensor

from eagle.drafts.config import DraftConfig, ViSpecConfig
from eagle.drafts.vispec import ViSpecDraft
from eagle.families.base_weights import BaseTensors
from eagle.train.collate import Batch
from eagle.train.loss import StateObjective, check_base
from eagle.train.settings import TrainConfig
from llava.errors import UserError


class ViSpecObjective(StateObjective[ViSpecDraft]):
    """Trains a ViSpec head."""

    @staticmethod
    def check(draft: DraftConfig, base: BaseTensors, config: TrainConfig) -> None:
        assert isinstance(draft, ViSpecConfig)
        check_base(draft, base)
        if draft.image_rows == "token":
            fix = "leave \"image_rows\" out of section 'msd'"
            raise UserError("ViSpec heads are trained with compressed image rows alone", fix=fix)
        if config.draft_image_tokens >= 0:
            raise UserError(
                f"draft_image_tokens={config.draft_image_tokens} for a ViSpec head",
                fix=f"leave it out: \"queries\" {draft.queries} of section 'vispec' says how many rows a picture has",
            )

    def embeds(self, batch: Batch) -> Tensor:
        """[B, S, 2 H] with the global vectors (`ViSpecDraft.next_embeds`)."""
        assert batch.pictures is not None
        embeds, features = self.draft.embed_tokens(batch.input_ids), batch.image_features.to(self.dtype)
        parts = features.split(list(batch.runs)) if batch.runs else [features.new_zeros(1, features.shape[1])]
        is_image = batch.image_mask.clone()
        is_image[:, 0] = False  # the first token is in no row
        return self.draft.next_embeds(embeds, is_image, batch.pictures, parts)

"""The kinds of drafts that can be trained, by the class of their config."""

from __future__ import annotations

from typing import Any, NamedTuple

from eagle.drafts.block import BlockDraft
from eagle.drafts.config import BlockConfig, DraftConfig, ViSpecConfig
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.eagle3_config import Eagle3Config
from eagle.drafts.msd import DraftModel
from eagle.drafts.vispec import ViSpecDraft
from eagle.train.block import BlockObjective
from eagle.train.eagle3 import Eagle3Objective
from eagle.train.loss import DraftObjective
from eagle.train.objective import Objective
from eagle.train.vispec import ViSpecObjective


class Kind(NamedTuple):
    """The class of a head, which is made from its config, and of the objective that trains it."""

    head: type[Any]
    objective: type[Objective[Any]]


KINDS: dict[type, Kind] = {
    DraftConfig: Kind(DraftModel, DraftObjective),
    BlockConfig: Kind(BlockDraft, BlockObjective),
    Eagle3Config: Kind(Eagle3Draft, Eagle3Objective),
    ViSpecConfig: Kind(ViSpecDraft, ViSpecObjective),
}

"""Stored hidden states as training data: they must come from the base that the draft is for, and stay the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from eagle.families.base_weights import BaseTensors
from eagle.ge_data.extract import fingerprint
from eagle.hidden_states.shards import DTYPES, Index, ShardDataset
from eagle.train.checkpoint import STATES
from eagle.train.settings import TrainConfig
from eagle.train.trainer import TrainingData
from llava.errors import UserError

FINGERPRINTED = 67  # rows of the embedding, at least, that `fingerprint` reads


def load_stored(
    folders: Mapping[str, str | None], hidden_size: int, base: BaseTensors, config: TrainConfig
) -> TrainingData:
    """The corpora that were given, split into training and validation.

    Args:
        folders: of each set, "text" or "image"; None where it is not given.
        hidden_size: of the draft.

    Raises:
        UserError: a corpus is broken, of another base or size, or both are not of one family.
    """
    sets = {name: ShardDataset(folder) for name, folder in folders.items() if folder is not None}
    for data in sets.values():
        if data.meta.hidden_size != hidden_size:
            raise UserError(
                f"hidden states of size {data.meta.hidden_size}, the draft config has {hidden_size}",
                where=data.folder,
                fix="choose the config made for this base model",
            )
        check_model(data, base)
    check_families(list(sets.values()))
    run: dict[str, Any] = {}
    for name, data in sets.items():
        run.update({f"{STATES}{name}_{key}": value for key, value in identity(data.meta).items()})
    return TrainingData.split(sets, config, run=run)


def check_model(data: ShardDataset, base: BaseTensors) -> None:
    """Raises `UserError` where the states come from a model with another token embedding.

    The allocation may have run in another dtype than the base's. Corpora without a fingerprint are taken as they are.
    """
    meta = data.meta
    own = fingerprint(base.embed[:FINGERPRINTED].to(DTYPES[meta.dtype]))  # bfloat16 stands for 32 bit too
    if meta.fingerprint not in (None, own):
        raise UserError(
            f"hidden states of another model ({meta.model}): its embedding is {meta.fingerprint}, the base's is {own}",
            where=data.folder,
            fix="give the base that the states were made with, or make them again",
        )


def check_families(sets: list[ShardDataset]) -> None:
    """Raises `UserError` where two sets are of two families. That they are of one model follows from `check_model`."""
    first = sets[0]
    for data in sets[1:]:
        if data.meta.family != first.meta.family:
            raise UserError(
                f"hidden states of family {data.meta.family}, those in {first.folder} are of {first.meta.family}",
                where=data.folder,
                fix="make both sets with the same base model",
            )


def identity(meta: Index) -> dict[str, str]:
    """What a resumed run must find unchanged, as far as it is known.

    ``shards`` is made from ranges and sizes, ``sums`` from the checksums of all shards.
    """
    sums = [shard.sha256 for shard in meta.shards]
    known = {
        "fingerprint": meta.fingerprint,
        "hidden_dtype": meta.hidden_dtype or meta.dtype,
        "shards": _digest([[s.start, s.end, s.samples, s.tokens, s.image_tokens] for s in meta.shards]),
        "sums": None if None in sums else _digest(sums),
    }
    return {name: value for name, value in known.items() if value is not None}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

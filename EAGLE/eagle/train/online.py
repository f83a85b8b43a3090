"""Training without stored hidden states: the target reads each batch's conversations just before the draft does.

What a sample is comes from `eagle.ge_data`: rows, templates, pictures and batched forwards are those of the allocation,
and states are rounded as a shard stores them, so a run has the losses of one on stored states. What is decided here is
only which rows can be used. That has to be known before training starts, since order, split and schedule are made from
the number of samples: all rows are prepared once, and ``CKPT/rows-text.json`` and ``CKPT/rows-image.json`` keep the
result for a resumed run. A conversation whose states are not finite, which the allocation skips, has no part in the
loss.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eagle.families import TRAINING_NAMES, load_target, template_of
from eagle.families.template import Prepared, Template
from eagle.ge_data.extract import source_of
from eagle.ge_data.reader import Reader
from eagle.ge_data.selection import Selection, shortened
from eagle.hidden_states.index import Skipped, sha256
from eagle.hidden_states.shards import Sample
from eagle.hidden_states.source import Source
from eagle.train.checkpoint import CheckpointStore
from eagle.train.settings import TrainConfig
from llava.errors import UserError
from llava.files import read_json, write_json

THREADS = 4


@dataclass(frozen=True)
class OnlineSet:
    """The usable rows of an annotation file, prepared when asked for.

    ``usable``: their places in the shuffled selection; ``settings``: what decided them; ``source``: of the target.
    """

    selection: Selection
    template: Template
    usable: Sequence[int]
    settings: Mapping[str, Any]
    source: Source

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, index: int) -> Prepared:
        """Sample ``index`` as model inputs, in the order of the shuffled selection.

        Raises:
            UserError: the row could be used when the run began, and cannot any more.
        """
        ready = self.selection.prepare(self.template, self.usable[index])
        if isinstance(ready, Skipped):
            raise UserError(
                f"row {ready.row} cannot be used any more ({ready.reason})",
                where=self.selection.records.path,
                fix="put the file back as it was, or start in another --cpdir",
            )
        return ready

    def describe(self) -> dict[str, Any]:
        """What provenance says of the set."""
        return {"online": True, "samples": len(self), **self.settings, **asdict(self.source)}


class OnlineReader:
    """Makes samples of prepared conversations with the target; those without finite states have no part in the loss."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __call__(self, items: Sequence[Prepared]) -> list[Sample]:
        return [sample if sample.hidden.isfinite().all() else mask_out(sample) for sample in self.reader.read(items)]


def mask_out(sample: Sample) -> Sample:
    """The sample with zeros for its states and for its loss mask."""
    return replace(
        sample,
        loss_mask=torch.zeros_like(sample.loss_mask),
        hidden=torch.zeros_like(sample.hidden),
        image_features=torch.zeros_like(sample.image_features),
    )


@dataclass(frozen=True)
class Processes:
    """``rank`` of this process among ``world``; ``device``: where its target goes."""

    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"

    def gather(self, part: Any) -> list[Any]:
        """``part`` of every process, in the order of their ranks."""
        if self.world == 1:
            return [part]
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, part)
        return parts


@dataclass(frozen=True)
class Corpus:
    """Both sets, what reads them, and what a resumed run must share."""

    sets: dict[str, OnlineSet]
    read: OnlineReader
    run: dict[str, Any]


def load_corpus(
    args: argparse.Namespace, files: Mapping[str, Path], config: TrainConfig, processes: Processes
) -> Corpus:
    """Loads the target and finds the usable rows of each annotation file.

    Args:
        args: of main_deepspeed.
        files: annotation file of each set, "text" or "image".

    Raises:
        UserError: a file or the base model cannot be read, it is of another family than --model_type, or no row can be
        used.
    """
    selections = {
        kind: Selection.of(path, kind, args.image_folder, config.max_length, config.seed)
        for kind, path in files.items()
    }
    target = load_target(args.basepath, dtype=args.dtype, device_map={"": processes.device})
    wanted = None if args.model_type is None else TRAINING_NAMES[args.model_type]
    if wanted not in (None, target.family):
        raise UserError(f"--model_type means a model of family {wanted}, this is {target.family}", args.basepath)
    template, source = template_of(target), source_of(target, args.basepath)
    sets: dict[str, OnlineSet] = {}
    run: dict[str, Any] = {"online": f"{source.model} {source.fingerprint} in {target.dtype}"}
    for kind, whole in selections.items():
        selection = limited(whole, args.limit).within(target)
        if processes.rank == 0 and (line := shortened(config.max_length, selection)) is not None:
            print(line, flush=True)
        settings = settings_of(selection, source, config)
        record = RowRecord(Path(args.cpdir), kind, args.resume)
        usable = record.usable(selection, template, settings, processes)
        if not usable:
            raise UserError("every row was skipped", selection.records.path, f"{record.path} tells why")
        sets[kind] = OnlineSet(selection, template, usable, settings, source)
        run[f"annotations_{kind}"] = f"{settings['data']} {settings['data_sha256']}"
    return Corpus(sets, OnlineReader(Reader(target, template, source, args.batch_tokens)), run)


def limited(selection: Selection, limit: int | None) -> Selection:
    """The first ``limit`` rows of the shuffled order; all where that is None."""
    return selection if limit is None else replace(selection, order=selection.order[:limit])


def settings_of(selection: Selection, source: Source, config: TrainConfig) -> dict[str, Any]:
    """What decides which rows can be used."""
    return {
        "family": source.family,
        "model": source.model,
        "data": selection.records.path.name,
        "data_sha256": sha256(selection.records.path),
        "rows": len(selection.order),
        "max_length": selection.max_length,
        "seed": config.seed,
    }


class RowRecord:
    """``CKPT/rows-text.json``, ``CKPT/rows-image.json``: which rows of a set can be used, and why the others cannot.

    Args:
        folder: of the checkpoints; where it has one, the record of the run that made it stays as it is.
        kind: of the set.
        resume: whether a record that is there may be taken.
    """

    def __init__(self, folder: Path, kind: str, resume: bool) -> None:
        self.path, self.resume = folder / f"rows-{kind}.json", resume
        self.begun = CheckpointStore(folder, 1, {}).latest() is not None

    def usable(
        self, selection: Selection, template: Template, settings: Mapping[str, Any], processes: Processes
    ) -> list[int]:
        """Places in the shuffled selection that can be used: from the record, or found by all processes together."""
        known = processes.gather(self._read(settings))[0]  # the main process decides for all
        if known is not None:
            return known
        parts = processes.gather(find_usable(selection, template, processes))
        skipped = {place: row for part in parts for place, row in part.items()}
        usable = [place for place in range(len(selection.order)) if place not in skipped]
        if processes.rank == 0:
            rows = [asdict(skipped[place]) for place in sorted(skipped)]
            if not (self.begun and self.path.exists()):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, {"settings": dict(settings), "usable": usable, "skipped": rows})
            reasons = Counter(row.reason for row in skipped.values())
            told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            print(f"{selection.records.path}: {len(usable)} rows, skipped: {told or 'none'}", flush=True)
        return usable

    def _read(self, settings: Mapping[str, Any]) -> list[int] | None:
        if not (self.resume and self.path.exists()):
            return None
        known = read_json(self.path, "record of usable rows")
        matches = isinstance(known, dict) and known.get("settings") == dict(settings)
        return list(known["usable"]) if matches else None


def find_usable(selection: Selection, template: Template, processes: Processes) -> dict[int, Skipped]:
    """Prepares this process's share of the rows; returns those that cannot be used, by place."""
    own = range(processes.rank, len(selection.order), processes.world)

    def reason(place: int) -> Skipped | None:
        ready = selection.prepare(template, place)
        return ready if isinstance(ready, Skipped) else None

    with ThreadPoolExecutor(THREADS) as pool:
        checked = pool.map(reason, own)
        found = list(tqdm(checked, "checking rows", len(own), unit="row", disable=processes.rank > 0, mininterval=1))
    return {place: row for place, row in zip(own, found, strict=True) if row is not None}

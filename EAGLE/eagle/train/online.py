"""Training without stored hidden states: the target reads each batch's conversations just before the draft does.

Records, templates, pictures and batched forwards are those of the allocation (`eagle.ge_data`), and states are rounded
as a shard stores them, so a run has the losses of one on stored states. This module only decides which records can be
used. Order, split and schedule follow from the number of samples, so all records are prepared once before training
starts, and ``CKPT/rows-text.json`` and ``CKPT/rows-image.json`` keep the result for a resumed run. A conversation whose
states are not finite, which the allocation skips, has no part in the loss.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eagle.families import TRAINING_NAMES, template_of
from eagle.families.template import Prepared, Template
from eagle.ge_data.extract import check_embedding_scale, load_base, source_of
from eagle.ge_data.reader import Reader
from eagle.ge_data.selection import Selection, ignored_keys, shortened
from eagle.hidden_states.index import Skipped, sha256
from eagle.hidden_states.shards import Sample
from eagle.hidden_states.source import Source
from eagle.train.checkpoint import CheckpointStore
from eagle.train.dataset import TrainingData
from eagle.train.settings import TrainConfig
from llava.errors import UserError
from llava.files import read_json, write_json

THREADS = 4


@dataclass(frozen=True)
class OnlineSet:
    """The usable records of an annotation file, prepared on access.

    Attributes:
        usable: their indices in the shuffled selection.
        settings: everything that decides which records are usable.
        source: the target.
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
            UserError: the record was usable when the run began, and no longer is.
        """
        ready = self.selection.prepare(self.template, self.usable[index])
        if isinstance(ready, Skipped):
            raise UserError(
                f"record {ready.row} is no longer usable ({ready.reason})",
                where=self.selection.records.path,
                fix="restore the file, or start in another --cpdir",
            )
        return ready

    def describe(self) -> dict[str, Any]:
        """The set's record for provenance."""
        return {"online": True, "samples": len(self), **self.settings, **asdict(self.source)}


class OnlineReader:
    """Turns prepared conversations into samples; those without finite states have no part in the loss."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __call__(self, pieces: Iterable[Sequence[Prepared]]) -> Iterator[list[Sample]]:
        for samples in self.reader.read(pieces):
            yield [sample if sample.finite() else mask_out(sample) for sample in samples]


def mask_out(sample: Sample) -> Sample:
    """The sample with zeros for its states and for its loss mask."""
    return replace(
        sample,
        loss_mask=torch.zeros_like(sample.loss_mask),
        hidden=torch.zeros_like(sample.hidden),
        image_features=torch.zeros_like(sample.image_features),
        streams=None if sample.streams is None else torch.zeros_like(sample.streams),
    )


@dataclass(frozen=True)
class Processes:
    """``rank`` of this process among ``world``; ``device``: device of its target."""

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


def load_corpus(
    args: argparse.Namespace,
    files: Mapping[str, Path],
    config: TrainConfig,
    processes: Processes,
    layers_of: Callable[[int], Sequence[int]] = lambda count: (),
) -> TrainingData:
    """Loads the target, finds the usable records of each annotation file, and splits them.

    Args:
        args: flags of `eagle.train.main_deepspeed`.
        files: name of a set, "text" or "image" → annotation file.
        layers_of: the layers whose input streams the draft reads, of so many.

    Raises:
        UserError: a file or the base model cannot be read, it is of another family than --model_type or fails the
        self-check, or no record can be used.
    """
    selections = {
        kind: Selection.of(path, kind, args.image_folder, config.max_length, config.seed)
        for kind, path in files.items()
    }
    wanted = None if args.model_type is None else TRAINING_NAMES[args.model_type]
    target = load_base(args.basepath, wanted, args.dtype, processes.device, args.self_check)
    layers = layers_of(len(target.text_model.layers))
    check_embedding_scale(target, layers)
    template, source = template_of(target), source_of(target, args.basepath)
    sets: dict[str, OnlineSet] = {}
    run: dict[str, Any] = {"online": f"{source.model} {source.fingerprint} in {target.dtype}"}
    for kind, whole in selections.items():
        selection = limited(whole, args.limit).within(target)
        for line in (shortened(config.max_length, selection), ignored_keys(selection)):
            if processes.rank == 0 and line is not None:
                print(line, flush=True)
        settings = settings_of(selection, source, config)
        records = UsableRecords(Path(args.cpdir), kind, args.resume)
        usable = records.usable(selection, template, settings, processes)
        if not usable:
            raise UserError("every record was skipped", selection.records.path, f"{records.path} has the reasons")
        sets[kind] = OnlineSet(selection, template, usable, settings, source)
        run[f"annotations_{kind}"] = f"{settings['data']} {settings['data_sha256']}"
    reader = OnlineReader(Reader(target, template, source, args.batch_tokens, layers))
    return TrainingData.split(sets, config, read=reader, run=run)


def limited(selection: Selection, limit: int | None) -> Selection:
    """The first ``limit`` records of the shuffled order; all if it is None."""
    return selection if limit is None else replace(selection, order=selection.order[:limit])


def settings_of(selection: Selection, source: Source, config: TrainConfig) -> dict[str, Any]:
    """Everything that decides which records are usable."""
    return {
        "family": source.family,
        "model": source.model,
        "data": selection.records.path.name,
        "data_sha256": sha256(selection.records.path),
        "rows": len(selection.order),
        "max_length": selection.max_length,
        "seed": config.seed,
    }


class UsableRecords:
    """``CKPT/rows-text.json``, ``CKPT/rows-image.json``: which records of a set are usable, and why the others are not.

    Args:
        folder: of the checkpoints. If it has a checkpoint, the file of that run is not overwritten.
        kind: of the set.
        resume: whether to use a file that exists.
    """

    def __init__(self, folder: Path, kind: str, resume: bool) -> None:
        self.path, self.resume = folder / f"rows-{kind}.json", resume
        self.begun = CheckpointStore(folder, 1, {}).latest() is not None

    def usable(
        self, selection: Selection, template: Template, settings: Mapping[str, Any], processes: Processes
    ) -> list[int]:
        """Indices of usable records in the shuffled selection: from the file, or found by all processes together."""
        known = processes.gather(self._read(settings))[0]  # the main process decides for all
        if known is not None:
            return known
        parts = processes.gather(find_usable(selection, template, processes))
        skipped = {index: record for part in parts for index, record in part.items()}
        usable = [index for index in range(len(selection.order)) if index not in skipped]
        if processes.rank == 0:
            rows = [asdict(skipped[index]) for index in sorted(skipped)]
            if not (self.begun and self.path.exists()):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, {"settings": dict(settings), "usable": usable, "skipped": rows})
            reasons = Counter(record.reason for record in skipped.values())
            listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            print(f"{selection.records.path}: {len(usable)} records, skipped: {listed or 'none'}", flush=True)
        return usable

    def _read(self, settings: Mapping[str, Any]) -> list[int] | None:
        if not (self.resume and self.path.exists()):
            return None
        known = read_json(self.path, "list of usable records")
        matches = isinstance(known, dict) and known.get("settings") == dict(settings)
        return list(known["usable"]) if matches else None


def find_usable(selection: Selection, template: Template, processes: Processes) -> dict[int, Skipped]:
    """Prepares this process's share of the records; returns the unusable ones by index in the selection."""
    own = range(processes.rank, len(selection.order), processes.world)

    def reason(index: int) -> Skipped | None:
        ready = selection.prepare(template, index)
        return ready if isinstance(ready, Skipped) else None

    with ThreadPoolExecutor(THREADS) as pool:
        checked = pool.map(reason, own)
        found = list(
            tqdm(checked, "checking records", len(own), unit="record", disable=processes.rank > 0, mininterval=1)
        )
    return {index: record for index, record in zip(own, found, strict=True) if record is not None}

"""The training loop: for each epoch its samples, for each step its batches, then log, validate and save when due."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from eagle.train.checkpoint import CheckpointStore, Progress
from eagle.train.collate import NO_COMPRESSION, Batch
from eagle.train.dataset import Samples, TrainingData, batches
from eagle.train.engine import METRICS, Engine
from eagle.train.objective import trained_parameters
from eagle.train.schedule import Item, Schedule, epoch_items, image_probability, micro_batches
from eagle.train.served import ServedEvaluation
from eagle.train.settings import TrainConfig
from eagle.train.tracking import Tracker
from eagle.train.validation import validate
from llava.errors import UserError


class Trainer:
    """Trains from ``progress.step`` to the end of the schedule, or to ``max_steps``."""

    def __init__(
        self,
        engine: Engine,
        data: TrainingData,
        schedule: Schedule,
        config: TrainConfig,
        store: CheckpointStore,
        tracker: Tracker,
        progress: Progress,
        served: ServedEvaluation | None = None,
    ) -> None:
        self.engine, self.data, self.schedule, self.config = engine, data, schedule, config
        self.store, self.tracker, self.progress, self.served = store, tracker, progress, served
        self._saved_at = time.monotonic()

    def run(self) -> bool:
        """Returns whether training is complete."""
        progress, schedule = self.progress, self.schedule
        if progress.step:
            self._check_weights()  # a checkpoint that was written elsewhere
        limit = min(self.config.max_steps or schedule.total_steps, schedule.total_steps)
        progress.meter.start()
        while progress.step < limit:
            epoch = progress.step // schedule.steps_per_epoch
            for step_batches in islice(self._epoch(epoch), limit - progress.step):
                self._step(step_batches, epoch)
        if progress.step < schedule.total_steps:
            self._check_loss()
            self._check_weights()
            self._save_once()
        self.store.save_draft(self.engine, "final", progress.step)
        return progress.step == schedule.total_steps

    def _epoch(self, epoch: int) -> Iterator[list[Batch]]:
        """The micro-batches of each remaining step of ``epoch``."""
        config = self.config
        items = epoch_items(self.schedule, epoch, config.text_share, config.seed, config.image_start, config.image_end)
        first_step = max(0, self.progress.step - epoch * self.schedule.steps_per_epoch)
        pieces = micro_batches(items, self.schedule.sizes, self.engine.rank, first_step)
        stream = self._load(self.data.training, pieces, noise=self.config.noise)
        while step_batches := list(islice(stream, self.schedule.sizes.accumulation)):
            yield step_batches

    def _load(self, samples: Samples, pieces: Sequence[list[Item]], noise: float) -> Iterator[Batch]:
        draft = self.engine.objective.draft
        return batches(
            samples,
            pieces,
            vocab_size=draft.config.vocab_size,
            max_length=self.config.max_length,
            noise=noise,
            compression=draft.compression or NO_COMPRESSION,
            positions=draft.positions,
            image_ids=draft.embeds_image_ids,
            queries=draft.image_queries,
            workers=self.config.workers,
            pin_memory=self.engine.device.type == "cuda",
            read=self.data.read,
        )

    def _step(self, step_batches: list[Batch], epoch: int) -> None:
        """One optimizer step, then log, validate and save if due."""
        progress, schedule, config = self.progress, self.schedule, self.config
        progress.meter.add(self.engine.step(step_batches, schedule.learning_rate(progress.step)))
        progress.step += 1
        self.tracker.advance()
        last = progress.step == schedule.total_steps
        saves = last or self._save_is_due()
        if progress.step % config.log_every == 0 or saves:
            self._check_loss()
        if progress.step % config.log_every == 0 or last:
            self._log(epoch)
        validates = last or progress.step % (config.validate_every or schedule.steps_per_epoch) == 0
        evaluates = last or progress.step % (config.eval_every or schedule.steps_per_epoch) == 0
        evaluates = evaluates and self.served is not None
        if not (validates or saves or evaluates):
            return
        with progress.meter.paused():
            if validates:
                self._validate()
            if evaluates:
                self._evaluate()
            if saves:
                self._check_weights()
                self.store.save(self.engine, progress)
                self._saved_at = time.monotonic()

    def _save_is_due(self) -> bool:
        """Whether a checkpoint is due, the same in all processes: by time the main process decides, where it logs."""
        config, step = self.config, self.progress.step
        if not config.save_minutes:
            return step % (config.save_every or self.schedule.steps_per_epoch) == 0
        if step % config.log_every:
            return False
        due = self.engine.is_main and time.monotonic() - self._saved_at >= 60 * config.save_minutes
        return bool(self.engine.sum(torch.tensor(float(due))))

    def _check_loss(self) -> None:
        """Raises `UserError` if the loss is NaN or infinite, before such a draft replaces a good one."""
        if not self.progress.meter.finite():
            raise UserError(
                f"the loss is not a number, at step {self.progress.step} or just before",
                where=self.store.folder,
                fix="--init from a checkpoint there, in another --cpdir, at a lower learning_rate",
            )

    def _check_weights(self) -> None:
        """Raises `UserError` if a weight of the draft is NaN or infinite, which a step with a good loss can do."""
        finite = torch.stack([weight.isfinite().all() for weight in trained_parameters(self.engine.objective)]).all()
        if not bool(finite):
            raise UserError(
                f"the draft has weights that are not numbers, at step {self.progress.step}",
                where=self.store.folder,
                fix="--init from an earlier checkpoint there, in another --cpdir, at a lower learning_rate",
            )

    def _log(self, epoch: int) -> None:
        """Means since the last log, over all processes."""
        meter = self.progress.meter
        assert meter.sums is not None
        means = self.engine.mean(meter.sums / meter.steps).tolist()
        text, image = self.schedule.text, self.schedule.image
        config = self.config
        share = image_probability(epoch, self.schedule.epochs, config.text_share, config.image_start, config.image_end)
        values = {
            **dict(zip(METRICS, means, strict=True)),
            "learning_rate": self.schedule.learning_rate(self.progress.step - 1),
            "image_probability": share if text and image else float(image > 0),
            "samples_per_second": meter.steps * self.schedule.sizes.total / meter.seconds,
        }
        self.progress.history["steps"].append({"step": self.progress.step, "epoch": epoch, **values})
        self.tracker.log(self.progress.step, values)
        meter.clear()

    def _validate(self) -> None:
        """Validates on each data set; keeps the draft with the best mean simulated tau as ``best``."""
        results: dict[str, Any] = {}
        samples, sizes = self.data.validation, self.schedule.sizes
        for name, (_, _, held_out) in self.data.sources.items():
            count = min(len(held_out), self.config.validation_limit)
            if not count:
                continue
            own = [Item(name, index, 0) for index in range(self.engine.rank, count, sizes.world)]
            pieces = [own[at : at + sizes.micro] for at in range(0, len(own), sizes.micro)]
            results[name] = validate(self.engine, self._load(samples, pieces, noise=0.0))
        if not results:
            return
        self.progress.history["validations"].append({"step": self.progress.step, "results": results})
        self.tracker.log_validation(self.progress.step, results)
        score = sum(values["tau"] for values in results.values()) / len(results)
        if self.progress.best is None or score > self.progress.best:
            self.progress.best = score
            self.store.save_draft(self.engine, "best", self.progress.step)

    def _evaluate(self) -> None:
        """Answers the evaluation's questions with the draft so far; the other processes wait for the main one."""
        assert self.served is not None
        result = self.served(self.engine.objective.draft)
        if result is not None:
            history = self.progress.history
            history.setdefault("served", []).append({"step": self.progress.step, **result})
            self.tracker.log_served(self.progress.step, result, history)
        self.engine.barrier()

    def _save_once(self) -> None:
        """Saves the last step of a stopped run, unless it is saved already."""
        latest = self.store.latest()
        if latest is None or latest.name != f"step-{self.progress.step:08d}":
            with self.progress.meter.paused():
                self.store.save(self.engine, self.progress)

"""One worker for each device: it loads the target once and makes shards of the ranges that it is handed.

On a machine without GPU the work is done in this process. Otherwise each worker is a process of its own; a range goes
to whichever worker asks next, and a worker that fails is named while the others finish.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from eagle.decode.msd import MSDModel
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.msd import DraftModel
from eagle.families import Target, load_target, template_of
from eagle.ge_data.extract import Extractor, fingerprint, model_name, source_of
from eagle.ge_data.regenerate import Regenerator
from eagle.ge_data.selection import Range, Selection, shortened
from eagle.hidden_states.index import ShardInfo
from eagle.hidden_states.source import Regeneration, Source
from llava.errors import UserError


@dataclass(frozen=True)
class Answers:
    """How the target answers: ``msd_model`` a draft's folder or hub name, None for plain decoding; ``temperature`` 0 is
    greedy; ``max_new_tokens`` of the longest answer; ``at_once`` conversations answered together."""

    msd_model: str | None
    temperature: float
    seed: int
    max_new_tokens: int
    at_once: int


@dataclass(frozen=True)
class Job:
    """What every worker is told. ``family``: the one that --model_type means; ``source``: of shards that are there;
    ``hidden_dtype``: "int8", or None for the target's 16 bit; ``answers``: how the target answers itself, None for the
    data set's answers."""

    model: str
    family: str
    dtype: str
    selection: Selection
    folder: Path
    batch_tokens: int | None
    source: Source | None
    hidden_dtype: str | None = None
    answers: Answers | None = None


@dataclass(frozen=True)
class Events:
    """Called as work goes on: by rows and tokens, with each shard that is on disk, and with what the user should know,
    once each."""

    progress: Callable[[int, int], None]
    shard: Callable[[Source, ShardInfo], None]
    note: Callable[[str], None] = lambda line: None
    said: set[str] = field(default_factory=set)

    def say(self, line: str | None) -> None:
        """Notes a line, unless a worker has said it before."""
        if line is not None and line not in self.said:
            self.said.add(line)
            self.note(line)


@dataclass(frozen=True)
class Failure:
    """A worker that stopped early. ``user``: bad input, not a defect."""

    device: str
    message: str
    user: bool


def run_here(job: Job, ranges: Sequence[Range], events: Events, device: str = "cpu") -> None:
    """Does all the work in this process."""
    extractor = _extractor(job, device)
    events.say(shortened(job.selection.max_length, extractor.selection))
    for info in extractor.run(ranges, events.progress):
        events.shard(extractor.source, info)


def run_workers(job: Job, ranges: Sequence[Range], devices: Sequence[str], events: Events) -> list[Failure]:
    """Does the work in one process for each device; returns the workers that failed, with their reasons.

    What a failed worker had begun is left for the next run.
    """
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # the first start would do it, and let Ctrl-C through again
    waiting = iter(ranges)
    workers: dict[Connection, tuple[str, Any]] = {}
    failures: list[Failure] = []
    try:
        for device in devices:
            ours, theirs = context.Pipe()
            what = (job, device, threads(devices), theirs)
            process = context.Process(target=_serve, args=what, name=f"ge_data {device}", daemon=True)
            with _deaf_to_ctrl_c():
                process.start()
            theirs.close()
            workers[ours] = (device, process)
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                device, process = workers[connection]
                failure = _handle(connection, device, process, waiting, events)
                if failure is None:
                    continue
                del workers[connection]
                if failure.message:
                    failures.append(failure)
    finally:
        for _, process in workers.values():
            process.terminate()
    return failures


def _handle(
    connection: Connection, device: str, process: Any, waiting: Iterator[Range], events: Events
) -> Failure | None:
    """Serves one message of a worker; a `Failure` when it is gone, with an empty message if all is well."""
    try:
        kind, *values = connection.recv()
        if kind == "next":
            connection.send(next(waiting, None))
    except (EOFError, OSError):
        process.join()
        code = process.exitcode
        return Failure(device, f"ended with status {code} and no word" if code else "", user=False)
    if kind == "progress":
        events.progress(*values)
    elif kind == "shard":
        events.shard(*values)
    elif kind == "note":
        events.say(*values)
    elif kind == "failure":
        process.join()
        return Failure(device, *values)
    return None


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What is started here is deaf to Ctrl-C from its first moment: a terminal sends it to all processes, and a worker
    that still loads its modules would end with a traceback. For this process it waits until the block is over."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def threads(devices: Sequence[str]) -> int:
    """Of this process's threads, those of each worker: together they do not outnumber its cores, neither in computing
    nor, beside a GPU, in preparing pictures."""
    return max(1, torch.get_num_threads() // len(devices))


def _serve(job: Job, device: str, share: int, connection: Connection) -> None:
    """A worker process: asks for ranges until there are none, computing with ``share`` threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    torch.set_num_threads(share)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def ranges() -> Iterator[Range]:
        while True:
            connection.send(("next",))
            span = connection.recv()
            if span is None:
                return
            yield span

    try:
        extractor = _extractor(job, device)
        connection.send(("note", shortened(job.selection.max_length, extractor.selection)))
        for info in extractor.run(ranges(), lambda rows, tokens: connection.send(("progress", rows, tokens))):
            connection.send(("shard", extractor.source, info))
    except UserError as error:
        connection.send(("failure", str(error), True))
    except Exception:
        connection.send(("failure", traceback.format_exc(), False))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _extractor(job: Job, device: str) -> Extractor:
    if device != "cpu":
        torch.cuda.set_device(device)
    target = load_target(job.model, dtype=job.dtype, device_map={"": device})
    if target.family != job.family:
        raise UserError(f"--model_type means a model of family {job.family}, this is {target.family}", job.model)
    draft = None if job.answers is None else _draft(job.answers, target)
    regeneration = None if job.answers is None else _regeneration(job.answers, draft)
    source = source_of(target, job.model, job.hidden_dtype, regeneration)
    if job.source is not None and (differences := job.source.differences(source)):
        raise UserError(
            f"the folder's shards are of another model or draft, with {differences}",
            job.folder,
            "take another --outdir",
        )
    selection = job.selection.within(target)
    template, regenerator = template_of(target), None
    if regeneration is not None and job.answers is not None:
        model, together = MSDModel(target, draft), job.answers.at_once
        regenerator = Regenerator(model, template, regeneration, selection.max_length, together)
    return Extractor(target, template, selection, job.folder, source, job.batch_tokens, regenerator)


def _draft(answers: Answers, target: Target) -> DraftModel | None:
    if answers.msd_model is None:
        return None
    return load_draft(answers.msd_model, dtype=target.dtype, device=target.head_device)


def _regeneration(answers: Answers, draft: DraftModel | None) -> Regeneration:
    """The record of the answers."""
    return Regeneration(
        draft=None if answers.msd_model is None else model_name(answers.msd_model),
        draft_fingerprint=None if draft is None else fingerprint(draft.fc.weight),
        temperature=answers.temperature,
        seed=answers.seed if answers.temperature else None,
        max_new_tokens=answers.max_new_tokens,
    )

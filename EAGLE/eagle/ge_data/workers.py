"""One worker for each device: it loads the target once and makes the shards of the ranges that it gets.

Without a GPU the work is done in this process. Otherwise each worker is a process; a range goes to the next worker that
asks for one. A worker that fails is reported, and the others finish.
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
from typing import TYPE_CHECKING, Any, Literal

from eagle.ge_data.selection import Range, Selection, shortened
from eagle.hidden_states.index import ShardInfo
from eagle.hidden_states.source import Regeneration, Source, model_name
from llava.arguments import is_greedy
from llava.errors import UserError

if TYPE_CHECKING:
    from eagle.ge_data.extract import Extractor


@dataclass(frozen=True)
class Answers:
    """How the target answers itself. ``msd_model``: a draft's folder or hub name, None for plain decoding;
    ``temperature``: 0 is greedy; ``max_new_tokens``: of the longest answer; ``at_once``: number of conversations that
    are answered together."""

    msd_model: str | None
    temperature: float
    seed: int
    max_new_tokens: int
    at_once: int


@dataclass(frozen=True)
class Job:
    """The task of all workers. ``family``: given by --model_type; ``source``: of the existing shards; ``hidden_dtype``:
    None for 16 bit; ``answers``: None for the answers of the data set; ``feature_layers``: whose input streams are
    stored; ``self_check``: test the base when it is loaded for the first time."""

    model: str
    family: str
    dtype: str
    selection: Selection
    folder: Path
    batch_tokens: int | None
    source: Source | None
    hidden_dtype: Literal["int8"] | None = None
    answers: Answers | None = None
    feature_layers: tuple[int, ...] | None = None
    self_check: bool = True


@dataclass(frozen=True)
class Events:
    """Callbacks. ``progress``: number of records and tokens that were read; ``shard``: a shard was written; ``note``: a
    line for the user."""

    progress: Callable[[int, int], None]
    shard: Callable[[Source, ShardInfo], None]
    note: Callable[[str], None] = lambda line: None
    noted: set[str] = field(default_factory=set)

    def note_once(self, line: str | None) -> None:
        """Notes a line, unless another worker did."""
        if line is not None and line not in self.noted:
            self.noted.add(line)
            self.note(line)


@dataclass(frozen=True)
class Failure:
    """A worker that failed. ``user``: because of bad input, not a bug."""

    device: str
    message: str
    user: bool


def run_here(job: Job, ranges: Sequence[Range], events: Events, device: str = "cpu") -> None:
    """Does all the work in this process."""
    extractor = _extractor(job, device)
    events.note_once(shortened(job.selection.max_length, extractor.selection))
    for info in extractor.run(ranges, events.progress):
        events.shard(extractor.source, info)


def run_workers(job: Job, ranges: Sequence[Range], devices: Sequence[str], events: Events) -> list[Failure]:
    """Does the work in one process for each device; returns the workers that failed.

    The ranges that a failed worker had begun are left for the next run.
    """
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # process.start() would do it otherwise, and unblock Ctrl-C
    waiting = iter(ranges)
    workers: dict[Connection, tuple[str, Any]] = {}
    failures: list[Failure] = []
    try:
        for device in devices:
            ours, theirs = context.Pipe()
            arguments = (job, device, threads(devices), theirs)
            process = context.Process(target=_serve, args=arguments, name=f"ge_data {device}", daemon=True)
            with _ctrl_c_blocked():
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
    """Handles one message of a worker. Returns a `Failure` when it has ended, with the message "" after success."""
    try:
        kind, *values = connection.recv()
        if kind == "next":
            connection.send(next(waiting, None))
    except (EOFError, OSError):
        process.join()
        code = process.exitcode
        return Failure(device, f"ended with status {code} without a message" if code else "", user=False)
    if kind == "progress":
        events.progress(*values)
    elif kind == "shard":
        events.shard(*values)
    elif kind == "note":
        events.note_once(*values)
    elif kind == "failure":
        process.join()
        return Failure(device, *values)
    return None


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C from the beginning: a terminal sends it to all processes, and a
    worker that is importing modules would print a traceback. In this process it is delivered after the block, also if
    another thread (a progress bar's) receives it: a worker that is started by half would print a traceback too."""
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if received:
        raise KeyboardInterrupt


def threads(devices: Sequence[str]) -> int:
    """Number of threads of each worker, so that together they do not use more threads than this process would."""
    import torch

    return max(1, torch.get_num_threads() // len(devices))


def _serve(job: Job, device: str, share: int, connection: Connection) -> None:
    """A worker process: asks for ranges until there are none. ``share``: number of threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process stops this one
    import torch

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
        for info in extractor.run(ranges(), lambda records, tokens: connection.send(("progress", records, tokens))):
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
    import torch

    from eagle.decode.msd import MSDModel
    from eagle.drafts.checkpoint import load_draft
    from eagle.families import template_of
    from eagle.ge_data.extract import Extractor, check_embedding_scale, fingerprint, load_base, source_of
    from eagle.ge_data.regenerate import Regenerator

    if device != "cpu":
        torch.cuda.set_device(device)
    target = load_base(job.model, job.family, job.dtype, device, job.self_check)
    check_embedding_scale(target, job.feature_layers or ())
    answers, draft, regeneration = job.answers, None, None
    if answers is not None:
        if answers.msd_model is not None:
            draft = load_draft(answers.msd_model, dtype=target.dtype, device=target.head_device)
        regeneration = Regeneration(
            draft=None if answers.msd_model is None else model_name(answers.msd_model),
            draft_fingerprint=None if draft is None else fingerprint(draft.fc.weight),
            temperature=answers.temperature,
            seed=None if is_greedy(answers.temperature) else answers.seed,
            max_new_tokens=answers.max_new_tokens,
        )
    source = source_of(target, job.model, job.hidden_dtype, regeneration, job.feature_layers)
    if job.source is not None and (differences := job.source.differences(source)):
        message = f"the folder's shards are of another model or draft, with {differences}"
        raise UserError(message, job.folder, "take another --outdir")
    selection, template, regenerator = job.selection.within(target), template_of(target), None
    if answers is not None and regeneration is not None:
        model = MSDModel(target, draft)
        regenerator = Regenerator(model, template, regeneration, selection.max_length, answers.at_once)
    return Extractor(target, template, selection, job.folder, source, job.batch_tokens, regenerator)

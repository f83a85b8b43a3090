"""Generate training data: the target reads conversations, its hidden states are stored in shards.

    python -m eagle.ge_data.allocation --outdir D --model_type llava_v15_t|llava_v15_v|qwen2_vl_t|... \\
        --model BASE --image_data_path image_data --json_data_path FILE [--start A --end B] [--shard I/N] \\
        [--gpus 0,1,...] [--hidden-dtype int8] [--again] \\
        [--regenerate [--msd-model DRAFT] [--temperature T] [--max-new-tokens N] [--at-once B]]

`_t` takes the rows without picture, `_v` those with one; they are shuffled, and [A, B) counts in the shuffled order
(all by default). Killed at any moment and started again, it goes on: finished shards are not touched. Ranges of one
corpus may be made one after the other in one folder. `--shard I/N` is one of N equal parts of them, for N machines,
each with a folder of its own; their shards put into one folder are the whole. `--again` also makes those shards anew in
which rows were skipped for want of pictures that are there by now. `--hidden-dtype int8` halves the disk
that hidden states take; with `--regenerate` the model answers the questions itself, its answers take the place of the
file's.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from eagle.arguments import DTYPES, positive
from eagle.families import TRAINING_NAMES
from eagle.ge_data.extract import model_name
from eagle.ge_data.folder import AUTO, Settings, finished, locked, missing, write_skipped
from eagle.ge_data.missing_pictures import REASONS as PICTURE_REASONS
from eagle.ge_data.missing_pictures import look_for_pictures, mended_shards
from eagle.ge_data.progress import Board, summary
from eagle.ge_data.selection import IMAGE, TEXT, Range, Selection
from eagle.ge_data.workers import Answers, Events, Failure, Job, run_here, run_workers
from eagle.hidden_states.index import PATTERN, Index, ShardInfo, load_index, sha256
from eagle.hidden_states.shards import shard_name
from eagle.hidden_states.source import INT8
from llava.errors import UserError, run_cli

KINDS = {"t": TEXT, "v": IMAGE}
HIDDEN_DTYPES = (AUTO, INT8)
MAX_NEW_TOKENS = 1024
AT_ONCE = 8
MODEL_TYPES = tuple(f"{family}_{kind}" for family in TRAINING_NAMES for kind in KINDS)


def part(text: str) -> tuple[int, int]:
    """An argparse type: ``I/N``, part I of N, from 0."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if number >= parts:
        raise argparse.ArgumentTypeError(f"'{text}' is no part, give 0/2 for the first of two and 1/2 for the second")
    return number, parts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = __doc__.splitlines()[0]
    made = argparse.ArgumentParser(prog="python -m eagle.ge_data.allocation", description=about, allow_abbrev=False)
    add = made.add_argument
    add("--outdir", required=True, type=Path, help="folder of the shards; started again, it is completed")
    add("--model_type", required=True, choices=MODEL_TYPES, help="family of --model; _t text, _v image rows")
    add("--model", required=True, help="base model: folder or hub name")
    add("--image_data_path", type=Path, default=Path("image_data"), help="where the rows' pictures lie")
    add("--json_data_path", required=True, type=Path, help="annotation file, a JSON array of conversations")
    add("--start", type=int, default=0, help="first row of the shuffled selection (default: 0)")
    add("--end", type=int, help="row after the last one (default: all)")
    add("--limit", type=positive, help="at most so many rows")
    add(
        "--shard", type=part, metavar="I/N", help="part I, from 0, of N equal parts of these rows: one for each machine"
    )
    add("--gpus", help="one worker on each: 0,1,..., cpu or cpu,cpu (default: all GPUs, else this process's CPU)")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the base model (default: the checkpoint's)")
    add("--hidden-dtype", choices=HIDDEN_DTYPES, default=AUTO, help=f"stored hidden states (default: {AUTO}, 16 bit)")
    add("--max-length", type=positive, default=2048, help="longest sequence; longer rows are cut (default: 2048)")
    add("--seed", type=int, default=42, help="of the shuffle and of sampled answers (default: 42)")
    add("--shard-size", type=positive, default=64, help="rows of a shard (default: 64)")
    add("--again", action="store_true", help="make shards anew that skipped rows whose pictures can be read by now")
    add("--batch-tokens", type=positive, help="most tokens of a forward, padded (default: 8192, on a CPU 1024)")
    own = made.add_argument_group("the model's own answers")
    own.add_argument("--regenerate", action="store_true", help="they take the place of those in the annotation file")
    own.add_argument("--msd-model", help="draft that speeds them up: folder or hub name (default: plain decoding)")
    own.add_argument("--temperature", type=float, help="0 is greedy (default)")
    own.add_argument("--max-new-tokens", type=positive, help=f"of the longest answer (default: {MAX_NEW_TOKENS})")
    own.add_argument("--at-once", type=positive, help=f"conversations answered together (default: {AT_ONCE})")
    return made


def answers_wanted(options: argparse.Namespace) -> Answers | None:
    """How the model is to answer itself; None for the answers of the annotation file.

    Raises:
        UserError: settings of answers without --regenerate, or a temperature that is none.
    """
    given = {"--msd-model": options.msd_model, "--temperature": options.temperature}
    given |= {"--max-new-tokens": options.max_new_tokens, "--at-once": options.at_once}
    if not options.regenerate:
        for flag, value in given.items():
            if value is not None:
                raise UserError(f"{flag} is for answers of the model's own", fix="give --regenerate too")
        return None
    temperature = options.temperature or 0.0
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature}", fix="give 0 for greedy decoding, or more")
    longest, together = options.max_new_tokens or MAX_NEW_TOKENS, options.at_once or AT_ONCE
    return Answers(options.msd_model, temperature, options.seed, longest, together)


def select(options: argparse.Namespace) -> tuple[Selection, Range]:
    """The shuffled rows of the wanted kind, and the range of them that is wanted.

    Raises:
        UserError: the file cannot be read, no row is of that kind, the range or the part of it is empty, or there is
        no folder of pictures.
    """
    kind = KINDS[options.model_type.rsplit("_", 1)[1]]
    selection = Selection.of(options.json_data_path, kind, options.image_data_path, options.max_length, options.seed)
    rows = len(selection.order)
    end = rows if options.end is None else min(options.end, rows)
    if options.limit is not None:
        end = min(end, options.start + options.limit)
    if not 0 <= options.start < end:
        raise UserError(
            f"rows {options.start} to {end} are none of the {rows} {kind} rows",
            fix="see --start, --end and --limit",
        )
    return selection, part_of((options.start, end), options.shard, options.shard_size)


def part_of(span: Range, shard: tuple[int, int] | None, shard_size: int) -> Range:
    """Part I of N of a range, cut where shards are: at multiples of ``shard_size``. The parts make up the whole.

    >>> [part_of((3, 20), (number, 2), 4) for number in range(2)]
    [(3, 8), (8, 20)]

    Raises:
        UserError: nothing is left for this part.
    """
    if shard is None:
        return span
    (start, end), (number, parts) = span, shard

    def cut(place: int) -> int:
        at = start + (end - start) * place // parts
        return at if place in (0, parts) else max(start, at - at % shard_size)

    first, last = cut(number), cut(number + 1)
    if first == last:
        raise UserError(
            f"part {number}/{parts} of rows {start} to {end} is empty",
            fix=f"take fewer parts, or a smaller --shard-size than {shard_size}",
        )
    return first, last


def devices(gpus: str | None) -> list[str]:
    """``--gpus`` as device names; [] for this process's CPU.

    Raises:
        UserError: no such GPU.
    """
    count = torch.cuda.device_count()
    if gpus is None:
        return [f"cuda:{number}" for number in range(count)]
    names = []
    for part in gpus.split(","):
        part = part.strip()
        if part != "cpu" and not (part.isdecimal() and int(part) < count):
            raise UserError(f"no GPU '{part}', there are {count}", fix="give numbers as in --gpus 0,1 or cpu")
        names.append(part if part == "cpu" else f"cuda:{int(part)}")
    return [] if names == ["cpu"] else names


def run(options: argparse.Namespace, notify: Callable[[str], None]) -> int:
    """Makes what is missing; returns the exit status, 1 if a worker failed by a defect.

    Raises:
        UserError: bad input, see the functions above.
    """
    began = time.monotonic()
    workers, answers = devices(options.gpus), answers_wanted(options)
    selection, (start, end) = select(options)
    with locked(options.outdir):
        settings = Settings(
            model_type=options.model_type,
            dtype=options.dtype,
            hidden_dtype=options.hidden_dtype,
            max_length=options.max_length,
            seed=options.seed,
            data=options.json_data_path.name,
            data_sha256=sha256(options.json_data_path),
            rows=len(selection.rows),
            regenerate=answers is not None,
            msd_model=None if answers is None or answers.msd_model is None else model_name(answers.msd_model),
            temperature=0.0 if answers is None else answers.temperature,
            max_new_tokens=None if answers is None else answers.max_new_tokens,
        )
        settings.claim(options.outdir)
        done = finished(options.outdir, notify)
        ranges = missing(start, end, options.shard_size, done)
        if options.again:
            ranges, done = with_mended(options, selection, (start, end), ranges, done, notify)
        failures: list[Failure] = []
        stopped: UserError | None = None
        if ranges:
            if (line := look_for_pictures(selection, ranges, bool(done))) is not None:
                notify(line)
            try:
                failures = work(job_of(options, selection), done, ranges, end - start, workers, notify)
            except UserError as error:
                stopped = error
        for failure in failures:
            notify(f"error: worker {failure.device} failed: {failure.message}")
        index = conclude(options.outdir, began, notify) if any(options.outdir.glob(PATTERN)) else None
    if stopped is not None:
        raise stopped
    for failure in failures:
        if failure.user:
            raise UserError(failure.message, f"worker {failure.device}")
    if not failures and index is not None and not index.samples:
        raise UserError("every row was skipped", options.outdir, "skipped.jsonl tells why")
    return 1 if failures else 0


def conclude(folder: Path, began: float, notify: Callable[[str], None]) -> Index:
    """Writes what was skipped and shows what is in the folder now, whether or not all is well.

    Args:
        began: when the run did, by `time.monotonic`.
    """
    index = load_index(folder)
    write_skipped(folder, index)
    if lost := sum(index.skipped.get(reason, 0) for reason in PICTURE_REASONS):
        notify(f"{lost:,} rows were skipped for their pictures; once these are there, --again makes their shards anew")
    Console().print(summary(index, folder, time.monotonic() - began))
    return index


def with_mended(
    options: argparse.Namespace,
    selection: Selection,
    span: Range,
    ranges: Sequence[Range],
    done: Sequence[ShardInfo],
    notify: Callable[[str], None],
) -> tuple[list[Range], list[ShardInfo]]:
    """The ranges to make with those of shards to be made anew (see `mended_shards`), and the shards that stay.

    The old ones stay in the folder until each is replaced. The index lets go of them before: killed at any moment, what
    then lies there is read as it is.
    """
    mended = mended_shards(options.outdir, done, selection, span)
    notify(f"--again: {len(mended):,} shards have rows whose pictures can be read by now")
    if not mended:
        return list(ranges), list(done)
    kept = [shard for shard in done if shard not in mended]
    Index.of(load_index(options.outdir, strict=False).source, kept).save(options.outdir)
    return sorted([*ranges, *((shard.start, shard.end) for shard in mended)]), kept


def job_of(options: argparse.Namespace, selection: Selection) -> Job:
    """What the workers are told."""
    return Job(
        model=options.model,
        family=TRAINING_NAMES[options.model_type.rsplit("_", 1)[0]],
        dtype=options.dtype,
        selection=selection,
        folder=options.outdir,
        batch_tokens=options.batch_tokens,
        source=load_index(options.outdir, strict=False).source if any(options.outdir.glob(PATTERN)) else None,
        hidden_dtype=None if options.hidden_dtype == AUTO else options.hidden_dtype,
        answers=answers_wanted(options),
    )


def work(
    job: Job,
    done: Sequence[ShardInfo],
    ranges: Sequence[Range],
    rows: int,
    workers: Sequence[str],
    notify: Callable[[str], None],
) -> list[Failure]:
    """Hands the ranges to the workers; returns those that failed, after all have ended.

    Raises:
        UserError: bad input, where this process does the work.
    """
    waiting = sum(last - first for first, last in ranges)
    old = [job.folder / shard_name(*span) for span in ranges]
    replaced = sum(path.stat().st_size for path in old if path.exists())
    board = Board(job.folder, done, rows, waiting, job.source, notify, replaced)
    events = Events(board.progress, board.shard, notify)
    with board.bar:
        if not workers:
            run_here(job, ranges, events)
            return []
        return run_workers(job, ranges, workers, events)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run(parser().parse_args(argv), lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    sys.exit(run_cli(main))

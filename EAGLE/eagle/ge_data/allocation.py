"""Generate training data: the target reads conversations, and its hidden states are stored in shards.

    python -m eagle.ge_data.allocation --outdir D --model_type llava_v15_t|llava_v15_v|qwen2_vl_t|... \\
        --model BASE --image_data_path image_data --json_data_path FILE [--start A --end B] [--shard I/N] \\
        [--gpus 0,1,...] [--hidden-dtype int8] [--again] \\
        [--regenerate [--msd-model DRAFT] [--temperature T] [--max-new-tokens N] [--at-once B]]

`_t` selects the records without a picture, `_v` those with one. They are shuffled; [A, B) is a range of the shuffled
order (default: all). The command can be killed at any moment; started again, it resumes without touching finished
shards. Ranges of one corpus may be made one after the other in one folder. With `--shard I/N`, N machines make one part
each in a folder of their own; the shards of all parts, moved into one folder, are the corpus. `--again` also replaces
the shards that skipped records whose pictures can be read by now. `--hidden-dtype int8` halves the disk space of hidden
states. With `--regenerate` the model's own answers replace those of the file.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from eagle.arguments import DTYPES, NO_SELF_CHECK, count, positive
from eagle.families import TRAINING_NAMES
from eagle.ge_data.folder import AUTO, Settings, finished, locked, missing, write_skipped
from eagle.ge_data.progress import AllocationProgress, summary
from eagle.ge_data.selection import (
    IMAGE,
    PICTURE_REASONS,
    TEXT,
    Range,
    Selection,
    check_pictures,
    ignored_keys,
    repairable_shards,
)
from eagle.ge_data.workers import Answers, Events, Failure, Job, run_here, run_workers
from eagle.hidden_states.index import PATTERN, Index, ShardInfo, load_index, sha256
from eagle.hidden_states.source import INT8, model_name
from llava.arguments import OneLineParser, temperature
from llava.errors import UserError, run_cli
from llava.inputs import seed_option

KINDS = {"t": TEXT, "v": IMAGE}
HIDDEN_DTYPES = (AUTO, INT8)
MAX_NEW_TOKENS = 1024
AT_ONCE = 8
MODEL_TYPES = tuple(f"{family}_{kind}" for family in TRAINING_NAMES for kind in KINDS)

Notify = Callable[[str], None]


def part(text: str) -> tuple[int, int]:
    """An argparse type: ``I/N``, part I of N, from 0."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if number >= parts:
        raise argparse.ArgumentTypeError(f"'{text}' is not a part: give 0/2 for the first of two, 1/2 for the second")
    return number, parts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = (__doc__ or "").splitlines()[0]
    made = OneLineParser(prog="python -m eagle.ge_data.allocation", description=about, allow_abbrev=False)
    add = made.add_argument
    add("--outdir", required=True, type=Path, help="folder of the shards; an unfinished one is completed")
    add("--model_type", required=True, choices=MODEL_TYPES, help="family of --model; _t text, _v image records")
    add("--model", required=True, help="base model: folder or hub name")
    add("--image_data_path", type=Path, default=Path("image_data"), help="folder of the pictures (default: image_data)")
    add("--json_data_path", required=True, type=Path, help="annotation file, a JSON array of conversations")
    add("--start", type=count, default=0, help="first record of the shuffled selection (default: 0)")
    add("--end", type=count, help="record after the last one (default: all)")
    add("--limit", type=positive, help="maximal number of records")
    add("--shard", type=part, metavar="I/N", help="part I, from 0, of N equal parts of these records, for N machines")
    add("--gpus", help="one worker on each: 0,1,..., cpu or cpu,cpu (default: all GPUs, else this process's CPU)")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the base model (default: the checkpoint's)")
    add("--hidden-dtype", choices=HIDDEN_DTYPES, default=AUTO, help=f"stored hidden states (default: {AUTO}, 16 bit)")
    add(
        "--max-length",
        type=positive,
        default=2048,
        help="tokens at which conversations are cut (default: 2048)",
    )
    add("--seed", type=seed_option, default=42, help="of the shuffle and of sampled answers (default: 42)")
    add("--shard-size", type=positive, default=64, help="records of a shard (default: 64)")
    add("--again", action="store_true", help="replace shards that skipped records whose pictures can be read by now")
    add("--batch-tokens", type=positive, help="maximal tokens of a forward, with padding (default: 8192, CPU 1024)")
    add("--no-self-check", **NO_SELF_CHECK)
    own = made.add_argument_group("the model's own answers")
    own.add_argument("--regenerate", action="store_true", help="they replace the answers of the annotation file")
    own.add_argument("--msd-model", help="draft that speeds them up: folder or hub name (default: plain decoding)")
    own.add_argument("--temperature", type=temperature, help="0 is greedy (default)")
    own.add_argument("--max-new-tokens", type=positive, help=f"of the longest answer (default: {MAX_NEW_TOKENS})")
    own.add_argument("--at-once", type=positive, help=f"conversations answered together (default: {AT_ONCE})")
    return made


def answers_wanted(options: argparse.Namespace) -> Answers | None:
    """How the model answers itself; None for the answers of the annotation file.

    Raises:
        UserError: settings of answers without --regenerate.
    """
    given = {"--msd-model": options.msd_model, "--temperature": options.temperature}
    given |= {"--max-new-tokens": options.max_new_tokens, "--at-once": options.at_once}
    if not options.regenerate:
        for flag, value in given.items():
            if value is not None:
                raise UserError(f"{flag} is for the model's own answers", fix="give --regenerate too")
        return None
    longest, together = options.max_new_tokens or MAX_NEW_TOKENS, options.at_once or AT_ONCE
    return Answers(options.msd_model, options.temperature or 0.0, options.seed, longest, together)


def select(options: argparse.Namespace) -> tuple[Selection, Range]:
    """The shuffled records, and the range of them that is wanted.

    Raises:
        UserError: the file cannot be read, has no such record, the range is empty, or the folder of pictures does not
            exist.
    """
    kind = KINDS[options.model_type.rsplit("_", 1)[1]]
    given, default = options.image_data_path, parser().get_default("image_data_path")
    if given != default and not given.is_dir():  # said in the text pass too, which comes first and is long
        raise UserError("no folder of pictures", given, "give --image_data_path")
    selection = Selection.of(options.json_data_path, kind, options.image_data_path, options.max_length, options.seed)
    total = len(selection.order)
    end = total if options.end is None else min(options.end, total)
    if options.limit is not None:
        end = min(end, options.start + options.limit)
    if not 0 <= options.start < end:
        message = f"records {options.start} to {end} are not among the {total} {kind} records"
        raise UserError(message, fix="see --start, --end and --limit")
    return selection, part_of((options.start, end), options.shard, options.shard_size)


def part_of(span: Range, shard: tuple[int, int] | None, shard_size: int) -> Range:
    """Part I of N of a range, cut at multiples of ``shard_size``, as shards are. The parts cover the range.

    >>> [part_of((3, 20), (number, 2), 4) for number in range(2)]
    [(3, 8), (8, 20)]

    Raises:
        UserError: the part is empty.
    """
    if shard is None:
        return span
    (start, end), (number, parts) = span, shard

    def cut(place: int) -> int:
        at = start + (end - start) * place // parts
        return at if place in (0, parts) else max(start, at - at % shard_size)

    first, last = cut(number), cut(number + 1)
    if first == last:
        message = f"part {number}/{parts} of records {start} to {end} is empty"
        raise UserError(message, fix=f"take fewer parts, or a smaller --shard-size than {shard_size}")
    return first, last


def devices(gpus: str | None) -> list[str]:
    """``--gpus`` as device names; [] for this process's CPU.

    Raises:
        UserError: there is no such GPU.
    """
    import torch

    count = torch.cuda.device_count()
    if gpus is None:
        return [f"cuda:{number}" for number in range(count)]
    names = []
    for name in map(str.strip, gpus.split(",")):
        if name != "cpu" and not (name.isdecimal() and int(name) < count):
            raise UserError(f"no GPU '{name}', there are {count}", fix="give numbers as in --gpus 0,1 or cpu")
        names.append(name if name == "cpu" else f"cuda:{int(name)}")
    return [] if names == ["cpu"] else names


def run(options: argparse.Namespace, notify: Notify) -> int:
    """Makes the shards that are missing; returns the exit status, 1 if a worker failed because of a bug.

    Raises:
        UserError: bad input, see the functions above.
    """
    began = time.monotonic()
    workers, answers = devices(options.gpus), answers_wanted(options)
    selection, (start, end) = select(options)
    if (line := ignored_keys(selection)) is not None:
        notify(line)
    with locked(options.outdir):
        settings = Settings(
            model_type=options.model_type,
            dtype=options.dtype,
            hidden_dtype=options.hidden_dtype,
            max_length=options.max_length,
            seed=options.seed,
            data=options.json_data_path.name,
            data_sha256=sha256(options.json_data_path),
            rows=len(selection.records),
            regenerate=answers is not None,
            msd_model=None if answers is None or answers.msd_model is None else model_name(answers.msd_model),
            temperature=0.0 if answers is None else answers.temperature,
            max_new_tokens=None if answers is None else answers.max_new_tokens,
        )
        settings.claim(options.outdir)
        done = finished(options.outdir, notify)
        ranges = missing(start, end, options.shard_size, done)
        if options.again:
            ranges, done = with_repairable(options, selection, (start, end), ranges, done, notify)
        if (line := surplus(done, (start, end))) is not None and not ranges:
            notify(line)
        failures: list[Failure] = []
        stopped: UserError | None = None
        if ranges:
            if (line := check_pictures(selection, ranges, bool(done))) is not None:
                notify(line)
            try:
                failures = work(job_of(options, selection, answers), done, ranges, end - start, workers, notify)
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
        raise UserError("every record was skipped", options.outdir, "see skipped.jsonl for the reasons")
    return 1 if failures else 0


def surplus(done: Sequence[ShardInfo], span: Range) -> str | None:
    """A line if the folder has records outside of the range that was asked for."""
    start, end = span
    stored = sum(shard.end - shard.start for shard in done)
    if all(start <= shard.start and shard.end <= end for shard in done):
        return None
    return (
        f"{stored:,} records are stored here and {end - start:,} were asked for: all stay, and training reads all of "
        "them; for fewer, remove the folder and start again, or give another --outdir"
    )


def conclude(folder: Path, began: float, notify: Notify) -> Index:
    """Writes ``skipped.jsonl`` and prints a summary, also after a failure. ``began``: by `time.monotonic`."""
    from rich.console import Console

    index = load_index(folder)
    write_skipped(folder, index)
    if lost := sum(index.skipped.get(reason, 0) for reason in PICTURE_REASONS):
        notify(f"{lost:,} records were skipped because of their pictures; --again repairs their shards later")
    Console().print(summary(index, folder, time.monotonic() - began))
    return index


def with_repairable(
    options: argparse.Namespace,
    selection: Selection,
    span: Range,
    ranges: Sequence[Range],
    done: Sequence[ShardInfo],
    notify: Notify,
) -> tuple[list[Range], list[ShardInfo]]:
    """Adds the ranges of shards that can be repaired (see `repairable_shards`); also returns the shards that stay.

    Old shards stay in the folder until they are replaced, but are removed from the index first: after a kill, each
    shard is read as it is then.
    """
    repairable = repairable_shards(options.outdir, done, selection, span)
    notify(f"--again: {len(repairable):,} shards have records whose pictures can be read by now")
    if not repairable:
        return list(ranges), list(done)
    kept = [shard for shard in done if shard not in repairable]
    Index.of(load_index(options.outdir, strict=False).source, kept).save(options.outdir)
    return sorted([*ranges, *((shard.start, shard.end) for shard in repairable)]), kept


def job_of(options: argparse.Namespace, selection: Selection, answers: Answers | None) -> Job:
    """The task of the workers."""
    return Job(
        model=options.model,
        family=TRAINING_NAMES[options.model_type.rsplit("_", 1)[0]],
        dtype=options.dtype,
        selection=selection,
        folder=options.outdir,
        batch_tokens=options.batch_tokens,
        source=load_index(options.outdir, strict=False).source if any(options.outdir.glob(PATTERN)) else None,
        hidden_dtype=None if options.hidden_dtype == AUTO else options.hidden_dtype,
        answers=answers,
        self_check=options.self_check,
    )


def work(
    job: Job, done: Sequence[ShardInfo], ranges: Sequence[Range], records: int, workers: Sequence[str], notify: Notify
) -> list[Failure]:
    """Gives the ranges to the workers; returns those that failed, after all have ended.

    Raises:
        UserError: bad input, if this process does the work.
    """
    from eagle.hidden_states.shards import shard_name

    waiting = sum(last - first for first, last in ranges)
    old = [job.folder / shard_name(*span) for span in ranges]
    replaced = sum(path.stat().st_size for path in old if path.exists())
    progress = AllocationProgress(job.folder, done, records, waiting, job.source, notify, replaced)
    events = Events(progress.update, progress.add_shard, notify)
    with progress.bar:
        if not workers:
            run_here(job, ranges, events)
            return []
        return run_workers(job, ranges, workers, events)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return run(parser().parse_args(argv), lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    sys.exit(run_cli(main, "finished shards are kept, and the same command resumes"))

"""Flags that say where samples come from: folders of stored hidden states, or annotation files and the base model."""

from __future__ import annotations

import argparse
from pathlib import Path

from eagle.arguments import DTYPES, positive
from eagle.families import TRAINING_NAMES
from llava.errors import UserError

IMAGE_FOLDER = Path("image_data")


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Adds both groups."""
    stored = parser.add_argument_group("stored hidden states (eagle.ge_data.allocation), of one set or both")
    stored.add_argument("--tmpdir_t", metavar="DT", help="those of the text set")
    stored.add_argument("--tmpdir_v", metavar="DV", help="those of the image set")
    add = parser.add_argument_group("without stored hidden states, with one annotation file or both").add_argument
    add("--online", action="store_true", help="run the base model beside the draft")
    add("--annotations_t", type=Path, metavar="FILE", help="annotation file of the text set: its rows without picture")
    add("--annotations_v", type=Path, metavar="FILE", help="annotation file of the image set: its rows with one")
    add("--image-folder", type=Path, metavar="DIR", help=f"where the rows' pictures lie (default {IMAGE_FOLDER})")
    add("--limit", type=positive, metavar="N", help="at most so many rows of each file, in shuffled order")
    add("--model_type", choices=TRAINING_NAMES, help="the family that the base model must be of (default: any)")
    add("--dtype", choices=DTYPES, help="dtype of the base model (default auto, the checkpoint's)")
    add("--batch-tokens", type=positive, metavar="N", help="most tokens of its forward (default 8192, on a CPU 1024)")


def check_sources(args: argparse.Namespace) -> None:
    """Sets the defaults of the flags that belong to --online.

    Raises:
        UserError: no data, or flags of both ways together.
    """
    stored = {"--tmpdir_t": args.tmpdir_t, "--tmpdir_v": args.tmpdir_v}
    files = {"--annotations_t": args.annotations_t, "--annotations_v": args.annotations_v}
    others = {"--image-folder": args.image_folder, "--limit": args.limit, "--model_type": args.model_type}
    others.update({"--dtype": args.dtype, "--batch-tokens": args.batch_tokens})
    wanted = files if args.online else stored
    fix = f"give {' or '.join(wanted)}, or both"
    for flag, value in (stored if args.online else {**files, **others}).items():
        if value is not None:
            raise UserError(f"{flag} is for training {'without' if args.online else 'with'} --online", fix=fix)
    if all(value is None for value in wanted.values()):
        raise UserError("no data", fix=fix)
    args.image_folder = args.image_folder or IMAGE_FOLDER
    args.dtype = args.dtype or "auto"

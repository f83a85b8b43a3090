"""Trains a draft head on stored hidden states, or on those of a base model that runs beside it.

    deepspeed --master_port 29504 --include localhost:0 main_deepspeed.py --deepspeed_config ds_config.json \\
        --tmpdir_v DV --tmpdir_t DT --basepath BASE --cpdir CKPT --config llava_v15_7B_config.json [--resume]

    deepspeed ... --online --annotations_v FILE --annotations_t FILE --image-folder image_data  (instead of --tmpdir_*)

More processes: another ``--include``, or ``--num_gpus 8``; nothing else changes. ``python main_deepspeed.py ...``
trains in one process without DeepSpeed. CKPT/final is the draft; `eagle.train.checkpoint` has the rest of CKPT.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eagle.train.settings import (
    DRAFT_KINDS,
    DRAFT_POSITIONS,
    TRACKERS,
    add_setting_flags,
    add_source_flags,
    check_settings,
)
from llava.arguments import OneLineParser
from llava.errors import INTERRUPT_STATUS, run_cli


def main() -> None:
    args = parse_args()
    if args.check:
        check_settings(args)
        print(Path(args.cpdir).absolute())
        return
    try:
        from eagle.train.run import train  # imports torch

        train(args)
    except KeyboardInterrupt:
        print(f"stopped; {how_to_resume(args)}", file=sys.stderr)
        raise SystemExit(INTERRUPT_STATUS) from None


def how_to_resume(args: argparse.Namespace) -> str:
    """What a stopped run leaves, and which command resumes it."""
    newest = Path(args.cpdir).absolute() / "latest"
    if not newest.is_file():
        return "there is no checkpoint yet, and the same command starts again"
    name = newest.read_text(encoding="utf-8").strip()
    return f"the same command{'' if args.resume else ' with --resume'} resumes from {newest.with_name(name)}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--basepath", required=True, metavar="BASE", help="base model, folder or hub name")
    parser.add_argument("--cpdir", required=True, metavar="CKPT", help="folder of the checkpoints")
    parser.add_argument(
        "--config",
        required=True,
        help="draft's config.json with a 'train' section; a bare name may be a shipped one; auto: the base's sizes",
    )
    parser.add_argument("--draft-kind", choices=DRAFT_KINDS, help="kind of draft by --config auto (default msd)")
    parser.add_argument(
        "--draft-positions",
        choices=DRAFT_POSITIONS,
        help="position ids of a draft by --config auto (default: mrope for an EAGLE-3 head of a base with M-RoPE, else "
        "plain, which vLLM's V2 runner gives every EAGLE-3 head)",
    )
    parser.add_argument("--deepspeed_config", required=True, help="batch sizes, precision, ZeRO (ds_config.json)")
    parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in CKPT, if any")
    parser.add_argument("--init", metavar="DRAFT", help="start from this draft's weights, folder or hub name")
    parser.add_argument(
        "--tracker", choices=TRACKERS, default="tensorboard", help="where values go (default %(default)s)"
    )
    parser.add_argument(
        "--eval-data", type=Path, metavar="FILE.jsonl",
        help="answer some of these questions during training, by the decoding loop with the draft so far; loads the "
        "base model beside it",
    )  # fmt: skip
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check the flags and --config, and print the folder of the checkpoints",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    add_source_flags(parser)
    add_setting_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_cli(main))

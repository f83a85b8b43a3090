"""Upload a draft with its model card to the hub; --out only writes both into a folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd push`."""
    parser.add_argument("--msd-model", required=True, metavar="D", help="folder of the draft")
    parser.add_argument("--repo", required=True, metavar="R", help="hub repository, owner/name; created if needed")
    parser.add_argument("--private", action="store_true", help="make the new repository private")
    parser.add_argument("--base-model", help="its base model (default: the one recorded by training)")
    parser.add_argument(
        "--bench", type=Path, metavar="FILE.json",
        help="report of `msd bench --out` on this draft, or results of lmms-eval with --msd_baseline",
    )  # fmt: skip
    parser.add_argument("--license", help="licence of the weights (default: that of the base model)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the files here and upload nothing")


def run(arguments: argparse.Namespace) -> int:
    """Uploads the draft, or writes its files, and prints where they are."""
    from rich.console import Console

    from eagle.publish import push_to_hub, write_release

    draft, repo, console = arguments.msd_model, arguments.repo, Console(soft_wrap=True, highlight=False)
    about = {"base_model": arguments.base_model, "license": arguments.license, "bench": arguments.bench}
    if arguments.out is not None:
        console.print(f"written, not pushed: {write_release(draft, arguments.out, repo, **about)}", markup=False)
    else:
        console.print(f"pushed: {push_to_hub(draft, repo, private=arguments.private, **about)}", markup=False)
    return 0

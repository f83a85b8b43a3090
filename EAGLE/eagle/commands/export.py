"""Write a draft for a serving engine, or a base model in the layout that engines read."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from llava.errors import UserError

NOT_SGLANG = (
    "SGLang's format cannot carry an MSD draft: its EAGLE class sends every row through fc, so there are no decoupled "
    "picture rows, and it has neither input_layernorm nor attention biases"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd export`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", choices=("vllm", "sglang"), help="engine that a draft is written for")
    what.add_argument("--base", metavar="BASE", help="base model in the liuhaotian layout: write it in transformers'")
    parser.add_argument("--msd-model", help="draft head: folder or hub name (with --to)")
    parser.add_argument(
        "--base-model",
        help="with --to: base model that the draft is compared with, and that gives missing rows of the vocabulary",
    )
    parser.add_argument(
        "--layout", choices=("flat", "speculators"),
        help="of an EAGLE-3 head: one of the two that vLLM reads (default flat; speculators needs --base-model)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; new or empty")


def run(arguments: argparse.Namespace) -> int:
    """Writes the folder and prints how it is used."""
    if arguments.base is not None:
        for name in ("msd_model", "base_model", "layout"):
            if getattr(arguments, name):
                raise UserError(f"--base does not go with --{name.replace('_', '-')}", fix="export one at a time")
        from llava.export import export_pretrained

        print(f"wrote {export_pretrained(arguments.base, arguments.out)}: the base in transformers' layout")
        return 0
    if not arguments.msd_model:
        raise UserError("no draft head", where="--msd-model", fix="name a folder or hub repository")
    from eagle.drafts.checkpoint import load_draft
    from eagle.drafts.eagle3 import Eagle3Draft
    from eagle.drafts.msd import DraftModel
    from eagle.serving.draft import export_draft
    from eagle.serving.engine import Vllm, server_command

    draft = load_draft(arguments.msd_model, device="meta")
    if isinstance(draft, Eagle3Draft):
        return export_head(arguments)
    if arguments.to == "sglang":
        if isinstance(draft, DraftModel):
            raise UserError(NOT_SGLANG, fix="serve it with vLLM: --to vllm")
        raise UserError(f"{draft.kind} heads are not exported to SGLang, only EAGLE-3 heads are", arguments.msd_model)
    if arguments.layout:
        raise UserError(f"--layout is for EAGLE-3 heads, this is one of the {draft.kind} heads", arguments.msd_model)
    folder = export_draft(arguments.msd_model, arguments.out, arguments.base_model)
    base = arguments.base_model or "BASE"
    command = server_command(Vllm("python", has_command=True), base, str(folder), 5, base)
    print(f"wrote {folder}; with vLLM and msd-vllm installed:\n{shlex.join(command)}")
    if arguments.base_model is None:
        print("the draft was not compared with its base model: --base-model does that")
    return 0


def export_head(arguments: argparse.Namespace) -> int:
    """Writes an EAGLE-3 head and prints how it is served."""
    from eagle.serving.eagle3_export import TOKENS, export_eagle3

    base = arguments.base_model
    folder = export_eagle3(arguments.msd_model, arguments.out, arguments.layout or "flat", base, arguments.to)
    if arguments.to == "sglang":
        command = ["python", "-m", "sglang.launch_server", "--model-path", base, "--speculative-algorithm", "EAGLE3"]
        command += ["--speculative-draft-model-path", str(folder), "--speculative-num-steps", "3"]
        command += ["--speculative-eagle-topk", "4", "--speculative-num-draft-tokens", "16"]
        print(f"wrote {folder}; with SGLang (not run by the tests of this package):\n{shlex.join(command)}")
        return 0
    settings = json.dumps({"method": "eagle3", "model": str(folder), "num_speculative_tokens": TOKENS})
    print(
        f"wrote {folder}; with vLLM:\n{shlex.join(['vllm', 'serve', base or 'BASE', '--speculative-config', settings])}"
    )
    print("msd doctor --served-by vllm compares what it was trained with and what vLLM does")
    return 0

"""Serve a base model with its draft by vLLM: OpenAI's interface, batches, streaming.

Needs vLLM and the plugin msd-vllm, in this environment or in that of --vllm-python. What vLLM cannot read as it is (the
draft, a base in the liuhaotian layout) is exported into the cache first. Arguments behind -- go to vLLM.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from contextlib import redirect_stdout
from functools import partial

from eagle.arguments import port, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd serve`."""
    parser.add_argument("--base-model", required=True, help="base model: folder or hub name")
    parser.add_argument("--msd-model", required=True, help="draft head: folder or hub name")
    parser.add_argument("--port", type=port, help="port of the server (default: vLLM's, 8000)")
    parser.add_argument(
        "--num-speculative-tokens", type=positive, default=5, metavar="K", help="drafted in each cycle (default: 5)"
    )
    parser.add_argument(
        "--vllm-python", default=sys.executable, metavar="FILE",
        help="Python of the environment with vLLM and msd-vllm (default: this one)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="export, print the command, and do not run it")
    parser.add_argument("vllm", nargs="*", metavar="-- VLLM ARGUMENTS", help="further arguments of vLLM's server")


def run(arguments: argparse.Namespace) -> int:
    """Prints vLLM's command and becomes it."""
    from eagle.serving.engine import check_arguments, executed, require_vllm, server_command

    check_arguments(arguments.port, arguments.vllm)
    vllm = require_vllm(arguments.vllm_python)
    if vllm.note:
        print(f"warning: {vllm.note}", file=sys.stderr)
    with redirect_stdout(sys.stderr):  # the command alone is on stdout: deepspeed logs there when a model is saved
        base, draft = exported_pair(arguments.base_model, arguments.msd_model)
    command = server_command(
        vllm, base, draft, arguments.num_speculative_tokens, arguments.base_model, arguments.port, arguments.vllm
    )
    print(shlex.join(command), flush=True)
    if not arguments.dry_run:
        started = executed(command, vllm)
        os.execv(started[0], started)
    return 0


def exported_pair(base: str, draft: str) -> tuple[str, str]:
    """The names under which vLLM loads the models; what it cannot read as it is, is exported into the cache."""
    from eagle.families import family_of
    from eagle.serving.draft import export_draft
    from eagle.serving.engine import kept_export
    from llava.export import export_pretrained, needs_export

    kept = kept_export([draft, base], partial(export_draft, draft, base=base))
    if family_of(base).name == "llava" and needs_export(base):
        base = str(kept_export([base], partial(export_pretrained, base)))
    return base, str(kept)

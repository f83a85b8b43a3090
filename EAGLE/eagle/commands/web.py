"""Serve a web page: ask about a picture and watch the answer; drafted tokens are coloured by their tree depth."""

from __future__ import annotations

import argparse
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle.arguments import (
    POCKET,
    add_data_options,
    add_length_option,
    add_model_options,
    port,
    positive,
    use_pocket_defaults,
)
from eagle.extras import require
from eagle.questions import Question, pick_questions, read_questions
from llava.errors import UserError

SAMPLES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd web`; without models it takes the repository's pocket models."""
    add_model_options(parser, required=False)
    add_data_options(parser, required=False)
    add_length_option(parser, default=512)
    parser.add_argument(
        "--samples", type=positive, default=SAMPLES, help=f"pictures to choose from (default: {SAMPLES})"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="host name that requests may use besides this machine's own, for a proxy; may be repeated",
    )  # fmt: skip
    parser.add_argument("--port", type=port, default=7860, help="port, 0 for any free one (default: 7860)")


def run(arguments: argparse.Namespace) -> int:
    """Loads the models, prints the address and serves until Ctrl-C."""
    for package in ("starlette", "uvicorn"):
        require(package, extra="web")
    from eagle.loading import load_model
    from eagle.web.app import Page

    if arguments.base_model is None:
        use_pocket_defaults(arguments)
    listener = listen(arguments.host, arguments.port)
    with listener:
        samples = samples_of(arguments)
        model = load_model(arguments, need_draft=arguments.msd_model is not None)
        about = {
            "base_model": Path(arguments.base_model).name,
            "msd_model": Path(arguments.msd_model).name if arguments.msd_model else None,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        }
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"msd web: http://{shown}:{port}  (Ctrl-C stops it)", flush=True)
        names = allowed(host, arguments.allow_host)
        serve(Page(model, about, arguments.max_new_tokens, samples), listener, names)
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    if not host.strip():  # the system would listen on all addresses
        raise UserError("no address", "--host", "give one, such as 127.0.0.1, or 0.0.0.0 for all of this machine")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen ({getattr(error, 'strerror', None) or error})",
            f"{host}:{port}",
            "give another --port or --host",
        ) from None


def samples_of(arguments: argparse.Namespace) -> list[Question]:
    """Questions with a picture to choose from: those of ``--data``, or the pocket's own with a pocket model."""
    data = arguments.data
    if data is None and Path(arguments.base_model).resolve().parent == POCKET.resolve():
        data = POCKET / "data" / "heldout.jsonl"
    return [] if data is None else pick_questions(read_questions(data, arguments.limit), arguments.samples)


def allowed(host: str, more: Sequence[str]) -> list[str]:
    """Host names that requests may use, "*" for any. On a loopback address these are its own names and ``more`` (those
    of a proxy): this keeps out web pages whose own host name resolves to this machine (DNS rebinding)."""
    if not ipaddress.ip_address(host).is_loopback:
        return list(more) or ["*"]
    return [f"[{host}]" if ":" in host else host, "localhost", *more]


def serve(page: Any, listener: socket.socket, hosts: Sequence[str]) -> None:
    """Answers requests for ``hosts`` until Ctrl-C."""
    import uvicorn

    from eagle.web.app import application
    from eagle.web.connection import Connection

    config = uvicorn.Config(
        application(page, hosts), http=Connection, ws="none", log_level="warning", timeout_graceful_shutdown=2
    )
    uvicorn.Server(config).run(sockets=[listener])

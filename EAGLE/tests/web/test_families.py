"""The page's answers for each of today's families: straight to the application, without a browser or a socket."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_families import FAMILY_MAKERS
from tiny_llava import make_image

from eagle.commands import web
from eagle.decode.msd import MSDModel
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from eagle.web.app import Page, application

pytestmark = pytest.mark.slow
IN_CI = ("qwen3_vl", "gemma3")
"""The others are run by hand."""
FAMILIES = [pytest.param(name, marks=[] if name in IN_CI else pytest.mark.by_hand) for name in FAMILY_MAKERS]
QUESTION = "How many shapes can you count here?"
NEW = 24


def answer(model: MSDModel, **asked: Any) -> list[dict[str, Any]]:
    """The events of one request to the page."""
    served, parts = application(Page(model, {}, NEW, []), web.allowed("127.0.0.1", [])), [b""]
    body = json.dumps(asked).encode()

    async def request() -> None:
        given, open_end = iter([{"type": "http.request", "body": body, "more_body": False}]), asyncio.Event()

        async def receive() -> dict[str, Any]:
            message = next(given, None)
            if message is None:
                await open_end.wait()  # the client stays
            assert message is not None
            return message

        async def send(message: dict[str, Any]) -> None:
            assert message.get("status", 200) == 200
            parts.append(message.get("body", b""))

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        headers.append((b"content-length", str(len(body)).encode()))
        scope = {"type": "http", "method": "POST", "path": "/answer", "headers": headers, "query_string": b""}
        await served(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(request(), 600))
    return [json.loads(line) for line in b"".join(parts).splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_about_a_picture(family: str, tmp_path: Path) -> None:
    target = load_target(FAMILY_MAKERS[family](tmp_path / "base"), dtype="float32")
    draft = load_draft(make_draft(tmp_path / "draft", target, agree=1.0), dtype=torch.float32)
    tree = TreeConfig(2, 4, 9) if target.verifies_trees else TreeConfig(2, 1, 3)
    model = MSDModel(target, draft, tree)
    make_image(tmp_path / "a.png", width=60, height=50)
    inputs = target.prepare(target.chat_prompt(QUESTION, 1), [tmp_path / "a.png"])
    output = model.generate(**inputs, temperature=0.0, max_new_tokens=NEW)
    expected = model.tokenizer.decode(output.tokens[0], skip_special_tokens=True)
    image = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    for msd in (True, False):
        *_, end = answer(model, question=QUESTION, image=image, max_new_tokens=NEW, msd=msd)
        assert end["kind"] == "end", end
        assert end["text"] == expected != ""
        assert end["new_tokens"] == output.stats.new_tokens
    no_picture = answer(model, question=QUESTION, max_new_tokens=NEW)[-1]
    assert no_picture["text"] != expected, "the picture changes the answer"

"""The web application: one page, sample pictures, and answers as a stream of JSON lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from eagle.decode.msd import MSDModel
from eagle.questions import Question
from eagle.web.request import AnswerRequest
from eagle.web.stream import Answerer, PieceStreamer
from llava.errors import UserError

FOLDER = Path(__file__).parent
MAX_BODY = 32 * 2**20  # bytes of a request: a picture of 24 MB in base64
# The page loads nothing from other servers, and no other page may show it in a frame.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Accel-Buffering": "no",  # nginx then forwards an answer without buffering
}


class Page:
    """The routes.

    Args:
        about: what the page shows about the models.
        longest: maximal number of new tokens of an answer.
        samples: questions with a picture, to choose from.
    """

    def __init__(self, model: MSDModel, about: dict[str, Any], longest: int, samples: Sequence[Question] = ()) -> None:
        self.model, self.about, self.longest, self.samples = model, about, longest, list(samples)
        self._answerer = Answerer(model)

    def routes(self) -> list[Route]:
        return [
            Route("/", self.file("page.html")),
            Route("/page.css", self.file("page.css")),
            Route("/page.js", self.file("page.js")),
            Route("/about", self.describe),
            Route("/samples/{number:int}", self.sample),
            Route("/answer", self.answer, methods=["POST"]),
        ]

    @staticmethod
    def file(name: str) -> Any:
        """A route that returns one file of the page."""

        async def give(request: Request) -> Response:
            return FileResponse(FOLDER / name, headers=HEADERS)

        return give

    async def describe(self, request: Request) -> Response:
        """Models and samples, as JSON."""
        samples = [
            {"picture": f"samples/{number}", "question": sample.question} for number, sample in enumerate(self.samples)
        ]
        about = {**self.about, "longest": self.longest, "draft": self.model.draft is not None, "samples": samples}
        return JSONResponse(about, headers=HEADERS)

    async def sample(self, request: Request) -> Response:
        """The picture of a sample."""
        number = request.path_params["number"]
        if number >= len(self.samples):
            return JSONResponse({"message": f"there are {len(self.samples)} samples"}, status_code=404)
        return FileResponse(self.samples[number].images[0], headers=HEADERS)

    async def answer(self, request: Request) -> Response:
        """Streams the events of a `PieceStreamer`, one JSON object a line. A bad request has status 400. A picture that
        cannot be read is an "error" event."""
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return JSONResponse({"message": "send application/json"}, status_code=415)
        body, size = bytearray(), 0
        async for part in request.stream():  # to its end: a client reads no response before it has sent all
            size += len(part)
            if size <= MAX_BODY:
                body += part
        if size > MAX_BODY:
            return JSONResponse({"message": f"over {MAX_BODY // 2**20} MB"}, status_code=413)
        try:
            asked = AnswerRequest.from_json(json.loads(body), self.longest)
        except (ValueError, RecursionError):
            return JSONResponse({"message": "the request is not JSON"}, status_code=400)
        except UserError as error:
            return JSONResponse({"message": str(error)}, status_code=400)
        lines = _lines(self._answerer.answer(asked))
        return StreamingResponse(lines, media_type="application/x-ndjson", headers=HEADERS)


async def _lines(streamer: PieceStreamer) -> AsyncIterator[str]:
    """Each event as a line. Stops the decoding when the client leaves."""
    kind = "tokens"
    try:
        while kind == "tokens":
            event = await asyncio.to_thread(streamer.events.get)
            kind = event["kind"]
            yield json.dumps(event, ensure_ascii=False) + "\n"
    finally:
        streamer.gone.set()


def application(page: Page, hosts: Sequence[str]) -> Starlette:
    """The ASGI application. Requests for host names other than ``hosts`` are refused ("*" allows all)."""
    return Starlette(routes=page.routes(), middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))])

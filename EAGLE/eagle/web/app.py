"""The web application: one page, sample pictures, and answers as a stream of JSON lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from eagle.decode.msd import MSDModel
from eagle.questions import Question
from eagle.web.request import MAX_PICTURE, MAX_SIDE, AnswerRequest
from eagle.web.stream import LAST, Answerer, Event
from llava.errors import UserError

FOLDER = Path(__file__).parent
MAX_BODY = 32 * 2**20  # bytes of a request: a picture in base64 and a question
MAX_OPEN = 16  # requests that are read, wait or run
UPLOAD_SECONDS = 120.0  # for the body of a request
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
        self._open = 0

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
        limits = {"longest": self.longest, "max_picture": MAX_PICTURE, "max_side": MAX_SIDE}
        about = {**self.about, **limits, "draft": self.model.draft is not None, "samples": samples}
        return JSONResponse(about, headers=HEADERS)

    async def sample(self, request: Request) -> Response:
        """The picture of a sample."""
        number = request.path_params["number"]
        if number >= len(self.samples):
            return refusal(404, f"there are {len(self.samples)} samples")
        return FileResponse(self.samples[number].images[0], headers=HEADERS)

    async def answer(self, request: Request) -> Response:
        """Streams the events of a `PieceStreamer`, one JSON object a line. A bad request has status 400. A picture that
        cannot be read is an "error" event, and so is a prompt that is too long for the model."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return refusal(415, "send application/json")
        if self._open == MAX_OPEN:
            return refusal(503, f"{MAX_OPEN} requests are open: ask again later")
        self._open += 1
        asked: AnswerRequest | Response | None = None
        try:
            asked = await self._read(request)
        finally:
            if not isinstance(asked, AnswerRequest):
                self._open -= 1
        return self._start(asked) if isinstance(asked, AnswerRequest) else asked

    async def _read(self, request: Request) -> AnswerRequest | Response:
        """The question of a request, or why it is refused. A body that is too large is not read to its end."""
        try:
            body = await asyncio.wait_for(read_body(request), UPLOAD_SECONDS)
            if body is None:
                return refusal(413, f"over {MAX_BODY // 2**20} MB")
            return await asyncio.to_thread(parse, body, self.longest)
        except ClientDisconnect:
            return refusal(400, "the request ended early")
        except asyncio.TimeoutError:
            return refusal(408, f"the request took over {UPLOAD_SECONDS:.0f} s")
        except UserError as error:
            return refusal(400, str(error))

    def _start(self, asked: AnswerRequest) -> Response:
        """Queues a request. The response ends it if the client leaves."""
        events, loop = asyncio.Queue[Event](), asyncio.get_running_loop()

        def send(event: Event) -> None:  # in the thread that decodes
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(arrive, event)

        def arrive(event: Event) -> None:
            self._open -= event["kind"] in LAST
            events.put_nowait(event)

        streamer = self._answerer.answer(asked, send)
        return EventStream(lines(events), partial(self._answerer.leave, streamer))


class EventStream(StreamingResponse):
    """A stream of JSON lines. ``leave`` is called at its end, however it ends."""

    def __init__(self, content: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(content, media_type="application/x-ndjson", headers=HEADERS)
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def lines(events: asyncio.Queue[Event]) -> AsyncIterator[str]:
    """Each event as a line, up to the last one."""
    kind = None
    while kind not in LAST:
        event = await events.get()
        kind = event["kind"]
        yield json.dumps(event, ensure_ascii=False) + "\n"


async def read_body(request: Request) -> bytes | None:
    """The body of a request, or None if it is longer than `MAX_BODY`."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY:
        return None
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


def parse(body: bytes, longest: int) -> AnswerRequest:
    """`AnswerRequest.from_json` of a body.

    Raises:
        UserError: it is not JSON, or not such a request.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the request is not JSON") from None
    return AnswerRequest.from_json(given, longest)


def refusal(status: int, message: str) -> Response:
    """A response that says in one line why there is no answer."""
    return JSONResponse({"message": message}, status_code=status, headers=HEADERS)


def application(page: Page, hosts: Sequence[str]) -> Starlette:
    """The ASGI application. Requests for host names other than ``hosts`` are refused ("*" allows all)."""
    return Starlette(routes=page.routes(), middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))])

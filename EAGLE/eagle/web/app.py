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
from eagle.web.request import MAX_PICTURE, MAX_QUESTION, MAX_SIDE, AnswerRequest
from eagle.web.stream import LAST, Answerer, Event
from llava.errors import UserError
from llava.files import DuplicateKey, unique_keys

FOLDER = Path(__file__).parent
MAX_BODY = 32 * 2**20  # bytes of a request: a picture in base64 and a question
MAX_OPEN = 16  # requests that wait or run
MAX_UPLOADS = 16  # requests that are read; one more ends the one that has been read longest
UPLOAD_SECONDS = 120.0  # for the body of a request
STALL_SECONDS = 10.0  # for its next part
# The page loads nothing from other servers, and no other page may show it in a frame.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Accel-Buffering": "no",  # nginx then forwards an answer without buffering
}


class UploadEnded(Exception):
    """A request was not read to its end, because others take its place."""


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
        self._uploads: list[asyncio.Future[bytes | None]] = []  # bodies that arrive, the oldest first
        self._parsing = 0

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
        limits = {
            "longest": self.longest,
            "max_picture": MAX_PICTURE,
            "max_side": MAX_SIDE,
            "max_question": MAX_QUESTION,
        }
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
            return full()
        asked = await self._read(request)
        if isinstance(asked, Response):
            return asked
        return full() if self._open == MAX_OPEN else self._start(asked)

    async def _read(self, request: Request) -> AnswerRequest | Response:
        """The question of a request, or why it is refused. A body that is too large is not read to its end."""
        try:
            body = await self._receive(request)
            if body is None:
                return refusal(413, f"the request has over {MAX_BODY // 2**20} MB (give a smaller picture)")
            self._parsing += 1
            try:
                return await asyncio.to_thread(parse, body, self.longest)
            finally:
                self._parsing -= 1
        except ClientDisconnect:
            return refusal(400, "the request ended early")
        except asyncio.TimeoutError:
            limits = f"{STALL_SECONDS:.0f} s without a part of it, or {UPLOAD_SECONDS:.0f} s in all"
            return refusal(408, f"the request did not arrive in time ({limits})")
        except UploadEnded:
            return refusal(503, "too many requests arrive, and this one is slow: ask again later")
        except UserError as error:
            return refusal(400, str(error))

    async def _receive(self, request: Request) -> bytes | None:
        """`read_body` in `UPLOAD_SECONDS`.

        Raises:
            UploadEnded: another request has taken its place.
        """
        if len(self._uploads) + self._parsing >= MAX_UPLOADS:
            if not self._uploads:
                raise UploadEnded
            self._uploads.pop(0).cancel()
        reading = asyncio.ensure_future(read_body(request))
        self._uploads.append(reading)
        try:
            return await asyncio.wait_for(reading, UPLOAD_SECONDS)
        except asyncio.CancelledError:
            if reading in self._uploads:  # the server stops
                raise
            raise UploadEnded from None
        finally:
            if reading in self._uploads:
                self._uploads.remove(reading)

    def _start(self, asked: AnswerRequest) -> Response:
        """Queues a request. The response ends it if the client leaves."""
        events, loop = asyncio.Queue[Event](), asyncio.get_running_loop()

        def send(event: Event) -> None:  # in the thread that decodes
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(arrive, event)

        def arrive(event: Event) -> None:
            self._open -= event["kind"] in LAST
            events.put_nowait(event)

        self._open += 1
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
    """The body of a request, or None if it is longer than `MAX_BODY`.

    Raises:
        asyncio.TimeoutError: no part of it came for `STALL_SECONDS`.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY:
        return None
    body, parts = bytearray(), request.stream()
    while (part := await asyncio.wait_for(anext(parts, None), STALL_SECONDS)) is not None:
        body += part
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


def parse(body: bytes, longest: int) -> AnswerRequest:
    """`AnswerRequest.from_json` of a body.

    Raises:
        UserError: it is not JSON, has a key with two values, or is not such a request.
    """
    try:
        given = json.loads(body, object_pairs_hook=unique_keys)
    except DuplicateKey as error:
        raise UserError(str(error), fix="keep one of its values") from None
    except (ValueError, RecursionError):
        raise UserError("the request is not JSON") from None
    return AnswerRequest.from_json(given, longest)


def full() -> Response:
    """The refusal of a request for which there is no place."""
    return refusal(503, f"{MAX_OPEN} requests are open: ask again later")


def refusal(status: int, message: str) -> Response:
    """A response that says in one line why there is no answer."""
    return JSONResponse({"message": message}, status_code=status, headers=HEADERS)


def application(page: Page, hosts: Sequence[str]) -> Starlette:
    """The ASGI application. Requests for host names other than ``hosts`` are refused ("*" allows all)."""
    return Starlette(routes=page.routes(), middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))])

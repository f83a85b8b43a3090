"""An answer as the page receives it: pieces of text, each with the depth in the draft tree at which it was accepted."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eagle.decode.detokenizer import Detokenizer
from eagle.decode.msd import MSDModel
from eagle.decode.sampling import SamplingSettings
from eagle.web.request import AnswerRequest
from llava.errors import UserError, is_out_of_memory

Event = dict[str, Any]
LAST = ("end", "error", "gone")
"""Kinds of the last event of a request."""


class ClientGone(Exception):
    """The client has closed the connection."""


@dataclass
class PieceStreamer:
    """A streamer (see `eagle.decode.decoder.DecodingSettings`) that turns cycles into events.

    Attributes:
        send: called with each event, from any thread. While the request waits: {"kind": "waiting", "ahead"} with the
            number of requests before it, 0 when the model begins to read the prompt. After each cycle: {"kind":
            "tokens", "pieces": [[text, depth], ...], "new_tokens", "tau", "tokens_per_second"}. Depth 1 is a child of
            the tree's root, 0 a token of the target itself. The last event is "end" with the statistics, "error" with a
            message, or "gone".
        gone: set when the client has left. The next layer of the prefill or the next cycle then raises `ClientGone`.
    """

    tokenizer: Any
    send: Callable[[Event], None]
    gone: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._text = Detokenizer(self.tokenizer)
        self._start, self._tokens, self._cycles = time.perf_counter(), 0, -1  # the first call is the prefill
        self._hooks: list[RemovableHandle] = []

    @contextmanager
    def watch_prefill(self, model: nn.Module) -> Iterator[None]:
        """Checks before each layer of ``model``, until the prefill is over, whether the client has left."""
        stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
        self._hooks = [layer.register_forward_pre_hook(lambda *_: self.check()) for part in stacks for layer in part]
        try:
            yield
        finally:
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def put(self, value: Tensor) -> None:
        """Starts the clock. ``value``: the prompt [1, P], which the page does not show."""
        self.check()
        self._start = time.perf_counter()

    def put_cycle(self, tokens: list[int], accepted: int) -> None:
        """The new tokens of a cycle. The first ``accepted`` of them were drafted, at depths 1, 2, ..."""
        self.check()
        self._remove_hooks()  # cycles are checked here; compiled layers run without hooks
        self._tokens += len(tokens)
        self._cycles += 1
        self._send(
            [[self._text.add(token), place if place <= accepted else 0] for place, token in enumerate(tokens, 1)]
        )

    def end(self) -> None:
        """Sends what is left of an incomplete character."""
        if rest := self._text.rest():
            self._send([[rest, 0]])

    def check(self) -> None:
        """Raises `ClientGone` if the client has left."""
        if self.gone.is_set():
            raise ClientGone

    def _send(self, pieces: list[list[Any]]) -> None:
        tau = (self._tokens - 1) / self._cycles if self._cycles else None
        speed = self._tokens / (time.perf_counter() - self._start)
        numbers = {"new_tokens": self._tokens, "tau": tau, "tokens_per_second": speed}
        self.send({"kind": "tokens", "pieces": pieces, **numbers})


class Answerer:
    """Answers requests one after the other, so none slows another. All run in the same thread, because compiled code
    and device state may belong to a thread."""

    def __init__(self, model: MSDModel) -> None:
        self.model = model
        self._waiting: list[tuple[AnswerRequest, PieceStreamer]] = []
        self._running = False
        self._changed = threading.Condition()  # guards the two above
        threading.Thread(target=self._work, daemon=True).start()

    def answer(self, request: AnswerRequest, send: Callable[[Event], None]) -> PieceStreamer:
        """Queues a request, whose events are passed to ``send``."""
        streamer = PieceStreamer(self.model.tokenizer, send)
        with self._changed:
            if ahead := len(self._waiting) + self._running:
                send({"kind": "waiting", "ahead": ahead})
            self._waiting.append((request, streamer))
            self._changed.notify()
        return streamer

    def leave(self, streamer: PieceStreamer) -> None:
        """The client of a request has left. A waiting request is dropped, a running one ends soon."""
        streamer.gone.set()
        with self._changed:
            kept = [(request, other) for request, other in self._waiting if other is not streamer]
            if len(kept) == len(self._waiting):
                return
            self._waiting = kept
            self._send_places()
        streamer.send({"kind": "gone"})

    def _send_places(self) -> None:
        for ahead, (_, streamer) in enumerate(self._waiting, start=int(self._running)):
            streamer.send({"kind": "waiting", "ahead": ahead})

    def _work(self) -> None:
        try:
            self.model.warm_up()
        except Exception:  # the first request says what is wrong
            traceback.print_exc()
        while True:
            request, streamer = self._next()
            last = self._last_event(request, streamer)
            with self._changed:
                self._running = False
            streamer.send(last)
            del request, streamer  # while nothing is asked, no picture is held

    def _next(self) -> tuple[AnswerRequest, PieceStreamer]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            self._send_places()
            self._running = True
            return self._waiting.pop(0)

    def _last_event(self, request: AnswerRequest, streamer: PieceStreamer) -> Event:
        try:
            return decode(self.model, request, streamer)
        except ClientGone:
            return {"kind": "gone"}
        except UserError as error:
            return {"kind": "error", "message": str(error)}
        except Exception as error:  # the next request is answered
            if is_out_of_memory(error):
                return {"kind": "error", "message": "out of memory (ask a shorter question, or for fewer new tokens)"}
            traceback.print_exc()  # a defect
            return {"kind": "error", "message": f"{type(error).__name__}: see the terminal of msd web"}


def decode(model: MSDModel, request: AnswerRequest, streamer: PieceStreamer) -> Event:
    """Answers a request. Returns the "end" event; all others go to the streamer.

    Raises:
        ClientGone: the client has left.
        UserError: the picture cannot be read, or prompt and answer are too long for the model.
    """
    streamer.check()
    picture, target = request.picture(), model.target
    prompt = target.chat_prompt(request.question, num_images=int(picture is not None))
    inputs = target.prepare(prompt, [] if picture is None else [picture])
    target.check_length(inputs, request.max_new_tokens)
    with streamer.watch_prefill(target.model):
        output = model.generate(
            **inputs,
            use_msd=request.msd and model.draft is not None,
            **SamplingSettings(request.temperature).for_engine(),
            max_new_tokens=request.max_new_tokens,
            streamer=streamer,
        )
    names = ("new_tokens", "cycles", "tau", "tokens_per_second", "seconds")
    text = target.tokenizer.decode(output.tokens[0], skip_special_tokens=True)
    return {"kind": "end", "text": text, **{name: getattr(output.stats, name) for name in names}}

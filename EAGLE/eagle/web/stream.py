"""An answer as the page gets it: pieces of text, each with the depth in the draft tree at which it was accepted."""

from __future__ import annotations

import threading
import time
import traceback
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from eagle.decode.msd import MSDModel
from eagle.decode.sampling import SamplingSettings
from eagle.web.ask import Ask
from llava.errors import UserError

UNFINISHED = "�"  # what a tokenizer writes for the first bytes of a character
Event = dict[str, Any]


class Detokenizer:
    """Text of tokens that arrive one by one: `add` gives what a token adds, "" while its character is not complete."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._tokens = tokenizer, list[int]()
        self._from, self._read = 0, 0  # the text before token _read is out; from _from on it is decoded again

    def add(self, token: int) -> str:
        """The text that ``token`` adds."""
        self._tokens.append(token)
        text = self.rest()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._from, self._read = self._read, len(self._tokens)
        return text

    def rest(self) -> str:
        """The text that is not out yet: what an unfinished character has."""
        before = self._decode(self._tokens[self._from : self._read])
        return self._decode(self._tokens[self._from :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class Gone(Exception):
    """The reader of an answer has left."""


@dataclass
class PieceStreamer:
    """A streamer that turns cycles into events.

    ``events``: gets {"kind": "tokens", "pieces": [[text, depth], ...], "new_tokens", "tau", "tokens_per_second"} after
    each cycle; depth 1 is a child of the tree's root, 0 a token that the target gave itself. The last event is an "end"
    with the statistics, an "error" with a line to show, or "gone". ``gone``: set when nobody reads any more; the next
    cycle then ends with `Gone`.
    """

    tokenizer: Any
    events: SimpleQueue[Event] = field(default_factory=SimpleQueue)
    gone: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._text = Detokenizer(self.tokenizer)
        self._began, self._tokens, self._cycles = time.perf_counter(), 0, -1  # the first call is the prefill

    def put(self, value: Tensor) -> None:
        """The prompt [1, P], which the page does not show; starts the clock."""
        self.check()
        self._began = time.perf_counter()

    def put_cycle(self, tokens: list[int], accepted: int) -> None:
        """The new tokens of a cycle, of which the first ``accepted`` were drafted, at depth 1, 2, ..."""
        self.check()
        self._tokens += len(tokens)
        self._cycles += 1
        pieces = [[self._text.add(token), place if place <= accepted else 0] for place, token in enumerate(tokens, 1)]
        self._send(pieces)

    def end(self) -> None:
        """What is left of an unfinished character."""
        if rest := self._text.rest():
            self._send([[rest, 0]])

    def _send(self, pieces: list[list[Any]]) -> None:
        self.events.put(
            {
                "kind": "tokens",
                "pieces": pieces,
                "new_tokens": self._tokens,
                "tau": (self._tokens - 1) / self._cycles if self._cycles else None,
                "tokens_per_second": self._tokens / (time.perf_counter() - self._began),
            }
        )

    def check(self) -> None:
        """Raises `Gone` when nobody reads any more."""
        if self.gone.is_set():
            raise Gone


class Answerer:
    """Decodes in one thread of its own, so that answers are made one after the other and none slows another. It is
    always the same thread, since what is compiled or planned for a device may belong to a thread."""

    def __init__(self, model: MSDModel) -> None:
        self.model = model
        self._waiting: SimpleQueue[tuple[Ask, PieceStreamer]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def answer(self, ask: Ask) -> PieceStreamer:
        """Puts an answer into the queue; what it sends comes out of the streamer's ``events``."""
        streamer = PieceStreamer(self.model.tokenizer)
        self._waiting.put((ask, streamer))
        return streamer

    def _work(self) -> None:
        """A defect is told to the page and to the terminal, and the next answer is made nevertheless."""
        while True:
            ask, streamer = self._waiting.get()
            try:
                decode(self.model, ask, streamer)
            except Exception as error:
                streamer.events.put(
                    {"kind": "error", "message": f"{type(error).__name__}: see the terminal of msd web"}
                )
                traceback.print_exc()


def decode(model: MSDModel, ask: Ask, streamer: PieceStreamer) -> None:
    """Fills the streamer's events."""
    try:
        streamer.check()
        picture = ask.picture()
        target = model.target
        prompt = target.chat_prompt(ask.question, num_images=int(picture is not None))
        inputs = target.prepare(prompt, [] if picture is None else [picture])
        output = model.generate(
            **inputs,
            use_msd=ask.msd and model.draft is not None,
            **SamplingSettings(ask.temperature).for_engine(),
            max_new_tokens=ask.max_new_tokens,
            streamer=streamer,
        )
    except Gone:
        streamer.events.put({"kind": "gone"})
        return
    except UserError as error:
        streamer.events.put({"kind": "error", "message": str(error)})
        return
    (tokens,), stats = output.tokens, output.stats
    streamer.events.put(
        {
            "kind": "end",
            "text": target.tokenizer.decode(tokens, skip_special_tokens=True),
            "new_tokens": stats.new_tokens,
            "cycles": stats.cycles,
            "tau": stats.tau,
            "tokens_per_second": stats.tokens_per_second,
            "seconds": stats.seconds,
        }
    )

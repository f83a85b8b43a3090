"""A client of OpenAI-style servers: questions with pictures, streamed, and what the server's own counters say.

Works with any server that has ``/v1/chat/completions`` with streaming. Counters of speculation are read from
``/metrics`` under vLLM's names, where a server has them. Does not import torch or transformers.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

from eagle.questions import Question
from llava.errors import UserError, reason_of
from llava.image import data_url

TIMEOUT = 600.0
COUNTER = re.compile(r"vllm:spec_decode_num_(drafts|accepted_tokens|accepted_tokens_per_pos)_total\{(.*)\} (\S+)")
POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True)
class Answer:
    """One request. ``first`` and ``seconds``: from the request to its first text and to its end; ``tokens``: as the
    server counts them; ``error``: why there is no answer."""

    first: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    text: str = ""
    error: str = ""


@dataclass(frozen=True)
class Counters:
    """Speculation since the server's start: drafts, and accepted tokens of all and by position."""

    drafts: float = 0.0
    accepted: float = 0.0
    by_position: Mapping[int, float] = field(default_factory=dict)

    def since(self, before: Counters) -> Counters:
        positions = {place: count - before.by_position.get(place, 0) for place, count in self.by_position.items()}
        return Counters(self.drafts - before.drafts, self.accepted - before.accepted, positions)


@dataclass(frozen=True)
class Server:
    """A server by its address, such as http://127.0.0.1:8000."""

    url: str

    def connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("not the address of a server", self.url, "give one such as http://127.0.0.1:8000")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=TIMEOUT)

    def path(self, name: str) -> str:
        """``name`` below the path of the address; an address may end with /v1."""
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1") + name

    def get(self, name: str) -> str | None:
        """The text at a path, None if the server has none.

        Raises:
            UserError: there is no server.
        """
        connection = self.connect()
        try:
            connection.request("GET", self.path(name))
            response = connection.getresponse()
            text = response.read().decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise UserError("no server answers", self.url, reason_of(error)) from None
        finally:
            connection.close()
        return text if response.status == 200 else None

    def model(self) -> str:
        """Name of the first model.

        Raises:
            UserError: there is no server, or it is not an OpenAI-style one.
        """
        try:
            return json.loads(self.get("/v1/models") or "")["data"][0]["id"]
        except (ValueError, LookupError, TypeError):
            raise UserError("no models at /v1/models", self.url, "is it an OpenAI-style server?") from None

    def counters(self) -> Counters | None:
        """None if the server does not count speculation."""
        found = list(COUNTER.finditer(self.get("/metrics") or ""))
        totals = {"drafts": 0.0, "accepted_tokens": 0.0}
        positions: dict[int, float] = {}
        for kind, labels, value in (match.groups() for match in found):
            if kind in totals:
                totals[kind] += float(value)
            elif place := POSITION.search(labels):
                positions[int(place[1])] = positions.get(int(place[1]), 0.0) + float(value)
        return Counters(totals["drafts"], totals["accepted_tokens"], positions) if found else None

    def ask(self, body: Mapping[str, Any]) -> Answer:
        """One streamed chat completion. An error of the server or of the network is part of the answer."""
        connection, start, first = self.connect(), time.perf_counter(), 0.0
        pieces: list[str] = []
        tokens = 0
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", self.path("/v1/chat/completions"), json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                return Answer(error=f"status {response.status}: {response.read(300).decode('utf-8', 'replace')}")
            for event in events(response):
                if "error" in event:
                    return Answer(error=str(event["error"]))
                for choice in event.get("choices", []):
                    piece = choice["delta"].get("content") or ""
                    first = first or (time.perf_counter() - start if piece else 0.0)
                    pieces.append(piece)
                tokens = (event.get("usage") or {}).get("completion_tokens") or tokens
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            return Answer(error=reason_of(error))
        finally:
            connection.close()
        if not tokens:
            return Answer(error="the server counted no tokens of the answer (stream_options include_usage)")
        seconds = time.perf_counter() - start
        return Answer(first or seconds, seconds, tokens, "".join(pieces))


def events(response: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events.

    >>> list(events(iter([b'data: {"id": 1}\\n', b"\\n", b"data: [DONE]\\n"])))
    [{'id': 1}]
    """
    for line in response:
        data = line.strip().removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield json.loads(data)


def request_of(question: Question, model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a question's request, pictures as data URLs. In a conversation it has the user's turns so far, the
    pictures in the first one; `after` adds the answers."""
    content = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in question.images]
    first, *later = [{"type": "text", "text": text} for text in (*question.earlier, question.question)]
    messages = [{"role": "user", "content": parts} for parts in ([*content, first], *([text] for text in later))]
    return {
        "model": model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}, **settings,
    }  # fmt: skip


def after(body: Mapping[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
    """A request of a conversation with the server's answers to the turns before."""
    first, *later = body["messages"]
    said = [{"role": "assistant", "content": answer.text.strip()} for answer in answers]
    pairs = zip(said, later, strict=True)
    return {**body, "messages": [first, *(message for pair in pairs for message in pair)]}


def conversations(questions: Iterable[Question], model: str, settings: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Requests by conversation; a single question is one of a single turn."""
    found: list[list[dict[str, Any]]] = []
    for question in questions:
        body = request_of(question, model, settings)
        if question.earlier:
            found[-1].append(body)
        else:
            found.append([body])
    return found


@dataclass(frozen=True)
class Load:
    """How requests come: ``concurrency`` at a time, or ``rate`` a second at random moments, however many that are.
    Later turns of a conversation follow the answer before, at once."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.concurrency} at a time" if self.rate is None else f"{self.rate:g} a second"

    def starts(self, count: int, seed: int = 0) -> list[float]:
        """Seconds at which each request may begin, of a Poisson process with a rate; all at once without one."""
        at, moments, draw = 0.0, [], random.Random(seed)
        for _ in range(count):
            moments.append(at)
            at += draw.expovariate(self.rate) if self.rate else 0.0
        return moments


Requests = Sequence[Sequence[Mapping[str, Any]]]
"""Of each conversation, in the order of its turns."""


def run_load(server: Server, requests: Requests, load: Load) -> tuple[list[Answer], float]:
    """Answers in the order of the requests, and the seconds until the last one's end. After a turn that failed, the
    later turns of its conversation are not asked."""
    begin = time.perf_counter()

    def one(turns: Sequence[Mapping[str, Any]], at: float) -> list[Answer]:
        time.sleep(max(0.0, begin + at - time.perf_counter()))
        answers: list[Answer] = []
        for body in turns:
            failed = bool(answers and answers[-1].error)
            answers.append(Answer(error="the turn before failed") if failed else server.ask(after(body, answers)))
        return answers

    with ThreadPoolExecutor(load.concurrency or len(requests)) as pool:
        answers = list(pool.map(one, requests, load.starts(len(requests))))
    return [answer for each in answers for answer in each], time.perf_counter() - begin


def measure(server: Server, requests: Requests, load: Load) -> dict[str, Any]:
    """One row of the report.

    Raises:
        UserError: no request was answered.
    """
    before = server.counters()
    answers, seconds = run_load(server, requests, load)
    after = server.counters()
    good = [answer for answer in answers if not answer.error]
    if not good:
        raise UserError("no request was answered", server.url, answers[0].error)
    tokens = sum(answer.tokens for answer in good)
    gaps = [(each.seconds - each.first) / (each.tokens - 1) for each in good if each.tokens > 1]
    row: dict[str, Any] = {
        "concurrency": load.concurrency,
        "rate": load.rate,
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "error": next((answer.error for answer in answers if answer.error), None),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "first_token_ms": spread([1000 * answer.first for answer in good]),
        "between_tokens_ms": spread([1000 * gap for gap in gaps]),
        "answers": [None if answer.error else answer.text for answer in answers],
    }
    if before is not None and after is not None and (made := after.since(before)).drafts:
        row["acceptance_length"] = 1 + made.accepted / made.drafts
        row["accepted_by_position"] = [made.by_position[place] / made.drafts for place in sorted(made.by_position)]
    return row


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and 95th percentile; None without values.

    >>> spread([1.0, 2.0, 3.0])["median"]
    2.0
    """
    if not values:
        return None
    high = quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
    return {"median": median(values), "p95": high}

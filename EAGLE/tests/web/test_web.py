"""The server of `msd web` without a browser: what it answers, what it refuses, and when it stops decoding."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian

from eagle.cli import main
from eagle.commands import web
from eagle.decode.decoder import Decoder
from eagle.decode.detokenizer import Detokenizer
from eagle.decode.msd import MSDModel
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from eagle.questions import Question
from eagle.web import app, connection
from eagle.web.app import MAX_BODY, Page, application
from eagle.web.request import AnswerRequest
from eagle.web.stream import LAST, Answerer, ClientGone, Event, PieceStreamer, decode
from llava.errors import UserError

PATIENCE = 600  # seconds until a server that says nothing is given up
MANY = 10_000
QUESTION = "How many shapes can you count here?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("web")
    make_image(made / "a.png")
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> MSDModel:
    target = load_target(make_liuhaotian(folder / "base"), dtype="float32")
    draft = load_draft(make_draft(folder / "draft", target, agree=1.0), dtype=torch.float32)
    return MSDModel(target, draft, TreeConfig(2, 40, 120))  # a wide tree: a random draft is rarely right


@pytest.fixture(scope="module")
def page(model: MSDModel, folder: Path) -> Page:
    return Page(model, {"base_model": "base"}, 40, [Question("a", QUESTION, (folder / "a.png",))])


@pytest.fixture(scope="module")
def port(page: Page) -> Iterator[int]:
    """A running server; a daemon thread, as it ends with Ctrl-C alone."""
    listener = web.listen("127.0.0.1", 0)
    threading.Thread(target=web.serve, args=(page, listener, web.allowed("127.0.0.1", [])), daemon=True).start()
    yield listener.getsockname()[1]


def request(port: int, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json", **headers})
    return connection.getresponse()


def events(port: int, **ask: Any) -> list[dict[str, Any]]:
    response = request(port, "/answer", ask)
    assert response.status == 200
    first, *others = [json.loads(line) for line in response]
    assert first == {"kind": "waiting", "ahead": 0}
    return others


def test_pieces_are_the_answer_and_depths_are_those_of_the_cycles(model: MSDModel, port: int, folder: Path) -> None:
    image = base64.b64encode((folder / "a.png").read_bytes()).decode()
    *cycles, end = events(port, question=QUESTION, image=image, max_new_tokens=40)
    inputs = model.target.prepare(model.target.chat_prompt(QUESTION, num_images=1), [folder / "a.png"])
    output = model.generate(**inputs, temperature=0.0, max_new_tokens=40)
    assert end["kind"] == "end" and end["new_tokens"] == output.stats.new_tokens == 40
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    assert end["text"] == model.tokenizer.decode(tokens, skip_special_tokens=True)
    one_by_one = Detokenizer(model.tokenizer)  # random tokens are seldom whole characters
    expected = [one_by_one.add(token) for token in tokens.tolist()] + list(filter(None, [one_by_one.rest()]))
    assert [text for cycle in cycles for text, _ in cycle["pieces"]] == expected
    depths = [[depth for _, depth in cycle["pieces"]] for cycle in cycles if cycle["pieces"]]
    accepted = output.stats.accept_lengths
    assert max(accepted) > 0, "the draft has to agree somewhere"
    assert depths[0] == [0]
    assert depths[1 : len(accepted)] == [[*range(1, n + 1), 0] for n in accepted[:-1]]
    assert end["tau"] == output.stats.tau


def test_the_temperature_samples_whatever_the_checkpoint_says(model: MSDModel, port: int) -> None:
    """Qwen2-VL's own generation config takes the likeliest token at any temperature."""
    settings = model.target.model.generation_config
    before = settings.top_k
    settings.top_k = 1
    try:
        answers = {events(port, question=QUESTION, temperature=1.5, max_new_tokens=12)[-1]["text"] for _ in range(4)}
    finally:
        settings.top_k = before
    assert len(answers) > 1


def test_plain_decoding_has_no_drafted_token_and_the_same_answer(port: int) -> None:
    fast, plain = (events(port, question=QUESTION, msd=msd, max_new_tokens=20) for msd in (True, False))
    assert fast[-1]["text"] == plain[-1]["text"]
    assert plain[-1]["tau"] == 1.0
    assert {depth for cycle in plain[:-1] for _, depth in cycle["pieces"]} == {0}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ([], "not a JSON object"),
        ({"questoin": "x"}, "did you mean 'question'"),
        ({}, "lacks 'question'"),
        ({"question": "  "}, "no question"),
        ({"question": "x", "msd": 1}, "msd=1 (give true or false)"),
        ({"question": "x", "image": 3}, "give a text"),
        ({"question": "x", "max_new_tokens": 41}, "give 1 to 40"),
        ({"question": "x", "max_new_tokens": 0}, "give at least 1"),
        ({"question": "x", "max_new_tokens": True}, "give a whole number"),
        ({"question": "x", "temperature": -1}, "give at least 0"),
        ({"question": "x", "temperature": 2.01}, "temperature=2.01 (give at most 2"),
        ({"question": "x", "temperature": 1e-300}, "or at least 1e-06"),
        ({"question": "x", "max_new_tokens": 10**30}, "give 1 to 40"),
        ({"question": "x" * 500_001}, "question of 500001 characters (give at most 500000)"),
        ({"question": "x", "temperature": "hot"}, "give a number"),
        (b'{"question": "x\\ud800"}', "half of a character"),
        (b'\xff{"question": "x"}', "not JSON"),
        (b"{", "not JSON"),
        (b'{"question": "x", "question": "y"}', "key 'question' is there twice"),
        (b"[" * 100_000, "not JSON"),
        (b'{"question": "x", "temperature": NaN}', "give a finite number"),
    ],
)
def test_a_bad_request_is_one_line(port: int, ask: Any, message: str) -> None:
    response = request(port, "/answer", ask)
    assert response.status == 400
    assert message in json.loads(response.read())["message"]


def test_the_extremes_of_the_controls(port: int) -> None:
    """As the page sends them: a number without a fraction is a JSON integer."""
    for temperature in (0, 0.1, 2):
        for length in (1, 40):
            for msd in (True, False):
                *_, end = events(port, question=QUESTION, temperature=temperature, max_new_tokens=length, msd=msd)
                assert end["kind"] == "end" and 1 <= end["new_tokens"] <= length


def picture_of(size: tuple[int, int], kind: str) -> str:
    made = io.BytesIO()
    Image.new("RGB", size).save(made, kind)
    return base64.b64encode(made.getvalue()).decode()


def huge_png() -> str:
    """A PNG whose header says 60000 x 60000."""
    chunks = {b"IHDR": struct.pack(">II5B", 60000, 60000, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(b"")}
    parts = [struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v)) for k, v in chunks.items()]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("%%", "not base64"),
        ("é", "not base64"),
        (base64.b64encode(b"text").decode(), "not a picture"),
        (picture_of((8193, 1), "PNG"), "picture of 8193 x 1 pixels: <bytes> (give at most 8192 a side)"),
        (huge_png(), "too many pixels"),
        (picture_of((8, 8), "EPS"), "not a picture, or of an unknown format"),
    ],
)
def test_a_bad_picture_is_one_line_and_the_server_goes_on(port: int, image: str, message: str) -> None:
    (event,) = events(port, question="x", image=image)
    assert event["kind"] == "error" and message in event["message"]
    assert events(port, question="x", max_new_tokens=2)[-1]["kind"] == "end"


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON ;charset=UTF-8"])
def test_content_types_of_json(port: int, kind: str) -> None:
    response = request(port, "/answer", {"question": "x", "max_new_tokens": 1}, **{"Content-Type": kind})
    assert response.status == 200 and b'"end"' in response.read()


def test_what_is_refused(port: int) -> None:
    for kind in ("text/plain", "text/plain; application/json", "application/jsonp", ""):
        assert request(port, "/answer", {"question": "x"}, **{"Content-Type": kind}).status == 415
    assert request(port, "/answer", b" " * (MAX_BODY + 1)).status == 413
    assert request(port, "/", Host="elsewhere.example").status == 400
    assert request(port, "/samples/1").status == 404
    assert request(port, "/../app.py").status == 404


def test_page_samples_and_headers(port: int, folder: Path) -> None:
    about = json.loads(request(port, "/about").read())
    assert about["samples"] == [{"picture": "samples/0", "question": QUESTION}] and about["draft"] is True
    assert request(port, "/samples/0").read() == (folder / "a.png").read_bytes()
    for path in ("/", "/page.css", "/page.js"):
        response = request(port, path)
        text = response.read().decode()
        assert response.status == 200 and "default-src 'self'" in response.headers["Content-Security-Policy"]
        assert "//" not in text.replace("// ", ""), "nothing is loaded from elsewhere"


def test_decoding_ends_when_the_client_leaves(model: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer would be 40 tokens; the client leaves after the first event."""
    first = threading.Event()
    verify = Decoder.verify

    def slow(self: Decoder, trees: Any) -> Any:
        first.wait()
        return verify(self, trees)

    monkeypatch.setattr(Decoder, "verify", slow)
    events, answerer = SimpleQueue[Event](), Answerer(model)
    streamer = answerer.answer(AnswerRequest(QUESTION, max_new_tokens=40), events.put)
    assert events.get(timeout=PATIENCE) == {"kind": "waiting", "ahead": 0}
    assert events.get(timeout=PATIENCE)["new_tokens"] == 1
    answerer.leave(streamer)
    first.set()
    assert events.get(timeout=PATIENCE) == {"kind": "gone"}


@pytest.mark.parametrize("fails", [False, True])
def test_the_thread_that_answers_warms_up(model: MSDModel, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """CUDA graphs belong to a thread. If it fails, the page answers nevertheless."""
    threads, verify = [], Decoder.verify

    def warm_up() -> None:
        threads.append(threading.get_ident())
        if fails:
            raise RuntimeError("no compiler")

    def look(self: Decoder, trees: Any) -> Any:
        threads.append(threading.get_ident())
        return verify(self, trees)

    monkeypatch.setattr(model, "warm_up", warm_up)
    monkeypatch.setattr(Decoder, "verify", look)
    events = SimpleQueue[Event]()
    Answerer(model).answer(AnswerRequest(QUESTION, max_new_tokens=3), events.put)
    while events.get(timeout=PATIENCE)["kind"] != "end":
        pass
    assert len(threads) > 1 and len(set(threads)) == 1 and threads[0] != threading.get_ident()


@pytest.fixture
def gate(model: MSDModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Holds each forward at the first layer of the text model until it gets one of ``passes``. ``calls`` counts runs of
    its layers."""
    held = SimpleNamespace(passes=threading.Semaphore(0), reached=threading.Semaphore(0), calls=0)
    layers = model.target.text_model.layers
    assert len(layers) > 1

    def wait(layer: Any, *_: Any) -> None:
        held.calls += 1
        if layer is layers[0]:
            held.reached.release()
            assert held.passes.acquire(timeout=PATIENCE)

    hooks = [layer.register_forward_hook(wait) for layer in layers]  # after the layer
    yield held
    held.passes.release(MANY)
    for hook in hooks:
        hook.remove()


def wait_until(true: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def connect(port: int, body: bytes, *headers: str) -> socket.socket:
    """A connection that has sent the head of a request and ``body``."""
    lines = ["POST /answer HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *headers, "", ""]
    opened = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    opened.sendall("\r\n".join(lines).encode() + body)
    return opened


def next_event(answer: Any) -> dict[str, Any]:
    """The next event of a response that is read from a socket."""
    while not (line := answer.readline()).startswith(b"{"):
        assert line, "the connection has ended"
    return dict(json.loads(line))


def test_the_prefill_ends_when_the_client_leaves(
    page: Page, port: int, gate: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer that runs is the last one, and the next request is answered."""
    left, leave = threading.Semaphore(0), Answerer.leave

    def leave_and_tell(self: Answerer, streamer: PieceStreamer) -> None:
        leave(self, streamer)
        left.release()

    monkeypatch.setattr(Answerer, "leave", leave_and_tell)
    body = json.dumps({"question": QUESTION, "msd": False}).encode()
    client = connect(port, body, f"Content-Length: {len(body)}")
    assert gate.reached.acquire(timeout=PATIENCE)
    client.close()
    assert left.acquire(timeout=PATIENCE)
    gate.passes.release(MANY)
    wait_until(lambda: page._open == 0)
    assert gate.calls == 1
    assert events(port, question=QUESTION, max_new_tokens=2)[-1]["kind"] == "end"


def test_cycles_run_without_hooks(model: MSDModel, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled layers would be compiled again."""
    verify, hooked = Decoder.verify, []

    def look(self: Decoder, trees: Any) -> Any:
        hooked.append(any(part._forward_pre_hooks for part in model.target.model.modules()))
        return verify(self, trees)

    monkeypatch.setattr(Decoder, "verify", look)
    assert events(port, question=QUESTION, max_new_tokens=20)[-1]["kind"] == "end"
    assert hooked and not any(hooked)
    (error,) = events(port, question=QUESTION, image="%%")
    assert error["kind"] == "error" and not any(part._forward_pre_hooks for part in model.target.model.modules())


def test_places_in_the_queue(model: MSDModel, gate: SimpleNamespace) -> None:
    """The second of three leaves; the third moves up and is answered. No event of the second is an answer."""
    answerer = Answerer(model)
    queues = [SimpleQueue[Event]() for _ in range(3)]
    first = answerer.answer(AnswerRequest(QUESTION, msd=False, max_new_tokens=1), queues[0].put)
    assert gate.reached.acquire(timeout=PATIENCE)
    second = answerer.answer(AnswerRequest(QUESTION, msd=False, max_new_tokens=1), queues[1].put)
    answerer.answer(AnswerRequest(QUESTION, msd=False, max_new_tokens=1), queues[2].put)
    assert [queue.get(timeout=PATIENCE)["ahead"] for queue in queues] == [0, 1, 2]
    answerer.leave(second)
    assert queues[2].get(timeout=PATIENCE) == {"kind": "waiting", "ahead": 1}
    assert queues[1].get(timeout=PATIENCE) == {"kind": "gone"}
    gate.passes.release(MANY)
    assert [queues[2].get(timeout=PATIENCE).get("ahead") for _ in range(2)] == [0, None]
    assert queues[1].empty() and not first.gone.is_set()


def test_fifty_requests_at_once(page: Page, port: int, gate: SimpleNamespace) -> None:
    """Those that find no place are refused at once. The others wait and are answered, and hold no other request up."""
    body = json.dumps({"question": QUESTION, "msd": False, "max_new_tokens": 3}).encode()
    clients = [connect(port, body, f"Content-Length: {len(body)}") for _ in range(50)]
    answers = [client.makefile("rb") for client in clients]
    status = [int(answer.readline().split()[1]) for answer in answers]
    assert status.count(200) == 16 and status.count(503) == 34
    assert json.loads(request(port, "/about").read())["longest"] == 40, "the page can be read meanwhile"
    waiting = [answer for answer, code in zip(answers, status, strict=True) if code == 200]
    ahead = {next_event(answer)["ahead"]: answer for answer in waiting}
    assert sorted(ahead) == list(range(16))
    gate.passes.release()  # for the prefill of the first one
    assert next_event(ahead[0])["new_tokens"] == 1, "it is sent although others wait"
    gate.passes.release(MANY)
    for answer in waiting:
        while (event := next_event(answer))["kind"] not in LAST:
            pass
        assert event["kind"] == "end" and event["new_tokens"] == 3
    wait_until(lambda: page._open == 0)
    for client in clients:
        client.close()


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(port: int) -> None:
    for headers in ([], ["Expect: 100-continue"]):
        with connect(port, b"", f"Content-Length: {MAX_BODY + 1}", *headers) as client:
            assert client.makefile("rb").readline().split()[1] == b"413"
    with connect(port, b"", "Transfer-Encoding: chunked") as client:
        size = MAX_BODY + 1
        client.sendall(f"{size:x}\r\n".encode() + b" " * size + b"\r\n0\r\n\r\n")
        assert client.makefile("rb").readline().split()[1] == b"413"


def test_a_body_that_does_not_come_is_given_up(page: Page, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(port, b'{"question"', "Content-Length: 100"):
        wait_until(lambda: len(page._uploads) == 1)
    wait_until(lambda: not page._uploads)  # the client has left
    for limit in ("UPLOAD_SECONDS", "STALL_SECONDS"):
        with monkeypatch.context() as patch:
            patch.setattr(app, limit, 0.1)
            with connect(port, b'{"question"', "Content-Length: 100") as client:
                assert client.makefile("rb").readline().split()[1] == b"408"
    assert page._open == 0 and not page._uploads
    assert events(port, question=QUESTION, max_new_tokens=1)[-1]["kind"] == "end"


def test_half_sent_bodies_keep_nobody_out(page: Page, port: int) -> None:
    """More than there are places; the visitor is answered at once, and the oldest is told that its place is taken."""
    heads = (["Content-Length: 1000"], ["Transfer-Encoding: chunked"])
    bodies = (b'{"question"', b'5\r\n{"que')
    clients = [connect(port, bodies[number % 2], *heads[number % 2]) for number in range(app.MAX_UPLOADS)]
    try:
        wait_until(lambda: len(page._uploads) == app.MAX_UPLOADS)
        start = time.monotonic()
        assert events(port, question=QUESTION, max_new_tokens=1)[-1]["kind"] == "end"
        assert time.monotonic() - start < app.STALL_SECONDS, "nothing had to be waited for"
        assert clients[0].makefile("rb").readline().split()[1] == b"503"
        assert len(page._uploads) == app.MAX_UPLOADS - 1 and page._open == 0
    finally:
        for client in clients:
            client.close()
    wait_until(lambda: not page._uploads)


def is_closed(client: socket.socket) -> bool:
    """Waits for the end of a connection; whether nothing came before it."""
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("sent", [b"", b"GET /about HTTP/1.1\r\nHost: 127"], ids=["silent", "half a head"])
def test_connections_without_a_request_are_closed(port: int, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        client.sendall(sent)
        assert is_closed(client)


def test_a_connection_that_drips_after_an_answer_is_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte would otherwise begin uvicorn's waiting again."""
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.5)
    kept = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    kept.request("GET", "/about")
    kept.getresponse().read()
    assert kept.sock is not None, "the connection is kept"
    end, head = time.monotonic() + PATIENCE, iter(b"GET /" + b"a" * 10_000)
    with pytest.raises(ConnectionError):
        while time.monotonic() < end:
            kept.sock.sendall(bytes([next(head)]))
            time.sleep(0.02)
    kept.close()


def test_an_answer_may_take_longer_than_a_request(
    port: int, gate: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.1)
    body = json.dumps({"question": QUESTION, "msd": False, "max_new_tokens": 1}).encode()
    with connect(port, body, f"Content-Length: {len(body)}") as client:
        assert gate.reached.acquire(timeout=PATIENCE)
        time.sleep(0.3)
        gate.passes.release(MANY)
        assert b'"kind": "end"' in client.makefile("rb").read()


def test_idle_connections_keep_nobody_out(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has waited longest makes room."""
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 20)
    clients = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in range(40)]
    try:
        assert json.loads(request(port, "/about").read())["longest"] == 40
        assert all(is_closed(client) for client in clients[:20])
        clients[-1].sendall(b"GET /about HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b" 200 " in clients[-1].makefile("rb").readline(), "the youngest are kept"
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        ([], b"", b"400"),  # no length: no body
        (["Content-Length: -5"], b"{}", b"400"),
        (["Content-Length: 5", "Content-Length: 6"], b"{}   ", b"400"),
        (["Content-Length: many"], b"{}", b"400"),
        (["Transfer-Encoding: chunked"], b"zz\r\n", b"400"),
        (["Transfer-Encoding: chunked"], b"2\r\n{}\r\n0\r\n\r\n", b"400"),  # read: lacks a question
    ],
)
def test_odd_lengths_are_refused(page: Page, port: int, head: list[str], body: bytes, status: bytes) -> None:
    with connect(port, body, *head) as client:
        assert client.makefile("rb").readline().split()[1] == status
    wait_until(lambda: not page._uploads)
    assert page._open == 0


def test_http_1_0(port: int) -> None:
    body = json.dumps({"question": QUESTION, "max_new_tokens": 1}).encode()
    head = f"POST /answer HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        assert b'"kind": "end"' in client.makefile("rb").read()


def test_what_is_too_long_for_the_model_is_refused_before_any_forward(
    model: MSDModel, port: int, gate: SimpleNamespace
) -> None:
    (event,) = events(port, question="word " * 2000)
    assert re.search(r"prompt of \d+ positions for a model of 512 \(shorten the prompt\)", event["message"])
    (event,) = events(port, question="word " * 2000, msd=False)
    assert event["kind"] == "error"
    length = model.target.prepare(model.target.chat_prompt(""))["input_ids"].shape[1]
    one = model.target.prepare(model.target.chat_prompt("word " * 11))["input_ids"].shape[1]
    each = (one - length) / 11
    (event,) = events(port, question="word " * int((500 - length) / each), max_new_tokens=40)
    assert re.search(r"and 40 new tokens for a model of 512 positions \(ask for at most \d+", event["message"])
    assert gate.calls == 0


def test_a_defect_is_told_to_the_page(
    model: MSDModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next request is answered, in the same thread."""
    threads, verify = set(), Decoder.verify

    def broken(self: Decoder, trees: Any) -> Any:
        threads.add(threading.get_ident())
        raise ZeroDivisionError

    def whole(self: Decoder, trees: Any) -> Any:
        threads.add(threading.get_ident())
        return verify(self, trees)

    answerer, events = Answerer(model), SimpleQueue[Event]()
    monkeypatch.setattr(Decoder, "verify", broken)
    answerer.answer(AnswerRequest(QUESTION), events.put)
    kinds = [events.get(timeout=PATIENCE) for _ in range(3)]
    assert kinds[-1]["kind"] == "error" and "ZeroDivisionError" in kinds[-1]["message"]
    monkeypatch.setattr(Decoder, "verify", whole)
    answerer.answer(AnswerRequest(QUESTION, max_new_tokens=5), events.put)
    while (event := events.get(timeout=PATIENCE))["kind"] not in LAST:
        assert event.get("new_tokens", 0) <= 5
    assert event["kind"] == "end" and len(threads) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_request_whose_client_has_left_is_not_begun(model: MSDModel) -> None:
    events: list[Event] = []
    streamer = PieceStreamer(model.tokenizer, events.append)
    streamer.gone.set()
    with pytest.raises(ClientGone):
        decode(model, AnswerRequest(QUESTION), streamer)
    assert events == []


def test_characters_of_several_tokens_come_whole() -> None:
    table = {1: b"a", 2: b"\xc3", 3: b"\xa9", 4: b"b"}
    tokenizer = SimpleNamespace(
        decode=lambda ids, skip_special_tokens: b"".join(table[i] for i in ids).decode(errors="replace")
    )
    text = Detokenizer(tokenizer)
    assert [text.add(token) for token in (1, 2, 3, 4, 2)] == ["a", "", "é", "b", ""]
    assert text.rest() == "�"
    events: list[Event] = []
    streamer = PieceStreamer(tokenizer, events.append)
    streamer.put_cycle([1, 2], 1)
    streamer.end()
    assert [event["pieces"] for event in events] == [[["a", 1], ["", 0]], [["�", 0]]]


def error_of(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["web", "--base-model", "nowhere", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_listens_on_ipv6() -> None:
    try:
        listener = web.listen("::1", 0)
    except UserError:
        pytest.skip("this machine has no address ::1")
    with listener, socket.create_connection(listener.getsockname()[:2], timeout=10):
        assert listener.family is socket.AF_INET6


@pytest.mark.parametrize(
    ("host", "more", "asked", "status"),
    [
        ("127.0.0.1", [], "127.0.0.1:7860", 200),
        ("127.0.0.1", [], "localhost:7860", 200),
        ("127.0.0.1", [], "elsewhere.example", 400),
        ("127.0.0.1", ["models.example"], "models.example", 200),
        ("127.0.0.1", ["models.example"], "elsewhere.example", 400),
        ("::1", [], "[::1]:7860", 200),
        ("::1", [], "elsewhere.example", 400),
        ("0.0.0.0", [], "elsewhere.example", 200),
        ("0.0.0.0", ["models.example"], "elsewhere.example", 400),
    ],
)
def test_names_that_requests_may_ask_for(model: MSDModel, host: str, more: list[str], asked: str, status: int) -> None:
    """Straight to the application: what a browser sends as Host of an address."""
    served, answered = application(Page(model, {}, 40, []), web.allowed(host, more)), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        answered.append(message)

    headers = [(b"host", asked.encode())]
    scope = {"type": "http", "method": "GET", "path": "/about", "headers": headers, "query_string": b""}
    asyncio.run(served(scope, receive, send))
    assert answered[0]["status"] == status


def test_missing_package_taken_port_and_no_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with web.listen("127.0.0.1", 0) as taken:
        assert "cannot listen" in error_of(capsys, "--port", str(taken.getsockname()[1]))
    assert "--port: 70000 is above 65535" in error_of(capsys, "--port", "70000")
    assert "nowhere" in error_of(capsys, "--port", "0")
    monkeypatch.setattr("eagle.extras.find_spec", lambda name: None)
    assert "starlette is not installed (pip install 'msd-eagle[web]')" in error_of(capsys)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_of_the_page(scheme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for the edges of controls."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = (Path(app.__file__).parent / "page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2 and "prefers-color-scheme: dark" in style
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[scheme]))
    assert not re.search(r"#[0-9a-f]{3,6}\b", style.split("body {")[1]), "all colours are named in the two blocks"
    assert re.search(r"#legend i \{[^}]* color: var\(--text\)", style), "the legend's numbers are on the colours"
    grounds = ["page", "panel", *(f"d{depth}" for depth in range(1, 11))]
    pairs = [("text", ground) for ground in grounds] + [("on-accent", "accent")]
    pairs += [(name, ground) for name in ("muted", "error") for ground in ("page", "panel")]
    low = {pair: contrast(*(colours[name] for name in pair)) for pair in pairs}
    assert {pair: value for pair, value in low.items() if value < 4.5} == {}
    edges = {name: contrast(colours[name], colours["panel"]) for name in ("edge", "accent")}
    assert {name: value for name, value in edges.items() if value < 3} == {}
    depths = [colours[f"d{depth}"] for depth in range(1, 11)]
    assert len(set(depths)) == 10


def test_an_empty_host_is_not_all_addresses() -> None:
    with pytest.raises(UserError, match="no address: --host"):
        web.listen("", 0)

"""The server of `msd web` without a browser: what it answers, what it refuses, and when it stops decoding."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian

from eagle.cli import main
from eagle.commands import web
from eagle.decode.decoder import Decoder
from eagle.decode.msd import MSDModel
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from eagle.questions import Question
from eagle.web.app import MAX_BODY, Page, application
from eagle.web.request import AnswerRequest
from eagle.web.stream import Answerer, ClientGone, Detokenizer, PieceStreamer, decode
from llava.errors import UserError

PATIENCE = 600  # seconds until a server that says nothing is given up
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
def port(model: MSDModel, folder: Path) -> Iterator[int]:
    """A running server; a daemon thread, as it ends with Ctrl-C alone."""
    page = Page(model, {"base_model": "base"}, 40, [Question("a", QUESTION, (folder / "a.png",))])
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
    return [json.loads(line) for line in response]


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
        ({"question": "x", "msd": 1}, "msd=1: request (give true or false)"),
        ({"question": "x", "image": 3}, "give a text"),
        ({"question": "x", "max_new_tokens": 41}, "give 1 to 40"),
        ({"question": "x", "max_new_tokens": 0}, "give at least 1"),
        ({"question": "x", "max_new_tokens": True}, "give a whole number"),
        ({"question": "x", "temperature": -1}, "give at least 0"),
        ({"question": "x", "temperature": "hot"}, "give a number"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"question": "x", "temperature": NaN}', "give a finite number"),
    ],
)
def test_a_bad_request_is_one_line(port: int, ask: Any, message: str) -> None:
    response = request(port, "/answer", ask)
    assert response.status == 400
    assert message in json.loads(response.read())["message"]


@pytest.mark.parametrize(
    ("image", "message"),
    [("%%", "not base64"), (base64.b64encode(b"text").decode(), "not a picture")],
)
def test_a_bad_picture_is_one_line_and_the_server_goes_on(port: int, image: str, message: str) -> None:
    (event,) = events(port, question="x", image=image)
    assert event["kind"] == "error" and message in event["message"]
    assert events(port, question="x", max_new_tokens=2)[-1]["kind"] == "end"


def test_what_is_refused(port: int) -> None:
    assert request(port, "/answer", {"question": "x"}, **{"Content-Type": "text/plain"}).status == 415
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
    streamer = Answerer(model).answer(AnswerRequest(QUESTION, max_new_tokens=40))
    assert streamer.events.get(timeout=PATIENCE)["new_tokens"] == 1
    streamer.gone.set()
    first.set()
    assert streamer.events.get(timeout=PATIENCE) == {"kind": "gone"}


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

    answerer = Answerer(model)
    monkeypatch.setattr(Decoder, "verify", broken)
    streamer = answerer.answer(AnswerRequest(QUESTION))
    kinds = [streamer.events.get(timeout=PATIENCE) for _ in range(2)]
    assert kinds[-1]["kind"] == "error" and "ZeroDivisionError" in kinds[-1]["message"]
    monkeypatch.setattr(Decoder, "verify", whole)
    streamer = answerer.answer(AnswerRequest(QUESTION, max_new_tokens=5))
    while (event := streamer.events.get(timeout=PATIENCE))["kind"] == "tokens":
        assert event["new_tokens"] <= 5
    assert event["kind"] == "end" and len(threads) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_request_whose_client_has_left_is_not_begun(model: MSDModel) -> None:
    streamer = PieceStreamer(model.tokenizer)
    streamer.gone.set()
    with pytest.raises(ClientGone):
        decode(model, AnswerRequest(QUESTION), streamer)
    assert streamer.events.empty()


def test_characters_of_several_tokens_come_whole() -> None:
    table = {1: b"a", 2: b"\xc3", 3: b"\xa9", 4: b"b"}
    tokenizer = SimpleNamespace(
        decode=lambda ids, skip_special_tokens: b"".join(table[i] for i in ids).decode(errors="replace")
    )
    text = Detokenizer(tokenizer)
    assert [text.add(token) for token in (1, 2, 3, 4, 2)] == ["a", "", "é", "b", ""]
    assert text.rest() == "�"
    streamer = PieceStreamer(tokenizer)
    streamer.put_cycle([1, 2], 1)
    streamer.end()
    assert [streamer.events.get()["pieces"] for _ in range(2)] == [[["a", 1], ["", 0]], [["�", 0]]]


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
    app, answered = application(Page(model, {}, 40, []), web.allowed(host, more)), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        answered.append(message)

    headers = [(b"host", asked.encode())]
    scope = {"type": "http", "method": "GET", "path": "/about", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert answered[0]["status"] == status


def test_missing_package_taken_port_and_no_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with web.listen("127.0.0.1", 0) as taken:
        assert "cannot listen" in error_of(capsys, "--port", str(taken.getsockname()[1]))
    assert "cannot listen" in error_of(capsys, "--port", "70000")
    assert "nowhere" in error_of(capsys, "--port", "0")
    monkeypatch.setattr("eagle.extras.find_spec", lambda name: None)
    assert "starlette is not installed (pip install 'msd-eagle[web]')" in error_of(capsys)

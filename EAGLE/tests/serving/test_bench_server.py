"""`msd bench --server` on a server made for the test: what is sent, counted and reported."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_llava import make_image

from eagle.cli import main
from eagle.serving.client import Load


class OpenAIServer(ThreadingHTTPServer):
    """Streams four tokens for each question in two chunks; the last token is the number of messages. With ``drafts`` it
    counts a chain of two, of which the first token is accepted always and the second every other time. Fails for
    questions with the word "fail"."""

    daemon_threads = True

    def __init__(self, drafts: bool, pause: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.drafts, self.pause = drafts, pause
        self.said = "one two"
        self.bodies: list[dict[str, Any]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: OpenAIServer

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def send(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self.send('{"data": [{"id": "made-up"}]}')
        if self.path != "/metrics" or not self.server.drafts:
            return self.send("no such page", 404)
        count = 2 * len(self.server.bodies)
        rows = {"drafts": count, "accepted_tokens": 1.5 * count}
        lines = [f'vllm:spec_decode_num_{name}_total{{engine="0"}} {value:.1f}' for name, value in rows.items()]
        for place, share in enumerate((1.0, 0.5)):
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines.append(f'{name}{{engine="0",position="{place}"}} {share * count:.1f}')
        self.send("\n".join(lines))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(self.server.pause)
        with self.server.lock:
            self.server.now -= 1
        if "fail" in body["messages"][-1]["content"][-1]["text"]:
            return self.send("out of order", 500)
        texts = self.server.said, f" three {len(body['messages'])}\n"
        chunks = [{"choices": [{"delta": {"content": text}}]} for text in texts]
        chunks.append({"choices": [], "usage": {"completion_tokens": 4}})
        self.send("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")


@pytest.fixture
def servers() -> Iterator[tuple[OpenAIServer, OpenAIServer]]:
    both = OpenAIServer(drafts=True, pause=0.05), OpenAIServer(drafts=False, pause=0.1)
    yield both
    for server in both:
        server.shutdown()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_image(tmp_path / "one.png")
    rows = [{"id": str(n), "images": ["one.png"] * (n % 2), "question": f"What is {n}?"} for n in range(6)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_two_servers_at_two_levels(
    servers: tuple[OpenAIServer, OpenAIServer], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_draft, plain = servers
    out, picture = tmp_path / "report.json", tmp_path / "plot.svg"
    arguments = ["--plain-server", f"{plain.url}/v1", "--data", str(data), "--concurrency", "1,3", "--warm-up", "1"]
    more = ["--max-new-tokens", "7", "--seed", "5", "--out", str(out), "--plot", str(picture)]
    assert main(["bench", "--server", with_draft.url, *arguments, *more]) == 0
    report = json.loads(out.read_text())
    assert report["model"] == "made-up" and report["commit"] is not None and "versions" in report
    first, second = report["levels"]
    assert [first["concurrency"], second["concurrency"]] == [1, 3]
    for level in (first, second):
        assert (level["requests"], level["failed"], level["tokens"], level["equal_answers"]) == (6, 0, 24, 6)
        assert level["acceptance_length"] == 2.5 and level["accepted_by_position"] == [1.0, 0.5]
        assert "acceptance_length" not in level["plain"]
        assert level["speedup"] == pytest.approx(level["tokens_per_second"] / level["plain"]["tokens_per_second"])
        assert level["speedup"] > 1.2 and level["first_token_ms"]["median"] >= 50
        assert level["plain"]["first_token_ms"]["p95"] >= 100
    assert second["tokens_per_second"] > 1.5 * first["tokens_per_second"]
    assert with_draft.most == plain.most == 3
    assert len(with_draft.bodies) == 13  # one to warm up
    body = with_draft.bodies[-1]
    assert {key: body[key] for key in ("model", "max_tokens", "temperature", "seed", "stream")} == {
        "model": "made-up", "max_tokens": 7, "temperature": 0.0, "seed": 5, "stream": True,
    }  # fmt: skip
    urls = [part["image_url"]["url"] for body in with_draft.bodies for part in body["messages"][0]["content"][:-1]]
    assert len(urls) == 6 and {base64.b64decode(url.split(",")[1]) for url in urls} == {
        (tmp_path / "one.png").read_bytes()
    }
    assert "2.50" in capsys.readouterr().out and picture.read_text().lstrip().startswith("<?xml")


def test_two_servers_one_after_the_other(
    servers: tuple[OpenAIServer, OpenAIServer], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_draft, plain = servers
    first, out = tmp_path / "plain.json", tmp_path / "report.json"
    arguments = ["--data", str(data), "--concurrency", "1,3"]
    assert main(["bench", "--server", plain.url, *arguments, "--out", str(first)]) == 0
    asked = len(plain.bodies)
    more = ["--plain-results", str(first), "--out", str(out)]
    assert main(["bench", "--server", with_draft.url, *arguments, *more]) == 0
    rows = json.loads(first.read_text())["levels"]
    for level, row in zip(json.loads(out.read_text())["levels"], rows, strict=True):
        assert level["plain"] == row and level["equal_answers"] == 6
        assert level["speedup"] == pytest.approx(level["tokens_per_second"] / row["tokens_per_second"])
    assert len(plain.bodies) == asked  # it is not asked again
    capsys.readouterr()
    for changes, words in (
        (["--concurrency", "2"], "has no level '2 at a time'"),
        (["--seed", "1"], "made with seed None, this run has 1"),
        (["--limit", "3"], "made with questions 6, this run has 3"),
        (["--plain-results", str(data)], "is not valid JSON"),
    ):
        assert main(["bench", "--server", with_draft.url, *arguments, *more, *changes]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and words in shown, shown
    first.write_text('{"levels": [{}], "settings": {}}')
    assert main(["bench", "--server", with_draft.url, *arguments, *more]) == 2
    assert "not a report of msd bench --server" in capsys.readouterr().err


def test_a_rate_and_failed_requests(
    servers: tuple[OpenAIServer, OpenAIServer], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with data.open("a") as file:
        file.write('\n{"id": "x", "question": "fail, please"}')
    out = tmp_path / "report.json"
    arguments = ["--data", str(data), "--rate", "100", "--warm-up", "0", "--out", str(out)]
    assert main(["bench", "--server", servers[0].url, *arguments]) == 1
    (level,) = json.loads(out.read_text())["levels"]
    assert (level["requests"], level["failed"], level["tokens"], level["rate"]) == (7, 1, 24, 100.0)
    assert level["error"] == "status 500: out of order" and "1 of 7" in capsys.readouterr().out


def test_conversations_keep_the_servers_own_answers(
    servers: tuple[OpenAIServer, OpenAIServer], data: Path, tmp_path: Path
) -> None:
    """Two conversations and a single question, of which each server is asked at most two at a time."""
    rows = [
        {"id": "a", "images": ["one.png"], "turns": ["Who?", "Why?", "When?"]},
        {"id": "b", "turns": ["Red?", "fail", "Blue?"]},
        {"id": "c", "question": "Alone?"},
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    with_draft, plain = servers
    plain.said, out = "eins zwei", tmp_path / "report.json"
    arguments = ["--data", str(data), "--plain-server", plain.url, "--concurrency", "2", "--warm-up", "2"]
    assert main(["bench", "--server", with_draft.url, *arguments, "--out", str(out)]) == 1
    (level,) = json.loads(out.read_text())["levels"]
    assert (level["requests"], level["failed"], level["tokens"], level["equal_answers"]) == (7, 2, 20, 0)
    assert level["error"] == "status 500: out of order"
    first = "one two three"
    assert level["answers"] == [
        f"{first} 1\n",
        f"{first} 3\n",
        f"{first} 5\n",
        f"{first} 1\n",
        None,
        None,
        f"{first} 1\n",
    ]
    for server in servers:
        assert len(server.bodies) == 8 and server.most == 2  # "Blue?" was not asked; two turns to warm up
        (asked,) = [
            each["messages"] for each in server.bodies if each["messages"][-1]["content"][-1]["text"] == "When?"
        ]
        assert [message["role"] for message in asked] == ["user", "assistant", "user", "assistant", "user"]
        assert [message["content"] for message in asked[1::2]] == [f"{server.said} three 1", f"{server.said} three 3"]
        pictures = [part["type"] == "image_url" for message in asked[::2] for part in message["content"]]
        assert pictures == [True, False, False, False], "the picture is in the first turn"


def test_moments_of_a_rate() -> None:
    starts = Load(rate=4.0).starts(4000)
    assert starts[0] == 0 and starts == sorted(starts)
    assert 4000 / starts[-1] == pytest.approx(4.0, rel=0.1)
    assert Load(concurrency=2).starts(3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--server", "http://127.0.0.1:9"], "no server answers"),
        (["--server", "nonsense"], "not the address of a server"),
        (["--server", "http://127.0.0.1:9", "--base-model", "x"], "--base-model does not go with --server"),
        (["--plot", "x.png"], "--plot needs --server"),
        (["--plain-results", "x.json"], "--plain-results needs --server"),
        ([], "no base model"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], words: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--data", str(data), *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and words in shown, shown

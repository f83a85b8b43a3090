"""`msd serve`: vLLM's OpenAI server with the draft, over HTTP, for both pocket pairs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from repository import REPO
from serving_support import POCKET, load_msd

from eagle import MSDModel
from eagle.cli import main
from eagle.questions import Question
from eagle.serving.client import Load, Server, request_of, run_load

pytestmark = pytest.mark.by_hand

TOKENS = 48
VLLM = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", "400M"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def post(port: int, body: dict[str, Any]) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return answer.read().decode()


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        return answer.read().decode()


@contextmanager
def running(command: list[str], environment: dict[str, str], port: int, log: Path) -> Iterator[subprocess.Popen]:
    """A server in a process group of its own, ready to answer; killed with all its processes at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=REPO, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 400
        while True:
            try:
                get(port, "/health")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(log.read_text()[-4000:]) from None
                time.sleep(0.5)
        yield process
    finally:
        with_group(process, signal.SIGKILL)


def with_group(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    process.wait(timeout=60)


@dataclass
class Served:
    """A running server of a pocket pair, and our model of the pair."""

    port: int
    name: str
    msd: MSDModel
    command: list[str]
    environment: dict[str, str]
    process: subprocess.Popen
    folder: Path

    def body(self, question: Question, **more: Any) -> dict[str, Any]:
        settings = {"max_tokens": TOKENS, "temperature": 0, "stream": False, **more}
        body = {**request_of(question, self.name, {}), **settings}
        return body if body["stream"] else {key: value for key, value in body.items() if key != "stream_options"}

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        return json.loads(post(self.port, body))["choices"][0]

    def plain(self, prompt: str, images: Sequence[Path]) -> str:
        """Our answer without the draft."""
        inputs = self.msd.target.prepare(prompt, images)
        ids = self.msd.generate(**inputs, max_new_tokens=TOKENS, temperature=0.0, use_msd=False).tokens[0]
        return self.msd.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def expected(self, question: Question) -> str:
        prompt = self.msd.target.chat_prompt(question.question, num_images=len(question.images))
        return self.plain(prompt, question.images)


@pytest.fixture(scope="module", params=["llava", "qwen2vl"])
def served(
    request: pytest.FixtureRequest, vllm_python: str, vllm_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:  # fmt: skip
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    base, draft = POCKET / request.param, POCKET / f"{request.param}-msd"
    pair = ["--base-model", str(base), "--msd-model", str(draft), "--port", str(port), "--vllm-python", vllm_python]
    started: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSD_CACHE", str(folder / "cache"))
        patch.setattr(os, "execv", lambda _, arguments: started.append(list(arguments)))
        assert main(["serve", *pair, "--", *VLLM]) == 0
    (command,) = started
    environment = {**vllm_environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with running(command, environment, port, folder / "first.log") as process:
        yield Served(port, str(base), load_msd(base, draft), command, environment, process, folder)


def test_pictures_streaming_stop_strings_seeds_and_metrics(served: Served, questions: list[Question]) -> None:
    question = questions[0]
    body, expected = served.body(question), served.expected(question)
    assert json.loads(get(served.port, "/v1/models"))["data"][0]["id"] == served.name
    assert served.answer(body)["message"]["content"].strip() == expected
    lines = post(served.port, served.body(question, stream=True)).split("\n")
    chunks = [json.loads(line[6:])["choices"] for line in lines if "{" in line]
    pieces = [choice["delta"].get("content") or "" for choices in chunks for choice in choices]
    assert "".join(pieces).strip() == expected and len([piece for piece in pieces if piece]) > 1
    word = expected.split()[3]
    stopped = served.answer({**body, "stop": [word]})
    assert stopped["message"]["content"].strip() == expected.split(word)[0].strip()
    assert stopped["finish_reason"] == "stop"
    sampled = [served.answer({**body, "temperature": 1.0, "seed": 7})["message"]["content"] for _ in range(2)]
    assert sampled[0] == sampled[1]
    with pytest.raises(urllib.error.HTTPError) as refused:  # a bad request does not stop the server
        post(served.port, {**body, "max_tokens": -1})
    assert refused.value.code == 400
    metrics = get(served.port, "/metrics")
    accepted = re.search(r"^vllm:spec_decode_num_accepted_tokens_total\{.*\} ([\d.]+)$", metrics, re.MULTILINE)
    assert accepted and float(accepted[1]) > 0
    assert "vllm:spec_decode_num_accepted_tokens_per_pos_total" in metrics


def test_no_picture_several_and_an_earlier_turn(served: Served, questions: list[Question]) -> None:
    one, other = questions[:2]
    for question in (
        Question("none", "Hello there. What can you do?"),
        Question("several", "What is the same in both pictures?", (*one.images, *other.images)),
    ):
        assert served.answer(served.body(question))["message"]["content"].strip() == served.expected(question)
    earlier = ("Hello there.", "Hello. Show me a picture.")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), earlier, strict=True)]
    body = served.body(one)
    prompt = served.msd.target.chat_prompt(one.question, num_images=len(one.images), history=[earlier])
    found = served.answer({**body, "messages": [*turns, *body["messages"]]})["message"]["content"].strip()
    assert found == served.plain(prompt, one.images)


def test_of_two_hundred_requests_at_concurrency_eight_none_is_lost(served: Served, questions: list[Question]) -> None:
    asked = [questions[number % len(questions)] for number in range(200)]
    expected = {question.id: served.expected(question) for question in questions}
    bodies = [served.body(question, stream=True) for question in asked]
    answers, _ = run_load(Server(f"http://127.0.0.1:{served.port}"), bodies, Load(concurrency=8))
    assert [answer.error for answer in answers] == [""] * 200
    wrong = [
        (question.id, answer.text, expected[question.id])
        for question, answer in zip(asked, answers, strict=True)
        if answer.text.strip() != expected[question.id]
    ]
    assert wrong == []


def test_a_killed_server_starts_again(served: Served, questions: list[Question]) -> None:
    """The last test here: it ends the server of the others."""
    with_group(served.process, signal.SIGKILL)
    with pytest.raises(OSError):
        get(served.port, "/health")
    with running(served.command, served.environment, served.port, served.folder / "second.log"):
        found = served.answer(served.body(questions[0]))["message"]["content"].strip()
        assert found == served.expected(questions[0])

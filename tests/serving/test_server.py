"""`msd serve`: vLLM's OpenAI server with the draft, over HTTP."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from repository import REPO
from serving_support import POCKET, load_msd

from eagle.cli import main
from eagle.questions import Question

pytestmark = pytest.mark.by_hand

TOKENS = 48


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


def test_pictures_streaming_metrics_and_a_killed_server(
    vllm_python: str, vllm_environment: dict[str, str], questions: list[Question], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    port, base, draft = free_port(), POCKET / "llava", POCKET / "llava-msd"
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: started.append(list(arguments)))
    arguments = [
        "--base-model",
        str(base),
        "--msd-model",
        str(draft),
        "--port",
        str(port),
        "--vllm-python",
        vllm_python,
    ]
    vllm = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", "400M"]
    assert main(["serve", *arguments, "--vllm-python", vllm_python, "--", *vllm]) == 0
    (command,) = started

    question = questions[0]
    msd = load_msd(base, draft)
    target = msd.target
    ids = msd.generate(**question.inputs(target), max_new_tokens=TOKENS, temperature=0.0).tokens[0]
    expected = target.tokenizer.decode(ids, skip_special_tokens=True).strip()
    picture = base64.b64encode(question.images[0].read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": question.question},
    ]
    body = {
        "model": str(base), "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0,
    }  # fmt: skip

    def answer(**more: Any) -> dict[str, Any]:
        return json.loads(post(port, {**body, **more}))["choices"][0]

    environment = {**vllm_environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with running(command, environment, port, tmp_path / "first.log") as process:
        assert json.loads(get(port, "/v1/models"))["data"][0]["id"] == str(base)
        assert answer()["message"]["content"].strip() == expected
        chunks = [json.loads(line[6:]) for line in post(port, {**body, "stream": True}).split("\n") if "{" in line]
        assert "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks).strip() == expected
        assert len(chunks) > 2
        word = expected.split()[3]
        stopped = answer(stop=[word])
        assert stopped["message"]["content"].strip() == expected.split(word)[0].strip()
        assert stopped["finish_reason"] == "stop"
        sampled = [answer(temperature=1.0, seed=7)["message"]["content"] for _ in range(2)]
        assert sampled[0] == sampled[1]
        text_only = {**body, "messages": [{"role": "user", "content": "Hello?"}]}
        assert json.loads(post(port, text_only))["choices"][0]["message"]["content"]
        with pytest.raises(urllib.error.HTTPError) as refused:  # a bad request does not stop the server
            post(port, {**body, "max_tokens": -1})
        assert refused.value.code == 400
        metrics = get(port, "/metrics")
        accepted = re.search(r"^vllm:spec_decode_num_accepted_tokens_total\{.*\} ([\d.]+)$", metrics, re.MULTILINE)
        assert accepted and float(accepted[1]) > 0
        assert "vllm:spec_decode_num_accepted_tokens_per_pos_total" in metrics
        with_group(process, signal.SIGKILL)
        with pytest.raises(OSError):
            get(port, "/health")
    with running(command, environment, port, tmp_path / "second.log"):
        assert answer()["message"]["content"].strip() == expected

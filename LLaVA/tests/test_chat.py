"""The chat command, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llava import make_image, make_liuhaotian

from llava import chat, checkpoint, load_pretrained
from llava.chat import Chat
from llava.errors import UserError, run_cli
from llava.processor import LlavaProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_liuhaotian(tmp_path_factory.mktemp("chat") / "model")
    make_image(folder / "a.png")
    return folder


def command(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "llava.chat", "--model-path", str(folder), "--device", "cpu", *arguments]
    return subprocess.run(line, input=stdin, capture_output=True, text=True, timeout=900, check=False, errors="replace")


@pytest.mark.slow
def test_one_question_in_a_subprocess(folder: Path) -> None:
    image = str(folder / "a.png")
    options = ("--image-file", image, "--max-new-tokens", "6", "--temperature", "0", "--prompt", "What is it?")
    done = command(folder, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    model, processor = load_pretrained(folder)
    inputs = processor(text=processor.chat_prompt("What is it?", 1), images=image)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert done.stdout.strip() == processor.decode(output, skip_special_tokens=True).strip()


def test_error_is_one_line_and_status_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = folder / "none.png"
    assert run_cli(lambda: chat.main(["--model-path", str(folder), "--image-file", str(image)])) == 2
    assert capsys.readouterr() == ("", f"error: picture not found: {image}\n")


def test_conversation_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = []
    original = LlavaProcessor.__call__

    def spy(self, images=None, text=None, **options):
        prompts.append((text, len(images or ())))
        return original(self, images, text, **options)

    monkeypatch.setattr(LlavaProcessor, "__call__", spy)
    model, processor = load_pretrained(folder)
    talk = Chat(model, processor, [make_image()], system="S", generation={"max_new_tokens": 3, "do_sample": False})
    first = talk.ask("What is it?")
    talk.ask("Why?")
    talk.history[-1] = ("Why?", "The tag <image> again.")
    talk.ask("And?")
    assert prompts.pop()[1] == 1
    assert prompts == [
        ("S USER: <image>\nWhat is it? ASSISTANT:", 1),
        (f"S USER: <image>\nWhat is it? ASSISTANT: {first}</s>USER: Why? ASSISTANT:", 1),
    ]
    assert first in capsys.readouterr().out


def test_lines_of_stdin(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    monkeypatch.setattr(Chat, "ask", lambda self, question: asked.append(question))
    monkeypatch.setattr("sys.stdin", (folder.parent / "lines").open("w+"))
    sys.stdin.write("What is it?\n\n  Why? \nlast")
    sys.stdin.seek(0)
    assert chat.main(["--model-path", str(folder), "--device", "cpu"]) == 0
    assert asked == ["What is it?", "Why?", "last"]
    sys.stdin.close()


@pytest.mark.slow
def test_a_bad_line_does_not_end_it(folder: Path) -> None:
    done = command(folder, "--max-new-tokens", "2", "--seed", "1", stdin="what is <image>?\nand now?\n")
    assert done.returncode == 0
    assert done.stderr == "error: prompt has 1 <image> mark(s), but 0 picture(s) were given\n"
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature -1.0 (give 0 for greedy"),
        (["--temperature", "nan"], "temperature nan (give 0 for greedy"),
        (["--temperature", "inf"], "temperature inf (give 0 for greedy"),
        (["--seed", "1.5"], "argument --seed: 1.5 is not a whole number"),
        (["--seed", "99999999999999999999"], "argument --seed: 99999999999999999999 is not a whole number from 0 to"),
        (["--prompt", "caf\udce9"], "prompt has half of a character"),
        (["--system", "\ud83d", "--prompt", "a"], "prompt has half of a character"),
        (["--top-p", "0"], "argument --top-p: 0 is not in (0, 1]"),
        (["--max-new-tokens", "0"], "argument --max-new-tokens: 0 is not at least 1"),
        (["--conv-mode", "v9"], "unknown conversation template: v9"),
        (["--device", "abacus"], "device cannot be used: abacus"),
    ],
)
def test_bad_options(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run_cli(lambda: chat.main(["--model-path", str(folder), *arguments])) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1


@pytest.mark.parametrize(("device", "there"), [("cpu", None), ("meta", {"": torch.device("meta")})])
def test_weights_go_straight_to_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, there: dict[str, torch.device] | None
) -> None:
    """By way of the host "auto" would be the host's dtype."""
    asked: dict[str, object] = {}

    def load(path: str, **options: object) -> None:
        asked.update(options)
        raise UserError("enough")

    monkeypatch.setattr(checkpoint, "load_pretrained", load)
    with pytest.raises(UserError, match="enough"):
        chat.main(["--model-path", str(folder), "--device", device])
    assert asked == {"dtype": "auto", "device_map": there}

"""Answers that a server makes: requests in OpenAI's batch format, and annotation files of what comes back.

The lines of answers are in the form that vLLM 0.32 writes and that OpenAI publishes.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus_support import Write, image_record, text_record, turns

from eagle.conversations import Conversation, Unusable, read_conversation
from eagle.families import Target, template_of
from eagle.ge_data import export_questions, import_answers
from eagle.ge_data.batch_file import parse_answer
from eagle.ge_data.convert import fix_record
from eagle.ge_data.regenerate import ConversationState
from llava.errors import UserError, run_cli

Answered = Callable[[dict[str, Any]], dict[str, Any]]


def export(data: Path, output: Path, *more: str) -> int:
    flags = ["--input", str(data), "--output", str(output), "--model", "own/model", *more]
    return run_cli(lambda: export_questions.main(flags))


def import_(data: Path, output: Path, requests: list[Path], answers: list[Path]) -> int:
    flags = ["--input", str(data), "--output", str(output), "--requests", *map(str, requests)]
    return run_cli(lambda: import_answers.main([*flags, "--answers", *map(str, answers)]))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def answered(request: dict[str, Any], text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A line of the output file of `vllm run-batch`."""
    said = {
        "role": "assistant", "content": text, "refusal": None, "annotations": None, "audio": None,
        "function_call": None, "tool_calls": [], "reasoning": None, **message,
    }  # fmt: skip
    choice = {
        "index": 0, "message": said, "logprobs": None, "finish_reason": finish, "stop_reason": None, "token_ids": None,
    }  # fmt: skip
    body = {
        "id": "chatcmpl-batch-8a", "object": "chat.completion", "created": 1764345600, "model": "own/model",
        "choices": [choice], "service_tier": None, "system_fingerprint": None,
        "usage": {"prompt_tokens": 9, "total_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": None},
        "prompt_logprobs": None, "prompt_token_ids": None, "kv_transfer_params": None,
    }  # fmt: skip
    response = {"status_code": 200, "request_id": "vllm-batch-0f", "body": body}
    return {"id": "vllm-3c", "custom_id": request["custom_id"], "response": response, "error": None}


def failed(request: dict[str, Any], error: Any, status: int = 400, body: Any = None) -> dict[str, Any]:
    response = {"status_code": status, "request_id": "vllm-batch-1f", "body": body}
    return {"id": "vllm-4d", "custom_id": request["custom_id"], "response": response, "error": error}


def test_requests_have_the_published_form(annotations: Write, pictures: Path, tmp_path: Path) -> None:
    record = text_record(7) | {"system": "Be brief."}
    data, out = annotations([image_record(5), record]), tmp_path / "q.jsonl"
    more = ["--image_data_path", str(pictures), "--temperature", "0.5", "--max-new-tokens", "64"]
    assert export(data, out, *more) == 0
    image, text = lines_of(out)
    assert set(image) == {"custom_id", "method", "url", "body"}
    assert (image["method"], image["url"]) == ("POST", "/v1/chat/completions")
    seed = image["body"].pop("seed")
    assert image["body"] == {
        "model": "own/model", "max_tokens": 64, "temperature": 0.5,
        "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": (pictures / "a.png").resolve().as_uri()}},
            {"type": "text", "text": "What colours?"},
        ]}],
    }  # fmt: skip
    assert text["body"]["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name two rivers."},
    ]  # fmt: skip
    assert 0 <= seed < 2**63 and seed != text["body"]["seed"]
    assert image["custom_id"] != text["custom_id"]
    assert export(data, out, "--image_data_path", str(pictures), "--inline") == 0
    url = lines_of(out)[0]["body"]["messages"][0]["content"][0]["image_url"]["url"]
    head, data_part = url.split(",")
    assert head == "data:image/png;base64" and base64.b64decode(data_part) == (pictures / "a.png").read_bytes()
    assert "seed" not in lines_of(out)[0]["body"], "greedy"


def test_two_rounds_make_conversations_with_the_answers(
    annotations: Write, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second question follows the server's own first answer; answers come in any order."""
    data = annotations([image_record(5, "b.png"), text_record(1) | {"id": None}])
    q1, q2, a1, a2, own = (tmp_path / name for name in ("q1", "q2", "a1", "a2", "own.json"))
    root = ["--image_data_path", str(pictures)]
    assert export(data, q1, *root) == 0
    image, text = lines_of(q1)
    write_lines(a1, [answered(text, "The Nile and the", "length"), answered(image, " Blue. ")])
    assert import_(data, own, [q1], [a1]) == 0
    assert [len(record["conversations"]) for record in json.loads(own.read_text())] == [2, 2]
    assert "2  later questions have no answer" in capsys.readouterr().out
    assert export(data, q2, *root, "--requests", str(q1), "--answers", str(a1)) == 0
    image, text = lines_of(q2)
    assert [message["role"] for message in image["body"]["messages"]] == ["user", "assistant", "user"]
    assert image["body"]["messages"][1:] == [
        {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "More?"},
    ]  # fmt: skip
    write_lines(a2, [answered(image, "No."), answered(text, "No, that is all.")])
    assert import_(data, own, [q1, q2], [a1, a2]) == 0
    first, second = json.loads(own.read_text())
    assert first == {
        "id": "5", "image": "b.png", "model": "own/model",
        "conversations": turns("<image>\nWhat colours?", "Blue.", "More?", "No."),
    }  # fmt: skip
    assert second["id"] == "1", "the number in the file of the questions"
    assert second["conversations"][1] == {"from": "gpt", "value": "The Nile and the", "cut": True}
    conversation = read_conversation(second, 0)
    assert conversation.cut == {0} and conversation.turns[1] == ("And?", "No, that is all.")
    shown = capsys.readouterr().out
    assert "2 records with 4 answers" in shown and "1  answers are cut" in shown and "no answer yet" not in shown
    assert export(data, tmp_path / "q3", "--requests", str(q1), str(q2), "--answers", str(a1), str(a2)) == 2
    assert "no question is left to ask" in capsys.readouterr().err and not (tmp_path / "q3").exists()


FAILURES: dict[str, tuple[Answered, str]] = {
    "vllm": (
        lambda request: failed(
            request,
            {"error": {"message": "The prompt is too long", "type": "BadRequestError", "param": None, "code": 400}},
        ),
        "The prompt is too long",
    ),
    "vllm text": (lambda request: failed(request, "Invalid URL was used."), "Invalid URL was used."),
    "openai": (
        lambda request: failed(request, None, body={"error": {"message": "Invalid image", "code": "image"}}),
        "Invalid image",
    ),
    "openai expired": (
        lambda request: {**failed(request, {"code": "batch_expired", "message": "Too late"}), "response": None},
        "Too late",
    ),
    "no reason": (lambda request: failed(request, None, 500), "status 500"),
    "filtered": (lambda request: answered(request, "x", "content_filter"), "finish_reason 'content_filter'"),
    "no text": (lambda request: answered(request, None), "has no text"),
    "thinks": (lambda request: answered(request, "x", reasoning="hm"), "has reasoning"),
    "picture": (lambda request: answered(request, "<image> a"), "contains <image>"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_request_is_listed_and_ends_its_conversation(
    kind: str, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fail, reason = FAILURES[kind]
    data = annotations([text_record(n) for n in range(3)])
    q1, q2, a1, a2, own = (tmp_path / name for name in ("q1", "q2", "a1", "a2", "own.json"))
    assert export(data, q1) == 0
    asked = lines_of(q1)
    write_lines(a1, [answered(asked[0], "A"), fail(asked[1]), answered(asked[2], "C")])
    assert export(data, q2, "--requests", str(q1), "--answers", str(a1)) == 0
    later = lines_of(q2)
    assert [line["custom_id"].split("-")[:2] for line in later] == [["0", "1"], ["2", "1"]]
    write_lines(a2, [fail(later[0]), answered(later[1], "D")])
    capsys.readouterr()
    assert import_(data, own, [q1, q2], [a1, a2]) == 0
    records = json.loads(own.read_text())
    assert [(record["id"], len(record["conversations"])) for record in records] == [("text0", 2), ("text2", 4)]
    shown = capsys.readouterr().out
    assert "2  requests failed" in shown and f"{asked[1]['custom_id']}: " in shown and reason in shown
    assert "no answer yet" not in shown, "nothing is left to ask"


def test_records_with_empty_answers_are_counted(
    annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, requests, own = annotations([text_record(0), text_record(1)]), tmp_path / "q", tmp_path / "own.json"
    assert export(data, requests) == 0
    asked = lines_of(requests)
    answers = write_lines(tmp_path / "a", [answered(asked[0], " "), answered(asked[1], "B")])
    assert import_(data, own, [requests], [answers]) == 0
    assert "1  records left out: all answers are empty" in capsys.readouterr().out
    write_lines(answers, [answered(line, "") for line in asked])
    assert import_(data, own, [requests], [answers]) == 2
    assert "none of 2 requests has an answer: " in (shown := capsys.readouterr().err) and "answers are empty" in shown


def test_a_batch_without_any_answer_is_refused_and_names_a_reason(
    annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, requests, own = annotations([text_record(0)]), tmp_path / "q", tmp_path / "own.json"
    assert export(data, requests) == 0
    answers = write_lines(tmp_path / "a", [failed(line, "No such model") for line in lines_of(requests)])
    assert import_(data, own, [requests], [answers]) == 2
    assert "No such model" in capsys.readouterr().err and not own.exists()


BROKEN: dict[str, tuple[Callable[[list[Any]], list[Any]], str]] = {
    "missing": (lambda lines: lines[:-1], "1 of 2 requests have no answer, the first is 1-0-"),
    "twice": (lambda lines: [*lines, lines[0]], "is answered twice"),
    "unknown": (
        lambda lines: [*lines, {**lines[0], "custom_id": "9-0-x"}],
        "answer to request 9-0-x, which is in none",
    ),
    "without id": (lambda lines: [{"id": "x"}], "it has no custom_id"),
    "a number as id": (lambda lines: [{**lines[0], "custom_id": 0}], "it has no custom_id"),
    "another endpoint": (
        lambda lines: [{**lines[0], "response": {"status_code": 200, "body": {"data": []}}}],
        "not the answer of a chat completion",
    ),
    "a text": (lambda lines: ["x"], "it has no custom_id"),
    "a text as response": (lambda lines: [{**lines[0], "response": "x"}], "not the answer of a chat completion"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_wrong_answers_are_refused_in_one_line(
    kind: str, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = BROKEN[kind]
    data, requests, own = annotations([text_record(0), text_record(1)]), tmp_path / "q", tmp_path / "own.json"
    assert export(data, requests) == 0
    own.write_text("as before")
    answers = write_lines(tmp_path / "a", change([answered(line, "A") for line in lines_of(requests)]))
    assert import_(data, own, [requests], [answers]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and own.read_text() == "as before"


def test_wrong_files_are_refused_in_one_line(
    annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [text_record(0), text_record(1)]
    data, requests = annotations(records), tmp_path / "q"
    assert export(data, requests) == 0
    answers = write_lines(tmp_path / "a", [answered(line, "A") for line in lines_of(requests)])

    def refused(source: Path, output: Path, asked: list[Path], files: list[Path]) -> str:
        assert import_(source, output, asked, files) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    own, other = tmp_path / "own.json", tmp_path / "other.json"
    other.write_text(json.dumps([records[0], text_record(1) | {"conversations": turns("Another one?", "A.")}]))
    assert "1 of 2 requests are not questions of this annotation file" in refused(other, own, [requests], [answers])
    assert "is there twice" in refused(data, own, [requests, requests], [answers])
    assert "is one that is read" in refused(data, answers, [requests], [answers])
    assert "is one that is read" in refused(data, data, [requests], [answers])
    assert "cannot be read" in refused(data, own, [tmp_path / "nothing"], [answers])
    (tmp_path / "half").write_text('{"custom_id": ')
    assert "not JSON lines" in refused(data, own, [requests], [tmp_path / "half"])
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "not JSON lines" in refused(data, own, [requests], [tmp_path / "bytes"])
    assert not own.exists()


def test_records_that_cannot_be_asked_are_counted(
    annotations: Write, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = annotations([image_record(0, "none.png"), image_record(1), {"id": 2, "conversations": []}])
    assert export(data, tmp_path / "q", "--image_data_path", str(pictures)) == 0
    assert [line["custom_id"].split("-")[0] for line in lines_of(tmp_path / "q")] == ["1"]
    shown = capsys.readouterr().out
    assert "1 requests" in shown and "1  records left out: a picture's file does not exist" in shown
    data = annotations([image_record(0, "none.png")])
    assert export(data, tmp_path / "other", "--image_data_path", str(pictures)) == 2
    assert "a picture's file does not exist" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_limit_chooses_records_at_random_and_later_rounds_stay_with_them(annotations: Write, tmp_path: Path) -> None:
    data = annotations([text_record(n) for n in range(40)])

    def asked(path: Path) -> list[int]:
        return [int(line["custom_id"].split("-")[0]) for line in lines_of(path)]

    q1, q2, other = tmp_path / "q1", tmp_path / "q2", tmp_path / "other"
    assert export(data, q1, "--limit", "10") == 0 and export(data, other, "--limit", "10", "--seed", "3") == 0
    assert len(asked(q1)) == 10 and asked(q1) not in (list(range(10)), asked(other))
    answers = write_lines(tmp_path / "a", [answered(line, "A") for line in lines_of(q1)])
    assert export(data, q2, "--limit", "10", "--requests", str(q1), "--answers", str(answers)) == 0
    assert asked(q2) == asked(q1)


def test_a_cut_answer_has_the_loss_mask_that_regeneration_gives_it(any_target: Target, tmp_path: Path) -> None:
    """The same ids, and no end token to learn where none was generated."""
    template = template_of(any_target)
    said = Conversation("r", (("Name two rivers.", "The Nile and the"), ("And?", "That is all.")), cut=frozenset({0}))
    made = template.prepare(said, tmp_path, 400)
    spans = [(start, end) for start, end in spans_of(made.loss_mask.tolist())]
    state, ends = ConversationState(template.outline(said, tmp_path, 400), 0), set(any_target.eos_token_ids)
    for turn, (start, end) in enumerate(spans):
        assert state.add_question(turn, 400)
        state.add_answer(state.outline.turns[turn], made.input_ids[start:end].tolist(), ends)
    assert state.ids == made.input_ids.tolist() and state.loss_mask == made.loss_mask.tolist()
    (_, first), (_, last) = spans
    assert int(made.input_ids[first]) in ends and not made.loss_mask[first]
    assert int(made.input_ids[last - 1]) in ends and made.loss_mask[last - 1]


def spans_of(mask: list[bool]) -> list[tuple[int, int]]:
    """[start, end) of the unbroken runs of a mask."""
    starts = [place for place, each in enumerate(mask) if each and not (place and mask[place - 1])]
    return [(start, next((n for n in range(start, len(mask)) if not mask[n]), len(mask))) for start in starts]


@pytest.mark.parametrize("cut", ["yes", 1, []])
def test_a_mark_of_a_cut_answer_is_true_or_false(cut: Any) -> None:
    record = text_record(0)
    record["conversations"][1]["cut"] = cut
    with pytest.raises(Unusable, match="cut"):
        read_conversation(record, 0)
    record = text_record(0)
    record["conversations"][0]["cut"] = True
    with pytest.raises(Unusable, match="cut"):
        read_conversation(record, 0)


def test_the_mark_of_a_cut_answer_survives_convert_and_a_new_answer_drops_it() -> None:
    record = {"id": "a", "items": [{"from": "user", "value": "q"}, {"from": "gpt", "value": "a", "cut": True}]}
    assert read_conversation(fix_record(record, 0, Counter()), 0).cut == {0}
    assert read_conversation(record, 0, keep_answers=False).cut == frozenset()


def test_an_answer_of_one_line_per_request_only() -> None:
    line = answered({"custom_id": "0-0-x"}, "A")
    line["response"]["body"]["choices"] *= 2
    with pytest.raises(UserError, match="one choice"):
        parse_answer(line, "here")

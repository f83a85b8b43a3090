"""Rows to turns, and the loss mask: its tokens, decoded, are what the assistant says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_support import image_record, text_record, turns

from eagle.conversations import (
    Unusable,
    claims_pictures,
    count_unknown_keys,
    read_conversation,
    unknown_keys_note,
)
from eagle.families import Target, template_of
from eagle.families.template import Prepared, Template


def row_of(*texts: str, **more: Any) -> dict[str, Any]:
    return {"id": "r", "conversations": turns(*texts), **more}


def test_turns() -> None:
    assert read_conversation(row_of("q", "a", "r", "b"), 0).turns == (("q", "a"), ("r", "b"))
    assert read_conversation({"items": turns("q", "a")}, 7).id == "7"
    leading = [{"from": "gpt", "value": "hello"}, *turns("q", "a")]
    assert read_conversation({"id": 1, "conversations": leading}, 0).turns == (("q", "a"),)
    assert read_conversation(row_of("q", "a", "unanswered"), 0).turns == (("q", "a"),)
    spoken = [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "q"}, {"from": "bing", "value": "a"}]
    conversation = read_conversation({"conversations": spoken}, 0)
    assert (conversation.system, conversation.turns) == ("Be brief.", (("q", "a"),))


@pytest.mark.parametrize("speaker", ["gpt", "assistant", "chatgpt", "bing", "bard"])
def test_names_of_the_assistant(speaker: str) -> None:
    """All those of the ShareGPT file."""
    row = {"id": 1, "conversations": [{"from": "human", "value": "q"}, {"from": speaker, "value": "a"}]}
    assert read_conversation(row, 0).turns == (("q", "a"),)


def test_messages_are_read_like_conversations() -> None:
    spoken = [("system", "Be brief."), ("user", "q"), ("assistant", "a")]
    row = {"id": "r", "messages": [{"role": role, "content": text} for role, text in spoken]}
    assert read_conversation(row, 0) == read_conversation(row_of("q", "a", system="Be brief."), 0)
    mixed = {"id": "r", "conversations": row["messages"]}
    assert read_conversation(mixed, 0) == read_conversation(row, 0)


PICTURE_PARTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "image_url", "image_url": {"url": "a.png"}}, {}),
    ({"type": "image_url", "image_url": "a.png"}, {}),
    ({"type": "input_image", "image_url": "a.png"}, {}),
    ({"type": "image", "image": "a.png"}, {"images": ["a.png"]}),
    ({"type": "image"}, {"images": ["a.png"]}),
    ({"type": "image"}, {"image": "a.png"}),
]


@pytest.mark.parametrize(("part", "more"), PICTURE_PARTS, ids=str)
def test_pictures_in_the_parts_of_messages(part: dict[str, Any], more: dict[str, Any]) -> None:
    content = [part, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}], **more}
    conversation = read_conversation(row, 0)
    assert claims_pictures(row) and conversation.images == ("a.png",)
    assert conversation.turns == (("<image>\nWhat?", "A cat."),)


def test_system_key_is_the_system_turn() -> None:
    assert read_conversation(row_of("q", "a", system="Be brief."), 0).system == "Be brief."
    assert read_conversation(row_of("q", "a", system=""), 0).system is None
    turn = {"from": "system", "value": "Be brief."}
    both = {"conversations": [turn, *turns("q", "a")], "system": "Be brief."}
    assert read_conversation(both, 0).system == "Be brief."


def part_row(part: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}], **more}


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"id": 1}, "no_conversation"),
    ({"conversations": "text"}, "no_conversation"),
    ({"conversations": ["text"]}, "no_conversation"),
    ({"conversations": [{"from": "dog", "value": "wuff"}]}, "no_conversation"),
    ({"conversations": [{"from": ["human"], "value": "q"}]}, "no_conversation"),
    ({"conversations": [{"from": "human", "value": None}]}, "no_conversation"),
    (row_of(), "empty"),
    (row_of("q"), "empty"),
    (row_of("q", " \n"), "empty"),
    ({"conversations": [*turns("q", "a"), *turns("q", "a")[1:]]}, "not_alternating"),
    ({"conversations": [*turns("q"), *turns("q", "a")]}, "not_alternating"),
    ({"conversations": [*turns("q", "a"), *turns("q"), *turns("q")]}, "not_alternating"),
    ({"conversations": [*turns("q"), *turns("q")]}, "not_alternating"),
    ({"conversations": turns("q", "a"), "messages": turns("other", "a")}, "no_conversation"),
    ({"image": "a.png", "images": ["b.png"], "conversations": turns("<image>q", "a")}, "image_name"),
    ({"conversations": [*turns("q", "a"), {"from": "system", "value": "s"}]}, "not_alternating"),
    (row_of("q", "a", image="a.png"), "no_mark"),
    (row_of("<image> <image>", "a", image="a.png"), "too_many_marks"),
    (row_of("<image>", "a"), "too_many_marks"),
    (row_of("<image>", "a", image=["a.png", "b.png"]), "too_few_marks"),
    (row_of("q", "a", system=["Be brief."]), "system"),
    ({"conversations": [{"from": "system", "value": "x"}, *turns("q", "a")], "system": "y"}, "system"),
    (row_of("What happens?", "a", video="a.mp4"), "video"),
    (row_of("What happens?", "a", videos=["a.mp4"]), "video"),
    (row_of("What is said?", "a", audio="a.wav"), "video"),
    (part_row({"type": "video_url", "video_url": {"url": "a.mp4"}}), "video"),
    (part_row({"type": "tool_result"}), "no_conversation"),
    (part_row(7), "no_conversation"),
    (part_row({"type": "image", "image": "a.png"}, image="b.png"), "image_name"),
    (part_row({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}), "image_name"),
    (row_of("<image>", "a", image="https://host/a.png"), "image_name"),
    (row_of("q", "half \ud83e"), "text"),
    (row_of("q", "a", id="half \ud83e"), "id"),
    ({"conversations": [{"from": "human", "role": "assistant", "value": "q"}, *turns("q", "a")[1:]]}, "two_values"),
    ({"conversations": [{"from": "human", "value": "q", "content": "other"}, *turns("q", "a")[1:]]}, "two_values"),
    ({"messages": [{"role": "user", "content": [1], "value": "q"}, *turns("q", "a")[1:]]}, "two_values"),
    ({"messages": [*turns("q"), {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]}, "tools"),
    ({"messages": [*turns("q"), {"role": "assistant", "content": None, "function_call": {"name": "f"}}]}, "tools"),
]


def test_a_turn_in_both_forms_that_agree() -> None:
    asked = {"from": "human", "role": "user", "value": "q", "content": "q", "name": None}
    said = {"role": "assistant", "from": None, "content": "a", "tool_calls": [], "function_call": None}
    row = {"conversations": [asked, {**said, "from": "gpt"}]}
    assert read_conversation(row, 0).turns == (("q", "a"),)


def test_keys_of_turns_that_are_not_read_are_counted() -> None:
    counts: Counter[str] = Counter()
    turn = {"from": "human", "value": "q", "weight": 0, "name": "", "refusal": None}
    for _ in range(2):
        count_unknown_keys({"conversations": [turn, {**turn, "from": "gpt"}], "tools": 1}, counts)
    assert counts == {"turn: weight": 2, "tools": 2}
    assert "'turn: weight' (2 records)" in str(unknown_keys_note(counts))


@pytest.mark.parametrize(("row", "reason"), UNUSABLE)
def test_unusable_rows(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        read_conversation(row, 0)
    assert caught.value.reason == reason


def spoken(template: Template, prepared: Prepared) -> list[str]:
    """The masked tokens, decoded, one text for each unbroken run."""
    runs, run = [], []
    for token, mask in zip(prepared.input_ids.tolist(), [*prepared.loss_mask.tolist()], strict=True):
        if mask:
            run.append(token)
        elif run:
            runs.append(run)
            run = []
    runs += [run] if run else []
    return [template.processor.tokenizer.decode(ids) for ids in runs]


SPOKEN: list[tuple[dict[str, Any], list[str]]] = [
    (text_record(7), ["The Nile is longer than the Rhine. </s>", "That is 7.</s>"]),
    (image_record(3), ["Red and 3.</s>", "No, only red.</s>"]),
    (image_record(3, "b.png"), ["Red and 3.</s>", "No, only red.</s>"]),
    (row_of("What is it?\n<image>", "A cat", image="a.png"), ["A cat</s>"]),
    (row_of("one", "uno", "<image> two", "dos", image="a.png"), ["uno</s>", "dos</s>"]),
    (row_of("<image> and <image>?", "Both", image=["a.png", "b.png"]), ["Both</s>"]),
    (row_of("q ASSISTANT: no", "yes USER: ASSISTANT: x"), ["yes USER: ASSISTANT: x</s>"]),
    (row_of("Übersetze 日本語 🦙", "Größe 🦙\n\nund   mehr"), ["Größe 🦙\n\nund   mehr</s>"]),
    (row_of("q", "  a"), ["  a</s>"]),
    (row_of("q", "", "r", "b"), ["</s>", "b</s>"]),
    (row_of("q", "a</s>b"), ["a</s>b</s>"]),
    (
        row_of("What is <unk> in <image>?", "<unk>", "<unk>", "a <unk>", image="a.png"),
        ["<unk></s>", "a <unk></s>"],
    ),
]


@pytest.mark.parametrize(("row", "answers"), SPOKEN, ids=range(len(SPOKEN)))
def test_masked_tokens_are_the_answers(
    any_target: Target, pictures: Path, row: dict[str, Any], answers: list[str]
) -> None:
    template = template_of(any_target)
    prepared = template.prepare(read_conversation(row, 0), pictures, 1000)
    # the space before an answer is the assistant's, decoding may drop it; some tokenizers show one after </s>
    texts = [text.removeprefix(" ").replace("</s> ", "</s>") for text in spoken(template, prepared)]
    assert texts == [answer.removeprefix(" ") for answer in answers]
    assert not (prepared.loss_mask & (prepared.input_ids == template.image_token_id)).any()


@pytest.mark.parametrize("row", [row for row, _ in SPOKEN], ids=range(len(SPOKEN)))
def test_ids_are_those_of_inference(any_target: Target, pictures: Path, row: dict[str, Any]) -> None:
    template = template_of(any_target)
    conversation = read_conversation(row, 0)
    prompt = "".join(segment.text for segment in template.segments(conversation))
    prepared = template.prepare(conversation, pictures, 1000)
    images = [pictures / name for name in conversation.images]
    inputs = any_target.prepare(prompt, images)
    assert torch.equal(inputs["input_ids"][0], prepared.input_ids)
    if images:
        assert torch.equal(inputs["pixel_values"], prepared.images["pixel_values"])


def test_prompt_before_an_answer_is_the_chat_prompt(any_target: Target, pictures: Path) -> None:
    """The tokens before the last answer are what the model is asked with at inference."""
    template = template_of(any_target)
    prepared = template.prepare(read_conversation(image_record(3), 0), pictures, 1000)
    prompt = any_target.chat_prompt("More?", 0, [("<image>\nWhat colours?", "Red and 3.")], None)
    asked = any_target.prepare(prompt, [pictures / "a.png"])["input_ids"][0]
    last = prepared.loss_mask.nonzero().flatten()
    start = int(last[(last.diff() > 1).nonzero().flatten()[-1] + 1])
    assert torch.equal(prepared.input_ids[:start], asked)


def test_own_system_prompt(target: Target, pictures: Path) -> None:
    row = {"conversations": [{"from": "system", "value": "Be brief."}, *turns("q", "a")]}
    prepared = template_of(target).prepare(read_conversation(row, 0), pictures, 1000)
    assert target.tokenizer.decode(prepared.input_ids) == "<s> Be brief. USER: q ASSISTANT: a</s>"


def test_long_rows_are_cut_but_not_through_a_picture(target: Target, pictures: Path) -> None:
    template = template_of(target)
    whole = template.prepare(read_conversation(text_record(1, length=9), 0), pictures, 10_000)
    cut = template.prepare(read_conversation(text_record(1, length=9), 0), pictures, 200)
    assert len(whole.input_ids) > 200 and torch.equal(cut.input_ids, whole.input_ids[:200])
    assert torch.equal(cut.loss_mask, whole.loss_mask[:200])
    image = template.prepare(read_conversation(image_record(1), 0), pictures, 10_000)
    last_image = int((image.input_ids == template.image_token_id).nonzero()[-1])
    first_answer = int(image.loss_mask.nonzero()[0])
    kept = template.prepare(read_conversation(image_record(1), 0), pictures, first_answer + 1)
    assert int(kept.loss_mask.sum()) == 1
    for length, reason in ((last_image, "image_cut"), (first_answer, "answer_cut")):
        with pytest.raises(Unusable, match=reason):
            template.prepare(read_conversation(image_record(1), 0), pictures, length)


def test_pictures_that_are_none(target: Target, pictures: Path) -> None:
    for name, reason in (
        ("nothing.png", "missing_picture"),
        ("broken.png", "broken_picture"),
        (".", "missing_picture"),
    ):
        with pytest.raises(Unusable, match=reason):
            template_of(target).prepare(read_conversation(image_record(1, name), 0), pictures, 1000)

"""Templates word for word."""

from __future__ import annotations

import pytest

from llava.conversation import TEMPLATES, build_prompt, get_template
from llava.errors import UserError

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@pytest.mark.parametrize(("name", "system"), [("vicuna_v1", VICUNA), ("llava_v1", LLAVA)])
def test_two_turns_word_for_word(name: str, system: str) -> None:
    conversation = get_template(name)
    conversation.append(0, "<image>\nWhat is this?")
    conversation.append("ASSISTANT", "A cat.")
    conversation.append("USER", "And <image> this?")
    conversation.append(1, None)
    assert conversation.prompt() == (
        f"{system} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: And <image> this? ASSISTANT:"
    )


def test_closed_conversation_ends_with_the_end_token() -> None:
    conversation = get_template("vicuna_v1")
    conversation.append(0, "Hi")
    conversation.append(1, "Hello.")
    assert conversation.prompt() == f"{VICUNA} USER: Hi ASSISTANT: Hello.</s>"


def test_empty_answer_is_an_answer() -> None:
    assert build_prompt("b", [("a", "")], system="") == " USER: a ASSISTANT: </s>USER: b ASSISTANT:"


def test_own_system_prompt_and_none_at_all() -> None:
    assert build_prompt("Hi", system="Be brief.") == "Be brief. USER: Hi ASSISTANT:"
    assert build_prompt("Hi", system="") == " USER: Hi ASSISTANT:"


def test_templates_are_fresh_copies() -> None:
    get_template("vicuna_v1").append(0, "Hi")
    assert get_template("vicuna_v1").messages == []
    assert TEMPLATES["vicuna_v1"].messages == []


def test_unknown_template_and_role() -> None:
    with pytest.raises(UserError, match=r"unknown conversation template: v9 \(known: vicuna_v1, llava_v1\)"):
        get_template("v9")
    for role in ("HUMAN", 2, -1):
        with pytest.raises(UserError, match="unknown role"):
            get_template().append(role, "Hi")

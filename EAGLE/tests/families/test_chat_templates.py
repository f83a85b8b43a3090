"""LLaVA in transformers' layout: its own chat template at inference and in training, with its own end token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus_support import turns
from tiny_llava import make_image, make_liuhaotian, make_llava_hf
from tiny_stock import make_qwen

from eagle.conversations import Unusable, read_conversation
from eagle.decode.msd import MSDModel
from eagle.families import Target, load_target, template_of
from eagle.ge_data.regenerate import ConversationState
from llava.errors import UserError

LLAVA_HF = (  # as published with llava-hf's checkpoints: no end token after an answer
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_ONLY = (  # as those of language models' tokenizers
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] + '</s>' }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = (  # as Qwen3.5's: a thought before the last answer, none before earlier ones
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] | trim }}"
    "{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEXT_ONLY
FILES = {
    "chat_template.jinja": lambda template: template,
    "chat_template.json": lambda template: json.dumps({"chat_template": template}),
    "processor_config.json": lambda template: json.dumps({"chat_template": template}),
    "tokenizer_config.json": lambda template: json.dumps({"chat_template": template}),
}


def with_template(folder: Path, template: str, file: str = "chat_template.jinja") -> Target:
    (make_llava_hf(folder) / file).write_text(FILES[file](template))
    return load_target(folder, dtype="float32")


@pytest.mark.parametrize("file", FILES)
def test_the_checkpoints_own_template_is_the_default(tmp_path: Path, file: str) -> None:
    target = with_template(tmp_path / "base", LLAVA_HF, file)
    assert target.chat_prompt("What?", 1) == "USER: <image>\nWhat? ASSISTANT:"
    assert target.chat_prompt("And?", 0, [("<image>\nWhat?", "A cat")]) == (
        "USER: <image>\nWhat? ASSISTANT: A cat USER: And? ASSISTANT:"
    )
    assert target.processor.chat_prompt("What?", template="vicuna_v1").startswith("A chat between")


def test_a_template_of_texts_gets_marks_and_one_begin_token(tmp_path: Path) -> None:
    target = with_template(tmp_path / "base", TEXT_ONLY)
    prompt = target.chat_prompt("What?", 1, system="Be brief.")
    assert prompt == "<|system|>Be brief.</s>\n<|user|><image>\nWhat?</s>\n<|assistant|>"
    ids = target.prepare(prompt, [make_image()])["input_ids"][0].tolist()
    assert ids.count(target.tokenizer.bos_token_id) == 1


def test_liuhaotians_layout_keeps_vicunas_conversation(tmp_path: Path) -> None:
    folder = make_liuhaotian(tmp_path / "base")
    (folder / "chat_template.jinja").write_text(TEXT_ONLY)
    assert load_target(folder, dtype="float32").chat_prompt("What?").startswith("A chat between")


@pytest.mark.parametrize("template", [LLAVA_HF, TEXT_ONLY], ids=["parts", "text"])
def test_training_learns_what_is_asked_and_the_end_token(tmp_path: Path, template: str) -> None:
    target = with_template(tmp_path / "base", template)
    make_image(tmp_path / "a.png")
    own = template_of(target)
    row = {"image": "a.png", "conversations": turns("<image>\nWhat?", "A cat", "Sure?", "Yes")}
    conversation = read_conversation(row, 0)
    assert own.segments(conversation)[0].text == target.chat_prompt("What?", 1)
    assert "A chat between" not in own.segments(conversation)[0].text
    prepared = own.prepare(conversation, tmp_path, 500)
    learnt = prepared.input_ids[prepared.loss_mask]
    assert target.tokenizer.decode(learnt).replace(" ", "") == "Acat</s>Yes</s>"
    assert (learnt == target.eos_token_ids[0]).sum() == 2
    outline = own.outline(conversation, tmp_path, 500)
    assert [turn.end for turn in outline.turns] == [[target.eos_token_ids[0]]] * 2
    state = ConversationState(outline, 0)
    state.add_question(0, 500)
    state.add_answer(outline.turns[0], [7, *target.eos_token_ids], set(target.eos_token_ids))
    assert state.ids[-2:] == [7, *target.eos_token_ids] and state.loss_mask[-2:] == [True, True]


def test_a_thought_before_the_last_answer_only(tmp_path: Path) -> None:
    """Each answer is learnt as the last one is written, whatever stands in the questions."""
    target = with_template(tmp_path / "base", THINKING)
    own = template_of(target)
    make_image(tmp_path / "a.png")
    row = {"image": "a.png", "conversations": turns("<image>\nOK?", " OK ", "Not OK?", "OK", "Why?", "So")}
    conversation = read_conversation(row, 0)
    found = [segment.text for segment in own.segments(conversation)]
    asked = ["<|user|><image>OK?", "<|user|>Not OK?", "<|user|>Why?"]
    assert found[::2] == [
        f"{begin}{question}</s>\n<|assistant|><think>\n"
        for begin, question in zip(["", "\n", "\n"], asked, strict=True)
    ]
    assert found[1::2] == [f"\n</think>\n\n{answer}</s>" for answer in ("OK", "OK", "So")]
    prepared = own.prepare(conversation, tmp_path, 500)
    learnt = target.tokenizer.decode(prepared.input_ids[prepared.loss_mask]).replace(" ", "")
    assert learnt == "".join(found[1::2])
    assert [turn.end for turn in own.outline(conversation, tmp_path, 500).turns] == [[target.eos_token_ids[0]]] * 3


def test_a_template_that_refuses_a_system_prompt_is_named(tmp_path: Path) -> None:
    target = with_template(tmp_path / "base", NO_SYSTEM)
    assert target.chat_prompt("What?") == "<|user|>What?</s>\n<|assistant|>"
    with pytest.raises(UserError, match="no system role"):
        target.chat_prompt("What?", system="Be brief.")
    row: dict[str, Any] = {"conversations": turns("q", "a"), "system": "Be brief."}
    with pytest.raises(Unusable, match="template"):
        template_of(target).prepare(read_conversation(row, 0), tmp_path, 500)


WITHOUT_SYSTEM = "{% for message in messages if message['role'] != 'system' %}" + TEXT_ONLY.split("%}", 1)[1]


@pytest.mark.parametrize("make", [make_llava_hf, make_qwen])
def test_a_template_that_leaves_out_a_system_prompt_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path / "base")
    parts = LLAVA_HF.replace("<image>\\n", "<|vision_start|><|image_pad|><|vision_end|>")
    template = parts.replace("for message in messages", "for message in messages if message['role'] != 'system'")
    (folder / "chat_template.jinja").write_text(WITHOUT_SYSTEM if make is make_llava_hf else template)
    target = load_target(folder, dtype="float32")
    assert "What?" in target.chat_prompt("What?")
    with pytest.raises(UserError, match=r"chat template leaves out 'Be brief\.'"):
        target.chat_prompt("What?", system="Be brief.")
    row: dict[str, Any] = {"conversations": turns("q", "a"), "system": "Be brief."}
    with pytest.raises(Unusable, match="template"):
        template_of(target).prepare(read_conversation(row, 0), tmp_path, 500)


def test_a_template_of_texts_where_parts_are_needed_is_refused(tmp_path: Path) -> None:
    """It would write the list of parts as Python does."""
    folder = make_qwen(tmp_path / "base")
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(TEXT_ONLY.replace("{{ bos_token }}", "").replace(" + '</s>'", ""))
    with pytest.raises(UserError, match="chat template is for texts"):
        load_target(folder, dtype="float32").chat_prompt("What?")


def test_generation_uses_it(tmp_path: Path) -> None:
    """The engine ends where the checkpoint's generation config says."""
    target = with_template(tmp_path / "base", LLAVA_HF)
    inputs = target.prepare(target.chat_prompt("What?", 1), [make_image()])
    assert MSDModel(target).generate(**inputs, max_new_tokens=3).tokens

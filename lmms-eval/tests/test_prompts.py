"""Prompts, inputs and answers are those of lmms-eval's own models on the same checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
from eval_support import IMAGES, load, make_video, request, upstream

from llava import UserError
from lmms_eval_msd import model as models
from lmms_eval_msd.prompts import Prompt, Text, interleaved, visuals_of

ANY_STOP = {"until": []}
# as published with llava-hf's checkpoints: pictures first, no system prompt of its own
PARTS_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def compare(theirs, texts, ours, context, visuals, settings=None):
    """Asks both models; their prompts have to be equal. Returns both answers."""
    texts.clear()
    ask = lambda: [request(context, visuals, settings=settings or ANY_STOP)]  # noqa: E731
    answers = [str(theirs.generate_until(ask())[0]).strip(), ours.generate_until(ask())[0].text.strip()]
    assert ours.prompts.write(context, visuals_of(visuals)).text == texts[-1]
    assert answers[0]
    return answers


def test_llava_as_llava_hf(llava_hf, monkeypatch):
    """Its processor cuts the middle out of a picture, which `image_aspect` asks for here."""
    theirs, texts = upstream("llava_hf", "LlavaHf", llava_hf, monkeypatch, dtype="float32")
    ours = load(models.LlavaMSD, llava_hf, image_aspect="crop")
    few_shot = "Is this red?\nyes\n\nHow many shapes?"
    for context in ("How many shapes?", few_shot, "Look: <image>\nHow many?"):
        one, other = compare(theirs, texts, ours, context, IMAGES[:1])
        assert one == other
    compare(theirs, texts, ours, "Which two?", IMAGES[:2])  # llava tokenises the space between two marks otherwise
    padding = load(models.LlavaMSD, llava_hf)
    assert padding.generate_until([request(few_shot, IMAGES[:1], settings=ANY_STOP)])[0].text != other


def test_llava_next_as_llava_hf(llava_next, monkeypatch):
    theirs, texts = upstream("llava_hf", "LlavaHf", llava_next, monkeypatch, dtype="float32")
    ours = load(models.LlavaNextMSD, llava_next)
    for visuals in (IMAGES[:1], IMAGES[1:]):
        one, other = compare(theirs, texts, ours, "How many shapes?", visuals)
        assert one == other


def with_template(folder, copy, file):
    """A copy of a checkpoint with the template in one of the two files that checkpoints have it in."""
    shutil.copytree(folder, copy)
    (copy / file).write_text(
        PARTS_TEMPLATE if file.endswith(".jinja") else json.dumps({"chat_template": PARTS_TEMPLATE})
    )
    return copy


def test_template_of_the_processor_alone(llava_next, llava_hf, tmp_path, monkeypatch):
    """chat_template.json gives the tokenizer none: `llava_hf` writes Vicuna's conversation, and so do we with
    "tokenizer". By default we write the processor's."""
    pairs = [(llava_next, models.LlavaNextMSD, {}), (llava_hf, models.LlavaMSD, {"image_aspect": "crop"})]
    for number, (source, model_class, options) in enumerate(pairs):
        folder = with_template(source, tmp_path / str(number), "chat_template.json")
        theirs, texts = upstream("llava_hf", "LlavaHf", folder, monkeypatch, dtype="float32")
        assert theirs._image_processor.chat_template == PARTS_TEMPLATE
        same = load(model_class, folder, chat_template="tokenizer", **options)
        one, other = compare(theirs, texts, same, "How many?", IMAGES[:1])
        assert one == other
        assert texts[-1].startswith("A chat between a curious user")
        own = load(model_class, folder)
        assert own.prompts.write("How many?", IMAGES[:1]).text == "USER: <image>\nHow many? ASSISTANT:"
        assert own.prompts.target.chat_prompt("How many?", 1) == "USER: <image>\nHow many? ASSISTANT:"


def test_template_of_parts_for_the_tokenizer_too(llava_next, tmp_path, monkeypatch):
    """With chat_template.jinja `llava_hf` loses the question; "tokenizer" is what both write without a template."""
    folder = with_template(llava_next, tmp_path / "base", "chat_template.jinja")
    theirs, texts = upstream("llava_hf", "LlavaHf", folder, monkeypatch, dtype="float32")
    ours = load(models.LlavaNextMSD, folder, chat_template="tokenizer")
    prompt = ours.prompts.write("How many?", IMAGES[:1]).text
    assert prompt == load(models.LlavaNextMSD, llava_next).prompts.write("How many?", IMAGES[:1]).text
    theirs.tokenizer.apply_chat_template([{"role": "user", "content": "How many?"}], tokenize=False)
    assert "How many?" not in texts[-1]
    for options in ({}, {"chat_template": "processor"}):
        own = load(models.LlavaNextMSD, folder, **options)
        assert own.prompts.write("How many?", IMAGES[:1]).text == "USER: <image>\nHow many? ASSISTANT:"
    with pytest.raises(UserError, match="has no chat template"):
        load(models.LlavaNextMSD, llava_next, chat_template="processor")


@pytest.mark.parametrize(("version", "name"), [("2", "Qwen2_VL"), ("2_5", "Qwen2_5_VL")])
def test_qwen_as_its_own_model(version, name, tmp_path, monkeypatch, qwen2, qwen2_5):
    folder = qwen2 if version == "2" else qwen2_5
    limits = {"min_pixels": 56 * 56, "max_pixels": 84 * 84, "max_num_frames": 4}
    theirs, texts = upstream(name.lower(), name, folder, monkeypatch, **limits)
    ours = load(getattr(models, f"{name.replace('_VL', 'VL')}MSD"), folder, **limits)
    video = str(make_video(tmp_path / "clip.mp4"))
    asks = [
        ("How many <image> shapes?", IMAGES[:1], None),
        ("Which two?", IMAGES[:2], {"until": ["e"], "max_new_tokens": 12}),
        ("What happens?", [video], {"until": [], "max_new_tokens": 12}),
        ("Name two rivers.", [], {"until": []}),
    ]
    lengths = []
    for context, visuals, settings in asks:
        one, other = compare(theirs, texts, ours, context, visuals, settings)
        assert one == other
        lengths.append(ours.prompts.inputs([ours.prompts.write(context, visuals)])["input_ids"].shape[1])
    assert texts[-1].startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert lengths[1] > lengths[0] > lengths[3]
    assert lengths[2] > lengths[3] + 4  # the video is seen


def test_qwen_settings(qwen2):
    ours = load(
        models.Qwen2VLMSD, qwen2, system_prompt="Be brief.", reasoning_prompt="\\nThink.", interleave_visuals=True
    )
    prompt = ours.prompts.write("See <image 2> and <image 1>.", IMAGES[:2])
    assert prompt.text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert prompt.text.count("<|image_pad|>") == 2
    assert "See <|vision_start|>" in prompt.text
    assert ".\nThink.<|im_end|>" in prompt.text
    assert prompt.visuals == (IMAGES[1], IMAGES[0])
    assert interleaved("none", ["a.mp4"]) == ["a.mp4", Text("none")]
    assert interleaved("<image 3>x", ["a.mp4"]) == [Text("x")]


def test_system_prompt_of_llava(base, tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.\n")
    ours = load(models.LlavaMSD, base, system_prompt=str(tmp_path / "system.txt"))
    assert ours.prompts.write("What?", []).text == "Be brief. USER: What? ASSISTANT:"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_marks_of_llava(base, count):
    write = load(models.LlavaMSD, base).prompts.write
    marks = " ".join(["<image>"] * count) + "\n" if count else ""
    pictures = [IMAGES[0]] * count
    assert write("What?", pictures).text.endswith(f"answers to the user's questions. USER: {marks}What? ASSISTANT:")
    assert write("What?<image>", pictures).text.endswith(
        "USER: What?<image> ASSISTANT:" if count == 1 else f"USER: {marks}What? ASSISTANT:"
    )


def test_chat_template_of_llava(llava_next):
    template = "{{ bos_token }}[INST] {{ messages[-1]['content'] }} [/INST]"
    ours = load(models.LlavaNextMSD, llava_next, chat_template=template)
    prompt = ours.prompts.write("What?", IMAGES[:1])
    assert prompt == Prompt("<s>[INST] <image>\nWhat? [/INST]", (IMAGES[0],))
    ids = ours.prompts.inputs([prompt])["input_ids"][0].tolist()
    assert ids.count(ours.tokenizer.bos_token_id) == 1  # the template's
    ours.prompts.chat_template = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}"
    with pytest.raises(UserError, match="does not write the question"):
        ours.prompts.write("What?", [])
    ours.prompts.chat_template = "tokenizer"
    ours.tokenizer.chat_template = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}"
    assert ours.prompts.write("What?", []).text.endswith("USER: What? ASSISTANT:")  # as if there were none


def test_llava_has_no_video(base):
    with pytest.raises(UserError, match="video"):
        load(models.LlavaMSD, base).prompts.write("What?", ["clip.mp4"])


def test_broken_video(qwen2, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    conversation = load(models.Qwen2VLMSD, qwen2).prompts
    with pytest.raises(UserError, match=r"cannot be read: .*clip\.mp4"):
        conversation.inputs([conversation.write("What?", [str(tmp_path / "clip.mp4")])])

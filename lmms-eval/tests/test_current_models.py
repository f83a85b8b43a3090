"""Today's families: prompts and inputs are those of lmms-eval's own models, and answers those of `generate`."""

from __future__ import annotations

import shutil

import pytest
import torch
from eval_support import EARLIER, IMAGES, TREE, class_of, load, make_video, request, upstream
from lmms_eval.api.instance import Instance
from tiny_draft import make_draft
from tiny_llava import make_image
from transformers.video_utils import load_video

from eagle.families import load_target
from llava import UserError
from lmms_eval_msd import MODELS
from lmms_eval_msd.prompts import visuals_of

CURRENT = [name for name in MODELS if name not in EARLIER]
VIDEOS = [name for name in CURRENT if class_of(name).writer.has_videos]
TINY = {"max_num_frames": 4, "max_soft_tokens": 70}
LIMITS = {"min_pixels": 64 * 64, "max_pixels": 96 * 96, "max_num_frames": 4}
METADATA = {"task": "tiny", "doc_id": 0, "repeats": 1}
EMPTY = "<think>\n\n</think>\n\n"
SHORT = {"max_new_tokens": 12, "until": []}
ONEVISION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<' + part['type'] + '>' }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(make_video(tmp_path_factory.mktemp("video") / "clip.mp4", frames=11))


def given_to_generate(model, monkeypatch) -> list[dict]:
    """The model inputs of each call of `generate`."""
    calls: list[dict] = []
    generate = model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **inputs: calls.append(inputs) or generate(**inputs))
    return calls


def compare(theirs, calls, ours, context, visuals, ask=None):
    """Asks both models. Token ids, pixels and answers are equal. ``ask``: a request to theirs, if it is another."""
    answer = theirs.generate_until([ask or request(context, visuals, settings=dict(SHORT))])[0]
    check_inputs(calls[-1], ours, context, visuals)
    own = ours.generate_until([request(context, visuals, settings=SHORT)])[0].text
    assert own == getattr(answer, "text", answer) != ""


def check_inputs(theirs, ours, context, visuals):
    own = ours.prompts.inputs([ours.prompts.write(context, visuals_of(visuals))])
    assert theirs["input_ids"][theirs["attention_mask"].bool()].tolist() == own["input_ids"][0].tolist()
    pixels = [name for name in own if "pixel" in name or "grid" in name]
    assert bool(pixels) == bool(visuals)
    for name in pixels:
        torch.testing.assert_close(own[name], theirs[name], atol=1e-5, rtol=1e-5)


ASKED = [
    ("How many <image> shapes?", 1, 0),
    ("Which two?", 2, 0),
    ("What happens?", 0, 1),
    ("And here?", 1, 1),
    ("Why?", 0, 0),
]


@pytest.mark.parametrize("name", ["qwen3_vl_msd", pytest.param("qwen3_vl_moe_msd", marks=pytest.mark.slow)])
def test_as_qwen3_vl(name, family_bases, clip, monkeypatch):
    compare_qwen(name, ("qwen3_vl", "Qwen3_VL"), family_bases[name], clip, monkeypatch, **LIMITS)


@pytest.mark.parametrize("name", ["qwen3_5_msd", pytest.param("qwen3_5_moe_msd", marks=pytest.mark.slow)])
def test_as_qwen3_5(name, family_bases, clip, monkeypatch):
    """Which is asked to think, and samples where a task does not set a temperature."""
    limits = LIMITS | {"total_pixels": 3 * 96 * 96, "max_num_frames": 8, "enable_thinking": False}
    ours = compare_qwen(name, ("qwen3_5", "Qwen3_5"), family_bases[name], clip, monkeypatch, **limits)
    assert type(ours.prompts).enable_thinking is True
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    assert sampled.items() <= ours.settings(None).engine.items()
    assert ours.settings({"temperature": 0}).engine == {"max_new_tokens": 1024, "do_sample": False}


def compare_qwen(name, theirs_is, folder, clip, monkeypatch, **limits):
    theirs, texts = upstream(*theirs_is, folder, monkeypatch, **limits)
    ours = load(class_of(name), folder, **limits)
    calls = given_to_generate(theirs, monkeypatch)
    for context, pictures, clips in ASKED:
        visuals = IMAGES[:pictures] + [clip] * clips
        compare(theirs, calls, ours, context, visuals)
        assert ours.prompts.write(context, visuals).text == texts[-1]
    assert "seconds>" in ours.tokenizer.decode(ours.prompts.inputs([ours.prompts.write("", [clip])])["input_ids"][0])
    return ours


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_of_qwen3_vl(thinking, qwen3, monkeypatch):
    theirs, texts = upstream("qwen3_vl", "Qwen3_VL", qwen3, monkeypatch, enable_thinking=thinking)
    ours = load(class_of("qwen3_vl_msd"), qwen3, enable_thinking=str(thinking), reasoning_prompt="\\nThink.")
    theirs.reasoning_prompt = "\nThink."
    said = "Let me see.</think>\n\nTwo " if thinking else "Two"
    monkeypatch.setattr(theirs.processor, "batch_decode", lambda *given, **more: [said])
    monkeypatch.setattr(ours.tokenizer, "decode", lambda *given, **more: said)
    ask = request("How many? ", IMAGES[:1], settings=SHORT)
    assert ours.generate_until([ask])[0].text == str(theirs.generate_until([ask])[0]) == "Two"
    assert ours.prompts.write("How many? ", IMAGES[:1]).text == texts[-1]
    assert texts[-1].endswith("How many?\nThink.<|im_end|>\n<|im_start|>assistant\n" + ("" if thinking else EMPTY))


def test_as_gemma3(gemma3, monkeypatch):
    theirs, _ = upstream("gemma3", "Gemma3", gemma3, monkeypatch)
    ours = load(class_of("gemma3_msd"), gemma3)
    calls = given_to_generate(theirs, monkeypatch)
    monkeypatch.setattr(torch, "bfloat16", torch.float32)  # in which it gives the model its pictures
    for context, pictures, _ in ASKED:
        compare(theirs, calls, ours, context, IMAGES[:pictures])
    for interleave in (False, True):
        theirs.interleave_visuals = ours.prompts.interleave_visuals = interleave
        compare(theirs, calls, ours, "Is <image 2> like <image 1>?", IMAGES[:2])


def test_as_gemma4(family_bases, clip, monkeypatch):
    limits = {"max_soft_tokens": 70, "max_num_frames": 4}
    folder = family_bases["gemma4_msd"]
    theirs, _ = upstream("gemma4", "Gemma4", folder, monkeypatch, **limits)
    ours = load(class_of("gemma4_msd"), folder, **limits)
    calls = given_to_generate(theirs, monkeypatch)
    monkeypatch.setattr(torch, "bfloat16", torch.float32)  # in which it gives the model its pictures
    monkeypatch.setattr(theirs.processor.video_processor, "fetch_videos", read_with_pyav)  # by default torchcodec reads
    for context, pictures, clips in ASKED:
        compare(theirs, calls, ours, context, IMAGES[:pictures] + [clip] * clips)
    theirs.interleave_visuals = ours.prompts.interleave_visuals = True
    compare(theirs, calls, ours, "Is <image 2> like <image 1>?", IMAGES[:2])
    with pytest.raises(UserError, match="max_soft_tokens is none of 70, 140"):
        load(class_of("gemma4_msd"), folder, max_soft_tokens=9)


@pytest.mark.parametrize(
    ("name", "folder"), [("glm4v_msd", "GLM-Flash"), pytest.param("glm4v_moe_msd", "GLM", marks=pytest.mark.slow)]
)
def test_as_glm4v(name, folder, family_bases, clip, tmp_path, monkeypatch):
    """Whose class of the model follows the folder's name."""
    base = shutil.copytree(family_bases[name], tmp_path / folder)
    theirs, _ = upstream("glm4v", "GLM4V", base, monkeypatch)
    ours = load(class_of(name), base)
    calls = given_to_generate(theirs, monkeypatch)
    for context, pictures, clips in ASKED:
        if not clips:  # it reads no videos
            compare(theirs, calls, ours, context, IMAGES[:pictures])
    shown = ours.prompts.inputs([ours.prompts.write("What happens?", [clip])])
    assert shown["video_grid_thw"][:, 0].tolist() == [2]  # of two seconds with two frames each, two of which are one
    with pytest.raises(UserError, match="pictures and videos in one prompt"):
        ours.generate_until([request("And here?", [IMAGES[0], clip], settings=SHORT)])
    assert ours.settings(None).engine["max_new_tokens"] == 8192


def test_as_mistral3_vl(family_bases, monkeypatch):
    """Which samples where a task does not say otherwise, with a penalty of repetitions."""
    folder = family_bases["mistral3_msd"]
    theirs, _ = upstream("mistral3_vl", "Mistral3_VL", folder, monkeypatch)
    ours = load(class_of("mistral3_msd"), folder)
    calls = given_to_generate(theirs, monkeypatch)
    for context, pictures, clips in ASKED:
        if not clips:
            compare(theirs, calls, ours, context, IMAGES[:pictures])
    for key, value in {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2, "max_new_tokens": 512}.items():
        assert ours.settings(None).engine[key] == value
    for given in ({"temperature": 0}, {"do_sample": False}):
        settings = ours.settings(given).engine
        assert settings == {"max_new_tokens": 512, "do_sample": False, "repetition_penalty": 1.2}
    for said in ("<think>No.</think> 4", "The <answer> 4 </answer>", "So \\boxed{4}", "no</think>4", " 4 "):
        assert ours.prompts.finish(said) == theirs._postprocess_output(said) == "4"
    own = load(class_of("mistral3_msd"), folder, system_prompt="Be brief.").prompts.write("Hi", IMAGES[:1]).text
    assert own == "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST][IMG]Hi[/INST]"


def read_with_pyav(paths, sample_indices_fn):
    return zip(*[load_video(path, backend="pyav", sample_indices_fn=sample_indices_fn) for path in paths], strict=True)


def test_as_internvl_hf(internvl, clip, monkeypatch):
    theirs, texts = upstream("internvl_hf", "InternVLHf", internvl, monkeypatch, kind="chat", num_frames=4)
    ours = load(class_of("internvl_msd"), internvl, max_num_frames=4)
    calls = given_to_generate(theirs, monkeypatch)
    monkeypatch.setattr(theirs.processor.video_processor, "fetch_videos", read_with_pyav)  # by default torchcodec reads
    for context, pictures, clips in ASKED[1:]:
        visuals = IMAGES[:pictures] + [clip] * clips
        content = [{"type": "video" if isinstance(each, str) else "image", "url": each} for each in visuals]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": context}]}]
        given = (context, lambda doc, asked=messages: asked, dict(SHORT), 0, "tiny", "test")
        compare(theirs, calls, ours, context, visuals, Instance("generate_until", given, 0, METADATA))
        assert ours.prompts.write(context, visuals).text == texts[-1]


def test_as_llava_hf(onevision, tmp_path, clip, monkeypatch):
    """With a template that takes a text too, as `llava_hf` gives it."""
    folder = shutil.copytree(onevision, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(ONEVISION_TEMPLATE)
    theirs, texts = upstream("llava_hf", "LlavaHf", folder, monkeypatch, dtype="float32", max_frames_num=4)
    ours = load(class_of("llava_onevision_msd"), folder, chat_template="tokenizer", max_num_frames=4)
    own = load(class_of("llava_onevision_msd"), folder)
    calls = given_to_generate(theirs, monkeypatch)
    for context, pictures, clips in ASKED[:3]:
        visuals = IMAGES[:pictures] + [clip] * clips
        if pictures < 2:  # of several it cuts each into tiles
            compare(theirs, calls, ours, context, visuals)
        else:
            theirs.generate_until([request(context, visuals, settings=dict(SHORT))])
        assert ours.prompts.write(context, visuals).text == texts[-1]
        marks = "<image>" * pictures + "<video>" * clips
        assert f"user\n{marks}{context.replace('<image>', '')}<|im_end|>" in own.prompts.write(context, visuals).text
    several = own.prompts.inputs([own.prompts.write("Which two?", IMAGES[:2])])
    assert several["batch_num_images"].tolist() == [2]  # as `llava_onevision` gives them: one tile each
    mixed = ours.prompts.write("And <video> here?", [IMAGES[0], clip]).text
    assert "user\n<image> <video>\nAnd  here?<|im_end|>" in mixed


@pytest.mark.slow
@pytest.mark.parametrize("name", CURRENT)
def test_answers_are_those_of_generate(name, family_bases, clip, tmp_path):
    """Pictures of several sizes, several pictures, none, a video; alone and in batches, with a draft."""
    folder = family_bases[name]
    draft = make_draft(tmp_path / "draft", load_target(folder), agree=1.0)
    wide, high = make_image(seed=4, width=200, height=40), make_image(seed=5, width=50, height=120)
    asked = [[IMAGES[0]], [wide], [high], [wide, high, IMAGES[1]], []] + ([[clip]] if name in VIDEOS else [])
    limits = {key: value for key, value in TINY.items() if hasattr(class_of(name).writer, key)}
    requests = [request(f"How many {number}?", visuals, settings=SHORT) for number, visuals in enumerate(asked)]
    for size in (1, 3):
        model = load(class_of(name), folder, draft, batch_size=size, **limits, **TREE)
        penalty = model.sampling.get("repetition_penalty")
        answers = [each.text for each in model.generate_until(requests)]
        for number, visuals in enumerate(asked):
            inputs = model.prompts.inputs([model.prompts.write(f"How many {number}?", visuals)])
            ids = model.msd.target.model.generate(
                **inputs, max_new_tokens=12, do_sample=False, repetition_penalty=penalty
            )
            new = ids[0, inputs["input_ids"].shape[1] :]
            wanted = model.tokenizer.decode(new, skip_special_tokens=True)
            assert answers[number].strip() == wanted.strip()  # some families strip
        assert len(set(answers)) > 2


@pytest.mark.parametrize("name", ["llava_next_msd", *(name for name in CURRENT if name not in VIDEOS)])
def test_families_without_videos(name, family_bases):
    with pytest.raises(UserError, match=r"see pictures alone: clip\.mp4") as error:
        load(class_of(name), family_bases[name]).prompts.write("What?", ["clip.mp4"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", VIDEOS)
def test_broken_video(name, family_bases, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    prompts = load(class_of(name), family_bases[name]).prompts
    with pytest.raises(UserError, match=r"cannot be read.*clip\.mp4") as error:
        prompts.inputs([prompts.write("What?", [str(tmp_path / "clip.mp4")])])
    assert "\n" not in str(error.value)


def test_settings(internvl, onevision, qwen3, gemma3, clip):
    small = load(class_of("internvl_msd"), internvl, max_patches=1).prompts
    large = load(class_of("internvl_msd"), internvl).prompts
    wide = [make_image(seed=4, width=200, height=40)]
    counts = [prompts.inputs([prompts.write("What?", wide)])["pixel_values"].shape[0] for prompts in (small, large)]
    assert counts[0] == 1 < counts[1]
    assert load(class_of("llava_onevision_msd"), onevision).prompts.frames(clip)[0].shape[0] == 32
    with pytest.raises(UserError, match="min_pixels 9 is more than max_pixels 8"):
        load(class_of("qwen3_vl_msd"), qwen3, min_pixels=9, max_pixels=8)
    for name, folder in (("gemma3_msd", gemma3), ("internvl_msd", internvl)):
        with pytest.raises(UserError, match=f"unknown key 'min_pixels': --model_args of {name}"):
            load(class_of(name), folder, min_pixels=9)
    limits = {name: load(class_of(name), folder).settings(None).engine["max_new_tokens"] for name, folder in (
        ("qwen3_vl_msd", qwen3), ("gemma3_msd", gemma3), ("internvl_msd", internvl), ("llava_onevision_msd", onevision)
    )}  # fmt: skip
    assert list(limits.values()) == [128, 128, 1024, 1024]

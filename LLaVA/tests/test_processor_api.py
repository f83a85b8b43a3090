"""`LlavaProcessor` used as transformers' own processors are, and compared with transformers' own."""

from __future__ import annotations

import base64
import inspect
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from tiny_llava import TinySizes, make_image, make_liuhaotian, make_llava_hf

from llava import LlavaProcessor, UserError, load_pretrained, load_processor
from llava.messages import IMAGE_TOKEN

COUNT = TinySizes().image_tokens
SQUARE = make_image(width=60, height=60, seed=3)
"""Padding and cropping leave it as it is."""
PARTS_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module", params=["liuhaotian", "llava-hf"])
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlavaProcessor:
    make = make_liuhaotian if request.param == "liuhaotian" else make_llava_hf
    return load_processor(make(tmp_path_factory.mktemp("api") / "model"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> LlavaProcessor:
    return load_processor(make_llava_hf(tmp_path_factory.mktemp("api") / "model"))


@pytest.fixture(scope="module")
def stock(hf: LlavaProcessor) -> Any:
    """transformers' own, of the same tokenizer and image processor."""
    return transformers.LlavaProcessor(
        hf.image_processor, hf.tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def same(ours: Any, theirs: Any) -> None:
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        assert type(ours[name]) is type(theirs[name]), name
        pairs = zip(ours[name], theirs[name], strict=True)
        assert all(np.array_equal(np.asarray(own), np.asarray(other)) for own, other in pairs), name


CALLS: list[dict[str, Any]] = [
    {"text": "USER: Hi", "return_tensors": "pt"},
    {"text": "USER: Hi", "return_tensors": None},
    {"text": ["USER: Hi", "USER: Name two rivers"], "return_tensors": None},
    {"text": ["USER: Hi", "USER: Name two rivers"], "return_tensors": "pt", "padding": True},
    {"text": ["USER: Hi", "USER: Name two rivers"], "return_tensors": "np", "padding": "longest"},
    {"text": ["USER: Hi"], "return_tensors": "pt", "padding": "max_length", "max_length": 40},
    {"text": ["USER: Hi", "U"], "return_tensors": "pt", "padding": True, "pad_to_multiple_of": 16},
    {"text": "USER: Name two rivers", "return_tensors": "pt", "truncation": True, "max_length": 5},
    {"text": ["USER: Hi", "a b c d"], "return_tensors": "pt", "padding": True, "padding_side": "right"},
    {"text": "USER: Hi", "return_tensors": "pt", "add_special_tokens": False},
    {"text": "USER: Hi", "return_tensors": "pt", "return_attention_mask": False},
    {"text": "USER: Hi", "return_tensors": "pt", "return_token_type_ids": False, "verbose": True, "max_length": None},
    {"text": "<image>", "images": SQUARE, "return_tensors": "pt", "return_mm_token_type_ids": True},
    {"text": "<image>", "images": np.asarray(SQUARE), "return_tensors": "pt"},
    {"text": "<image>", "images": torch.from_numpy(np.asarray(SQUARE).copy()), "return_tensors": "pt"},
    {
        "text": ["<image>", "<image><image>"],
        "images": [[SQUARE], [SQUARE] * 2],
        "return_tensors": "pt",
        "padding": True,
    },
    {"text": ["<image>", "b"], "images": [SQUARE], "return_tensors": "pt", "padding": True},
]
if Version(transformers.__version__) >= Version("5.20"):  # before, the stock class forgot return_tensors here
    CALLS.append({"text": "<image>", "images": [[SQUARE]], "return_tensors": "pt", "text_kwargs": {"padding": True}})


@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_outputs_are_those_of_transformers(hf: LlavaProcessor, stock: Any, call: dict[str, Any]) -> None:
    same(hf(**call), stock(**call))


def test_it_is_a_processor_of_transformers(hf: LlavaProcessor, stock: Any) -> None:
    assert isinstance(hf, transformers.ProcessorMixin)
    for method in ("__call__", "apply_chat_template"):
        ours, theirs = (inspect.signature(getattr(each, method)).parameters for each in (hf, stock))
        named = [name for name, each in theirs.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
        assert any(each.kind is each.VAR_KEYWORD for each in ours.values())
        assert set(named[:4] if method == "__call__" else named[:2]) <= set(ours)
    assert hf.image_token == stock.image_token and hf.image_token_id == stock.image_token_id
    assert {"input_ids", "attention_mask", "pixel_values"} <= set(hf.model_input_names)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"text": ["a", "a b c"], "padding": False}, "padding=True"),
        ({"text": "a", "return_tensors": "tf"}, "return_tensors"),
        ({"text": "a", "paddin": True}, "padding"),
        ({"text": "a", "max_length": 0}, "max_length"),
        ({"text": "a", "padding": "left"}, "padding"),
        ({"text": "<image> a b c", "images": SQUARE, "truncation": True, "max_length": 5}, "would cut a picture"),
        ({"text": ["<image>", "b"], "images": [[], [SQUARE]]}, r"1 <image> mark\(s\), but 0 picture"),
        ({"text": [["a"]]}, "list of texts"),
        ({"images": SQUARE, "text": SQUARE}, "list of texts"),
        ({}, "neither text nor images"),
        ({"text": "a", "videos": [1]}, "videos"),
        ({"text": "<image>", "images": 5}, "not a picture"),
        ({"text": "<image>", "images": [object()]}, "not a picture"),
        ({"text": "<image>", "images": {"url": "a"}}, "not a picture"),
    ],
)
def test_what_cannot_be_served_is_one_line(processor: LlavaProcessor, call: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        processor(**call)
    assert "\n" not in str(raised.value)


def test_pictures_in_every_form(processor: LlavaProcessor, tmp_path: Path) -> None:
    SQUARE.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    wanted = processor(text=IMAGE_TOKEN, images=SQUARE)["pixel_values"]
    array = np.asarray(SQUARE)
    channels = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [
        [SQUARE], (SQUARE,), [[SQUARE]], tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").as_uri(),
        url, data, bytearray(data), memoryview(data), io.BytesIO(data), array, array[None],
        channels, channels[None] / 255, [None, SQUARE],
    ]  # fmt: skip
    for form in forms:
        assert torch.equal(processor(text=IMAGE_TOKEN, images=form)["pixel_values"], wanted), type(form)
    assert list(processor(images=[SQUARE])) == ["pixel_values"]
    for pair in ((IMAGE_TOKEN, SQUARE), (SQUARE, IMAGE_TOKEN), (str(tmp_path / "a.png"), [IMAGE_TOKEN])):
        assert torch.equal(processor(*pair)["pixel_values"], wanted)


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image", "image": SQUARE}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "The text <image>."}]},
    {"role": "user", "content": "Why?"},
]


@pytest.mark.parametrize("template", [None, PARTS_TEMPLATE, TEXT_TEMPLATE])
def test_chat_messages(processor: LlavaProcessor, template: str | None) -> None:
    text = processor.apply_chat_template(MESSAGES, template, add_generation_prompt=True)
    assert text.count(IMAGE_TOKEN) == 1
    if template is None:
        assert text == processor.chat_prompt(
            "Why?", history=[("<image>\nWhat is it?", "The text <image>.")], system="Be brief."
        )
    opening = "[assistant]" if template == TEXT_TEMPLATE else "ASSISTANT:"
    assert processor.apply_chat_template(MESSAGES, template) == text.removesuffix(opening) != text
    options = {"add_generation_prompt": True, "tokenize": True}
    inputs = processor.apply_chat_template(MESSAGES, template, return_dict=True, return_tensors="pt", **options)
    same(inputs, processor(text=text, images=SQUARE))
    assert "The text <image>." in processor.decode(inputs["input_ids"][0])
    ids = processor.apply_chat_template(MESSAGES, template, return_tensors="pt", **options)
    assert torch.equal(ids, inputs["input_ids"])
    both = processor.apply_chat_template(
        [MESSAGES, MESSAGES[3:]], template, return_dict=True, processor_kwargs={"padding": True}, **options
    )
    assert both["input_ids"].shape[0] == 2
    assert both["input_ids"][0][both["attention_mask"][0].bool()].tolist() == ids[0].tolist()
    assert both["pixel_values"].shape[0] == 1


def test_chat_messages_are_written_as_transformers_does(hf: LlavaProcessor, stock: Any) -> None:
    plain = [MESSAGES[1], {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]
    for open_end in (True, False):
        options: dict[str, Any] = {"chat_template": PARTS_TEMPLATE, "add_generation_prompt": open_end}
        assert hf.apply_chat_template(plain, **options) == stock.apply_chat_template(plain, **options)
        options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        same(hf.apply_chat_template(plain, **options), stock.apply_chat_template(plain, **options))


def test_pictures_of_messages(processor: LlavaProcessor, tmp_path: Path) -> None:
    SQUARE.save(tmp_path / "a.png")
    encoded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    wanted = processor(text=IMAGE_TOKEN, images=SQUARE)["pixel_values"]
    for part in (
        {"type": "image", "image": SQUARE}, {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "url": (tmp_path / "a.png").as_uri()}, {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{encoded}"},
        {"type": "input_image", "image_url": f"data:image/png;base64,{encoded}"},
    ):  # fmt: skip
        message = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
        inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True)
        assert torch.equal(inputs["pixel_values"], wanted), part["type"]
    place = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    later = processor(text=processor.apply_chat_template([place]), images=SQUARE)
    at_once = processor.apply_chat_template([place], tokenize=True, return_dict=True, images=SQUARE)
    same(later, at_once)


@pytest.mark.parametrize(
    "messages",
    [
        ["text"], [{"content": "a"}], [{"role": "tool", "content": "a"}], [{"role": "user"}],
        [{"role": "user", "content": [{"type": "video"}]}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "assistant", "content": [{"type": "image"}]}], [{"role": "user", "content": 3}],
    ],
    ids=str,
)  # fmt: skip
def test_messages_that_cannot_be_read_are_one_line(processor: LlavaProcessor, messages: list[Any]) -> None:
    with pytest.raises(UserError) as raised:
        processor.apply_chat_template(messages)
    assert "\n" not in str(raised.value)


def test_saved_and_loaded(processor: LlavaProcessor, tmp_path: Path) -> None:
    call = {"text": ["a <unk> b", "<image> c"], "images": make_image(width=90, height=30)}
    wanted = processor(**call)
    for template in (None, PARTS_TEMPLATE):
        folder = tmp_path / str(template is None)
        processor.chat_template = template
        try:
            processor.save_pretrained(folder)
        finally:
            processor.chat_template = None
        for again in (LlavaProcessor.from_pretrained(folder), load_processor(folder)):
            same(again(**call), wanted)
            assert again.chat_template == template and again.aspect == processor.aspect


def test_a_model_saved_with_its_processor(tmp_path: Path) -> None:
    for make, name in ((make_liuhaotian, "a"), (make_llava_hf, "b")):
        model, processor = load_pretrained(make(tmp_path / name / "base"), dtype="float32")
        model.save_pretrained(tmp_path / name / "saved")
        processor.save_pretrained(tmp_path / name / "saved")
        again, loaded = load_pretrained(tmp_path / name / "saved", dtype="float32")
        inputs = processor(text="USER: <image>\nWhat? ASSISTANT:", images=make_image())
        same(loaded(text="USER: <image>\nWhat? ASSISTANT:", images=make_image()), inputs)
        with torch.inference_mode():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_transformers_reads_what_was_saved(hf: LlavaProcessor, stock: Any, tmp_path: Path) -> None:
    hf.save_pretrained(tmp_path)
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path)
    call = {"text": "USER: <image>\nWhat?", "images": SQUARE, "return_tensors": "pt"}
    ours, theirs = loaded(**call), stock(**call)
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=0.05, rtol=0)  # another backend
    assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_pickled(processor: LlavaProcessor) -> None:
    again = pickle.loads(pickle.dumps(processor))
    call = {"text": "a <unk> <image>", "images": make_image()}
    same(again(**call), processor(**call))
    same(pickle.loads(pickle.dumps(processor(**call))), processor(**call))


def test_an_answer_with_the_text_of_a_mark_does_not_break_the_chat(processor: LlavaProcessor) -> None:
    prompt = processor.chat_prompt("And?", history=[("<image>\nTag?", "It is <image> in HTML.")], system="No <image>.")
    inputs = processor(text=prompt, images=SQUARE)
    ids = inputs["input_ids"][0]
    assert int((ids == processor.image_token_id).sum()) == COUNT
    assert "It is <image> in HTML." in processor.decode(ids)
    plain = processor.chat_prompt("And?", history=[("Tag?", "It is <imagf> in HTML.")])
    assert len(processor.encode(plain)) == len(processor.encode_with_spans(plain)[1])


def test_spans_of_a_written_mark(processor: LlavaProcessor) -> None:
    prompt = processor.chat_prompt("And?", history=[("Tag?", "An <image> tag, red.")])
    ids, spans = processor.encode_with_spans(prompt)
    start = prompt.index(" tag, red.")
    told = [
        processor.tokenizer.convert_ids_to_tokens(each) for each, (a, b) in zip(ids, spans, strict=True) if a >= start
    ]
    assert "".join(told).replace("\u2581", " ").startswith(" tag, red.")


def test_an_unknown_template_variable(processor: LlavaProcessor) -> None:
    with pytest.raises(UserError, match="unknown option 'tools'"):
        processor.apply_chat_template(MESSAGES, tools=[])
    text = processor.apply_chat_template(MESSAGES[3:], "{{ messages[0]['content'] }}{{ mood }}", mood="!")
    assert text == "Why?!"


def test_tokens_added_after_the_image_token_keep_their_ids(tmp_path: Path) -> None:
    """Their ids are counted from the vocabulary, so the image token must not be taken out of the row."""
    folder = make_llava_hf(tmp_path / "base")
    backend = json.loads((folder / "tokenizer.json").read_text())
    top = max(token["id"] for token in backend["added_tokens"])
    for number, text in enumerate(("<end>", "<other>"), start=1):
        backend["added_tokens"].append({**backend["added_tokens"][-1], "id": top + number, "content": text})
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    processor = load_processor(str(folder))
    text = "a<end>b<other>c"
    assert processor.encode(text) == processor.tokenizer(text)["input_ids"]
    assert processor.encode(f"{IMAGE_TOKEN}{text}")[-5:] == processor.tokenizer(text)["input_ids"][-5:]

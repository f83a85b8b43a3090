"""Requests as lmms-eval makes them, its own models to compare with, and a small video."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from lmms_eval.api.instance import Instance
from tiny_llava import make_image

from lmms_eval_msd import MODELS, model
from lmms_eval_msd.video import frames_at, measure, provide_reader

IMAGES = [make_image(seed=number, width=70 + 10 * number, height=60) for number in range(3)]
TREE = {"msd_depth": 2, "msd_top_k": 3, "msd_total_tokens": 8}

# as published with Qwen2-VL-7B-Instruct
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: "
    "{% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: "
    "{% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QWEN3_TEMPLATE = QWEN_TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)

EARLIER = ("llava_msd", "llava_next_msd", "qwen2_vl_msd", "qwen2_5_vl_msd")
SOME_SLOW = [name if name in EARLIER else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
"""All models; those of today's families in the slow tests."""


def request(context, visuals, number=0, settings=None, kind="generate_until", ask=None, **metadata) -> Instance:
    """One request of the task `tiny`; ``ask`` is how a task of several rounds asks on."""
    metadata = {"task": "tiny", "doc_id": number, "repeats": 1} | metadata
    if kind != "loglikelihood":
        settings = {"max_new_tokens": 24, "until": ["\n\n"], "temperature": 0} | (settings or {})
    texts = () if ask is None else (ask,)
    task = metadata["task"]
    return Instance(kind, (context, settings, lambda doc: visuals, *texts, number, task, "test"), 0, metadata)


def class_of(name: str):
    """The class of a `--model`."""
    return getattr(model, MODELS[name].rpartition(".")[2])


def load(model_class, folder, draft=None, **options):
    """One of our models, with documents for the tasks `tiny` and `other`."""
    given = {"use_msd": draft is not None, "msd_model_path": draft and str(draft), "device": "cpu"}
    if getattr(model_class.writer, "enable_thinking", None):  # a tiny model never ends a thought
        given["enable_thinking"] = False
    model = model_class(str(folder), **(given | {"dtype": "float32"} | options))
    model.task_dict = {task: {"test": dict.fromkeys(range(100))} for task in ("tiny", "other")}
    return model


class VideoReader:
    """decord's reader, with PyAV."""

    def __init__(self, path, ctx=None):
        path = path[0] if isinstance(path, list) else path
        self.frames = frames_at(path, list(range(measure(path)[0]))).permute(0, 2, 3, 1).numpy()

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        return SimpleNamespace(asnumpy=lambda: self.frames[index])

    get_batch = __getitem__


def upstream(name, class_name, folder: Path, monkeypatch: pytest.MonkeyPatch, kind="simple", **options):
    """lmms-eval's own model on the same checkpoint, in float32, and the list of prompts that it will write."""
    with monkeypatch.context() as patch:
        if find_spec("decord") is None:
            decord = SimpleNamespace(VideoReader=VideoReader, cpu=lambda number: None)
            patch.setitem(sys.modules, "decord", decord)
        module = import_module(f"lmms_eval.models.{kind}.{name}")
    provide_reader()  # lmms-eval's models have none where torchvision has lost its own
    model = getattr(module, class_name)(str(folder), device="cpu", device_map="cpu", **options)
    model._model = type(model._model).from_pretrained(folder, dtype=torch.float32).eval()
    model.task_dict = {task: {"test": dict.fromkeys(range(100))} for task in ("tiny", "other")}
    texts: list[str] = []
    for owner in (model.tokenizer, getattr(model, "processor", None)):
        if owner is not None:
            monkeypatch.setattr(owner, "apply_chat_template", recorded(owner.apply_chat_template, texts))
    return model, texts


def recorded(function, texts: list[str]):
    def call(*args, **kwargs):
        written = function(*args, **kwargs)
        texts.extend(written if isinstance(written, list) else [written])
        return written

    return call


def write_llava_processor(folder: Path) -> Path:
    """What lmms-eval's `llava_hf` reads beside the checkpoint."""
    processor = {"processor_class": "LlavaProcessor", "patch_size": 14, "vision_feature_select_strategy": "default"}
    processor |= {"image_token": "<image>", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def make_video(path: Path, frames: int = 10, size: int = 56) -> Path:
    """A real video file of noise that changes from frame to frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for number in range(frames):
            picture = make_image(seed=number, width=size, height=size)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def read(folder: Path, ending: str) -> str:
    """The text of the only file below ``folder`` whose name ends so."""
    (path,) = folder.rglob(f"*{ending}")
    return path.read_text(encoding="utf-8")

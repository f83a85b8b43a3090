"""Whatever is wrong with a base model is one line when it is loaded, and `msd doctor` finds it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import transformers
from json_paths import key_paths
from packaging.version import Version
from PIL import Image
from tiny_llava import make_liuhaotian, make_llava_hf
from tiny_stock import make_llava_next, make_qwen
from transformers import PreTrainedModel

from eagle.doctor import State
from eagle.doctor.models import check_base
from eagle.families import Target, load_target
from llava.errors import UserError

MAKERS: dict[str, Callable[[Path], Path]] = {
    "llava_hf": make_llava_hf,
    "llava, original": make_liuhaotian,
    "llava_next": make_llava_next,
    "qwen2_vl": make_qwen,
    "qwen2_5_vl": lambda folder: make_qwen(folder, version="2.5"),
}
ALL = {
    "qwen3_vl": "Qwen3VL", "qwen3_5": "Qwen3_5", "gemma3": "Gemma3", "gemma4": "Gemma4", "mistral3": "Mistral3",
    "glm": "Glm4v", "paddleocr": "PaddleOCRVL", "internvl": "InternVL", "onevision": "LlavaOnevision",
}  # fmt: skip
"""Makers of the other families and beginnings of their classes."""
ODD: tuple[Any, ...] = (None, True, -1, 0, 10**7, 0.5, "x", "", [], [1], {}, {"a": 1})
GPTQ = {"quant_method": "gptq", "bits": 4}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {family: make(root / str(number) / "base") for number, (family, make) in enumerate(MAKERS.items())}


@pytest.fixture(params=MAKERS)
def folder(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a base model, with its tower beside it."""
    shutil.copytree(originals[request.param].parent, tmp_path / "copy")
    return tmp_path / "copy" / "base"


def weights(folder: Path) -> Path:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])[-1]


def with_values(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def line_of(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        load_target(folder, **{"dtype": "float32", **options})
    line = str(raised.value)
    assert "\n" not in line
    return line


def problems(folder: Path) -> list[str]:
    checks = check_base(str(folder), hub=False)[1]
    return [f"{check.found} ({check.fix})" for check in checks if check.state is State.PROBLEM]


@pytest.mark.parametrize("how", ["cut", "pointer"])
def test_a_damaged_weight_file_is_named(folder: Path, how: str) -> None:
    path = weights(folder)
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_text(POINTER)
    line, (found,) = line_of(folder), problems(folder)
    wanted = "damaged or truncated" if how == "cut" else "git lfs pull"
    assert path.name in line and wanted in line and path.name in found
    assert how == "cut" or wanted in found


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "config.json", "generation_config.json"])
def test_any_file_can_be_a_pointer(folder: Path, name: str) -> None:
    if not (folder / name).is_file() or (name == "tokenizer.model" and (folder / "tokenizer.json").is_file()):
        pytest.skip("not read in this layout")
    (folder / name).write_text(POINTER)
    line, (found,) = line_of(folder), problems(folder)
    assert f"{name} (run `git lfs pull`" in line and name in found


@pytest.mark.parametrize("content", ["[1]", '"text"', "3", "null"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_json_file_that_is_not_an_object_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    line, (found,) = line_of(folder), problems(folder)
    assert "is not a JSON object" in line and name in line and name in found


@pytest.mark.parametrize("content", ['{"eos_token_id": 2', '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, null]}'])
def test_a_damaged_generation_config_does_not_lose_the_end_token(folder: Path, content: str) -> None:
    (folder / "generation_config.json").write_text(content)
    assert "generation_config.json" in line_of(folder)
    assert "generation_config.json" in problems(folder)[0]


@pytest.mark.parametrize(
    ("key", "odd"),
    [("pad_token_id", -1), ("pad_token_id", 10**7), ("pad_token_id", [1]), ("eos_token_id", [2, 10**7]),
     ("eos_token_id", -1), ("eos_token_id", True)],
    ids=str,
)  # fmt: skip
def test_a_special_token_that_the_model_does_not_have(folder: Path, key: str, odd: Any) -> None:
    """In each file and section that may have it. Padding of such an id cannot be decoded; such an end never comes."""
    path = folder / "generation_config.json"
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), key: odd}))
    assert f"{key}={odd!r}: {path} (give an id from 0 to" in line_of(folder)
    assert key in problems(folder)[0]
    path.write_text(json.dumps({**json.loads(whole), key: None}))  # else the end token of config.json is not used
    whole = (folder / "config.json").read_text()
    for name in (None, "text_config"):
        fields = json.loads(whole)
        if name in (None, *fields):
            section = fields if name is None else fields[name]
            section[key] = odd
            (folder / "config.json").write_text(json.dumps(fields))
            line = line_of(folder)
            assert key in line and "config" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"no_such_option": 1}, "no_such_option"),
        ({"attn_implementation": "flash_attention_2"}, "'flash_attention_2' cannot verify a draft tree"),
        ({"device_map": "nowhere"}, "nowhere"),
        ({"dtype": "float33"}, "dtype"),
    ],
)
def test_an_argument_that_cannot_be_served(folder: Path, options: dict[str, Any], said: str) -> None:
    assert said in line_of(folder, **options)


def test_a_package_of_a_quantisation_that_is_not_installed(folder: Path) -> None:
    if "mm_vision_tower" in json.loads((folder / "config.json").read_text()):
        pytest.skip("this layout is not quantised by its config")
    fields = json.loads((folder / "config.json").read_text())
    text = {"text_config": {**fields.get("text_config", {}), "quantization_config": GPTQ}}
    for place in ({"quantization_config": GPTQ}, text):
        (folder / "config.json").write_text(json.dumps({**fields, **place}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llava.weights._find_all", lambda *_: pytest.fail("weights were looked for"))
            line = line_of(folder)
        assert "cannot be loaded" in line and ("optimum" in line or "gptqmodel" in line or "GPU is required" in line)
        assert "quantised model cannot be loaded" in problems(folder)[0]


def test_a_quantisation_that_transformers_does_not_know(folder: Path) -> None:
    """transformers would read the packed numbers as weights."""
    if "mm_vision_tower" in json.loads((folder / "config.json").read_text()):
        pytest.skip("this layout is not quantised by its config")
    for odd in ({"quant_method": "fp6_of_tomorrow"}, {}, {"bits": 4}, "gptq"):
        with_values(folder, quantization_config=odd)
        line = line_of(folder)
        assert "quantis" in line or "config is not valid" in line
    with_values(folder, quantization_config={"quant_method": "fp6_of_tomorrow"})
    assert "unknown quantisation 'fp6_of_tomorrow'" in line_of(folder)
    assert "unknown quantisation" in problems(folder)[0]


@pytest.mark.parametrize("text", [{"hidden_size": "x"}, [1], {"rope_parameters": 3}])
def test_wrong_values_of_a_config(folder: Path, text: Any) -> None:
    if "mm_vision_tower" in json.loads((folder / "config.json").read_text()):
        with_values(folder, **(text if isinstance(text, dict) else {"hidden_size": text}))
    else:
        with_values(folder, text_config=text)
    line = line_of(folder)
    assert "config" in line and ("not valid" in line or "not a JSON object" in line)
    assert "config" in problems(folder)[0]


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
def test_a_section_without_sizes_does_not_mean_a_large_model(
    folder: Path, section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "mm_vision_tower" in json.loads((folder / "config.json").read_text()):
        pytest.skip("this layout has no sections")
    with_values(folder, **{section: {}})
    allocated = []
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: allocated.append(1))
    line = line_of(folder)
    assert not allocated
    assert "check the sizes in config.json" in line or "the vision tower takes 224" in line


def without_vision(folder: Path) -> Iterator[None]:
    """The config with null in place of the vision tower's section, and then without that section."""
    whole = (folder / "config.json").read_text()
    with_values(folder, vision_config=None)
    yield
    fields = json.loads(whole)
    del fields["vision_config"]
    (folder / "config.json").write_text(json.dumps(fields))
    yield
    (folder / "config.json").write_text(whole)


def test_a_model_without_a_vision_tower(folder: Path) -> None:
    if "mm_vision_tower" in json.loads((folder / "config.json").read_text()):
        pytest.skip("this layout has no sections")
    for _ in without_vision(folder):
        assert "config" in line_of(folder) and "config" in problems(folder)[0]


@pytest.mark.parametrize("kind", ["small", "unified"])
def test_a_vision_tower_that_transformers_does_without(kind: str, tmp_path: Path) -> None:
    """Gemma 4 without this section is a text model, which would ignore its pictures' weights."""
    if not hasattr(transformers, "Gemma4UnifiedConfig" if kind == "unified" else "Gemma4Config"):
        pytest.skip(f"transformers {transformers.__version__} does not have it")
    made = tiny_families.make_gemma4(tmp_path / "base", kind=kind)
    for _ in without_vision(made):
        assert "vision_config is missing or null: config of" in line_of(made)
        assert "vision_config is missing or null" in problems(made)[0]
    load_target(made, dtype="float32")


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "intermediate_size"])
def test_a_size_with_digits_too_many(folder: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = json.loads((folder / "config.json").read_text())
    place = fields if "mm_vision_tower" in fields else fields["text_config"]
    place[key] *= 10**6
    with_values(folder, **fields)
    allocated = []
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: allocated.append(1))
    line = line_of(folder)
    assert not allocated
    assert "check the sizes in config.json" in line or "layer_types" in line or "config is not valid" in line


def token_keys(folder: Path) -> list[str]:
    """Keys of a config with the id of a picture's or video's token."""
    fields = json.loads((folder / "config.json").read_text())
    names = [f"{kind}_token_{end}" for kind in ("image", "video") for end in ("id", "index")]
    return [name for name in names if name in fields]


def check_token(folder: Path, key: str, odd: Any) -> None:
    whole = (folder / "config.json").read_text()
    with_values(folder, **{key: odd})
    line = line_of(folder)
    (folder / "config.json").write_text(whole)
    assert key.removesuffix("_id").removesuffix("_index") in line and "config" in line, (key, odd, line)


@pytest.mark.parametrize("odd", ["x", -1, 10**7, 10**30, None, 0.5, True, [1], 5], ids=str)
def test_the_id_of_a_pictures_token(folder: Path, odd: Any) -> None:
    for key in token_keys(folder):
        check_token(folder, key, odd)


@pytest.fixture(scope="module", params=ALL)
def other_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not hasattr(transformers, f"{ALL[request.param]}ForConditionalGeneration"):
        pytest.skip(f"transformers {transformers.__version__} does not have {request.param}")
    made: Path = getattr(tiny_families, f"make_{request.param}")(tmp_path_factory.mktemp("other") / "base")
    return made


@pytest.mark.slow
def test_ids_and_sections_of_the_other_families(other_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (other_folder / "config.json").read_text()
    allocated: list[int] = []
    read = {media.token.partition("_token")[0] for media in load_target(other_folder, dtype="float32").media}
    for key in [key for key in token_keys(other_folder) if key.partition("_token")[0] in read]:
        for odd in ("x", -1, 10**7, None, True, 5):
            check_token(other_folder, key, odd)
    load_target(other_folder, dtype="float32")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: allocated.append(1))
    for section in [name for name in json.loads(whole) if name in ("text_config", "vision_config")]:
        for odd in ({}, 5, [1]):
            (other_folder / "config.json").write_text(json.dumps({**json.loads(whole), section: odd}))
            assert "config" in line_of(other_folder), (section, odd)
    assert not allocated
    monkeypatch.undo()
    (other_folder / "config.json").write_text(whole)
    for _ in without_vision(other_folder):
        assert "config" in line_of(other_folder)


def check_any_value(folder: Path, file: str, count: int) -> None:
    """``count`` times another value at some key: a model, or one line; the doctor never fails."""
    path, draw = folder / file, random.Random(0)
    if not path.is_file():
        pytest.skip("this layout has no such file")
    whole = path.read_text()
    choices = [(place, odd) for place in key_paths(json.loads(whole)) for odd in ODD]
    for place, odd in draw.sample(choices, min(count, len(choices))):
        content = json.loads(whole)
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = odd
        path.write_text(json.dumps(content))
        try:
            check_base(str(folder), hub=False)
            load_target(folder, dtype="float32")
        except UserError as error:
            assert "\n" not in str(error), (place, odd)
        except BaseException as error:
            raise AssertionError(f"{file}: {place} = {odd!r}") from error
    path.write_text(whole)


CONFIGS = ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("file", CONFIGS)
def test_any_value_at_any_key_is_a_line_or_a_model(folder: Path, file: str) -> None:
    check_any_value(folder, file, 4)


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS)
def test_any_value_at_any_key_many_times(folder: Path, file: str) -> None:
    check_any_value(folder, file, 40)


def with_template(folder: Path, template: str | None) -> None:
    """Replaces the chat template wherever it may be."""
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            fields = json.loads((folder / name).read_text())
            fields.pop("chat_template", None)
            (folder / name).write_text(json.dumps(fields))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize("template", ["{% for", "{{ 1 / 0 }}", "{{ a.b.c }}", "{{ messages + 1 }}"])
def test_a_chat_template_that_fails(folder: Path, template: str) -> None:
    if "mm_vision_tower" in json.loads((folder / "config.json").read_text()):
        pytest.skip("this layout has no chat template")
    with_template(folder, template)
    with pytest.raises(UserError, match="chat template cannot write") as raised:
        load_target(folder, dtype="float32").chat_prompt("What?", 1)
    assert "\n" not in str(raised.value)
    assert "chat template cannot write" in problems(folder)[0]


def test_a_missing_chat_template(folder: Path) -> None:
    """Qwen has none to fall back to; LLaVA has Vicuna's."""
    with_template(folder, None)
    target = load_target(folder, dtype="float32")
    if target.family.startswith("llava"):
        assert "USER: " in target.chat_prompt("What?", 1) and not problems(folder)
        return
    with pytest.raises(UserError, match="has no chat template"):
        target.chat_prompt("What?", 1)
    assert "has no chat template" in problems(folder)[0]


@pytest.fixture(scope="module")
def qwen(originals: dict[str, Path]) -> Target:
    return load_target(originals["qwen2_vl"], dtype="float32")


@pytest.mark.parametrize("size", [(300, 1), (1, 300), (2010, 10)])
def test_a_picture_that_qwens_processor_refuses(qwen: Target, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="aspect ratio"):
        qwen.prepare(qwen.chat_prompt("What?", 1), [Image.new("RGB", size)])


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.19"), reason="that processor takes the mark as text")
@pytest.mark.parametrize("pictures", [0, 1])
def test_the_mark_of_a_video_in_a_question(qwen: Target, pictures: int) -> None:
    prompt = qwen.chat_prompt("What is <|video_pad|>?", pictures)
    with pytest.raises(UserError, match="video_pad"):
        qwen.prepare(prompt, [Image.new("RGB", (60, 60))] * pictures)


@pytest.mark.parametrize(
    ("name", "value"), [("rescale_factor", -1), ("image_std", 0), ("do_resize", []), ("size", {"shortest_edge": True})]
)
def test_settings_of_pictures_are_checked_at_load(folder: Path, name: str, value: Any) -> None:
    """Also where they are in the config of a separate tower."""
    files = [*folder.parent.rglob("preprocessor_config.json"), *folder.parent.rglob("processor_config.json")]
    for path in files:
        fields = json.loads(path.read_text())
        part = fields.get("image_processor", fields)
        part[name] = value
        path.write_text(json.dumps(fields))
    line, (found,) = line_of(folder), problems(folder)
    assert f"{name}" in line and "processor_config.json" in line and name in found


@pytest.mark.parametrize("value", ["x", 0, []])
def test_settings_of_the_tokenizer_are_checked_at_load(folder: Path, value: Any) -> None:
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**fields, "model_max_length": value}))
    line, (found,) = line_of(folder), problems(folder)
    assert "model_max_length" in line and "tokenizer_config.json" in line and "model_max_length" in found

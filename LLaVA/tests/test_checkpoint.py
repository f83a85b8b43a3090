"""Loading of both layouts: equal logits, strictness, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import TinySizes, make_image, make_liuhaotian, make_llava_hf
from tiny_tokenizer import tokenizer_size
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava import UserError, load_config, load_model, load_pretrained, load_processor
from llava.weights import check_size

PROMPT = "USER: <image>\nHow many shapes can you count here? ASSISTANT:"


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model, processor = load_pretrained(folder, **options)
    assert type(model) is LlavaForConditionalGeneration and not model.training
    with torch.inference_mode():
        return model(**processor(PROMPT, make_image())).logits


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return logits(make_liuhaotian(tmp_path_factory.mktemp("reference") / "model"))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "options",
    [
        {"tower": "inside"},
        {"model_type": "llava_llama"},
        {"shards": 1},
        {"safetensors": True},
        {"safetensors": True, "shards": 1, "tower": "inside"},
        {"tower_safetensors": False},
        {"full_clip": True},
        {"old_buffers": True},
        {"full_clip": True, "old_buffers": True, "tower": "inside"},
    ],
    ids=str,
)
def test_variants_of_liuhaotian_give_the_same(tmp_path: Path, reference: torch.Tensor, options: dict[str, Any]) -> None:
    assert torch.equal(logits(make_liuhaotian(tmp_path / "model", **options)), reference)


def test_layouts_give_the_same(tmp_path: Path, reference: torch.Tensor) -> None:
    for shards in (1, 3):
        found = logits(make_llava_hf(tmp_path / str(shards), shards=shards))
        assert torch.equal(found[..., : tokenizer_size()], reference)


def test_liuhaotian_saved_as_hf_and_read_again(tmp_path: Path, reference: torch.Tensor) -> None:
    model, processor = load_pretrained(make_liuhaotian(tmp_path / "model"))
    model.save_pretrained(tmp_path / "hf")
    processor.tokenizer.save_pretrained(tmp_path / "hf")
    processor.image_processor.save_pretrained(tmp_path / "hf")
    assert torch.equal(logits(tmp_path / "hf"), reference)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    with torch.inference_mode():
        assert torch.equal(stock(**processor(PROMPT, make_image())).logits, reference)


@pytest.mark.parametrize("place", ["absolute", "inside", "beside", "below"])
def test_where_the_tower_may_be(tmp_path: Path, reference: torch.Tensor, place: str) -> None:
    folder = make_liuhaotian(tmp_path / "model")
    tower = tmp_path / "tiny-clip"
    targets = {"absolute": tmp_path / "elsewhere" / "clip", "inside": folder / "clip", "beside": tmp_path / "clip",
               "below": tmp_path / "openai" / "clip"}  # fmt: skip
    target = targets[place]
    target.parent.mkdir(exist_ok=True)
    tower.rename(target)
    name = {"absolute": str(target), "below": "openai/clip"}.get(place, "clip")
    change(folder / "config.json", mm_vision_tower=name)
    assert torch.equal(logits(folder), reference)


def test_model_folder_as_relative_path(
    tmp_path: Path, reference: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_liuhaotian(tmp_path / "model"))
    assert torch.equal(logits(Path(".")), reference)


@pytest.mark.parametrize(("fast", "auto"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("make", [make_liuhaotian, make_llava_hf])
def test_dtype(tmp_path: Path, make: Any, fast: bool, auto: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that is fast in 16 bit, and on one that is not."""
    monkeypatch.setattr("llava.device.cpu_has_bfloat16", lambda: fast)
    folder = make(tmp_path / "model", dtype=torch.bfloat16)
    for asked, given in [("auto", auto), ("float32", torch.float32), (torch.float16, torch.float16)]:
        model = load_model(folder, dtype=asked)
        assert {parameter.dtype for parameter in model.parameters()} == {given}


def test_dtype_is_the_weights_where_the_config_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.device.cpu_has_bfloat16", lambda: True)
    folder = make_liuhaotian(tmp_path / "model", dtype=torch.float16, config_changes={"torch_dtype": None})
    assert load_model(folder).dtype == torch.float16


def test_config_has_every_size_from_the_files(tmp_path: Path) -> None:
    sizes = TinySizes(hidden=48, layers=3, heads=6, kv_heads=2, intermediate=80, image_size=42, vision_layers=4)
    changes = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "mm_vision_select_layer": -3}
    folder = make_liuhaotian(tmp_path / "model", sizes=sizes, config_changes=changes)
    config = load_config(folder)
    text, vision = config.text_config, config.vision_config
    assert isinstance(config, LlavaConfig)
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (48, 3, 2)
    assert text.vocab_size == tokenizer_size() and text.rms_norm_eps == 1e-5
    assert text.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    assert (vision.image_size, vision.num_hidden_layers, vision.hidden_size) == (42, 4, 24)
    assert (config.image_seq_length, config.vision_feature_layer, config.image_token_id) == (9, -3, 0)
    assert load_processor(folder).image_token_count == 9
    model, processor = load_pretrained(folder)
    assert model(**processor(PROMPT, make_image())).logits.shape[-1] == text.vocab_size


@pytest.mark.parametrize("make", [make_liuhaotian, make_llava_hf])
def test_class_token_counts_as_a_feature(tmp_path: Path, make: Any) -> None:
    changes = {"mm_vision_select_feature": "cls_patch", "vision_feature_select_strategy": "full"}
    model, processor = load_pretrained(make(tmp_path / "model", config_changes=changes))
    assert processor.image_token_count == TinySizes().image_tokens + 1
    assert model(**processor(PROMPT, make_image())).logits.isfinite().all()


def test_generation_pads_with_the_end_token(tmp_path: Path) -> None:
    folder = make_liuhaotian(tmp_path / "model")
    change(folder / "generation_config.json", max_length=4096, pad_token_id=0)
    model, processor = load_pretrained(folder)
    assert model.generation_config.pad_token_id == 2 == processor.pad_token_id
    assert model.generation_config.max_length != 4096
    assert model.config.name_or_path == str(folder)


def test_batch_gives_what_each_prompt_gives(tmp_path: Path) -> None:
    model, processor = load_pretrained(make_liuhaotian(tmp_path / "model"))
    prompts, images = [PROMPT, "Name two rivers."], [make_image()]
    batch = processor(prompts, images)
    with torch.inference_mode():
        output = model.generate(**batch, max_new_tokens=6, do_sample=False)
        for row, inputs in enumerate((processor(prompts[0], images), processor(prompts[1]))):
            single = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            assert output[row, -6:].tolist() == single[0, -6:].tolist()


def test_options_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = LlavaForConditionalGeneration.from_pretrained.__func__

    def spy(cls: type, *arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return original(cls, *arguments, **options)

    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", classmethod(spy))
    for make in (make_liuhaotian, make_llava_hf):
        folder = make(tmp_path / make.__name__)
        model = load_model(folder, device_map={"": "cpu"}, attn_implementation="eager", max_memory={"cpu": "1GB"})
        assert model.config._attn_implementation == "eager"
        assert calls[-1]["device_map"] == {"": "cpu"} and calls[-1]["max_memory"] == {"cpu": "1GB"}
    with pytest.raises(UserError, match="model cannot be loaded"):
        load_model(folder, attn_implementation="abacus")


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    for make, name in [(make_liuhaotian, "model.norm.weight"), (make_llava_hf, "language_model.model.norm.weight")]:
        options = {"safetensors": True} if make is make_liuhaotian else {}
        folder = make(tmp_path / make.__name__, shards=1, **options)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["surplus.weight"] = tensors.pop(name)
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"1 missing: .*norm\.weight; 1 unexpected: .*surplus\.weight"):
            load_model(folder)
        tensors[name] = torch.ones(7)
        del tensors["surplus.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"1 of another shape: .*norm\.weight \(7,\) instead of \(32,\)"):
            load_model(folder)


def test_missing_tensor_of_the_tower(tmp_path: Path) -> None:
    folder = make_liuhaotian(tmp_path / "model")
    path = tmp_path / "tiny-clip" / "model.safetensors"
    tensors = load_file(path)
    del tensors["vision_model.encoder.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing: model\.vision_tower\..*layers\.1\.self_attn\.q_proj\.weight"):
        load_model(folder)


def test_many_names_are_cut_short(tmp_path: Path) -> None:
    folder = make_liuhaotian(tmp_path / "model", shards=1)
    torch.save({"lm_head.weight": torch.zeros(1, 32)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"\d+ missing: .* and \d+ more; 1 of another shape: lm_head\.weight") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize("make", [make_liuhaotian, make_llava_hf])
@pytest.mark.parametrize("keep", [0, 0.5, 0.98])
def test_truncated_file_is_named(tmp_path: Path, make: Any, keep: float) -> None:
    folder = make(tmp_path / "model", shards=2)
    path = max(folder.glob("*00002-of-00002*"))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=f"weight file is damaged or truncated: .*{path.name}"):
        load_model(folder)


def test_bin_with_something_else_than_tensors(tmp_path: Path) -> None:
    folder = make_liuhaotian(tmp_path / "model", shards=1)
    torch.save({"state_dict": {}}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a dict of tensors"):
        load_model(folder)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of the checkpoint was run')",)


def test_bin_runs_no_code(tmp_path: Path) -> None:
    folder = make_liuhaotian(tmp_path / "model", shards=1)
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="damaged"):
        load_model(folder)


def test_missing_files(tmp_path: Path) -> None:
    for make in (make_liuhaotian, make_llava_hf):
        folder = make(tmp_path / make.__name__, shards=2)
        shard = max(folder.glob("*00002-of-00002*"))
        shard.unlink()
        with pytest.raises(UserError, match=f"weight files missing.*{shard.name}"):
            load_model(folder)
        for file in folder.glob("*.index.json"):
            file.unlink()
        with pytest.raises(UserError, match="no weights"):
            load_model(folder)
        (folder / "config.json").unlink()
        with pytest.raises(UserError, match=r"model config not found.*config\.json"):
            load_model(folder)
    with pytest.raises(UserError, match="model not found"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("weight_map", [None, {}, {"a": "../../other.bin"}])
def test_broken_index(tmp_path: Path, weight_map: Any) -> None:
    folder = make_liuhaotian(tmp_path / "model")
    change(folder / "pytorch_model.bin.index.json", weight_map=weight_map)
    with pytest.raises(UserError, match="weight index"):
        load_model(folder)


def test_missing_tower_and_its_files(tmp_path: Path) -> None:
    folder = make_liuhaotian(tmp_path / "model")
    tower = tmp_path / "tiny-clip"
    (tower / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights: .*tiny-clip"):
        load_model(folder)
    (tower / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="no image processor config"):
        load_processor(folder)
    change(tower / "config.json", model_type="siglip_vision_model")
    with pytest.raises(UserError, match=r"vision tower is not a CLIP model.*siglip"):
        load_model(folder)
    change(folder / "config.json", mm_vision_tower="nowhere")
    with pytest.raises(UserError, match="vision tower not found: nowhere"):
        load_model(folder)
    change(folder / "config.json", mm_vision_tower=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="vision tower not found"):
        load_model(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2_vl"}, "not a LLaVA-1.5 model.*qwen2_vl"),
        ({"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}, "not a LLaVA-1.5 model"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "not a LLaVA-1.5 model.*LlavaMpt"),
        ({"image_aspect_ratio": "anyres"}, "unsupported image_aspect_ratio 'anyres'"),
        ({"mm_projector_type": "linear"}, "unsupported mm_projector_type 'linear'"),
        ({"mm_use_im_start_end": True}, "unsupported mm_use_im_start_end"),
        ({"hidden_size": "wide"}, "model config is not valid"),
        ({"vocab_size": None}, "model config is not valid.*no vocab_size"),
        ({"num_attention_heads": 5}, "model config is not valid|tensors do not fit the model"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    folder = make_liuhaotian(tmp_path / "model", config_changes=fields)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_image_processor_of_another_size(tmp_path: Path) -> None:
    folder = make_liuhaotian(tmp_path / "model")
    change(tmp_path / "tiny-clip" / "preprocessor_config.json", crop_size={"height": 42, "width": 42})
    with pytest.raises(UserError, match="the vision tower takes 56"):
        load_processor(folder)


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for make in (make_liuhaotian, make_llava_hf):
        load_pretrained(make(tmp_path / make.__name__))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("size", 100_000), ("size", {"shortest_edge": 2**31}), ("size", -5), ("resample", -1), ("rescale_factor", []),
     ("image_std", [0.5, 0.5, "x"]), ("image_mean", [0.5, 0.5, None]), ("image_mean", [0.5, 0.5, 2**31])],
)  # fmt: skip
@pytest.mark.parametrize("make", [make_liuhaotian, make_llava_hf])
def test_settings_of_pictures_that_cannot_be_used(tmp_path: Path, make: Any, setting: str, value: Any) -> None:
    folder = make(tmp_path / "model")
    places = (tmp_path / "tiny-clip", folder)
    change(next(p / "preprocessor_config.json" for p in places if p.is_dir()), **{setting: value})
    with pytest.raises(UserError, match="image processor"):
        load_processor(folder)(text="<image>\nWhat?", images=make_image(), return_tensors="pt")


@pytest.mark.parametrize("quantisation", [None, {"quant_method": "gptq", "bits": 4}])
def test_a_config_without_sizes_is_refused_also_if_it_is_quantised(quantisation: dict[str, Any] | None) -> None:
    """transformers' default is a 7B model."""
    config = LlavaConfig(text_config={}, quantization_config=quantisation)
    shapes = {f"layers.{number}.qweight": (64, 64) for number in range(100)}
    with pytest.raises(UserError, match=r"the checkpoint has 409,600: base \(check the sizes"):
        check_size(LlavaForConditionalGeneration, config, shapes, "base")

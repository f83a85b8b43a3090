"""Text models with sliding windows are verified exactly, before and past the window; others are refused at load."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_llava_hf
from tiny_stock import make_qwen
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

from eagle import MSDModel, TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from eagle.families.layers import (
    ALL_ALIKE,
    OWN_STATES,
    OWN_WINDOWS,
    AttentionLayers,
    attention_layers,
    position_limit,
)
from eagle.families.llava.target import LlavaTarget
from llava import UserError

WINDOW = 24
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "sliding_window": WINDOW,
}  # fmt: skip
TREES = [TreeConfig(5, 10, 60), TreeConfig(2, 2, 6)]
LANGUAGE_MODELS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "mistral": (MistralConfig, {"use_sliding_window": False}),  # which transformers does not read
    "phi3": (Phi3Config, {"pad_token_id": 0}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen2, all layers": (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 0}),
    "gemma2": (Gemma2Config, {"query_pre_attn_scalar": 8}),
    "gemma3": (Gemma3TextConfig, {"query_pre_attn_scalar": 8, "sliding_window_pattern": 2}),
}


def llava_around(name: str, folder: Path) -> LlavaTarget:
    """A tiny LLaVA whose language model has sliding windows."""
    base = load_target(make_llava_hf(folder), dtype=torch.float32)
    kind, changes = LANGUAGE_MODELS[name]
    vocab = base.vocab_size
    text = kind(**{**SIZES, "vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, **changes})
    config = LlavaConfig(
        vision_config=base.config.vision_config, text_config=text, image_token_id=base.config.image_token_id,
        image_seq_length=base.config.image_seq_length, vision_feature_layer=-2,
    )  # fmt: skip
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "language_model" in name and "embed" not in name:
                weight.mul_(4)  # so that what a layer sees changes its tokens
    model.generation_config.eos_token_id = None
    return LlavaTarget(model, base.processor)


@pytest.fixture(scope="module", params=[*LANGUAGE_MODELS, "qwen2_vl", "qwen2_5_vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    folder = tmp_path_factory.mktemp("window")
    if request.param in LANGUAGE_MODELS:
        target = llava_around(request.param, folder / "base")
    else:
        version = "2.5" if "5" in request.param else "2"
        window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
        target = load_target(make_qwen(folder / "base", version=version, **window), dtype=torch.float32)
        target.model.generation_config.eos_token_id = None
    draft = make_draft(folder / "draft", target, agree=1.0, head_dim=target.hidden_size // 4)
    return MSDModel(target, load_draft(draft, dtype=torch.float32), tree=TREES[0])


@pytest.mark.parametrize(
    ("tree", "compiled"),
    [
        (TREES[0], False),
        pytest.param(TREES[1], False, marks=pytest.mark.slow),
        pytest.param(TREES[1], True, marks=pytest.mark.slow),
    ],
    ids=["large tree", "small tree", "small tree, compiled"],
)
def test_answers_past_the_window_are_those_of_transformers(model: MSDModel, tree: TreeConfig, compiled: bool) -> None:
    msd = MSDModel(model.target, model.draft, tree, compile="eager") if compiled else model
    assert model.target.layers.window == WINDOW
    accepted = []
    for prompt, sizes in (("Hi", []), ("Which of these can you count? " * 4, []), ("And this?", [(50, 34)])):
        text = msd.target.chat_prompt(prompt, num_images=len(sizes))
        inputs = msd.target.prepare(text, [make_image(width=w, height=h) for w, h in sizes])
        expected = msd.target.model.generate(**inputs, max_new_tokens=40, do_sample=False)
        output = msd.generate(**inputs, max_new_tokens=40, temperature=0.0, tree=tree)
        assert torch.equal(output.sequences, expected)
        accepted += output.stats.accept_lengths
    if tree.total_tokens == 60 and model.target.family != "qwen2_vl":  # else a random draft is rarely right
        assert max(accepted) > 0


def test_a_batch_past_the_window(model: MSDModel) -> None:
    texts = [model.target.chat_prompt(text) for text in ("Hi", "Which of these can you count? " * 3, "And?")]
    batch = model.target.prepare(texts)
    output = model.generate(**batch, max_new_tokens=30, temperature=0.0, tree=TREES[1])
    for text, tokens in zip(texts, output.tokens, strict=True):
        alone = model.target.prepare(text)
        expected = model.target.model.generate(**alone, max_new_tokens=30, do_sample=False)
        assert tokens == expected[0, alone["input_ids"].shape[1] :].tolist()


def layers(kind: str, *types: str, **settings: Any) -> SimpleNamespace:
    return SimpleNamespace(model_type=kind, layer_types=list(types) or None, **settings)


OWN = (*OWN_WINDOWS, *OWN_STATES, "qwen3_vl_text", "glm4v_text", "paddleocr_vl_text")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Qwen2Config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "type 'dynamic'"),
        (
            Phi3Config(
                original_max_position_embeddings=64, max_position_embeddings=256, pad_token_id=0,
                rope_parameters={"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
                                 "rope_theta": 1e4, "original_max_position_embeddings": 64},
            ),
            "type 'longrope'",
        ),
        (layers("llama", "linear_attention"), "layers of type linear_attention"),
        (layers("llama", "chunked_attention"), "layers of type chunked_attention"),
        (layers("llama", "sliding_attention", sliding_window=8), "layers of type sliding_attention in 'llama'"),
        (layers("llama", sliding_window=8), "sliding windows of 'llama'"),
        (layers("llama", attention_chunk_size=8), "attention in chunks of 'llama'"),
        (layers("llama", is_heterogeneous=True), "layers of different sizes"),
        (layers("llama", is_causal=False), "attention to later tokens"),
        (layers("gemma2", use_bidirectional_attention=True), "attention to later tokens"),
        (layers("gemma3_text", use_bidirectional_attention="vision"), "attention to later tokens"),
        (layers("other"), "'other' is not known"),
        # the model does not read layer_types, and the cache of generate does
        (layers("mistral", "full_attention", sliding_window=8), "full_attention in 'mistral' with sliding_window 8"),
        (layers("phi3", "sliding_attention", sliding_window=None), "sliding_attention in 'phi3' with sliding_window"),
        (layers("mistral", sliding_window=1), "sliding_window 1 cannot"),
        (layers("mistral", sliding_window=0), "sliding windows of 'mistral'"),
        # the model cannot run such layers, or runs them as full ones
        (layers("qwen2", "sliding_attention", sliding_window=None), "sliding_attention in 'qwen2' with sliding_wi"),
        (layers("qwen3_5_text", "sliding_attention", sliding_window=8), "sliding_attention in 'qwen3_5_text'"),
        (layers("qwen3_5_moe_text", "sliding_attention", sliding_window=8), "in 'qwen3_5_moe_text'"),
        (layers("qwen3_vl_text", "sliding_attention", sliding_window=8), "sliding_attention in 'qwen3_vl_text'"),
        (layers("qwen3_vl_text", "linear_attention"), "layers of type linear_attention in 'qwen3_vl_text'"),
        (layers("glm4v_text", sliding_window=8), "sliding windows of 'glm4v_text'"),
        (layers("paddleocr_vl_text", "sliding_attention", sliding_window=8), "in 'paddleocr_vl_text'"),
        (layers("gemma4_text", "linear_attention", sliding_window=8), "linear_attention in 'gemma4_text'"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)  # fmt: skip
def test_what_cannot_be_exact_is_refused(config: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        attention_layers(config, OWN)


@pytest.mark.parametrize("kind", ALL_ALIKE)
def test_layers_that_are_all_alike(kind: str) -> None:
    """`generate` keeps the rows of a cache by layer_types, where a config has them."""
    for types, window in (((), 8), ((), None), (["sliding_attention"] * 2, 8), (["full_attention"] * 2, None)):
        found = attention_layers(layers(kind, *types, sliding_window=window, use_sliding_window=False))
        assert found == AttentionLayers(window, by_type=False)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "default"])
def test_rotary_kinds_that_do_not_depend_on_the_length(kind: str) -> None:
    config = SimpleNamespace(model_type="llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4})
    assert attention_layers(config).window is None


def test_a_window_that_is_switched_off() -> None:
    assert attention_layers(Qwen2Config(use_sliding_window=False, sliding_window=8)).window is None


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({}, 4096),
        ({"rope_type": "default", "rope_theta": 1e4}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}, 4096),
        ({"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "linear", "factor": 2}}, 8192),
    ],
)
def test_positions_that_a_model_is_made_for(rope: dict[str, Any], limit: int) -> None:
    assert position_limit(SimpleNamespace(max_position_embeddings=4096, rope_parameters=rope)) == limit
    assert position_limit(SimpleNamespace(rope_parameters=rope)) is None

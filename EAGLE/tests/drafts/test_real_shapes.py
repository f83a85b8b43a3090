"""The published sizes: drafts of every published family by name and shape, and LLaVA-1.5-13B with one layer."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import TinySizes, make_image, make_liuhaotian

from eagle import MSDModel, TreeConfig
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families import load_target

LLAVA = {"model_type": "llava", "vocab_size": 32000, "rms_norm_eps": 1e-5, "num_hidden_layers": 1}
QWEN = {
    "model_type": "qwen2_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "LLaVA-1.5-7B": {**LLAVA, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "LLaVA-1.5-13B": {**LLAVA, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40},
    "LLaVA-1.6-7B": {
        **LLAVA, "model_type": "llava_next", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    },
    "Qwen2-VL-7B": QWEN,
    "Qwen2.5-VL-7B": {**QWEN, "model_type": "qwen2_5_vl"},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_drafts_have_the_published_tensors(name: str) -> None:
    config = PUBLISHED[name]
    with torch.device("meta"):
        state = DraftModel(DraftConfig.from_dict(config)).state_dict()
    size, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = size * config.get("num_key_value_heads", config["num_attention_heads"]) // config["num_attention_heads"]
    layer = "layers.0."
    expected = {
        "embed_tokens.weight": [vocabulary, size], "fc.weight": [size, 2 * size], "fc.bias": [size],
        layer + "self_attn.q_proj.weight": [size, size], layer + "self_attn.o_proj.weight": [size, size],
        layer + "self_attn.k_proj.weight": [narrow, size], layer + "self_attn.v_proj.weight": [narrow, size],
        layer + "mlp.gate_proj.weight": [wide, size], layer + "mlp.up_proj.weight": [wide, size],
        layer + "mlp.down_proj.weight": [size, wide], layer + "post_attention_layernorm.weight": [size],
    }  # fmt: skip
    if "qwen" in config["model_type"]:
        expected[layer + "input_layernorm.weight"] = [size]
        rows = {"q": size, "k": narrow, "v": narrow}
        expected |= {f"{layer}self_attn.{part}_proj.bias": [count] for part, count in rows.items()}
    assert {key: list(value.shape) for key, value in state.items()} == expected


@pytest.mark.by_hand
def test_llava_13b_with_one_layer(tmp_path: Path) -> None:
    """Text sizes of `liuhaotian/llava-v1.5-13b` and of its vision tower, in float32 (8 GB)."""
    sizes = TinySizes(
        hidden=5120, layers=1, heads=40, kv_heads=40, intermediate=13824, max_positions=4096, vision_hidden=1024,
        vision_layers=3, vision_heads=16, image_size=336, patch_size=14, vocabulary=32000, spread=0.02,
    )  # fmt: skip
    base = make_liuhaotian(tmp_path / "base", sizes=sizes, dtype=torch.bfloat16, shards=3)
    gc.collect()
    target = load_target(base, dtype="float32")
    assert target.config.image_seq_length == 576
    draft = make_draft(tmp_path / "draft", target, agree=1.0, intermediate_size=13824)
    gc.collect()
    model = MSDModel.from_pretrained(base, draft, dtype=torch.float32)
    inputs = target.prepare("USER: <image>\nHow many? ASSISTANT:", [make_image()])
    assert (inputs["input_ids"] == target.config.image_token_id).sum() == 576
    expected = target.model.generate(**inputs, do_sample=False, max_new_tokens=8)
    output = model.generate(**inputs, temperature=0, max_new_tokens=8, tree=TreeConfig(3, 4, 16))
    assert torch.equal(output.sequences, expected)

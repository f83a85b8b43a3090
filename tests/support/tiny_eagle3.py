"""Tiny random EAGLE-3 heads in their published layouts, for any target. No pytest in here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle.families import Target

WINDOW = ("layer_types", "sliding_window", "use_sliding_window")


def make_eagle3(
    folder: str | Path,
    target: Target,
    layout: Literal["flat", "speculators"] = "flat",
    *,
    seed: int = 0,
    vocabulary: Sequence[int] | None = None,
    drop: tuple[str, ...] = (),
    shapes: dict[str, tuple[int, ...]] | None = None,
    **changes: Any,
) -> Path:
    """Writes a head that fits ``target`` and returns its folder.

    Its features are the inputs of layers 0 and 1 and of the final norm. It passes the last one on, and its head has
    rows of the target's, so it agrees with the target now and then though nobody trained it.

    Args:
        vocabulary: ids of its own vocabulary; by default every other one.
        drop: tensors to leave out.
        shapes: further tensors of zeros, such as norms.
        changes: fields of ``config.json``: of the layer in the speculators layout if they are in a layer's config.
    """
    text, tables = target.config.get_text_config(), target.model.get_input_embeddings().weight.detach().float()
    size, (tokens, hidden) = 2 * text.hidden_size, tables.shape
    heads, key_heads, head_dim = text.num_attention_heads, text.num_key_value_heads, 2 * (hidden // 8)
    layers = len(target.text_model.layers)
    layer: dict[str, Any] = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": size, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "head_dim": head_dim, "num_hidden_layers": 1, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "vocab_size": tokens,
    }  # fmt: skip
    kept = torch.arange(0, tokens, 2) if vocabulary is None else torch.tensor(sorted(set(vocabulary)))  # [K]
    top: dict[str, Any] = {"draft_vocab_size": len(kept), "target_hidden_size": hidden}
    if layout == "flat":
        outputs = [-1, 0, layers - 1]
        config = {"architectures": ["LlamaForCausalLMEagle3"], **layer, **top}
        config |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": outputs}, **changes}
    else:
        layer |= {key: changes.pop(key) for key in list(changes) if key in (*layer, *WINDOW)}
        config = {"architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3", **top}
        config |= {"eagle_aux_hidden_state_layer_ids": [0, 1, layers], "transformer_layer_config": layer, **changes}
    count = (layer if layout == "speculators" else config)["num_hidden_layers"]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    first = "midlayer" if layout == "flat" else "layers.0"
    tensors: dict[str, Tensor] = {"fc.weight": 0.1 * random(hidden, 3 * hidden)}
    tensors["fc.weight"][:, 2 * hidden :] += torch.eye(hidden)
    for index in range(count):
        name, width = (first, 2 * hidden) if index == 0 else (f"layers.{index}", hidden)
        tensors |= {
            f"{name}.self_attn.q_proj.weight": random(heads * head_dim, width),
            f"{name}.self_attn.k_proj.weight": random(key_heads * head_dim, width),
            f"{name}.self_attn.v_proj.weight": random(key_heads * head_dim, width),
            f"{name}.self_attn.o_proj.weight": random(hidden, heads * head_dim),
            f"{name}.mlp.gate_proj.weight": random(size, hidden),
            f"{name}.mlp.up_proj.weight": random(size, hidden),
            f"{name}.mlp.down_proj.weight": random(hidden, size),
        }
        norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")[:: 1 if index == 0 else 2]
        tensors |= {f"{name}.{norm}.weight": torch.ones(hidden) for norm in norms}
    final = getattr(target.text_model, "norm", None)
    tensors["norm.weight"] = torch.ones(hidden) if final is None else final.weight.detach().float().clone()
    tensors["lm_head.weight"] = target.model.get_output_embeddings().weight.detach().float()[kept].clone()
    tensors["d2t"] = kept - torch.arange(len(kept))
    tensors["t2d"] = torch.zeros(tokens, dtype=torch.bool).index_fill(0, kept, True)
    if layout == "speculators":
        tensors["embed_tokens.weight"] = tables.clone()
    tensors |= {name: torch.ones(shape) for name, shape in (shapes or {}).items()}
    for name in drop:
        del tensors[name]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder

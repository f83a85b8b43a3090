"""Which EAGLE-3 heads SGLang runs as they were trained.

SGLang reads the flat layout. Where implementations differ, its class has one behaviour, and what a config says
otherwise is ignored without an error there. So a head that it would run otherwise is refused when it is written. The
rules are those of SGLang 0.5.23, read in its source (``models/llama_eagle3.py`` and the targets' classes); nothing was
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle.decode.compatibility import same_rows
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.eagle3_config import IDS
from eagle.families.base_weights import BaseTensors
from llava.errors import UserError

TARGETS = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
"""Families whose class in SGLang gives an EAGLE-3 head its features. Gemma's do too, but they scale embeddings."""
TO_VLLM = "msd doctor --served-by vllm says whether vLLM runs it (--to vllm)"


def check_sglang(draft: Eagle3Draft, name: str | Path, family: str, count: int, base: BaseTensors) -> None:
    """Raises `UserError` for a head that SGLang would run otherwise than it was trained.

    Args:
        name: of the head, for the error.
        family: of the base.
        count: layers of the base.
        base: its token embedding and ``lm_head``.
    """
    if family not in TARGETS:
        raise UserError(
            f"SGLang does not run EAGLE-3 heads of {family}", name, f"it does of {', '.join(TARGETS)}; {TO_VLLM}"
        )
    config = draft.config
    own = draft.embed_tokens
    reasons = {
        "norm_before_residual": config.norm_before_residual,
        "more than one layer": config.num_hidden_layers > 1,
        "biases": config.fc_bias or config.attention_bias or config.output_bias,
        "norms of queries and keys": config.query_norm,
        "no norm before lm_head": not config.head_norm,
        "a sliding window": config.window is not None,
        '"positions": "temporal"': config.positions == "temporal",
        "another hidden size than the base": config.hidden_size != config.target_hidden_size,
        "a token embedding other than the base's": own is not None and not same_rows(base.embed, own.weight),
        f"the stream behind the base's last layer ({count})": count in config.layers_of(count),
    }
    for reason, found in reasons.items():
        if found:
            raise UserError(f"SGLang cannot run an EAGLE-3 head with {reason}", name, TO_VLLM)
    if config.image_rows != "feature":
        raise UserError(
            f'SGLang gives image rows the projected features, this head was trained with "{config.image_rows}" rows',
            name,
            f'train with "image_rows": "feature"; {TO_VLLM}',
        )


def sglang_fields(layers: Sequence[int]) -> dict[str, Any]:
    """What SGLang reads beside the keys of the flat layout. It names layers by their outputs.

    Args:
        layers: the layers whose inputs the head reads.

    >>> sglang_fields((2, 18, 33))
    {'eagle_config': {'use_aux_hidden_state': True, 'eagle_aux_hidden_state_layer_ids': [1, 17, 32]}}
    """
    return {"eagle_config": {"use_aux_hidden_state": True, IDS: [layer - 1 for layer in layers]}}

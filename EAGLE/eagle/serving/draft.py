"""Writes a draft in the format that vLLM reads with the plugin msd-vllm (``serving/``).

The tensors keep their published names. ``config.json`` names the plugin's class and gives the sizes under the names of
a Llama config; what a Llama does not have is in the section "msd". A draft with a trimmed vocabulary of K tokens also
gets ``draft_vocab`` [K] and the base's rows of ``lm_head`` [K, H] for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle.decode.compatibility import FIX, check_family, check_tensors, same_rows
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.head import DraftHead
from eagle.drafts.msd import DraftModel
from eagle.families import FAMILIES, Family, family_of
from eagle.families.base_weights import BaseTensors, load_base_tensors
from eagle.provenance import record
from llava.errors import UserError
from llava.files import atomic_folder, read_object, write_json
from llava.hub import Source

ARCHITECTURE = "EagleMSDForCausalLM"  # the plugin's class
WITH_BASE = "name the base model with --base-model"


def export_draft(name: str | Path, out: str | Path, base: str | Path | None = None) -> Path:
    """Writes a draft into the folder ``out``.

    Args:
        name: draft: folder or hub name.
        out: must not exist, or be empty.
        base: base model: folder or hub name. The draft is compared with it, and gets the rows of the token embedding
            that it lacks. Only two tensors of it are read.

    Raises:
        UserError: vLLM cannot run this draft; it is not one of ``base``; or ``base`` is needed and not given.
    """
    draft = portable(load_draft(name), name)
    positions = [draft.config.published.get("max_position_embeddings")]
    tensors, families = None, served_families(draft)
    if base is not None:
        family = family_of(base)
        if not family.vllm:
            raise not_served(family, base)
        tensors, families = load_base_tensors(base), [family]
        fit(draft, tensors, family.name)
        fields = read_object(Source.of(base, what="base model").require("config.json", "base model config"))
        positions.append({**fields, **(fields.get("text_config") or {})}.get("max_position_embeddings"))
    elif draft.draft_vocab is not None:
        raise UserError("a draft with a trimmed vocabulary needs rows of the base's lm_head", name, WITH_BASE)
    known = [count for count in positions if isinstance(count, int)]
    if not known:
        raise UserError("the draft's config does not say how many positions there are", name, WITH_BASE)
    with atomic_folder(out) as folder:
        save_file(exported_tensors(draft, tensors), folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", exported_config(draft, max(known), families))
        write_json(folder / "provenance.json", {"draft": str(name), "base_model": base and str(base), **record()})
    return Path(out)


def portable(draft: DraftHead, name: str | Path) -> DraftModel:
    """The draft itself, if vLLM can run it with the plugin.

    Raises:
        UserError: it is of another kind, or has settings that need MSD's own loop.
    """
    if not isinstance(draft, DraftModel) or draft.block_size > 1:
        message = f"{draft.kind} heads are not exported to vLLM, only MSD drafts and EAGLE-3 heads are"
        itself = {
            "MTP": 'vLLM reads it from the base itself, with "method": "mtp"',
            "Gemma 4 assistant": "vLLM reads its checkpoint as it is",
        }
        raise UserError(message, name, itself.get(draft.kind, "serve one of these"))
    for family in FAMILIES:
        if family.name == draft.config.model_type and not family.vllm:
            raise not_served(family, name)
    options = draft.config.options
    check_rows(options.image_tokens, "vLLM", name)
    if options.layer_size is not None:
        raise UserError("vLLM cannot run a draft whose layer has a hidden size of its own (layer_size)", name)
    if options.positions != "plain":
        raise UserError(
            f"vLLM gives a draft plain positions, this one was trained with {options.positions}", name,
            "serve a draft with plain positions",
        )  # fmt: skip
    return draft


def check_rows(image_tokens: int | None, servers: str, where: str | Path) -> None:
    """Raises `UserError` for a draft with merged image rows, which no server has."""
    if image_tokens is not None:
        raise UserError(
            f"{servers} cannot merge picture rows (image_tokens {image_tokens}): a draft reads all rows there",
            where,
            "serve a draft without image_tokens",
        )


def served_families(draft: DraftModel) -> list[Family]:
    """Families of base models that vLLM runs a draft with, as far as the draft's config can tell."""
    return [each for each in FAMILIES if each.vllm and ("qwen" in each.name) == ("qwen" in draft.config.model_type)]


def not_served(family: Family, where: str | Path) -> UserError:
    """The error of a family that was not tried in vLLM."""
    known = ", ".join(each.title for each in FAMILIES if each.vllm)
    return UserError(f"drafts of {family.title} are not exported to vLLM", where, f"drafts of {known} are")


def fit(draft: DraftModel, base: BaseTensors, family: str) -> None:
    """Refuses a draft of another base model, also one of the same shape, and adds missing rows to its embedding."""
    check_family(family, draft.config.model_type)
    comparable = draft.config.vocab_size <= len(base.embed) and draft.config.hidden_size == base.embed.shape[1]
    if comparable and not same_rows(base.embed, draft.embed_tokens.weight):
        raise UserError("the draft does not fit the base model: its token embedding is not the base's", fix=FIX)
    check_tensors(family, base.embed, base.head, draft)


def exported_tensors(draft: DraftModel, base: BaseTensors | None) -> dict[str, Tensor]:
    """The draft's tensors; with a trimmed vocabulary also its ids and the rows of the base's head."""
    tensors = {name: tensor.contiguous() for name, tensor in draft.state_dict().items()}
    if draft.draft_vocab is not None and base is not None:
        tensors["draft_vocab"] = draft.draft_vocab.to(torch.long)
        tensors["lm_head.weight"] = base.head[draft.draft_vocab].to(draft.dtype).contiguous()
    return tensors


def exported_config(draft: DraftModel, positions: int, families: Sequence[Family]) -> dict[str, Any]:
    """``config.json`` of the export.

    Args:
        positions: how many the base has.
        families: of base models that the plugin accepts.
    """
    config = draft.config
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": config.hidden_act,
        "attention_bias": False,  # of the output projection
        "qkv_bias": config.attention_bias,
        "tie_word_embeddings": False,
        "torch_dtype": str(draft.dtype).removeprefix("torch."),
        "msd": {
            "family": config.model_type,
            "targets": [name for family in families for name in family.model_types],
            "decoupled": config.options.decoupled,
            "input_layernorm": config.input_layernorm,
            "fc_bias": config.fc_bias,
            "draft_vocab_size": None if draft.draft_vocab is None else len(draft.draft_vocab),
        },
    }

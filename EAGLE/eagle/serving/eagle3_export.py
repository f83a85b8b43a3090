"""Writes an EAGLE-3 head in the layouts that servers read without a plugin.

``flat``: the keys of a Llama config with those of the head beside them, for vLLM and SGLang. ``speculators``: the
layout of that library, which vLLM reads too; it also holds the base's token embedding, so it needs the base. SGLang has
checks and a few keys of its own (`eagle.serving.sglang`), and vLLM reads what is written for it too.

All conventions are written by the publisher's own key, and by name in the section ``"msd"``, so that a head gives equal
outputs in both layouts whatever it was published as.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from eagle.decode.compatibility import misfit
from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.eagle3 import Eagle3Draft, vocabulary_tensors
from eagle.drafts.eagle3_config import FEATURES, IDS, Eagle3Config
from eagle.families.base_weights import BaseTensors, load_base_tensors
from eagle.families.draft_config import text_config_of
from eagle.provenance import record
from eagle.serving.draft import check_rows
from eagle.serving.sglang import check_sglang, sglang_fields
from llava.errors import UserError
from llava.files import atomic_folder, read_object, write_json
from llava.hub import Source

Layout = Literal["flat", "speculators"]
Server = Literal["vllm", "sglang"]
TOKENS = 5
"""Tokens that vLLM drafts in a cycle if nothing else is said."""


def export_eagle3(
    name: str | Path,
    out: str | Path,
    layout: Layout = "flat",
    base: str | Path | None = None,
    server: Server = "vllm",
) -> Path:
    """Writes a head into the folder ``out``.

    Args:
        name: head: folder or hub name.
        out: must not exist, or be empty.
        base: base model: folder or hub name. Its config and two of its tensors are read.
        server: SGLang needs the base and the flat layout.

    Raises:
        UserError: it is of another kind; servers cannot run it; the layout cannot carry it; it does not fit the base;
            or a base is needed and not given.
    """
    draft = load_draft(name)
    if not isinstance(draft, Eagle3Draft):
        raise UserError(f"this is one of the {draft.kind} heads, not an EAGLE-3 head", name)
    check_rows(draft.config.image_tokens, "vLLM and SGLang", name)
    config, layers, tensors, verifier = draft.config, draft.config.target_layers, None, None
    if server == "sglang" and layout != "flat":
        raise UserError("SGLang reads heads in the flat layout only", where="--layout", fix="leave it out")
    if base is not None:
        tensors = load_base_tensors(base)
        check_sizes(config, tensors)
        family, text = text_config_of(base)
        layers = config.layers_of(text.num_hidden_layers)
        if server == "sglang":
            check_sglang(draft, name, family, text.num_hidden_layers, tensors)
        fields = read_object(Source.of(base, what="base model").require("config.json", "base model config"))
        verifier = {"name_or_path": str(base), "architectures": fields.get("architectures") or []}
    elif server == "sglang":
        raise UserError("what SGLang runs depends on the base", name, "name it with --base-model")
    if layout == "speculators":
        check_speculators(config, name, tensors)
    with atomic_folder(out) as folder:
        if server == "sglang" and layers is not None:
            written = complete_tensors(draft, tensors)
            del written["embed_tokens.weight"]  # the base's: SGLang takes that itself
            save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
            fields = {**flat_fields(config, layers), **sglang_fields(layers)}
        elif layout == "flat":
            save_draft(draft, folder, dtype=draft.dtype)
            fields = flat_fields(config, layers)
        else:
            save_file(complete_tensors(draft, tensors), folder / "model.safetensors", metadata={"format": "pt"})
            fields = speculators_fields(config, layers, verifier)
        write_json(folder / "config.json", {**fields, "torch_dtype": str(draft.dtype).removeprefix("torch.")})
        write_json(folder / "provenance.json", {"draft": str(name), "base_model": base and str(base), **record()})
    return Path(out)


def check_sizes(config: Eagle3Config, base: BaseTensors) -> None:
    """Raises `UserError` for a head of a base of other sizes."""
    vocabulary, hidden = base.embed.shape
    if config.target_hidden_size != hidden:
        raise misfit("hidden size", config.target_hidden_size, hidden)
    if config.vocab_size != vocabulary:
        raise misfit("vocabulary", config.vocab_size, vocabulary)


def check_speculators(config: Eagle3Config, name: str | Path, base: BaseTensors | None) -> None:
    """Raises `UserError` for a head that the layout of speculators cannot carry."""
    if base is None:
        raise UserError("the layout of speculators holds tensors of the base", name, "name it with --base-model")
    reasons = {
        "a bias of fc": config.fc_bias,
        "biases of some attention projections alone": config.attention_bias != config.output_bias,
        "no norm before lm_head": not config.head_norm,
        "another hidden size than the base": config.hidden_size != config.target_hidden_size,
        "both fc_norm and norm_before_fc": config.fc_norm and config.norm_before_fc,
    }
    for reason, found in reasons.items():
        if found:
            raise UserError(f"the layout of speculators has no heads with {reason}", name, "export it as --layout flat")


def layer_fields(config: Eagle3Config) -> dict[str, Any]:
    """The keys of the head's layers, those of a Llama or Qwen3 config."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.positions == "mrope" and config.mrope_section is not None:
        rope |= {"mrope_section": list(config.mrope_section), "mrope_interleaved": config.mrope_interleaved}
    published = config.published.get("transformer_layer_config", config.published)
    fields = {
        "model_type": "qwen3" if config.query_norm else "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "attention_bias": config.attention_bias,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": published.get("max_position_embeddings", 2048),
        "tie_word_embeddings": False,
    }
    if config.window is not None:
        sliding = ["sliding_attention"] * config.num_hidden_layers
        fields |= {"layer_types": sliding, "sliding_window": config.window, "use_sliding_window": True}
    if config.features != FEATURES:
        fields["num_aux_hidden_states"] = config.features
    return fields


def head_fields(config: Eagle3Config, layers: tuple[int, ...] | None) -> dict[str, Any]:
    """The keys of the head itself, at the top of both layouts."""
    msd: dict[str, Any] = {
        "positions": config.positions,
        "rope_theta": config.rope_theta,
        "image_rows": config.image_rows,
        "norm_before_residual": config.norm_before_residual,
        "feedback": config.feedback,
        "head_norm": config.head_norm,
    }
    fields: dict[str, Any] = {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
    }
    if config.feedback == "after":
        fields["norm_output"] = True
    if layers is not None:
        fields[IDS] = list(layers)
        msd["target_layers"] = list(layers)
    return {**fields, "msd": msd}


def flat_fields(config: Eagle3Config, layers: tuple[int, ...] | None) -> dict[str, Any]:
    """``config.json`` of the flat layout."""
    architecture = "Eagle3Qwen3ForCausalLM" if config.query_norm else "LlamaForCausalLMEagle3"
    return {"architectures": [architecture], **layer_fields(config), **head_fields(config, layers)}


def speculators_fields(
    config: Eagle3Config, layers: tuple[int, ...] | None, verifier: dict[str, Any] | None
) -> dict[str, Any]:
    """``config.json`` of the layout of speculators."""
    proposal = {"proposal_type": "greedy", "speculative_tokens": TOKENS}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        **head_fields(config, layers),
        "transformer_layer_config": layer_fields(config),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
    }


def complete_tensors(draft: Eagle3Draft, base: BaseTensors | None) -> dict[str, Tensor]:
    """The head's tensors, with the base's token embedding and ``lm_head`` where it has none of its own."""
    tensors = {name: tensor.contiguous() for name, tensor in draft.state_dict().items()}
    ids = draft.draft_vocab
    if base is not None:
        tensors.setdefault("embed_tokens.weight", base.embed.to(draft.dtype).contiguous())
        rows = base.head if ids is None else base.head[ids]
        tensors.setdefault("lm_head.weight", rows.to(draft.dtype).contiguous())
    if ids is not None:
        tensors |= vocabulary_tensors(ids.cpu(), draft.config.vocab_size)
    return tensors

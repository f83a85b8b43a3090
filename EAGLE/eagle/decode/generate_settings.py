"""Which settings of transformers' `generate` the engine serves. All others are refused; none is silently ignored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig

from llava.errors import UserError
from llava.strict import shown

SERVED = frozenset(
    [
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "max_time",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "renormalize_logits",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "watermarking_config",
        "num_return_sequences",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "stop_strings",
    ]
)
NO_EFFECT = frozenset(
    [
        "early_stopping",
        "length_penalty",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "decoder_start_token_id",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "max_matching_ngram_size",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "speculation_type",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "low_memory",
        "prefill_chunk_size",
        "transformers_version",
    ]
)
"""They do not change the answer of greedy search or sampling, or belong to a refused setting."""
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0, 0.0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "guidance_scale": (None, 1, 1.0),
    "token_healing": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "is_assistant": (None, False),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
"""Settings with the values that switch them off."""
REFUSED_ARGUMENTS = (
    "inputs", "synced_gpus", "assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask",
    "custom_generate",
)  # fmt: skip
"""Arguments of transformers' `generate` itself."""
REASONS = {
    "inputs": "MSD needs the ids of the prompt as input_ids",
    "assistant_model": "MSD has its own draft",
    "num_beams": "MSD verifies one continuation, beam search keeps several",
    "output_scores": "MSD does not return scores",
    "output_logits": "MSD does not return logits",
    "output_attentions": "MSD does not return attentions",
    "output_hidden_states": "MSD does not return hidden states",
}


FIX = "leave it out, or use the target's own generate"
log = logging.getLogger(__name__)


def check_settings(settings: GenerationConfig) -> None:
    """Raises `UserError` for a setting that the engine does not serve."""
    for name, value, reason in unsupported(vars(settings)):
        raise UserError(f"{name}={value!r}: {reason}", fix=FIX)


def check_call(given: Mapping[str, Any]) -> None:
    """Checks the arguments of a call that transformers' `generate` would ignore beside ``custom_generate``, and those
    for which it would fail before it calls the engine.

    Raises:
        UserError: one of them is not served.
    """
    for name in REFUSED_ARGUMENTS:
        if given.get(name) is not None and given[name] is not False:
            raise UserError(f"{name}: {REASONS.get(name, 'MSD does not support it')}", fix=FIX)
    if not isinstance(given.get("generation_config"), GenerationConfig | None):
        raise UserError(f"generation_config={shown(given['generation_config'])}", fix="give a GenerationConfig")
    for name, value, reason in unsupported({name: given[name] for name in REFUSED if name in given}):
        raise UserError(f"{name}={value!r}: {reason}", fix=FIX)


def leave_out_unsupported(settings: GenerationConfig, model: str) -> None:
    """Removes from a checkpoint's own generation config what the engine does not serve, with a warning for each."""
    for name, value, reason in list(unsupported(vars(settings))):
        log.warning("generation config of %s: %s=%r is not used: %s", model, name, value, reason)
        if name in REFUSED:
            setattr(settings, name, REFUSED[name][0])
        else:
            delattr(settings, name)


def unsupported(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Name, value and reason of each setting that the engine does not serve."""
    for name, value in settings.items():
        if name.startswith("_") or name in SERVED or name in NO_EFFECT:
            continue
        off = REFUSED.get(name)
        if off is None:
            yield name, value, "MSD does not know this setting"
        elif not any(value is each or value == each for each in off):
            yield name, value, REASONS.get(name, "MSD does not support it")

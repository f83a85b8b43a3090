"""The draft class: decoupled picture rows, fusion and one decoder layer, in vLLM's layers.

vLLM gives the draft the same inputs as MSD's own loop does. Row ``t`` has the target's hidden state ``h_t`` after its
final norm, and the embedding of ``x_{t+1}``: of a text token ``E(x_{t+1})``, of a picture token the feature that the
target's encoder made of it. The input of the layer is ``fc([E(x_{t+1}) ; h_t])`` for text and the feature alone for a
picture. `forward` is not told which rows are pictures, but `embed_input_ids` is, and it is called right before. It
keeps the mask in a buffer of fixed size, so that a captured CUDA graph reads the current one.

The export (`msd export --to vllm`) writes the config: the sizes under their usual names, and the section "msd".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from msd_vllm import untested
from msd_vllm.cpu_sampling import repair_sampling
from msd_vllm.positions import use_plain_positions

try:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.models.interfaces import SupportsMultiModalEmbeddings
    from vllm.model_executor.models.llama_eagle import LlamaDecoderLayer, LlamaModel
    from vllm.model_executor.models.utils import (
        AutoWeightsLoader,
        _merge_multimodal_embeddings,
        get_draft_quant_config,
        maybe_prefix,
    )
except ImportError as error:
    from vllm import __version__

    raise ImportError(f"MSD drafts cannot be served: {untested(__version__)} ({error})") from error


class DraftLayers(nn.Module):
    """The tensors of a published draft, in vLLM's layers."""

    def __init__(self, vllm_config: VllmConfig, config: Any, first_layer: int, prefix: str) -> None:
        super().__init__()
        size, settings = config.hidden_size, config.msd
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, size, prefix=maybe_prefix(prefix, "embed_tokens"))
        # Numbered behind the target's layers: the names of attention layers must be unique.
        self.layers = nn.ModuleList(
            [
                LlamaDecoderLayer(
                    vllm_config,
                    disable_input_layernorm=not settings["input_layernorm"],
                    prefix=maybe_prefix(prefix, f"layers.{first_layer}"),
                    config=config,
                )
            ]
        )
        self.fc = ReplicatedLinear(
            input_size=2 * size,
            output_size=size,
            bias=settings["fc_bias"],
            params_dtype=vllm_config.model_config.dtype,
            quant_config=get_draft_quant_config(vllm_config),
            prefix=maybe_prefix(prefix, "fc"),
            return_bias=False,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads the tensors under their published names; returns the names that were loaded."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=LlamaModel.hf_to_vllm_mapper)


class EagleMSDForCausalLM(nn.Module, SupportsMultiModalEmbeddings):
    """An MSD draft. vLLM replaces ``model.embed_tokens`` and ``lm_head`` by the target's where they are equal."""

    has_own_embed_tokens = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        target = vllm_config.model_config
        check_pair(config, target)
        check_stages(vllm_config.parallel_config.pipeline_parallel_size)
        # Room for every position of the target: the draft's rotary angles are computed, not trained.
        config.max_position_embeddings = max(config.max_position_embeddings, target.max_model_len)
        if not hasattr(target.hf_config, "image_token_index"):
            # The V1 runner copies this attribute into the draft's config, where MSD does not need it.
            target.hf_config.image_token_index = getattr(target.hf_config, "image_token_id", None)
        use_plain_positions(EagleMSDForCausalLM)
        repair_sampling()
        self.config = config
        self.decoupled: bool = config.msd["decoupled"]
        first_layer = target.get_num_layers(vllm_config.parallel_config)
        self.model = DraftLayers(vllm_config, config, first_layer, maybe_prefix(prefix, "model"))
        drafted = config.msd["draft_vocab_size"]  # K, or None for the whole vocabulary
        self.has_own_lm_head = drafted is not None
        self.logits_processor = LogitsProcessor(drafted or config.vocab_size)
        if self.has_own_lm_head:
            self.lm_head = ParallelLMHead(drafted, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
            self.draft_vocab = nn.Parameter(torch.zeros(drafted, dtype=torch.long), requires_grad=False)  # [K] ids
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("is_image", torch.zeros(rows, dtype=torch.bool), persistent=False)  # [rows]
        self.is_image: Tensor

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Embeddings [N, H] of ``input_ids`` [N], picture features in place; remembers where these are.

        Args:
            multimodal_embeddings: features [P, H or more] of the target's encoder, in pieces.
            is_multimodal: [N] bool, true in P rows.
        """
        embeds = self.model.embed_tokens(input_ids)
        self.is_image.zero_()
        if multimodal_embeddings is None or is_multimodal is None or len(multimodal_embeddings) == 0:
            return embeds
        self.is_image[: len(is_multimodal)].copy_(is_multimodal)
        # Some encoders (Qwen3-VL) append features for the target's deeper layers to those of the first one.
        size = embeds.shape[-1]
        features = [each[..., :size] for each in multimodal_embeddings]
        return _merge_multimodal_embeddings(embeds, features, is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicted hidden states [N, H], once for the logits and once as input of the next step.

        Args:
            positions: [N], plain.
            hidden_states: [N, H] of the target, or predicted ones.
            inputs_embeds: [N, H] of `embed_input_ids`. None for a target without pictures.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        rows = self.model.fc(torch.cat([inputs_embeds, hidden_states], dim=-1))  # [N, H]
        if self.decoupled:
            rows = torch.where(self.is_image[: len(rows)].unsqueeze(-1), inputs_embeds, rows)
        out, residual = self.model.layers[0](positions, rows, None)
        predicted = out + residual  # [N, H]; there is no final norm
        return predicted, predicted

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [N, V]; -inf for tokens outside a trimmed vocabulary."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is None or not self.has_own_lm_head:
            return logits
        whole = logits.new_full((len(logits), self.config.vocab_size), -torch.inf)
        whole[:, self.draft_vocab] = logits
        return whole

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads an exported draft; returns the names that were loaded, which vLLM compares with the class's own."""
        own = {"lm_head.weight", "draft_vocab"}
        named = ((name if name in own else f"model.{name}", tensor) for name, tensor in weights)
        return AutoWeightsLoader(self).load_weights(named)


def check_stages(stages: int) -> None:
    """Refuses pipeline parallelism: vLLM keeps picture features on the first stage, and the draft runs on the last.

    Raises:
        ValueError: one line.
    """
    if stages > 1:
        raise ValueError(
            f"MSD drafts cannot be served with pipeline parallelism (pipeline_parallel_size {stages}): picture "
            "features stay on the first stage, the draft runs on the last; use tensor parallelism"
        )


def check_pair(config: Any, target: Any) -> None:
    """Refuses a draft that was made for another kind or size of base model.

    Args:
        config: of the draft.
        target: vLLM's `ModelConfig` of the base.

    Raises:
        ValueError: one line.
    """
    settings = getattr(config, "msd", None)
    if not isinstance(settings, dict) or "targets" not in settings:
        raise ValueError("this draft is not one that `msd export --to vllm` of this version wrote: export it again")
    base = target.hf_config.model_type
    pairs = (
        ("family", settings["family"], base, base in settings["targets"]),
        ("hidden size", config.hidden_size, target.get_hidden_size(), config.hidden_size == target.get_hidden_size()),
        ("vocabulary", config.vocab_size, target.get_vocab_size(), config.vocab_size == target.get_vocab_size()),
    )
    for what, own, theirs, fits in pairs:
        if not fits:
            raise ValueError(
                f"the MSD draft does not fit the base model: {what} {own} in the draft, {theirs} in the base "
                "(use the draft of this base, exported with --base-model)"
            )

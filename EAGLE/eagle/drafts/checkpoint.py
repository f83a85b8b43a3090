"""Draft checkpoints: read the published layout strictly, write it atomically."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from eagle.drafts.assistant import EMBEDDING, MODELS, ORDERING, AssistantDraft
from eagle.drafts.block import BlockDraft
from eagle.drafts.config import BLOCK, DRAFT_VOCAB_FILE, VISPEC, BlockConfig, DraftConfig
from eagle.drafts.draft_vocab import read_draft_vocab, write_draft_vocab
from eagle.drafts.eagle3 import Eagle3Draft, draft_vocabulary, vocabulary_tensors
from eagle.drafts.eagle3_config import Eagle3Config, Shapes, is_eagle3_config
from eagle.drafts.head import DraftHead, TrainedHead
from eagle.drafts.msd import DraftModel
from eagle.drafts.mtp import MARKS, PREFIX, MTPDraft, stack_experts
from eagle.drafts.vispec import QUERIES, ViSpecDraft
from llava.errors import UserError
from llava.files import atomic_write, read_object, write_json
from llava.hub import Source
from llava.loading import load_errors
from llava.weights import check_floats, find_weights, is_old_buffer, read_tensors

HEAD, MAPPING = "lm_head.weight", ("d2t", "t2d")
BASE = ("model.", "language_model.")
"""How names of tensors of a base model begin."""
T = TypeVar("T")
log = logging.getLogger(__name__)

SHOWN = 12
"""Tensors that an error names."""


def load_draft(
    name: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu", **hub: Any
) -> DraftHead:
    """Loads a draft of any kind from a folder or the hub.

    Args:
        name: folder or hub name.
        dtype: a torch dtype, or "auto" for the checkpoint's own.
        device: "meta" opens the weight files and does not read their data.
        hub: see `llava.hub.HUB_KEYS`.

    Raises:
        UserError: a file is missing or broken, or a tensor is missing, unexpected, of another shape or not of floats.
    """
    source = Source.of(name, hub, "draft")
    config_file = source.require("config.json", "draft config")
    paths = find_weights(source, PREFIX)
    tensors = canonical(read_tensors(paths))
    with load_errors("draft config is not valid", config_file):
        config = read_object(config_file, "draft config")
        draft = build_draft(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, config_file)
    meta = torch.device(device).type == "meta"
    if isinstance(draft, MTPDraft):
        tensors = stack_experts({name: tensor.to("meta") if meta else tensor for name, tensor in tensors.items()})
    elif isinstance(draft, AssistantDraft):
        tensors = draft.with_head(tensors)
    if problems := misfits({name: tuple(tensor.shape) for name, tensor in tensors.items()}, draft):
        fix = f"use a complete {draft.kind} draft"
        named = "; ".join(problems[:SHOWN]) + (f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
        raise UserError(f"draft does not fit its config: {named}", paths[0], fix)
    spare = {name: tensors.pop(name) for name in list(tensors) if is_spare(name, draft)}
    check_floats({name: tensor for name, tensor in tensors.items() if name != ORDERING}, paths[0])
    if not meta and (broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]):
        raise UserError(f"draft has NaN or infinite values in {', '.join(broken)}", paths[0], "use another checkpoint")
    draft.load_state_dict(tensors, assign=True)
    if isinstance(draft, AssistantDraft):
        draft.check_ordering(paths[0])
    if isinstance(draft, Eagle3Draft):
        with load_errors("draft vocabulary is not valid", paths[0]):
            draft.draft_vocab = draft_vocabulary(spare.pop("d2t", None), spare.pop("t2d", None), draft.config)
    draft.renew_rotary()
    if spare:
        log.warning("%s: a draft does not need %s, left out", name, ", ".join(spare))
    if isinstance(draft, DraftModel):
        draft.spare_head = spare.get(HEAD)
        if draft.config.options.head_tokens is not None:
            source.find(DRAFT_VOCAB_FILE)  # downloads it beside the config
            draft.draft_vocab = read_draft_vocab(config_file.parent, draft.config)
    own = dtype if isinstance(dtype, torch.dtype) else draft.dtype
    return draft.to(device=device, dtype=own).eval().requires_grad_(False)


def load_msd_draft(name: str | Path, purpose: str, **settings: Any) -> DraftModel:
    """`load_draft` where only MSD's own kind will do.

    Args:
        purpose: what it is for, named in the error.

    Raises:
        UserError: it is a head of another kind, or cannot be loaded.
    """
    return require_msd(load_draft(name, **settings), purpose, name)


def require_msd(draft: DraftHead, purpose: str, where: str | Path) -> DraftModel:
    """The draft itself if it is of MSD's own kind; errors as of `load_msd_draft`."""
    if not isinstance(draft, DraftModel) or draft.block_size > 1:
        raise UserError(f"{purpose} takes MSD drafts, not {draft.kind} heads", where)
    return draft


def build_draft(config: Mapping[str, Any], shapes: Shapes | None, where: str | Path) -> DraftHead:
    """The head that a ``config.json`` and the shapes of its tensors describe, on the meta device, without weights.

    Args:
        shapes: by canonical name. None if they are not known.
        where: the config, named in errors.

    Raises:
        UserError: the config is not valid, or of a kind that is not supported.
    """
    kind = kind_of(config, shapes, where)
    with torch.device("meta"):
        if kind is Eagle3Draft:
            return Eagle3Draft(Eagle3Config.from_dict(config, where, shapes))
        if kind is ViSpecDraft:
            return ViSpecDraft.from_dict(config, where, shapes)
        if kind is BlockDraft:
            return BlockDraft(BlockConfig.from_dict(config, where, shapes))
        if kind is AssistantDraft:
            return AssistantDraft.from_dict(config, where)
        if kind is MTPDraft:
            return MTPDraft.from_dict(config, where)
        return DraftModel(DraftConfig.from_dict(config, where, shapes))


def kind_of(config: Mapping[str, Any], names: Collection[str] | None, where: str | Path) -> type[DraftHead]:
    """The kind of a head, from its config and the names of its tensors.

    Raises:
        UserError: it is of a known kind that is not supported, or a base model without MTP layers.
    """
    names = names or ()
    form, model = config.get("speculators_model_type"), str(config.get("model_type"))
    other = {
        "P-EAGLE": form == "peagle" or "mask_hidden" in names,
        "DFlash": form == "dflash" or "dflash_config" in config or "hidden_norm.weight" in names,
        f"'{model}'": model.endswith("_assistant") and model not in MODELS,
        f"'{form}' speculators": form not in (None, "eagle3"),
    }
    for name, found in other.items():
        if found:
            fix = "use an MSD, EAGLE-3, ViSpec, block or MTP head, or a Gemma 4 assistant"
            raise UserError(f"{name} heads are not supported", where, fix)
    if model in MODELS:
        return AssistantDraft
    if BLOCK in config:
        return BlockDraft
    if any(name in names for name in MARKS):
        return MTPDraft
    if any(name.startswith(BASE) for name in names) and not any(name.endswith("fc.weight") for name in names):
        fix = "give a draft, or a Qwen3.5 whose checkpoint has its MTP layer"
        raise UserError("a base model without an MTP layer (tensors mtp.*) is not a draft", where, fix)
    by_tensors = "layers.0.hidden_norm.weight" in names or "d2t" in names
    if VISPEC in config or QUERIES in names or "img_fc.weight" in names:
        return ViSpecDraft
    return Eagle3Draft if is_eagle3_config(config) or by_tensors else DraftModel


def canonical(found: Mapping[str, T]) -> dict[str, T]:
    """Tensors, or what is known of them, by their names in all layouts. The first layer of an EAGLE-3 head is called
    ``midlayer`` in some. MTP layers are a part of a base model, whose other tensors are left out."""
    mtp = {name.removeprefix(PREFIX): value for name, value in found.items() if name.startswith(PREFIX)}
    first = "midlayer."
    renamed = {f"layers.0.{n.removeprefix(first)}" if n.startswith(first) else n: found[n] for n in found}
    return mtp or renamed


def is_spare(name: str, draft: DraftHead) -> bool:
    """Whether a checkpoint may have a tensor of this name though it is not part of the head: a buffer of old releases,
    the mapping of a trimmed vocabulary, for an MSD draft the base model's ``lm_head``, or for an assistant its
    embedding, which its ``lm_head`` is too."""
    if isinstance(draft, AssistantDraft):
        return name == EMBEDDING or is_old_buffer(name)
    known = name == HEAD if isinstance(draft, DraftModel) else name in MAPPING and isinstance(draft, Eagle3Draft)
    return known or is_old_buffer(name)


def misfits(shapes: Shapes, draft: DraftHead) -> list[str]:
    """Names the tensors of a checkpoint that are missing, unexpected, or of another shape than in ``draft``."""
    wanted = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    problems = [f"missing {name}" for name in wanted if name not in shapes]
    problems += [f"unexpected {name}" for name in shapes if name not in wanted and not is_spare(name, draft)]
    return problems + [
        f"{name} is {list(shape)}, config.json says {list(wanted[name])}"
        for name, shape in shapes.items()
        if name in wanted and shape != wanted[name]
    ]


def save_draft(draft: TrainedHead, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes ``config.json`` and ``model.safetensors`` in the published layout, each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in draft.state_dict().items()}
    vocabulary = draft.draft_vocab
    if isinstance(draft, Eagle3Draft) and vocabulary is not None:
        tensors |= vocabulary_tensors(vocabulary.cpu(), draft.config.vocab_size)
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    dtype_name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**draft.config.to_dict(), "torch_dtype": dtype_name})
    if isinstance(draft, DraftModel) and vocabulary is not None:
        write_draft_vocab(folder, vocabulary)
    return folder

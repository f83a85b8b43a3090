"""Whether base and draft are there, complete, and made for each other.

The loaders themselves read folders and the hub's cache, on the meta device: weight files are opened and their names and
shapes checked, their data is not read, except by `check_engine`. Of a model that is only on the hub, which is asked on
request, configs and other small files are fetched, and its weights are not checked.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from transformers import AutoConfig, AutoModelForImageTextToText

from eagle.decode.compatibility import (
    check_assistant,
    check_eagle3_sizes,
    check_family,
    check_image_ids,
    check_mtp,
    misfit,
)
from eagle.decode.self_check import self_check
from eagle.doctor import Check, State, problems
from eagle.doctor.memory import Footprint
from eagle.drafts.assistant import AssistantDraft
from eagle.drafts.checkpoint import build_draft, canonical, load_draft
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.head import DraftHead
from eagle.drafts.msd import DraftModel
from eagle.drafts.mtp import MTPDraft
from eagle.families import Target, family_of, load_target
from llava import load_config
from llava.checkpoint import check_quantisation
from llava.errors import UserError
from llava.files import read_object
from llava.generation import check_generation_config, check_special_tokens
from llava.hub import Source, cached_folder, hub_errors
from llava.layout import open_checkpoint
from llava.loading import load_errors
from llava.weights import WEIGHT_FILES

BASE, DRAFT, PAIR = "base model", "draft", "base and draft"
CONVENTIONS, ENGINE = "draft's conventions", "self-check"
UNCHECKED = "; weights not checked, since they are not on this disk"
LOCAL: dict[str, Any] = {"local_files_only": True}


def check_base(name: str, hub: bool) -> tuple[Target | None, list[Check]]:
    """The base model on the meta device, None if it cannot be loaded, and the findings.

    Args:
        name: folder or hub name.
        hub: whether the hub may be asked.
    """
    checks: list[Check] = []
    with problems(checks, BASE), load_errors("base model cannot be loaded", name, weights=True):
        source = Source.of(name, {} if hub else LOCAL, BASE)
        if not hub and not _is_here(source):
            return None, [_not_cached(BASE, name)]
        family = family_of(name, **source.hub)
        tower = open_checkpoint(source).tower if family.name == "llava" else None
        if not hub and tower is not None and tower.find("config.json") is None:
            return None, [_not_cached("vision tower", tower.name)]
        here = _is_here(source) and (tower is None or _is_here(tower))
        if here:
            target = load_target(name, device_map="meta", **LOCAL)
        else:
            _check_weights_on_hub(source)
            config = load_config(name) if family.name == "llava" else AutoConfig.from_pretrained(name)
            check_quantisation(config, name)
            check_special_tokens(source, config.get_text_config().vocab_size)
            check_generation_config(source, config.get_text_config().vocab_size)
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(config)
            target = family.target_class()(model, family.template_class().load_processor(name))
        with problems(checks, "chat template"):
            target.chat_prompt("What?", num_images=1)
        size = f"vocabulary {target.vocab_size}, {_parameters(target.model) / 1e6:,.1f} M parameters"
        found = f"{name}: {family.name}, {size}" + (f", vision tower {tower.name}" if tower else "")
        checks.insert(0, Check(BASE, State.OK, found + ("" if here else UNCHECKED)))
        return target, checks
    return None, checks


def check_engine(name: str, device_map: str) -> Check:
    """Loads the weights of a base model that is on this disk, and compares the engine with transformers' `generate`."""
    checks: list[Check] = []
    with problems(checks, ENGINE):
        target = load_target(name, device_map=device_map, **LOCAL)
        target.prepare_for_decoding()
        if self_check(target):
            return Check(ENGINE, State.OK, f"gives the logits of transformers' generate in {target.dtype}")
        return Check(ENGINE, State.WARNING, "no memory to compare it with transformers' generate")
    return checks[0]


def check_draft(name: str, hub: bool) -> tuple[DraftHead | None, list[Check]]:
    """The draft on the meta device, None if it cannot be loaded, and the findings; arguments as of `check_base`."""
    checks: list[Check] = []
    with problems(checks, DRAFT), load_errors("draft cannot be loaded", name, weights=True):
        source = Source.of(name, what=DRAFT)
        here = _is_here(source)
        if here:
            draft = load_draft(name, device="meta", **LOCAL)
        elif hub:
            _check_weights_on_hub(source)
            file = source.require("config.json", "draft config")
            draft = build_draft(read_object(file, "draft config"), _shapes_on_hub(source), file)
        else:
            return None, [_not_cached(DRAFT, name)]
        size = f"vocabulary {draft.config.vocab_size}, {_parameters(draft) / 1e6:,.1f} M parameters"
        kind = draft.config.model_type if isinstance(draft, DraftModel) else draft.kind
        checks.append(Check(DRAFT, State.OK, f"{name}: {kind}, {size}" + ("" if here else UNCHECKED)))
        checks.append(Check(CONVENTIONS, State.OK, f"{draft.kind}: {draft.conventions()}"))
        return draft, checks
    return None, checks


def check_pair(target: Target, draft: DraftHead) -> list[Check]:
    """Whether the draft was made for a base of this shape and family. The draft's vocabulary may be the first part of
    the base's."""
    checks: list[Check] = []
    hidden, vocabulary, more = target.hidden_size, target.vocab_size, target.vocab_size - draft.config.vocab_size
    with problems(checks, PAIR):
        if isinstance(draft, Eagle3Draft):
            check_eagle3_sizes(target, draft)
            read = ", ".join(map(str, draft.target_layers))
            more_found = f", inputs of layers {read} of {len(target.text_model.layers)}"
        elif isinstance(draft, AssistantDraft):
            check_assistant(target, draft)
            read = " and ".join(f"{index} ({kind})" for kind, index in draft.sources.items())
            more_found = f", keys and values of layers {read}"
        else:
            if isinstance(draft, DraftModel):  # most others do not name their family
                check_family(target.family, draft.config.model_type)
            if isinstance(draft, MTPDraft):
                check_mtp(target, draft)
            if draft.config.hidden_size != hidden:
                raise misfit("hidden size", draft.config.hidden_size, hidden)
            if more < 0:
                raise misfit("vocabulary", draft.config.vocab_size, vocabulary)
            check_image_ids(target, draft)
            more_found = f", {more} of them from the base, if its others are the draft's" if more else ""
        found = f"fit together: hidden size {hidden}, vocabulary {vocabulary}{more_found}"
        checks.append(Check(PAIR, State.OK, found))
    return checks


def footprint(target: Target, draft: DraftHead | None) -> Footprint:
    """Memory of base, with its vision tower, and draft."""
    parts = [target.text_model] if draft is None else [target.text_model, draft.layers]
    keys = sum(
        module.out_features for part in parts for name, module in part.named_modules() if name.endswith("k_proj")
    )
    return Footprint(_parameters(target.model), 0 if draft is None else _parameters(draft), 2 * keys)


def _is_here(source: Source) -> bool:
    """Whether the weights are in a folder or in the hub's cache."""
    folder = source.folder
    if folder is None and (folder := cached_folder(source.name)) is not None:
        return any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())
    return folder is not None


def _check_weights_on_hub(source: Source) -> None:
    with hub_errors(source.what, source.name):
        files = HfApi().list_repo_files(source.name)
    if not {file.removesuffix(".index.json") for file in files}.intersection(WEIGHT_FILES):
        raise UserError("no weights", source.name, f"expected {' or '.join(WEIGHT_FILES)}, or shards with an index")


def _shapes_on_hub(source: Source) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a draft's tensors by canonical name, from the headers of its .safetensors files. None without them."""
    with hub_errors(source.what, source.name):
        try:
            headers = HfApi().get_safetensors_metadata(source.name).files_metadata.values()
        except NotASafetensorsRepoError:
            return None
        except SafetensorsParsingError as error:
            raise UserError("weight file is damaged", source.name, str(error).splitlines()[0]) from error
    return canonical({name: tuple(tensor.shape) for header in headers for name, tensor in header.tensors.items()})


def _not_cached(topic: str, name: str) -> Check:
    found = f"{name} is not a folder here, and not in the hub cache"
    return Check(topic, State.WARNING, found, "check the name; --hub looks at it on the hub")


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

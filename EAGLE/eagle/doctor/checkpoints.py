"""Whether base and draft are there, complete, and made for each other. The weights themselves stay on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod

import torch

from eagle.doctor.check import Check, State
from eagle.doctor.contents import Contents, base_weights, draft_weights, open_contents
from eagle.doctor.headers import read_shapes
from eagle.doctor.memory import Footprint
from eagle.drafts.checkpoint import misfits
from eagle.drafts.config import HEAD_TOKENS, DraftConfig
from eagle.drafts.draft_vocab import read_head_tokens
from eagle.drafts.msd import DraftModel
from eagle.families import FAMILIES, family_named
from eagle.families.base_weights import EMBED_NAMES, HEAD_NAMES
from eagle.families.stock import load_processor
from llava.errors import UserError
from llava.hub import Source
from llava.layout import build_config, open_checkpoint
from llava.tokenizer import load_tokenizer
from llava.weights import find_weights, is_old_buffer

BASE, DRAFT, PAIR = "base model", "draft", "base and draft"
LAYER = re.compile(r"(?P<stack>(?:.*\.)?(?:layers|blocks)\.)(?P<number>\d+)\.(?P<part>.+)")
VISION = re.compile(r"vision|visual")
SHOWN = 5


def look_at_base(name: str, hub: bool) -> tuple[Contents | None, list[Check]]:
    """The base model's contents, None where they cannot be seen, and what is to be said about them."""
    try:
        contents = open_contents(name, BASE, base_weights, hub)
        if contents is None:
            return None, [_not_here(BASE, name)]
        _check_family(contents, name)
    except UserError as error:
        return None, [Check.of_error(BASE, error)]
    missing = list(missing_tensors(contents))
    if missing:
        mend = "download or copy the checkpoint again"
        return contents, [Check(BASE, State.PROBLEM, f"missing tensors: {_some(missing)}", mend)]
    checks = [Check(BASE, State.OK, f"{name} ({contents.place}): {_describe(contents)}")]
    checks += _check_processor(contents, name)
    if contents.config["model_type"] in family_named("llava").model_types:
        checks += _check_tower(contents, name, hub)
    return contents, checks


def look_at_draft(name: str, hub: bool) -> tuple[Contents | None, list[Check]]:
    """The draft's contents, None where they cannot be seen, and what is to be said about them."""
    try:
        contents = open_contents(name, DRAFT, draft_weights, hub)
        if contents is None:
            return None, [_not_here(DRAFT, name)]
        config = DraftConfig.from_dict(contents.config, where=f"{name}/config.json", tensors=contents.tensors)
        if config.options.head_tokens is not None and HEAD_TOKENS not in contents.files:
            raise UserError(f"{HEAD_TOKENS} missing", name, "make it again: python -m eagle.ge_data.vocabulary")
        if config.options.head_tokens is not None and contents.folder is not None:
            read_head_tokens(contents.folder, config)
    except UserError as error:
        return None, [Check.of_error(DRAFT, error)]
    shapes = {tensor: shape for tensor, shape in (contents.tensors or {}).items() if shape is not None}
    with torch.device("meta"):
        wrong = misfits(shapes, DraftModel(config)) if shapes else []
    if wrong:
        return contents, [
            Check(DRAFT, State.PROBLEM, f"does not fit its config: {_some(wrong)}", "is it an MSD draft?")
        ]
    return contents, [Check(DRAFT, State.OK, f"{name} ({contents.place}): {_describe(contents)}")]


def check_pair(base: Contents, draft: Contents) -> list[Check]:
    """Whether the draft was made for a base of this shape and family."""
    checks, added = [], ""
    fields, own = text_fields(base), text_fields(draft)
    rows, columns = embedding_shape(base) or (fields.get("vocab_size"), fields.get("hidden_size"))
    for what, theirs, ours in (
        ("hidden size", columns, own.get("hidden_size")),
        ("vocabulary", rows, own.get("vocab_size")),
    ):
        if what == "vocabulary" and isinstance(theirs, int) and isinstance(ours, int) and ours < theirs:
            added = f", {theirs - ours} of them from the base, if its first {ours} are the draft's"
            continue
        if theirs is None:
            checks.append(Check(PAIR, State.WARNING, f"the base's {what} is not known", "use msd generate to find out"))
        elif theirs != ours:
            mend = "use the draft that was trained for this base model"
            checks.append(Check(PAIR, State.PROBLEM, f"{what} {ours} in the draft, {theirs} in the base", mend))
    kinds = [str(contents.config.get("model_type", "llava")) for contents in (base, draft)]
    if not checks and ("qwen" in kinds[0]) != ("qwen" in kinds[1]):
        found = f"base is {kinds[0]}, draft was made for {kinds[1]}"
        checks.append(Check(PAIR, State.PROBLEM, found, "use the draft that was trained for this base model"))
    return checks or [Check(PAIR, State.OK, f"fit together: hidden size {columns}, vocabulary {rows}{added}")]


def footprint(base: Contents, draft: Contents | None) -> Footprint | None:
    """Memory that base and draft take, without a vision tower of its own; None where shapes are not known."""
    known = [_known_shapes(contents) for contents in (base, draft) if contents is not None]
    if not all(known):
        return None
    keys = sum(
        shape[0]
        for shapes in known
        for name, shape in shapes.items()
        if name.endswith("self_attn.k_proj.weight") and not VISION.search(name)
    )
    sizes = [sum(map(prod, shapes.values())) for shapes in known]
    return Footprint(sizes[0], sum(sizes[1:]), 2 * keys)


def text_fields(contents: Contents) -> Mapping[str, object]:
    """Settings of the language model, which old configs have at the top and new ones in ``text_config``."""
    return {**contents.config, **(contents.config.get("text_config") or {})}


def embedding_shape(contents: Contents) -> tuple[int, ...] | None:
    """[V, H] of the base's token embedding, where the shape is known."""
    tensors = contents.tensors or {}
    return next((shape for name in EMBED_NAMES if (shape := tensors.get(name)) is not None), None)


def missing_tensors(contents: Contents) -> Iterator[str]:
    """Names that a base of this config should have. Layouts differ in names, so each layer is compared with the others
    of its stack."""
    if contents.tensors is None:
        return
    names = {name for name in contents.tensors if not is_old_buffer(name)}
    fields = text_fields(contents)
    embed = next((name for name in EMBED_NAMES if name in names), None)
    if embed is None:
        yield f"token embedding ({' or '.join(EMBED_NAMES)})"
    elif (norm := embed.replace("embed_tokens", "norm")) not in names:
        yield norm
    if not names.intersection(HEAD_NAMES) and not fields.get("tie_word_embeddings", False):
        yield HEAD_NAMES[0]
    count = fields.get("num_hidden_layers")
    yield from _gaps(names, count if isinstance(count, int) else 0)


def _gaps(names: Iterable[str], text_layers: int) -> Iterator[str]:
    """What layers lack that others of the same stack have; the text stack has ``text_layers`` layers at least."""
    stacks: dict[str, dict[int, set[str]]] = {}
    for match in filter(None, map(LAYER.fullmatch, names)):
        layers = stacks.setdefault(match["stack"], {})
        layers.setdefault(int(match["number"]), set()).add(match["part"])
    for stack, layers in sorted(stacks.items()):
        parts = set().union(*layers.values())
        least = 0 if VISION.search(stack) else text_layers
        for number in range(max(least, max(layers) + 1)):
            yield from (f"{stack}{number}.{part}" for part in sorted(parts - layers.get(number, set())))


def _check_family(contents: Contents, name: str) -> None:
    """Raises UserError for a model_type that no adapter serves."""
    model_type = contents.config.get("model_type")
    known = [served for family in FAMILIES for served in family.model_types]
    if model_type not in known:
        raise UserError(
            f"model_type '{model_type}' is not supported as base model",
            where=name,
            fix=f"supported: {', '.join(known)}",
        )


def _check_processor(contents: Contents, name: str) -> list[Check]:
    """The tokenizer, and where the image processor is in the same files that too, opened as for decoding."""
    where = name if contents.folder is None else str(contents.folder)
    try:
        if contents.config["model_type"] in family_named("llava").model_types:
            load_tokenizer(Source.of(where))
        else:
            load_processor(where)
    except UserError as error:
        return [Check.of_error("tokenizer", error)]
    return []


def _check_tower(contents: Contents, name: str, hub: bool) -> list[Check]:
    """The vision tower of LLaVA-1.5, which may be a checkpoint of its own, and the config of both together."""
    try:
        checkpoint = open_checkpoint(Source.of(name, {} if hub else {"local_files_only": True}))
        tower = checkpoint.tower
        if tower is not None and tower.find("config.json") is None and tower.folder is None:
            found = f"{tower.name} is not in the hub cache; loading the base downloads it"
            return [Check("vision tower", State.WARNING, found, "download it first where there is no network")]
        build_config(checkpoint)
        if tower is None or any("vision_tower." in tensor for tensor in contents.tensors or {}):
            return []
        if tower.folder is None:
            return [Check("vision tower", State.OK, f"{tower.name} (hub)")]
        for path in find_weights(tower):
            read_shapes(path)
    except UserError as error:
        return [Check.of_error("vision tower" if "tower" in error.what else BASE, error)]
    return [Check("vision tower", State.OK, f"{tower.name} (folder)")]


def _not_here(topic: str, name: str) -> Check:
    return Check(topic, State.WARNING, f"{name} is not in the hub cache", "add --hub to look at it on the hub")


def _describe(contents: Contents) -> str:
    fields = text_fields(contents)
    shapes = _known_shapes(contents)
    size = f"{sum(map(prod, shapes.values())) / 1e6:,.1f} M parameters" if shapes else "weights not looked into"
    return f"{contents.config.get('model_type')}, vocabulary {fields.get('vocab_size')}, {size}"


def _known_shapes(contents: Contents) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in (contents.tensors or {}).items() if shape is not None}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

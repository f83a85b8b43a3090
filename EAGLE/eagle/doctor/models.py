"""Whether base and draft are there, complete, and made for each other.

Configs, indexes and headers of weight files are read, never the tensors. From the hub, which is asked only on request,
these few kilobytes are all that is fetched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import SafetensorsParsingError

from eagle.conversations import MARK
from eagle.decode.compatibility import check_eagle3_sizes
from eagle.doctor import Check, State
from eagle.doctor.memory import Footprint
from eagle.drafts.checkpoint import MAPPING, build_draft, canonical, is_spare, misfits
from eagle.drafts.config import DRAFT_VOCAB_FILE
from eagle.drafts.draft_vocab import read_draft_vocab
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.eagle3_config import Eagle3Config
from eagle.drafts.head import DraftHead
from eagle.drafts.msd import DraftModel
from eagle.families import family_of
from eagle.families.base_weights import EMBED_NAMES, HEAD_NAMES
from llava.errors import UserError
from llava.files import read_object
from llava.hub import Source, cached_folder, hub_errors
from llava.layout import MODEL_TYPES, build_config, open_checkpoint
from llava.loading import check_generation_config, load_errors
from llava.tokenizer import load_tokenizer
from llava.weights import WEIGHT_FILES, find_weights, is_old_buffer, read_index, read_shapes

BASE, DRAFT, PAIR, TOWER = "base model", "draft", "base and draft", "vision tower"
CONVENTIONS = "draft's conventions"
LAYER = re.compile(r"(?P<stack>(?:.*\.)?(?:layers|blocks)\.)(?P<number>\d+)\.(?P<part>.+)")
VISION = re.compile(r"vision|visual")
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Contents:
    """What a checkpoint consists of.

    ``where``: folder or hub name; ``place``: the same in words; ``config``: config.json; ``names`` of the tensors, None
    if not known (one .bin on the hub); ``shapes`` by name, empty if not known; ``files``: names of all.
    """

    where: str
    place: str
    config: dict[str, Any]
    names: frozenset[str] | None
    shapes: dict[str, tuple[int, ...]]
    files: frozenset[str]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """Settings of the language model: at the top of old configs, in ``text_config`` of new ones, in
        ``transformer_layer_config`` of draft heads in speculators' layout."""
        inner = self.config.get("text_config") or self.config.get("transformer_layer_config") or {}
        return {**self.config, **inner}

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "llava"))

    def __str__(self) -> str:
        size = f"{sum(map(prod, self.shapes.values())) / 1e6:,.1f} M parameters" if self.shapes else "weights not read"
        kind = self.config.get("model_type", "speculators head")
        return f"{kind}, vocabulary {self.text_config.get('vocab_size')}, {size}"


def open_contents(name: str, what: str, hub: bool) -> Contents | None:
    """Looks at a checkpoint in a folder, in the hub's cache, or, if ``hub``, on the hub.

    Args:
        name: folder or hub name.
        what: what it is to the user, for messages.

    Returns:
        None if the cache has no copy and the hub may not be asked.

    Raises:
        UserError: nothing is there, or something is damaged or incomplete.
    """
    source = Source.of(name, what=what)
    folder, place = source.folder, "folder"
    if folder is None:
        folder, place = cached_folder(name), "hub cache"
        if folder is None or not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
            return _open_on_hub(source) if hub else None
    config = _read_config(folder / "config.json", what)
    shapes = read_shapes(find_weights(Source.of(folder)))
    files = frozenset(path.name for path in folder.iterdir())
    return Contents(str(folder), place, config, frozenset(shapes), shapes, files)


def _open_on_hub(source: Source) -> Contents:
    config = _read_config(source.require("config.json", f"{source.what} config"), source.what)
    names: frozenset[str] | None = None
    shapes: dict[str, tuple[int, ...]] = {}
    with hub_errors(source.what, source.name):
        files = frozenset(HfApi().list_repo_files(source.name))
    found = next((f for name in WEIGHT_FILES for f in (name, f"{name}.index.json") if f in files), None)
    if found is None:
        raise UserError("no weights", source.name, f"expected {' or '.join(WEIGHT_FILES)}, or shards with an index")
    if "safetensors" in found:
        with hub_errors(source.what, source.name):
            try:
                headers = HfApi().get_safetensors_metadata(source.name).files_metadata.values()
            except SafetensorsParsingError as error:
                raise UserError("weight file is damaged", source.name, str(error).splitlines()[0]) from error
        shapes = {name: tuple(tensor.shape) for header in headers for name, tensor in header.tensors.items()}
        names = frozenset(shapes)
    elif found.endswith(".index.json"):
        index = read_index(source.require(found, "weight index"))
        if missing := sorted(set(index.values()) - files):
            raise UserError("weight files missing", source.name, ", ".join(missing))
        names = frozenset(index)
    return Contents(source.name, "hub", config, names, shapes, files)


def _read_config(path: Path, what: str) -> dict[str, Any]:
    config = read_object(path, f"{what} config")
    if not isinstance(config.get("text_config") or {}, dict):
        raise UserError(f"text_config of the {what} config is not a JSON object", where=path)
    return config


def check_base(name: str, hub: bool) -> tuple[Contents | None, list[Check]]:
    """The base model's contents, None if they cannot be read, and the findings."""
    try:
        with load_errors("base model cannot be loaded", name, weights=True):
            return _check_base(name, hub)
    except UserError as error:
        return None, [Check.of_error(BASE, error)]


def _check_base(name: str, hub: bool) -> tuple[Contents | None, list[Check]]:
    contents = open_contents(name, BASE, hub)
    if contents is None:
        return None, [_not_cached(BASE, name)]
    family = family_of(contents.where)
    if missing := list(missing_tensors(contents)):
        fix = "download or copy the checkpoint again"
        return contents, [Check(BASE, State.PROBLEM, f"missing tensors: {_shorten(missing)}", fix)]
    checks = [Check(BASE, State.OK, f"{name} ({contents.place}): {contents}")]
    is_llava = contents.model_type in MODEL_TYPES
    topic = "tokenizer"
    try:
        check_generation_config(Source.of(contents.where))
        if is_llava:
            load_tokenizer(Source.of(contents.where))
        if "mm_vision_tower" not in contents.config:  # its processor is that of a tower, which may not be here
            template = family.template_class()
            processor = template.load_processor(contents.where)
            topic = "chat template"
            template(processor, 0).write([(f"{MARK}\nWhat?", None)], None)
    except UserError as error:
        checks.append(Check.of_error(topic, error))
    return contents, checks + (_check_tower(contents, name, hub) if is_llava else [])


def _check_tower(contents: Contents, name: str, hub: bool) -> list[Check]:
    """The vision tower of LLaVA-1.5, which may be a checkpoint of its own, and the config of both together."""
    try:
        checkpoint = open_checkpoint(Source.of(name, {} if hub else {"local_files_only": True}))
        tower = checkpoint.tower
        if tower is not None and tower.folder is None and tower.find("config.json") is None:
            found = f"{tower.name} is not in the hub cache; loading the base downloads it"
            return [Check(TOWER, State.WARNING, found, "download it first if there will be no network")]
        build_config(checkpoint)
        if tower is None or any("vision_tower." in tensor for tensor in contents.names or ()):
            return []
        if tower.folder is not None:
            read_shapes(find_weights(tower))
    except UserError as error:
        return [Check.of_error(TOWER if "tower" in error.what else BASE, error)]
    return [Check(TOWER, State.OK, f"{tower.name} ({'hub' if tower.folder is None else 'folder'})")]


def missing_tensors(contents: Contents) -> Iterator[str]:
    """Names that a base of this config should have. Layouts differ in names, so each layer is compared with the others
    of its stack."""
    if contents.names is None:
        return
    names = {name for name in contents.names if not is_old_buffer(name)}
    embed = next((name for name in EMBED_NAMES if name in names), None)
    if embed is None:
        yield f"token embedding ({' or '.join(EMBED_NAMES)})"
    elif (norm := embed.replace("embed_tokens", "norm")) not in names:
        yield norm
    if not names.intersection(HEAD_NAMES) and not contents.text_config.get("tie_word_embeddings", False):
        yield HEAD_NAMES[0]
    count = contents.text_config.get("num_hidden_layers")
    yield from _missing_in_layers(names, count if isinstance(count, int) else 0)


def _missing_in_layers(names: Iterable[str], text_layers: int) -> Iterator[str]:
    """What layers lack that others of the same stack have; the text stack has at least ``text_layers`` layers.

    A stack may have several kinds of layers. A layer that is like no other is compared with the most similar of those
    that have all its tensors.
    """
    stacks: dict[str, dict[int, frozenset[str]]] = {}
    for match in filter(None, map(LAYER.fullmatch, names)):
        layers = stacks.setdefault(match["stack"], {})
        number = int(match["number"])
        layers[number] = layers.get(number, frozenset()) | {match["part"]}
    for stack, layers in sorted(stacks.items()):
        kinds = Counter(layers.values())
        for number in range(max(0 if VISION.search(stack) else text_layers, max(layers) + 1)):
            own = layers.get(number, frozenset())
            larger = [kind for kind in kinds if kind > own]
            if kinds[own] < 2 and larger:
                nearest = min(larger, key=lambda kind: (len(kind), -kinds[kind]))
                yield from (f"{stack}{number}.{part}" for part in sorted(nearest - own))


def check_draft(name: str, hub: bool) -> tuple[Contents | None, list[Check]]:
    """The draft's contents, None if they cannot be read, and the findings."""
    try:
        contents = open_contents(name, DRAFT, hub)
        if contents is None:
            return None, [_not_cached(DRAFT, name)]
        shapes = {canonical(name): shape for name, shape in contents.shapes.items()}
        draft = _head_of(contents, shapes)
        if isinstance(draft, DraftModel) and draft.config.options.head_tokens is not None:
            if DRAFT_VOCAB_FILE not in contents.files:
                fix = "make it again: python -m eagle.ge_data.vocabulary"
                raise UserError(f"{DRAFT_VOCAB_FILE} missing", name, fix)
            if contents.place != "hub":
                read_draft_vocab(Path(contents.where), draft.config)
    except UserError as error:
        return None, [Check.of_error(DRAFT, error)]
    if wrong := misfits(shapes, draft) if shapes else []:
        found = f"does not fit its config: {_shorten(wrong)}"
        return contents, [Check(DRAFT, State.PROBLEM, found, f"use a complete {draft.kind} draft")]
    spare = sorted(tensor for tensor in contents.names or () if is_spare(tensor, draft) and tensor not in MAPPING)
    unused = f"; not needed: {_shorten(spare)}" if spare else ""
    return contents, [
        Check(DRAFT, State.OK, f"{name} ({contents.place}): {contents}{unused}"),
        Check(CONVENTIONS, State.OK, f"{draft.kind}: {draft.conventions()}"),
    ]


def _head_of(contents: Contents, shapes: Mapping[str, tuple[int, ...]]) -> DraftHead:
    """The head without weights. If only the names of its tensors are known, their shapes are empty."""
    known = shapes or (None if contents.names is None else {canonical(name): () for name in contents.names})
    where = f"{contents.where}/config.json"
    with load_errors("draft config is not valid", where):
        return build_draft(contents.config, known, where)


def check_pair(base: Contents, draft: Contents) -> list[Check]:
    """Whether the draft was made for a base of this shape and family. The draft's vocabulary may be the first part of
    the base's."""
    checks, fix = [], "use the draft that was trained for this base model"
    fields, own = base.text_config, draft.text_config
    embedding = next((base.shapes[name] for name in EMBED_NAMES if name in base.shapes), None)
    rows, columns = embedding or (fields.get("vocab_size"), fields.get("hidden_size"))
    head = _head_of(draft, {canonical(name): shape for name, shape in draft.shapes.items()})
    if isinstance(head, Eagle3Draft) and isinstance(rows, int) and isinstance(columns, int):
        return _check_eagle3_pair(head.config, rows, columns, fields.get("num_hidden_layers"))
    vocabulary, hidden = own.get("vocab_size"), own.get("hidden_size")
    more = rows - vocabulary if isinstance(rows, int) and isinstance(vocabulary, int) else 0
    for what, theirs, ours, fits in (
        ("hidden size", columns, hidden, columns == hidden),
        ("vocabulary", rows, vocabulary, rows == vocabulary or more > 0),
    ):
        if theirs is None:
            checks.append(Check(PAIR, State.WARNING, f"the base's {what} is not known", "use msd generate to find out"))
        elif not fits:
            checks.append(Check(PAIR, State.PROBLEM, f"{what} {ours} in the draft, {theirs} in the base", fix))
    is_msd = isinstance(head, DraftModel)  # the others do not name their family
    if not checks and is_msd and ("qwen" in base.model_type) != ("qwen" in draft.model_type):
        found = f"base is {base.model_type}, draft was made for {draft.model_type}"
        checks.append(Check(PAIR, State.PROBLEM, found, fix))
    added = f", {more} of them from the base, if its first {vocabulary} are the draft's" if more > 0 else ""
    return checks or [Check(PAIR, State.OK, f"fit together: hidden size {columns}, vocabulary {rows}{added}")]


def _check_eagle3_pair(config: Eagle3Config, vocabulary: int, hidden_size: int, layers: Any) -> list[Check]:
    try:
        check_eagle3_sizes(config, vocabulary, hidden_size)
        read = config.layers_of(layers) if isinstance(layers, int) else ()
    except UserError as error:
        return [Check.of_error(PAIR, error)]
    found = f"fit together: hidden size {hidden_size}, vocabulary {vocabulary}"
    return [Check(PAIR, State.OK, f"{found}, inputs of layers {', '.join(map(str, read))} of {layers}")]


def footprint(base: Contents, draft: Contents | None) -> Footprint | None:
    """Memory of base and draft, without a vision tower of its own folder; None if shapes are not known."""
    shapes = [contents.shapes for contents in (base, draft) if contents is not None]
    if not all(shapes):
        return None
    keys = sum(
        shape[0]
        for found in shapes
        for name, shape in found.items()
        if name.endswith("self_attn.k_proj.weight") and not VISION.search(name)
    )
    sizes = [sum(map(prod, found.values())) for found in shapes]
    return Footprint(sizes[0], sum(sizes[1:]), 2 * keys)


def _not_cached(topic: str, name: str) -> Check:
    return Check(topic, State.WARNING, f"{name} is not in the hub cache", "add --hub to look at it on the hub")


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more

"""What a checkpoint consists of, wherever it is: a folder, the hub's cache, or (only if asked) the hub.

Configs, indexes and headers are read, never the tensors; from the hub too only these few kilobytes are fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, SafetensorsParsingError

from eagle.doctor.headers import read_shapes
from eagle.drafts.checkpoint import hub_errors, weights_file
from llava.errors import UserError
from llava.files import read_json
from llava.hub import Source
from llava.weights import find_weights

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Contents:
    """``place`` in words; ``config`` config.json; ``tensors`` name → shape. A shape is None where only the name is
    known; ``tensors`` is None where the file was not looked into (one .bin on the hub). ``files``: names of all;
    ``folder``: where they are, None on the hub."""

    place: str
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...] | None] | None
    files: frozenset[str] = frozenset()
    folder: Path | None = None


def open_contents(name: str, what: str, weights: Callable[[Path], list[Path]], hub: bool) -> Contents | None:
    """Looks at a checkpoint.

    Args:
        name: folder or hub name.
        what: what it is to the user, for messages.
        weights: the weight files of a folder.
        hub: whether the hub may be asked.

    Returns:
        None: a hub name without a copy in the cache, and the hub may not be asked.

    Raises:
        UserError: nothing is there, or something is damaged or incomplete.
    """
    if Path(name).is_dir():
        return _in_folder(Path(name), "folder", what, weights)
    with hub_errors(what, name):
        cached = _cached(name)
    if cached is not None:
        return _in_folder(cached, "hub cache", what, weights)
    return _on_hub(name, what) if hub else None


def base_weights(folder: Path) -> list[Path]:
    """The weight files of a base model; raises UserError where shards are missing."""
    return find_weights(Source.of(folder))


def draft_weights(folder: Path) -> list[Path]:
    """The one weight file of a draft."""
    return [weights_file(folder)]


def _in_folder(folder: Path, place: str, what: str, weights: Callable[[Path], list[Path]]) -> Contents:
    config = _object(folder / "config.json", f"{what} config")
    tensors: dict[str, tuple[int, ...] | None] = {}
    for path in weights(folder):
        tensors |= read_shapes(path)
    return Contents(place, config, tensors, frozenset(path.name for path in folder.iterdir()), folder)


def _cached(name: str) -> Path | None:
    """The repository's folder in the cache, where that has weights."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError as error:
        incomplete = getattr(error, "snapshot_path", None)  # what a loader has no use for may not be there
        if incomplete is None:
            return None
        folder = Path(incomplete)
    return folder if any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()) else None


def _on_hub(name: str, what: str) -> Contents:
    with hub_errors(what, name):
        config = _object(Path(hf_hub_download(name, "config.json")), f"{what} config")
        files = frozenset(HfApi().list_repo_files(name))
        if files & {SAFETENSORS, SAFETENSORS_INDEX}:
            return Contents("hub", config, _hub_shapes(name), files)
        if BIN_INDEX in files:
            index = _object(Path(hf_hub_download(name, BIN_INDEX)), "weight index")["weight_map"]
            if missing := sorted(set(index.values()) - files):
                raise UserError("weight files missing", where=name, fix=", ".join(missing))
            return Contents("hub", config, dict.fromkeys(index), files)
    if BIN not in files:
        raise UserError("no weights", where=name, fix=f"expected {SAFETENSORS} or {BIN}, or shards with an index")
    return Contents("hub", config, None, files)


def _hub_shapes(name: str) -> dict[str, tuple[int, ...] | None]:
    """Shapes from the headers of safetensors files on the hub."""
    try:
        found = HfApi().get_safetensors_metadata(name)
    except SafetensorsParsingError as error:
        raise UserError("weight file is damaged", where=name, fix=str(error).splitlines()[0]) from error
    files = found.files_metadata.values()
    return {tensor: tuple(about.shape) for file in files for tensor, about in file.tensors.items()}


def _object(path: Path, what: str) -> dict[str, Any]:
    content = read_json(path, what)
    if not isinstance(content, dict):
        raise UserError(f"{what} is not a JSON object", where=path)
    return content

"""Files of a model: in a folder, in the hub's cache, or in a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError, reason_of
from .files import read_object

HUB_KEYS = ("revision", "cache_dir", "local_files_only", "token", "force_download")
"""Keyword arguments of `huggingface_hub.hf_hub_download` that loaders of this project take."""

_WHOLE = ("model*.safetensors", "pytorch_model*.bin")
"""Weight files of a whole model, in a folder."""
_REPOSITORY = re.compile(r"[\w-][\w.-]{,95}/[\w-][\w.-]{,95}")


@contextmanager
def hub_errors(what: str, name: str | Path) -> Iterator[None]:
    """Turns whatever a request to the hub raises into one line.

    Args:
        what: what is asked for, for the message ("base model", "draft").
        name: the repository.

    Raises:
        UserError: ``name`` cannot be a repository, or the request failed.
    """
    _check_name(what, name)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # errors of the HTTP library, such as a refusing proxy's, have no common base class
        what = f"{what} is not a folder here, and the hub did not give it"
        raise UserError(what, where=name, fix=reason_of(error)) from error


def _check_name(what: str, name: str | Path) -> None:
    if os.path.exists(name) or not is_repository_name(str(name)):
        raise UserError(f"{what} not found", where=name, fix="give a folder, or a hub name such as owner/model")


def is_repository_name(name: str) -> bool:
    """Whether ``name`` has the form ``owner/name`` of a hub repository."""
    wrong = ".." in name or "--" in name or name.endswith(".git")
    return _REPOSITORY.fullmatch(name) is not None and not wrong


def split_hub_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keyword arguments into those of the hub (`HUB_KEYS`, without None) and the rest."""
    hub = {name: value for name, value in options.items() if name in HUB_KEYS and value is not None}
    return hub, {name: value for name, value in options.items() if name not in HUB_KEYS}


def cached_folder(name: str) -> Path | None:
    """The folder of a repository in the hub's cache; None if the cache has no config.json of it."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json") if is_repository_name(name) else None
    return Path(config).parent if isinstance(config, str) else None


@dataclass(frozen=True)
class Source:
    """A model folder, or a hub repository with the options to read it.

    ``what``: what the model is to the user, for messages.
    """

    name: str
    hub: Mapping[str, Any] = field(default_factory=dict)
    what: str = "model"

    @classmethod
    def of(cls, path: str | Path, hub: Mapping[str, Any] | None = None, what: str = "model") -> Source:
        """The source of this path or name.

        Raises:
            UserError: it is neither a folder nor a possible name of a repository, a folder with only an adapter, or a
                folder with a revision.
        """
        source = cls(str(path), dict(hub or {}), what)
        if source.folder is None:
            _check_name(what, path)
        elif (revision := source.hub.get("revision")) not in (None, "main"):
            fix = "leave it out, or name a repository of the hub"
            raise UserError(f"{what} of revision '{revision}', but this is a folder", path, fix)
        elif not any(next(source.folder.glob(pattern), None) for pattern in _WHOLE):
            source.refuse_adapter()
        return source

    @property
    def folder(self) -> Path | None:
        """The local folder; None for a repository."""
        return Path(self.name) if os.path.isdir(self.name) else None  # also for names that no file can have

    def find(self, file: str) -> Path | None:
        """Local path of ``file``, downloaded if needed; None if the model has no such file.

        Raises:
            UserError: the repository does not exist, or the download failed.
        """
        if self.folder is not None:
            path = self.folder / file
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        with hub_errors(self.what, self.name):
            try:
                return Path(hf_hub_download(self.name, file, **self.hub))
            except EntryNotFoundError:  # not in the repository; or not in the cache, and the hub cannot be reached
                return None

    def require(self, file: str, what: str) -> Path:
        """As `find`, for a file that the model must have; ``what`` names it in the UserError."""
        path = self.find(file)
        if path is None:
            self.refuse_adapter()
            if self.folder:
                raise UserError(f"{what} not found", self.folder / file)
            fix = "its cache has no copy; check name and network"
            raise UserError(f"{self.what} is not a folder here, and the hub did not give its {file}", self.name, fix)
        return path

    def refuse_adapter(self) -> None:
        """Raises UserError if the model is a LoRA adapter, for a caller that finds no config or no weights."""
        path = self.find("adapter_config.json")
        if path is None:
            return
        base = read_object(path, "adapter config").get("base_model_name_or_path")
        raise UserError(
            f"{self.what} is a LoRA adapter{f' of {base}' if base else ''}, not a whole model",
            self.name,
            "merge it into its base with peft's merge_and_unload(), and give the folder that save_pretrained() writes",
        )

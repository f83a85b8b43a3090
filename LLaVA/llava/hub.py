"""Files of a model: in a local folder, or in a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .errors import UserError

HUB_OPTIONS = ("revision", "cache_dir", "local_files_only", "token", "force_download")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def split_hub_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts keyword arguments into those of the hub (see `HUB_OPTIONS`) and the rest."""
    hub = {name: value for name, value in options.items() if name in HUB_OPTIONS and value is not None}
    return hub, {name: value for name, value in options.items() if name not in HUB_OPTIONS}


@dataclass(frozen=True)
class Source:
    """A model folder, or the name of a hub repository with the options to read it."""

    name: str
    hub: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str | Path, hub: Mapping[str, Any] | None = None) -> Source:
        """Checks that `path` is a folder or may name a repository.

        Raises:
            UserError: it is neither.
        """
        if not Path(path).is_dir() and not is_repository_name(str(path)):
            raise UserError("model folder not found", path)
        return cls(str(path), dict(hub or {}))

    @property
    def folder(self) -> Path | None:
        """The local folder; None for a repository."""
        return Path(self.name) if Path(self.name).is_dir() else None

    def find(self, file: str) -> Path | None:
        """Local path of `file`, downloaded if need be; None where the model has no such file.

        Raises:
            UserError: the repository cannot be reached or does not exist.
        """
        try:
            return self._locate(file)
        except EntryNotFoundError:
            return None

    def require(self, file: str, what: str) -> Path:
        """As `find`, for a file the model must have; `what` names it in the UserError."""
        try:
            path = self._locate(file)
        except LocalEntryNotFoundError:
            fix = "no such folder; the hub cannot be reached and its cache has no copy"
            raise UserError(f"{what} not found", f"{self.name}/{file}", fix) from None
        except EntryNotFoundError:
            path = None
        if path is None:
            raise UserError(f"{what} not found", Path(self.name) / file)
        return path

    def _locate(self, file: str) -> Path | None:
        if self.folder is not None:
            path = self.folder / file
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name, file, **self.hub))
        except EntryNotFoundError:
            raise
        except Exception as error:  # the HTTP library's own, such as a proxy's refusal, have no class in common
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError("no such folder, and the hub says no", self.name, reason) from None


def is_repository_name(name: str) -> bool:
    """Whether `name` has the form `owner/name` of a hub repository."""
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name

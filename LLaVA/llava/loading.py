"""The one place where errors of loading a model become one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError, is_full_disk, is_out_of_memory, reason_of
from .files import check_not_pointer, read_object
from .hub import Source

JSON_FILES = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json",
)  # fmt: skip
"""Files of a checkpoint that must be JSON objects."""


@contextmanager
def load_errors(what: str, name: str | Path, weights: bool = False) -> Iterator[None]:
    """Turns whatever the libraries raise while they read a model into one line.

    What a checkpoint says decides which code runs, so there is no list of what can be raised: errors of a weight file,
    of a package that is not installed, of a config's values, of an argument that the model class does not know. If a
    file of a local folder is damaged, the line names this file.

    Args:
        what: beginning of the message, such as "draft cannot be loaded".
        name: the folder, file or repository.
        weights: whether the weights were read, so that they can be the cause.

    Raises:
        UserError: in place of any exception but a full disk or too little memory, which `llava.errors` reports.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_full_disk(error) or is_out_of_memory(error):
            raise
        if os.path.isdir(name):
            try:
                check_files(Path(name), weights)
            except UserError as cause:
                raise cause from error
        raise UserError(what, name, reason_of(error)) from error


def check_files(folder: Path, weights: bool) -> None:
    """Raises `UserError` for the first file of a checkpoint that is damaged. Reads only headers of ``weights``."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            check_not_pointer(path)
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_object(folder / name, name)
    if weights:
        from .weights import find_weights, read_shapes  # imports torch

        read_shapes(find_weights(Source.of(folder)))

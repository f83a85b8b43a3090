"""The one place where errors of loading a model become one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field

from .errors import UserError, is_full_disk, reason_of
from .files import check_not_pointer, read_object
from .hub import Source
from .strict import read_strict, strict_dataclass

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
        from .memory import is_out_of_memory  # imports torch

        if is_full_disk(error) or is_out_of_memory(error):
            raise
        if Path(name).is_dir():
            try:
                check_files(Path(name), weights)
            except UserError as cause:
                raise cause from error
        raise UserError(what, name, reason_of(error)) from error


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


@strict_dataclass
class GenerationFields:
    """Keys of a generation_config.json whose values are checked. transformers leaves a file with wrong ones out without
    a word, so that answers do not end where they should, or fails at the first answer."""

    eos_token_id: int | Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    do_sample: bool | None = None
    temperature: NotNegative | None = None
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    repetition_penalty: Positive | None = None
    no_repeat_ngram_size: Count | None = None
    max_length: Count | None = None
    max_new_tokens: Count | None = None
    min_length: Count | None = None
    stop_strings: Text | tuple[Text, ...] | None = None


def check_generation_config(source: Source) -> None:
    """Raises `UserError` for a generation_config.json that is damaged or has values that cannot be used."""
    if (path := source.find("generation_config.json")) is not None:
        fields = read_object(path, "generation config")
        known = GenerationFields.__dataclass_fields__
        read_strict(GenerationFields, {name: fields[name] for name in fields if name in known}, path)


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

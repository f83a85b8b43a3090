"""Llama tokenizer of a checkpoint, from `tokenizer.json` or from a sentencepiece `tokenizer.model`.

`tokenizer.model` is converted here, because transformers needs a version of protobuf that other packages may exclude.
The result is compared with sentencepiece on a few texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .errors import UserError
from .files import check_not_pointer, read_object
from .hub import Source
from .loading import load_errors

SPACE = "\u2581"
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""For roles that the files do not mention."""
_PROBES = ("USER: What is in the picture?", "a  b\n\ncd       e", "1234 + 5,6 = \u00e9\u65e5\U0001f999", "\n")


def load_tokenizer(source: Source) -> PreTrainedTokenizerFast:
    """Tokenizer of a model folder, padding on the left.

    Raises:
        UserError: tokenizer files are missing or broken.
    """
    with load_errors("tokenizer cannot be loaded", source.name):
        return _read_tokenizer(source)


def _read_tokenizer(source: Source) -> PreTrainedTokenizerFast:
    settings = _settings(source)
    if (path := source.find("tokenizer.json")) is not None:
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises nothing narrower
            check_not_pointer(path)
            raise UserError(f"tokenizer cannot be read ({error})", path) from None
    elif (path := source.find("tokenizer.model")) is not None:
        legacy = settings.get("legacy")
        backend = from_sentencepiece(path, legacy=True if legacy is None else bool(legacy))
    else:
        raise UserError("no tokenizer.json and no tokenizer.model", source.name)
    special = {role: name for role in SPECIAL_ROLES if (name := _token_text(settings.get(role))) is not None}
    special |= {
        role: name
        for role, name in LLAMA_TOKENS.items()
        if role not in settings and backend.token_to_id(name) is not None
    }
    unknown = [name for name in special.values() if backend.token_to_id(name) is None]
    if unknown:
        raise UserError(f"special tokens {', '.join(unknown)} are not in the vocabulary", path)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", clean_up_tokenization_spaces=False, **special
    )


def from_sentencepiece(path: Path, legacy: bool = False) -> Tokenizer:
    """Converts a sentencepiece BPE model with byte fallback, the kind Llama has.

    Args:
        path: `tokenizer.model`.
        legacy: text after a special token gets a leading space too, as in old tokenizer configs.

    Raises:
        UserError: the file is broken, or not a BPE model with byte fallback.
    """
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.load(str(path))
        vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        check_not_pointer(path)
        raise UserError(f"tokenizer cannot be read ({error})", path) from None
    scores = {
        piece: pieces.get_score(index)
        for piece, index in vocabulary.items()
        if not (pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index))
    }
    unknown = pieces.id_to_piece(pieces.unk_id())
    backend = Tokenizer(BPE(vocabulary, _merges(scores), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for index in range(pieces.get_piece_size()):
        if pieces.is_control(index) or pieces.is_unknown(index):
            backend.add_special_tokens([AddedToken(pieces.id_to_piece(index), normalized=False, special=True)])
    begin = pieces.id_to_piece(pieces.bos_id())
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, pieces.bos_id())]
    )
    for text in _PROBES:
        if backend.encode(text, add_special_tokens=False).ids != pieces.encode(text):
            raise UserError("tokenizer is not of Llama's kind (sentencepiece BPE with byte fallback)", path)
    return backend


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, in sentencepiece's order: by score, not by id. Ties (Llama's runs of
    spaces) come with the longest left part first."""
    merges = [
        (-score, -cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(piece[:-back], piece[-back:]) for _, back, piece in sorted(merges)]


def _settings(source: Source) -> dict[str, Any]:
    """Fields of special_tokens_map.json and, above them, of tokenizer_config.json; None for a token that is null."""
    settings: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path := source.find(file)) is not None:
            fields = read_object(path, "tokenizer config")
            given = {name: value for name, value in fields.items() if value is not None}
            settings = dict.fromkeys(fields) | settings | given
    return settings


def _token_text(token: Any) -> str | None:
    """A special token is written as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token

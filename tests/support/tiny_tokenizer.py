"""Tiny tokenizers of Llama's kind, in both public layouts. No pytest in here: any package's tests may import it."""

from __future__ import annotations

import io
import json
import struct
from contextlib import redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken

from llava.tokenizer import from_sentencepiece

CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: How many shapes can you count here? ASSISTANT: There are three shapes in the picture.",
    "USER: Here is my picture. Tell me about its colours. ASSISTANT: The colours are red, green and blue.",
    "USER: Name two rivers and tell me which one is longer. ASSISTANT: The Nile is longer than the Rhine.",
)


@lru_cache(maxsize=1)
def tokenizer_model() -> bytes:
    """A sentencepiece BPE model with byte fallback, Llama's special ids (unk 0, bos 1, eos 2) and runs of spaces."""
    model = io.BytesIO()
    with redirect_stderr(io.StringIO()):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 4), model_writer=model, vocab_size=384, model_type="bpe",
            byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True, num_threads=1,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    return with_runs_of_spaces(model.getvalue())


def with_runs_of_spaces(model: bytes) -> bytes:
    """The same model with pieces of 2, 4, 8 and 3 spaces as Llama's has them: first after the bytes, and with scores
    below those of all others, so that the order of ids is not the order of merging.

    A model file is a protobuf message; its first field, repeated, is a piece: text, score, and kind where it is no
    ordinary one.
    """
    pieces, rest, start = [], b"", 0
    while start < len(model):
        size, body = varint(model, start + 1)
        end = body + size
        if model[start] == 0x0A:
            pieces.append(model[start:end])
        else:
            rest += model[start:end]
        start = end
    runs = []
    for length in (2, 4, 8, 3):
        text = ("\u2581" * length).encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1e9)
        runs.append(b"\x0a" + bytes([len(piece)]) + piece)
    ordinary = 3 + 256
    return b"".join([*pieces[:ordinary], *runs, *pieces[ordinary:]]) + rest


def varint(data: bytes, start: int) -> tuple[int, int]:
    """A protobuf number at ``start``, and where it ends."""
    value = shift = 0
    while True:
        byte = data[start]
        value |= (byte & 127) << shift
        start, shift = start + 1, shift + 7
        if byte < 128:
            return value, start


def tokenizer_size() -> int:
    """Number of pieces of the tiny tokenizer."""
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model()).get_piece_size()


def write_tokenizer_model(folder: Path) -> None:
    """tokenizer.model with its configs, as in the liuhaotian release."""
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        special | {"add_bos_token": True, "add_eos_token": False, "legacy": False, "model_max_length": 2048,
                   "padding_side": "right", "clean_up_tokenization_spaces": False, "sp_model_kwargs": {},
                   "tokenizer_class": "LlamaTokenizer"},
    )  # fmt: skip


def write_tokenizer_json(folder: Path, extra: tuple[str, ...] = ()) -> None:
    """tokenizer.json without tokenizer.model, as in the llava-hf release, with `extra` special tokens at the end."""
    write_tokenizer_model(folder)
    backend = from_sentencepiece(folder / "tokenizer.model", legacy=True)
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in extra])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": extra[-1] if extra else None}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json", special | {"tokenizer_class": "LlamaTokenizer", "padding_side": "left"}
    )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")

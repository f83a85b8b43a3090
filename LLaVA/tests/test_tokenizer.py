"""The tokenizer against sentencepiece itself, and against transformers' own loading of tokenizer.json."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from tiny_llava import make_liuhaotian, make_llava_hf
from tiny_tokenizer import CORPUS, tokenizer_model, write_tokenizer_json, write_tokenizer_model
from tokenizers import Tokenizer
from tokenizers.models import BPE

from llava.errors import UserError
from llava.hub import Source
from llava.tokenizer import load_tokenizer

UNUSUAL = ("", " ", "\n", " leading", "two  spaces", "\nHow many?", "12,345", "\u65e5\u672c \u00e9 \U0001f999", "a\tb")
TEXTS = (*CORPUS, *UNUSUAL)


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_liuhaotian(tmp_path_factory.mktemp("tokenizer") / "model")


def test_ids_are_those_of_sentencepiece(folder: Path, pieces: sentencepiece.SentencePieceProcessor) -> None:
    tokenizer = load_tokenizer(Source.of(folder))
    for text in TEXTS:
        if not text.startswith(" "):  # the processor sees to leading spaces
            assert tokenizer(text, add_special_tokens=False).input_ids == pieces.encode(text), text
            assert tokenizer(text).input_ids == [1, *pieces.encode(text)]
        assert tokenizer.decode(pieces.encode(text)) == pieces.decode(pieces.encode(text))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.padding_side == "left" and len(tokenizer) == pieces.get_piece_size()


def test_runs_of_spaces_are_merged_last(folder: Path, pieces: sentencepiece.SentencePieceProcessor) -> None:
    """As in Llama's model: their ids come before those of all words, their scores after."""
    runs = [pieces.piece_to_id("\u2581" * length) for length in (2, 3, 4, 8)]
    words = range(max(runs) + 1, pieces.get_piece_size())
    assert min(runs) == 3 + 256 and max(map(pieces.get_score, runs)) < min(map(pieces.get_score, words))
    tokenizer = load_tokenizer(Source.of(folder))
    shuffled = random.Random(0)
    texts = [f"red{' ' * length}green" for length in range(80)] + [f"\n{' ' * length}" for length in range(80)]
    for _ in range(300):
        parts = shuffled.choices([" ", "  ", "     ", "the", "red", "\n", "\u00e9", "1", "="], k=20)
        texts.append("q" + "".join(parts))
    used = set()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == pieces.encode(text), text
        used.update(ids)
    assert used >= set(runs)


def test_special_tokens_in_text(folder: Path, pieces: sentencepiece.SentencePieceProcessor) -> None:
    ids = load_tokenizer(Source.of(folder))("red</s>USER: hi", add_special_tokens=False).input_ids
    no_space = pieces.encode("\nUSER: hi")[2:]  # not legacy: no space after a special token
    assert ids == [*pieces.encode("red"), 2, *no_space]


@pytest.mark.parametrize("legacy", [True, None])
def test_legacy_puts_a_space_after_special_tokens(
    tmp_path: Path, pieces: sentencepiece.SentencePieceProcessor, legacy: bool | None
) -> None:
    write_tokenizer_model(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": legacy}))
    ids = load_tokenizer(Source.of(tmp_path))("red</s>USER: hi", add_special_tokens=False).input_ids
    assert ids == [*pieces.encode("red"), 2, *pieces.encode("USER: hi")]


def test_tokenizer_json_alone(tmp_path: Path, pieces: sentencepiece.SentencePieceProcessor) -> None:
    folder = make_llava_hf(tmp_path / "hf")
    assert not (folder / "tokenizer.model").exists()
    tokenizer = load_tokenizer(Source.of(folder))
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == pieces.encode(text), text
    assert tokenizer.convert_tokens_to_ids("<image>") == pieces.get_piece_size()
    assert tokenizer.pad_token_id == pieces.get_piece_size() + 1
    assert tokenizer.decode([1, *pieces.encode("red"), 2, tokenizer.pad_token_id], skip_special_tokens=True) == "red"


def test_special_tokens_as_objects(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path, extra=("<pad>",))
    fields = {"pad_token": {"content": "<pad>", "lstrip": False}, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    tokenizer = load_tokenizer(Source.of(tmp_path))
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "</s>", "<s>")


def test_broken_or_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(Source.of(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"tokenizer cannot be read.*tokenizer\.model"):
        load_tokenizer(Source.of(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer cannot be read.*tokenizer\.json"):
        load_tokenizer(Source.of(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_tokenizer(Source.of(tmp_path))


def test_a_piece_that_is_not_utf8(tmp_path: Path, pieces: sentencepiece.SentencePieceProcessor) -> None:
    """A bit that the disk has changed: sentencepiece loads the file and cannot give the piece."""
    folder = make_liuhaotian(tmp_path / "model")
    piece = next(
        text for text in map(pieces.id_to_piece, range(pieces.get_piece_size())) if text.isascii() and len(text) == 3
    )
    whole = (folder / "tokenizer.model").read_bytes()
    stored = b"\x0a\x03" + piece.encode()
    assert stored in whole
    (folder / "tokenizer.model").write_bytes(whole.replace(stored, stored[:-1] + b"\xe9", 1))
    with pytest.raises(UserError, match=r"tokenizer cannot be read.*tokenizer\.model"):
        load_tokenizer(Source.of(folder))


def test_special_token_outside_the_vocabulary(tmp_path: Path) -> None:
    write_tokenizer_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    with pytest.raises(UserError, match=r"special tokens \[PAD\] are not in the vocabulary"):
        load_tokenizer(Source.of(tmp_path))


def test_other_kinds_of_sentencepiece_models_are_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, vocab_size=90, model_type="unigram", minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="not of Llama's kind"):
        load_tokenizer(Source.of(tmp_path))


@pytest.mark.parametrize("role", ["bos_token", "unk_token", "pad_token"])
def test_a_null_token_is_none(tmp_path: Path, role: str) -> None:
    """Not Llama's, which the vocabulary of another language model lacks."""
    backend = Tokenizer(BPE({"a": 0, "<|end|>": 1, "<image>": 2}, []))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({role: None}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({role: None, "eos_token": "<|end|>"}))
    tokenizer = load_tokenizer(Source(tmp_path))
    assert getattr(tokenizer, role) is None and tokenizer.eos_token_id == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({role: "<s>"}))
    with pytest.raises(UserError, match="not in the vocabulary"):
        load_tokenizer(Source(tmp_path))


def test_llamas_tokens_where_the_files_say_nothing(tmp_path: Path) -> None:
    backend = Tokenizer(BPE({"<s>": 0, "</s>": 1}, []))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(Source(tmp_path))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", None)

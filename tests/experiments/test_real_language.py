"""The experiment with a real language model: a stand-in is written as a base of the LLaVA family and answers as before;
the prompts are sound. The real model is used if its packages are installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eagle import MSDModel
from eagle.questions import read_questions
from experiments.common import REPO, environment
from experiments.real_language.base import gguf_file
from experiments.real_language.base_run import UNUSED, different_answers, write_base
from experiments.real_language.prompts import HELD_OUT, TRAIN
from llava.errors import UserError

TEMPLATE = (
    "{% for message in messages %}<start>{{ message['role'] }}\n{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
PROMPTS = ["Why does bread rise?", "List 12 fruits.", "Name a river"]
LENGTH = 12


@pytest.fixture(scope="module")
def stock() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A tiny Llama with tied embeddings and grouped heads, and a tokenizer with its own chat template and end token."""
    special = ["<unk>", "<start>", "<end>", UNUSED]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(PROMPTS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<start>", eos_token="<end>", unk_token="<unk>", pad_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=100000.0, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


def test_the_base_answers_as_its_language_model(stock: tuple, tmp_path: Path) -> None:
    model, tokenizer = stock
    write_base(model, tokenizer, tmp_path / "base", "a stand-in")
    assert different_answers(model, tokenizer, tmp_path / "base", PROMPTS, LENGTH) == []
    base = MSDModel.from_pretrained(tmp_path / "base", dtype="float32")
    assert base.target.family == "llava" and 2 in base.target.eos_token_ids
    assert base.target.chat_prompt("Hi") == "<start>user\nHi<end>\n<start>assistant\n"
    assert torch.equal(base.target.model.lm_head.weight, model.lm_head.weight)
    pictured = base.target.prepare(base.target.chat_prompt("Hi", num_images=1), [Image.new("RGB", (40, 30))])
    assert (pictured["input_ids"] == tokenizer.convert_tokens_to_ids(UNUSED)).sum() == 4
    base.generate(**pictured, max_new_tokens=2)


def test_another_language_model_gives_other_answers(stock: tuple, tmp_path: Path) -> None:
    model, tokenizer = stock
    write_base(model, tokenizer, tmp_path / "base", "a stand-in")
    torch.manual_seed(1)
    other = LlamaForCausalLM(model.config).eval()
    assert different_answers(other, tokenizer, tmp_path / "base", PROMPTS, LENGTH)


def test_no_prompt_is_in_both_files() -> None:
    train, held_out = read_questions(TRAIN), read_questions(HELD_OUT)
    texts = [re.sub(r"\W+", " ", each.question.casefold()).strip() for each in [*train, *held_out]]
    assert len(set(texts)) == len(texts) and len({each.id for each in [*train, *held_out]}) == len(texts)
    assert len(train) >= 300 and len(held_out) >= 40
    assert TRAIN.stat().st_size + HELD_OUT.stat().st_size < 200_000
    kinds = [{json.loads(line)["kind"] for line in path.read_text().splitlines()} for path in (TRAIN, HELD_OUT)]
    assert len(kinds[0]) >= 10 and kinds[1] <= kinds[0]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="gguf is not installed"):
        gguf_file()


@pytest.mark.slow
def test_the_script_makes_a_draft(stock: tuple, tmp_path: Path) -> None:
    """With the stand-in in the place of the real model."""
    model, tokenizer = stock
    base, draft = tmp_path / "SmolLM2-135M-Instruct", tmp_path / "SmolLM2-135M-Instruct-msd"
    write_base(model, tokenizer, base, "a stand-in")
    settings = {**environment(), "WORK": str(tmp_path), "COUNT": "6", "PYTHON": sys.executable}
    flags = ["--epochs", "1", "--validation-share", "0.2"]
    script = ["bash", str(REPO / "experiments" / "real_language" / "train.sh"), *flags]
    done = subprocess.run(script, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    msd = MSDModel.from_pretrained(base, draft, dtype="float32", tree="fixed")
    inputs = msd.target.prepare(msd.target.chat_prompt(PROMPTS[0]))
    expected = model.generate(inputs["input_ids"], do_sample=False, max_new_tokens=LENGTH)
    assert torch.equal(msd.generate(**inputs, max_new_tokens=LENGTH).sequences, expected)
    subprocess.run(script, env=settings, capture_output=True, check=True)  # resumes, with nothing left to do


@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    try:
        gguf_file()
    except UserError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "experiments.real_language.base", "--out", str(tmp_path / "base")]
    command += ["--compare", "2", "--max-new-tokens", "12"]
    done = subprocess.run(command, env=environment(), cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 answers equal" in done.stdout

"""The experiment with a real language model: a stand-in is written as a base of the LLaVA family and answers as before;
the prompts are sound. The real model is used if its packages are installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eagle import MSDModel
from eagle.questions import read_questions
from experiments.common import REPO, environment
from experiments.real_language import kinds
from experiments.real_language.base import gguf_file
from experiments.real_language.base_run import UNUSED, different_answers, write_base
from experiments.real_language.kinds_run import LanguageStudy, train
from experiments.real_language.prompts import HELD_OUT, TRAIN
from llava.errors import UserError
from llava.files import read_json, write_json

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


ROW = {
    "kind": "block", "what": "-", "seed": 1, "step": 10, "seconds": 20.0, "top1": 0.5, "simulated": 1.6,
    "megabytes": 9.0, "acceptance": [0.5, 0.25], "acceptance_chain": [0.4], "acceptance_auto": [],
}  # fmt: skip
FIGURES = {
    "tau": 1.75, "draft_percent": 9.5, "draft_ms": 2.0, "verify_ms": 70.0, "speedup": 0.8, "after_first_token": 0.9,
    "identical": 2, "answers": 3,
}  # fmt: skip


def evaluated(**more: Any) -> dict[str, Any]:
    """An evaluation of one head, as it is written."""
    row = ROW | {f"{key}{tree}": value for tree in ("", "_chain", "_auto") for key, value in FIGURES.items()} | more
    made = {"date": "2026-11-28", "commit": "0" * 40, "hardware": {"cpu": "x", "cores": 2, "threads": 1}}
    return {
        "rows": [row], "questions": 3, "max_new_tokens": 8, "temperature": 1.0, "tree": "6/3/12", "chain": "3/1/5",
        "auto": "10/3/32 at most", "baselines": {"plain": 14.0}, "versions": {}, **made,
    }  # fmt: skip


def test_the_tables_show_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trained draft"):
        kinds.tables(tmp_path)
    cell = {"kind": "eagle3", "what": "-", "seed": 1, "steps": 7, "bytes": 5e6, "simulated_tau": {"text": 1.45}}
    cell["top1"] = {"text": 0.25}
    write_json(tmp_path / "eagle3-seed1" / "cell.json", cell)
    write_json(tmp_path / "cost.json", {"seconds": {"eagle3": 3.0, "msd": 1.0}})
    trained = kinds.tables(tmp_path)
    assert "| eagle3 | 1 | 7 | 21 | 0.250 | 1.45 | 5.00 |\n" in f"{trained}\n" and "whole request" not in trained
    write_json(tmp_path / "sampled.json", evaluated(identical_chain=3))
    shown = kinds.tables(tmp_path)
    assert "| eagle3 | 1 | 7 | 21 |" in shown and "| block | 1 | 10 | 20 | 0.500 | 1.60 | 9.00 |" in shown
    assert "sampled: 3 held-out prompts" in shown and "T = 1;" in shown
    assert "| 7 of 9 |" in shown, "of all trees"
    assert "| block, tree | 0.500 | 0.250 |" in shown and "| block, chain | 0.400 |  |" in shown


def test_a_draft_of_another_training_is_not_measured(tmp_path: Path) -> None:
    """The drafts of two --out of one --work have one place."""
    kind = kinds.KINDS[1]
    study = LanguageStudy(tmp_path / "again", "base", {}, "", {}, kinds.KINDS, tmp_path, 1, 10, 1)
    assert study.trained() == []
    for name in ("config.json", "provenance.json"):
        write_json(study.draft(kind) / name, {"date": "today"})
    with pytest.raises(UserError, match=r"a draft of another training than the one in .*again.*move it away"):
        train(study, kind)
    write_json(study.cell(kind, 1) / "checkpoints" / "final" / "provenance.json", {"date": "today"})
    assert study.trained() == [kind]


@pytest.mark.by_hand  # minutes
@pytest.mark.slow
def test_kinds_are_trained_for_equal_seconds_and_compared(stock: tuple, tmp_path: Path) -> None:
    """With the stand-in in the place of the real model."""
    model, tokenizer = stock
    write_base(model, tokenizer, tmp_path / kinds.NAME, "a stand-in")
    settings = {**environment(), "WORK": str(tmp_path), "COUNT": "12", "PYTHON": sys.executable}
    script = ["bash", str(REPO / "experiments" / "real_language" / "train.sh")]
    subprocess.run([*script, "--epochs", "4"], env=settings, capture_output=True, check=True)
    layers = {**settings, "FEATURE_LAYERS": "auto", "STATES_ONLY": "1"}
    subprocess.run(script, env=layers, capture_output=True, check=True)
    command = [sys.executable, "-m", "experiments.real_language.kinds"]
    flags = ["--work", str(tmp_path), "--questions", "2", "--max-new-tokens", str(LENGTH)]
    flags += ["--kinds", "eagle3-3", "block-4"]

    def run(*parts: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *parts, *flags], env=environment(), cwd=REPO, capture_output=True, text=True, check=False
        )

    assert "the cost of a step of msd is not measured" in run("train").stderr
    out = tmp_path / "kinds"
    cost = {"seconds": {"msd": 2.0, "eagle3-3": 4.0, "block-4": 1.0}}
    write_json(out / "cost.json", cost)
    done = run()
    assert done.returncode == 0, done.stderr
    assert read_json(out / "cost.json") == cost, "not measured again"
    for name in kinds.TEMPERATURES:
        record = read_json(out / f"{name}.json")
        rows = {row["kind"]: row for row in record["rows"]}
        assert set(rows) == {"msd", "eagle3-3", "block-4"} and f"{name}: 2 held-out prompts" in done.stdout
        for row in rows.values():
            assert row["tau"] >= 1 and row["tau_chain"] >= 1 and row["megabytes"] > 0
            assert row["identical"] == row["identical_chain"] == row["identical_auto"] == row["answers"] == 2
    steps = {name: row["step"] for name, row in rows.items()}
    assert steps["msd"] == 2 * steps["eagle3-3"] == steps["block-4"] / 2, "steps cost twice, and half of MSD's"
    heads = {name: MSDModel.from_pretrained(tmp_path / kinds.NAME, tmp_path / f"{kinds.NAME}-{name}") for name in rows}
    sizes = {name: len(head.draft.draft_vocab) for name, head in heads.items()}
    assert len(set(sizes.values())) == 1 and sizes["msd"] < model.config.vocab_size
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("**/*.json") if file.name != "study.json"}
    assert run().returncode == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}, "nothing is done twice"
    flags += ["--max-new-tokens", "5"]
    assert "measured with max_new_tokens=12, not 5" in run("evaluate").stderr


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

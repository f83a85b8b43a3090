"""The cost benchmark: both ways are the same loss, and what it measures of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eagle.hidden_states.shards import Index, Sample, Source, write_shard
from eagle.train.loss import draft_loss
from experiments import training_cost
from experiments.full_logits import full_logits_loss
from experiments.peak_memory import peak_bytes, resident_bytes
from experiments.steps import REPO, environment
from experiments.training_work import FULL, OURS
from llava.errors import UserError, run_cli

HIDDEN, VOCAB = 16, 40
HEAD = ["--vocab", "50", "--positions", "12", "--hidden", "8", "--rounds", "2", "--steps", "1"]


def test_full_logits_give_the_same_loss_and_gradient():
    torch.manual_seed(0)
    predicted, target, head = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, 8), torch.randn(30, 8)
    loss_mask = torch.rand(2, 9) > 0.4
    ours, full = (
        draft_loss(predicted, target, loss_mask, head, chunk=4),
        full_logits_loss(predicted, target, loss_mask, head),
    )
    torch.testing.assert_close(tuple(full), tuple(ours))
    gradients = [torch.autograd.grad(losses.total, predicted)[0] for losses in (ours, full)]
    torch.testing.assert_close(*gradients)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command, its workers in this process; gives the record."""

    def call(*argv: str) -> dict:
        def peak_of(way: str) -> dict[str, int]:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", ["training_cost.py", *argv, "--worker", way])
                return training_cost.measure_peak(training_cost.parse_args())

        monkeypatch.setattr(training_cost, "peak_of", peak_of)
        monkeypatch.setattr(sys, "argv", ["training_cost.py", *argv, "--out", str(tmp_path / "cost.json")])
        assert run_cli(training_cost.main) == 0
        return json.loads((tmp_path / "cost.json").read_text())

    return call


def test_a_head_alone(run, capsys):
    record = run(*HEAD)
    assert list(record["ways"]) == [OURS, FULL] and record["settings"]["vocab"] == 50
    for values in record["ways"].values():
        assert len(values["rounds"]) == 2 and values["samples_per_second"] > 0
        assert values["peak_bytes"] >= values["before_bytes"] > 0
    assert {"date", "commit", "hardware", "versions"} <= set(record)
    assert f"| {OURS} |" in capsys.readouterr().out


def write_states(folder: Path) -> Path:
    """Both sets of a tiny base, random, and the base as far as training reads it."""
    for name, images in (("hidden_t", 0), ("hidden_v", 3)):
        samples = []
        for row in range(6):
            image = torch.arange(10) < images
            ids = torch.randint(3, VOCAB, (10,)).masked_fill(image, 0)
            features = torch.randn(images, HIDDEN)
            samples.append((row, Sample(str(row), ids, torch.arange(10) > 4, image, torch.randn(10, HIDDEN), features)))
        source = Source("llava", "base", None, "bfloat16", HIDDEN, VOCAB, 0)
        (folder / name).mkdir()
        Index.of(source, [write_shard(folder / name, 0, 6, samples, [], source)]).save(folder / name)
    torch.save({"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN), "lm_head.weight": torch.randn(VOCAB, HIDDEN)},
               folder / "pytorch_model.bin")  # fmt: skip
    draft = {"model_type": "llava", "hidden_size": HIDDEN, "intermediate_size": 32, "num_attention_heads": 2,
             "vocab_size": VOCAB}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(draft))
    (folder / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}')
    return folder


def test_training_of_a_draft(run, tmp_path):
    folder = str(write_states(tmp_path))
    record = run("--data", folder, "--base", folder, "--config", f"{folder}/config.json",
                 "--deepspeed-config", f"{folder}/ds.json", "--rounds", "1", "--steps", "1")  # fmt: skip
    assert all(values["samples_per_second"] > 0 for values in record["ways"].values())


@pytest.mark.parametrize(("argv", "message"), [([], "one thing is measured"), ([*HEAD, "--rounds", "0"], "--rounds 0")])
def test_bad_options_are_refused(monkeypatch, argv, message):
    monkeypatch.setattr(sys, "argv", ["training_cost.py", *argv])
    with pytest.raises(UserError, match=message):
        training_cost.parse_args()


def test_peak_is_this_process_and_not_its_parent():
    """A parent that holds 300 MB more than a small child ever does."""
    ballast = torch.ones(75_000_000)
    code = "from benchmarks import peak_memory as p; import torch; print(p.peak_bytes(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=REPO, capture_output=True, text=True)
    cpu = torch.device("cpu")
    assert ballast[-1] == 1 and int(done.stdout) < resident_bytes(cpu) <= peak_bytes(cpu)


@pytest.mark.slow
def test_full_logits_take_more_memory_in_a_process_of_their_own(tmp_path):
    sizes = ["--vocab", "30000", "--positions", "512", "--hidden", "32", "--rounds", "1", "--steps", "1"]
    command = [sys.executable, "-m", "experiments.training_cost", *sizes, "--chunk", "64"]
    command += ["--out", str(tmp_path / "cost.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ways = json.loads((tmp_path / "cost.json").read_text())["ways"]
    logits = 512 * 30000 * 4  # bytes of one [R, V] in float32
    assert ways[FULL]["peak_bytes"] - ways[OURS]["peak_bytes"] > logits

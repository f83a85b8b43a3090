"""Drafts to the hub and back, over the loopback hub; the model card says what is known and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_draft import make_draft
from tiny_llava import make_liuhaotian

from eagle.cli import main
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from eagle.publish import About, model_card, push_to_hub, save_pretrained
from eagle.train.checkpoint import describe_run
from eagle.train.settings import TrainConfig
from llava.errors import UserError

REPO = Path(__file__).resolve().parents[2]
REPORT = REPO / "benchmarks" / "pocket-llava.json"
BASE = "liuhaotian/llava-v1.5-7b"


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: base, two drafts with the records of their training, a bench report of the first."""
    folder = tmp_path_factory.mktemp("run")
    base = make_liuhaotian(folder / "base")
    target = load_target(base, dtype="float32")
    data = {"text": {"folder": "/somewhere/hidden_t", "samples": 68000, "model": BASE, "hidden_size": 32}}
    for number, name in enumerate(("final", "best")):
        make_draft(folder / name, target, seed=number)
        write(folder / name / "provenance.json", describe_run(data, asdict(TrainConfig(epochs=7))))
    results = {"text": {"tau": 3.25, "loss": 0.1}, "image": {"tau": 2.5, "loss": 0.2}}
    write(folder / "training.json", {"steps": [], "validations": [{"step": 900, "results": results}]})
    report = json.loads(REPORT.read_text())
    report["settings"]["msd_model"] = "outputs/checkpoints/final"
    write(folder / "bench.json", report)
    return folder


def measured_tau() -> str:
    return f"{json.loads(REPORT.read_text())['tau']:.2f}"


def same(folder: Path, tensors: dict[str, torch.Tensor]) -> bool:
    wanted = load_file(folder / "model.safetensors")
    return set(wanted) == set(tensors) and all(torch.equal(wanted[name], tensors[name]) for name in wanted)


def test_card_tells_base_recipe_figures_licence_and_citation(run: Path) -> None:
    card = model_card("me/my-draft", About.of(run / "final", bench=run / "bench.json", license="llama2"))
    text = str(card)
    assert card.data.base_model == BASE
    assert card.data.license == "llama2"
    assert "speculative-decoding" in card.data.tags
    report = json.loads(REPORT.read_text())
    for told in (
        "# my-draft", f'MSDModel.from_pretrained("{BASE}", "me/my-draft"', f"{report['tau']:.2f}",
        f"{report['speedup']:.2f}x", report["baseline_name"], "AMD EPYC", "torch 2.14.1", "24 of heldout.jsonl",
        "| epochs | 7 |", "68000 samples", "text 3.25, image 2.50", "2505.14260", "Luxi", "llama2",
    ):  # fmt: skip
        assert told in text, told


def test_card_of_an_evaluation_names_the_strongest_baseline(run: Path, tmp_path: Path) -> None:
    """Results of lmms-eval with a baseline; without one they are refused."""
    paired = {"mean": 1.75, "low": 1.5, "high": 2.0}
    total = {"speedup": 1.5, "paired_speedup": paired, "tau": 3.25, "tokens_per_second": 60.0, "answers": 20}
    total |= {"baseline_tokens_per_second": 40.0}
    total |= {"after_first_token": {"speedup": 1.625, "paired_speedup": paired, "baseline_name": "x"}}
    decoding = {"use_msd": True, "draft": "final", "tasks": {"chartqa": {}}, "total": total, "hardware": "A CPU"}
    decoding |= {"versions": {"torch": "2.14"}, "tree": None, "batch_size": 2, "compile": "inductor"}
    decoding["baseline"] = {"name": "loop, compiled", "chosen_from": [{"loop": 9.0, "loop, compiled": 40.0}]}
    path = write(tmp_path / "1_results.json", {"results": {}, "msd": decoding})
    text = str(model_card("me/final", About.of(run / "final", bench=path)))
    for told in (
        "1.50x of totals, 1.75x [1.50, 2.00] mean of batches", "| 1.62x of totals", "20 of chartqa", "A CPU",
        "| tokens/s of loop, compiled, the strongest baseline | 40.0 |", "in turn", "batch size 2",
        "| compiled | yes |",
    ):  # fmt: skip
        assert told in text, text
    for change, message in (
        ({"baseline": {"name": "loop", "chosen_from": [{"loop": 40.0}]}}, r"MSD was compiled .* no plain baseline was"),
        ({"baseline": {}}, r"without a speed-up over the strongest.*--msd_baseline measure"),
        (
            {"total": {"speedup": 1.5}},
            r"lmms-eval that are not complete \(KeyError: 'paired_speedup'\)",
        ),
    ):
        write(path, {**decoding, **change})
        with pytest.raises(UserError, match=message):
            About.of(run / "final", bench=path)


def test_card_keeps_paths_of_the_machine_out(run: Path) -> None:
    about = About.of(run / "final", base_model=str(run / "base"), bench=run / "bench.json")
    text = str(model_card("me/my-draft", about))
    assert str(run) not in text and "/somewhere" not in text and sys.argv[0] not in text
    assert "of base." in text
    assert ModelCard(text).data.base_model is None  # no hub name


def test_card_of_a_draft_trained_by_an_earlier_version() -> None:
    """Its record has other keys for the command and the machine."""
    folder = REPO / "pocket" / "llava-msd"
    made = json.loads((folder / "provenance.json").read_text())
    text = str(model_card("me/pocket", About.of(folder)))
    assert "argv" in made and "command" not in made
    assert made["commit"] in text and f"torch {made['versions']['torch']}" in text


def test_card_says_what_is_not_known(tmp_path: Path, run: Path) -> None:
    draft = load_draft(run / "final")
    folder = save_pretrained(draft, tmp_path / "alone")
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.license == "other"
    for told in ("not recorded", "were not measured", "no record of the training", "base model's licence"):
        assert told in card.text
    assert same(run / "final", load_draft(folder).state_dict())
    assert load_draft(folder).dtype == draft.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report.pop("tau"), "not a report of msd bench.*lacks tau"),
        (lambda report: report["settings"].update(msd_model="me/another"), "the report measured another draft"),
        (
            lambda report: report.update(setting={"compiled": True}, baselines={"autoregressive float32": 1.0}),
            "MSD was compiled in this report, and no plain baseline was",
        ),
    ],
)
def test_a_report_that_does_not_belong_is_refused(run: Path, tmp_path: Path, change: Any, message: str) -> None:
    report = json.loads((run / "bench.json").read_text())
    change(report)
    bench = write(tmp_path / "bench.json", report)
    with pytest.raises(UserError, match=message):
        push_to_hub(run / "final", "me/draft", bench=bench)


def test_what_is_no_repository_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="not the name of a hub repository: draft"):
        push_to_hub(run / "final", "draft")


def test_out_writes_and_uploads_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push = ["push", "--msd-model", str(run / "final"), "--repo", "me/draft", "--out", str(tmp_path / "look")]
    assert main([*push, "--bench", str(run / "bench.json")]) == 0
    assert "not pushed" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "look").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert measured_tau() in (tmp_path / "look" / "README.md").read_text()


SCRIPT = """
import json, os, sys
from pathlib import Path
from eagle import MSDModel
from eagle.cli import main
from eagle.drafts.checkpoint import load_draft
from eagle.publish import push_to_hub
from llava.errors import UserError
from safetensors.torch import load_file
import torch

run, work, token = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
told = {}

def which(name="me/draft", **hub):
    "Name of the local draft that these tensors are, or the error."
    try:
        tensors = load_draft(name, **hub).state_dict()
    except UserError as error:
        return str(error)
    return next(n for n in ("final", "best") if all(
        torch.equal(t, tensors[k]) for k, t in load_file(run / n / "model.safetensors").items()))

push = ["push", "--repo", "me/draft", "--private", "--bench", str(run / "bench.json"), "--msd-model"]
told["without a token"] = main([*push, str(run / "final")])
os.environ["HF_TOKEN"] = token
told["push"] = main([*push, str(run / "final")])
told["loaded"] = which(cache_dir=str(work / "a"))
told["no token"] = which(token=False, cache_dir=str(work / "b"))
told["wrong token"] = which(token="hf_wrong", cache_dir=str(work / "b"))
told["own token"] = which(token=token, cache_dir=str(work / "b"))
first = push_to_hub(run / "final", "me/draft").rsplit("/", 1)[-1]
second = push_to_hub(run / "best", "me/draft").rsplit("/", 1)[-1]
told["newest"] = which(cache_dir=str(work / "c"))
told["first"] = which(revision=first, cache_dir=str(work / "c"))
told["unknown revision"] = which(revision="v9", cache_dir=str(work / "c"))
told["cached"] = which(cache_dir=str(work / "c"), local_files_only=True)
told["not cached"] = which(cache_dir=str(work / "d"), local_files_only=True)
model = MSDModel.from_pretrained(run / "base", "me/draft", draft_revision=first, cache_dir=str(work / "e"))
told["draft_revision"] = all(
    torch.equal(t.to(model.dtype), model.draft.state_dict()[k])
    for k, t in load_file(run / "final" / "model.safetensors").items())
told["public"] = push_to_hub(load_draft(run / "best"), "me/open", base_model="a/b")
told["private now"] = main([*push[:2], "me/open", "--private", "--msd-model", str(run / "final")])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def trip(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], HubServer, str]]:
    """One process that pushes and loads; what it saw, the hub after it, and what it wrote to stderr."""
    root, work = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("caches")
    with HubServer(root) as hub:
        environment = {**os.environ, **hub.environment(work / "home")}
        environment.pop("HF_TOKEN", None)
        command = [sys.executable, "-c", SCRIPT, str(run), str(work), hub.uploads.token]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout.splitlines()[-1]), hub, done.stderr


@pytest.mark.slow
def test_push_then_load_is_the_same_draft(trip: tuple[dict[str, Any], HubServer, str], run: Path) -> None:
    told, hub, _ = trip
    assert told["push"] == 0
    assert told["loaded"] == "final"
    first = hub.uploads.folder_at("me/draft", hub.uploads.commits["me/draft"][0])
    assert {path.name for path in first.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert same(run / "final", load_file(first / "model.safetensors"))
    assert measured_tau() in (first / "README.md").read_text()
    assert any(method == "PUT" and path.startswith("/lfs/") for method, path in hub.requests)


@pytest.mark.slow
def test_writing_and_private_reading_need_the_token(trip: tuple[dict[str, Any], HubServer, str]) -> None:
    told, hub, stderr = trip
    assert told["without a token"] == 2
    assert "error: the hub did not take the draft: me/draft (" in stderr
    assert "me/draft" in hub.uploads.private
    for refused in ("no token", "wrong token"):
        assert "the hub did not give it" in told[refused]
    assert told["own token"] == "final"


@pytest.mark.slow
def test_revisions(trip: tuple[dict[str, Any], HubServer, str]) -> None:
    told, hub, _ = trip
    assert len(hub.uploads.commits["me/draft"]) == 3
    assert told["newest"] == "best"
    assert told["first"] == "final"
    assert told["draft_revision"] is True
    assert "the hub did not give it" in told["unknown revision"]


@pytest.mark.slow
def test_cache_and_local_files_only(trip: tuple[dict[str, Any], HubServer, str]) -> None:
    told, _, _ = trip
    assert told["cached"] == "best"
    assert "the hub did not give it" in told["not cached"]


@pytest.mark.slow
def test_private_does_not_go_into_a_public_repository(trip: tuple[dict[str, Any], HubServer, str]) -> None:
    told, hub, stderr = trip
    assert told["public"].startswith(f"{hub.address}/me/open/commit/")
    assert told["private now"] == 2
    assert "the repository exists and is public: me/open" in stderr
    assert len(hub.uploads.commits["me/open"]) == 1

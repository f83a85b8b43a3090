"""From annotation files to an answer, by the commands, for each of today's families: the model's own answers, hidden
states, both stages of training, and a draft that is accepted when the same questions are asked again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILY_MAKERS
from tiny_llava import make_image

from eagle import MSDModel, TreeConfig, cli
from eagle.families import family_of
from eagle.ge_data import allocation
from eagle.train import main_deepspeed
from llava.errors import run_cli

QUESTIONS = ["Name two rivers.", "And what is that?", "Count the shapes."]
NEW = 24
CHAIN = TreeConfig(5, 1, 7)

pytestmark = pytest.mark.slow
IN_CI = ("qwen3_vl", "qwen3_5", "gemma3", "glm4v")
"""The others are run by hand."""
FAMILIES = [pytest.param(name, marks=[] if name in IN_CI else pytest.mark.by_hand) for name in FAMILY_MAKERS]


def write_data(folder: Path) -> None:
    (folder / "pictures").mkdir()
    records: dict[str, list[dict[str, Any]]] = {"t": [], "v": []}
    questions = []
    for number, question in enumerate(QUESTIONS):
        make_image(folder / "pictures" / f"{number}.png", 50 + 20 * number, 60, number)
        for kind, mark, names in (("t", "", []), ("v", "<image>\n", [f"{number}.png"])):
            said = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": "Unknown."}]
            record: dict[str, Any] = {"id": f"{kind}{number}", "conversations": said}
            records[kind].append(record | ({"image": names[0]} if names else {}))
            images = [f"pictures/{name}" for name in names]
            questions.append({"id": f"{kind}{number}", "images": images, "question": question, "answer": ""})
    for kind, own in records.items():
        (folder / f"{kind}.json").write_text(json.dumps(own))
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


def command(main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    assert run_cli(main) == 0


def allocate(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> None:
    """Hidden states of both kinds of records."""
    name = family_of(base).training_name
    for kind in "tv":
        command(
            allocation.main, monkeypatch, "--outdir", folder / f"states-{kind}", "--model_type", f"{name}_{kind}",
            "--model", base, "--json_data_path", folder / f"{kind}.json", "--image_data_path", folder / "pictures",
            "--gpus", "cpu", "--dtype", "float32", *more,
        )  # fmt: skip


def train(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, run: str, *more: object) -> None:
    """A run of both stages, without noise and validation."""
    sizes = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5}
    (folder / "ds.json").write_text(json.dumps(sizes))
    command(
        main_deepspeed.main, monkeypatch, "--basepath", base, "--cpdir", folder / run, "--config", "auto",
        "--deepspeed_config", folder / "ds.json", "--tracker", "none", "--validation-share", 0,
        "--learning-rate", 4e-3, "--token-weight", 1, "--rollout-steps", 2, "--noise", 0, "--image-start", 0.5,
        "--image-end", 0.5, *more,
    )  # fmt: skip


def stored(folder: Path) -> list[object]:
    return ["--tmpdir_t", folder / "states-t", "--tmpdir_v", folder / "states-v"]


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name == "qwen3_vl" else pytest.mark.by_hand) for name in FAMILY_MAKERS],
)
def test_training_online(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of a short run whose base computes the hidden states are those on stored ones."""
    base = FAMILY_MAKERS[family](tmp_path / "base")
    write_data(tmp_path)
    allocate(tmp_path, base, monkeypatch)
    short = ["--epochs", 4, "--log-every", 1]
    train(tmp_path, base, monkeypatch, "stored", *stored(tmp_path), *short)
    train(
        tmp_path, base, monkeypatch, "online", "--online", "--annotations_t", tmp_path / "t.json", "--annotations_v",
        tmp_path / "v.json", "--image-folder", tmp_path / "pictures", "--dtype", "float32", *short,
    )  # fmt: skip
    expected, found = (
        [step["loss"] for step in json.loads((tmp_path / run / "training.json").read_text())["steps"]]
        for run in ("stored", "online")
    )
    assert len(set(expected)) == len(expected) >= 4 and expected[-1] < expected[0]
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = FAMILY_MAKERS[family](tmp_path / "base")
    write_data(tmp_path)
    allocate(tmp_path, base, monkeypatch, "--regenerate", "--max-new-tokens", NEW)
    train(tmp_path, base, monkeypatch, "run", *stored(tmp_path), "--epochs", 600, "--text-share", 0.1)
    draft = tmp_path / "run" / "final"
    msd = MSDModel.from_pretrained(base, draft, dtype=torch.float32, tree=CHAIN)
    accepted: list[int] = []
    for line in (tmp_path / "questions.jsonl").read_text().splitlines():
        asked = json.loads(line)
        prompt = msd.target.chat_prompt(asked["question"], len(asked["images"]))
        inputs = msd.target.prepare(prompt, [tmp_path / name for name in asked["images"]])
        expected = msd.target.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        output = msd.generate(**inputs, max_new_tokens=NEW, temperature=0.0)
        assert torch.equal(output.sequences, expected)
        accepted += output.stats.accept_lengths
    tau = 1 + sum(accepted) / len(accepted)
    assert tau > 4, f"tau {tau:.2f} of at most 7: {accepted}"
    pair = ["--base-model", str(base), "--msd-model", str(draft), "--data", str(tmp_path / "questions.jsonl")]
    for tool in ("verify", "bench"):
        report = tmp_path / f"{tool}.json"
        more = ["--limit", "2", "--max-new-tokens", "8", "--dtype", "float32"]
        more += ["--out", str(report)] if tool == "bench" else []
        assert run_cli(lambda argv=[tool, *pair, *more]: cli.main(argv)) == 0  # type: ignore[misc]
    assert run_cli(lambda: cli.main(["doctor", *pair[:4]])) == 0

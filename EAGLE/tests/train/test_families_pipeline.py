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


@pytest.mark.parametrize("family", FAMILY_MAKERS)
def test_pipeline(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = FAMILY_MAKERS[family](tmp_path / "base")
    write_data(tmp_path)
    name = family_of(base).training_name
    for kind in "tv":
        command(
            allocation.main, monkeypatch, "--outdir", tmp_path / f"states-{kind}", "--model_type", f"{name}_{kind}",
            "--model", base, "--json_data_path", tmp_path / f"{kind}.json", "--image_data_path", tmp_path / "pictures",
            "--gpus", "cpu", "--dtype", "float32", "--regenerate", "--max-new-tokens", NEW,
        )  # fmt: skip
    sizes = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5}
    (tmp_path / "ds.json").write_text(json.dumps(sizes))
    command(
        main_deepspeed.main, monkeypatch, "--basepath", base, "--cpdir", tmp_path / "run", "--config", "auto",
        "--deepspeed_config", tmp_path / "ds.json", "--tmpdir_t", tmp_path / "states-t", "--tmpdir_v",
        tmp_path / "states-v", "--tracker", "none", "--epochs", 600, "--validation-share", 0, "--learning-rate", 4e-3,
        "--token-weight", 1, "--rollout-steps", 2, "--noise", 0, "--image-start", 0.5, "--image-end", 0.5,
        "--text-share", 0.1,
    )  # fmt: skip
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

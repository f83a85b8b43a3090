"""Qwen3-VL from annotation files to lmms-eval's scores: a draft trained by the pipeline's own commands decodes what
lmms-eval asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_families import make_qwen3_vl
from tiny_llava import make_image

from eagle.ge_data import allocation
from eagle.train import main_deepspeed
from llava.errors import run_cli
from lmms_eval_msd.offline import write_chartqa

REPO = Path(__file__).resolve().parents[1]
SYSTEM = "Be brief."
CHARTQA = "\nAnswer the question with a single word."
"""What the task `chartqa` adds to a question."""
SIDES = (56, 84)  # no resizing, in training and in lmms-eval
NEW = 24

pytestmark = pytest.mark.slow


def write_data(folder: Path) -> None:
    """The same questions as lmms-eval's and as annotations; the answers are replaced by the base's own."""
    (folder / "pictures").mkdir()
    records: dict[str, list[dict[str, Any]]] = {"t": [], "v": []}
    questions = []
    for number, question in enumerate(("How many shapes?", "Which colour?", "What is left?")):
        name = f"{number}.png"
        make_image(folder / "pictures" / name, *SIDES, seed=number)
        for kind, mark in (("t", ""), ("v", "<image>\n")):
            said = [{"from": "human", "value": mark + question + CHARTQA}, {"from": "gpt", "value": "Unknown."}]
            record = {"id": f"{kind}{number}", "system": SYSTEM, "conversations": said}
            records[kind].append(record | ({"image": name} if mark else {}))
        asked = {"id": str(number), "images": [f"pictures/{name}"], "question": question, "answer": "3"}
        questions.append(json.dumps(asked))
    for kind, own in records.items():
        (folder / f"{kind}.json").write_text(json.dumps(own))
    (folder / "questions.jsonl").write_text("\n".join(questions) + "\n")


def command(main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    assert run_cli(main) == 0


def train_draft(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base's own answers with their hidden states, and both stages of training; the draft's folder."""
    for kind in "tv":
        command(
            allocation.main, monkeypatch, "--outdir", folder / f"states-{kind}", "--model_type", f"qwen3_vl_{kind}",
            "--model", base, "--json_data_path", folder / f"{kind}.json", "--image_data_path", folder / "pictures",
            "--gpus", "cpu", "--dtype", "float32", "--regenerate", "--max-new-tokens", NEW,
        )  # fmt: skip
    sizes = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5}
    (folder / "ds.json").write_text(json.dumps(sizes))
    command(
        main_deepspeed.main, monkeypatch, "--basepath", base, "--cpdir", folder / "run", "--config", "auto",
        "--deepspeed_config", folder / "ds.json", "--tmpdir_t", folder / "states-t", "--tmpdir_v",
        folder / "states-v", "--tracker", "none", "--epochs", 600, "--validation-share", 0, "--learning-rate", 4e-3,
        "--token-weight", 1, "--rollout-steps", 2, "--noise", 0, "--image-start", 0.5, "--image-end", 0.5,
        "--text-share", 0.1,
    )  # fmt: skip
    return folder / "run" / "final"


def evaluate(folder: Path, draft: Path) -> dict[str, tuple[dict[str, Any], list[tuple[int, str]]]]:
    """lmms-eval on its own task, with the base alone and with the draft: the report of each, and its answers."""
    args = f"pretrained={folder / 'base'},dtype=float32,min_pixels=3136,max_pixels=12544,system_prompt={SYSTEM}"
    common = {"model": "qwen3_vl_msd", "tasks": "chartqa", "log_samples": True}
    common |= {"gen_kwargs": f"temperature=0,max_new_tokens={NEW}"}
    tree = ",msd_depth=5,msd_top_k=1,msd_total_tokens=7"
    flags = {"use_msd": True, "msd_model_path": str(draft), "model_args": args + tree}
    configs = [
        {"model_args": args, "output_path": str(folder / "alone")},
        {**flags, "output_path": str(folder / "msd")},
    ]
    (folder / "run.yaml").write_text(yaml.safe_dump([common | config for config in configs]))
    packages = os.pathsep.join(str(REPO / name) for name in ("LLaVA", "EAGLE", "lmms-eval"))
    environment = os.environ | {"PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "lmms_eval_msd", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {}
    for name in ("alone", "msd"):
        (report,), (samples,) = ((folder / name).rglob(each) for each in ("*_msd.json", "*_samples_chartqa.jsonl"))
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        answers = sorted((row["doc_id"], row["filtered_resps"][0]) for row in rows)
        results[name] = json.loads(report.read_text()), answers
    return results


def test_trained_draft_in_lmms_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_qwen3_vl(tmp_path / "base")
    write_data(tmp_path)
    assert write_chartqa(tmp_path / "questions.jsonl", tmp_path)[1] == 3
    results = evaluate(tmp_path, train_draft(tmp_path, base, monkeypatch))
    (alone, expected), (report, answers) = results["alone"], results["msd"]
    assert (alone["use_msd"], report["use_msd"]) == (False, True)
    assert answers == expected and len(answers) == 3 and all(text for _, text in answers)
    assert report["total"]["tau"] > 4

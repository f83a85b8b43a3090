"""README's table of the real models is what docs/real-models.md derives, and its settings are settings."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from eagle.doctor.memory import POSITIONS, PUBLISHED
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families import TRAINING_NAMES
from eagle.train.settings import TrainConfig
from llava.files import read_json
from lmms_eval_msd import MODELS

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
PAGE = (REPO / "docs" / "real-models.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- real models -->\n(.*?)<!-- end of real models -->", re.DOTALL)
COLUMNS = {"LLaVA-1.5-7B": "LLaVA-1.5-7B", "LLaVA-1.5-13B": "LLaVA-1.5-13B", "Qwen2-VL-7B": "Qwen2-VL-7B-Instruct"}
IMAGE_TOKENS = {"llava": (336 // 14) ** 2, "qwen2_vl": round(640 / 28) * round(480 / 28)}
ROWS, TOKENS, SPEED = 68_000, 800, 125e12


def exports() -> dict[str, dict[str, str]]:
    """The settings of each model, as the page exports them."""
    lines = re.findall(r"^export (.+)$", PAGE, re.MULTILINE)
    return dict(zip(COLUMNS, (dict(word.split("=", 1) for word in line.split()) for line in lines), strict=True))


def shipped(name: str) -> dict:
    return json.loads((REPO / "EAGLE" / "eagle" / "train" / exports()[name]["CONFIG"]).read_text())


def column(name: str) -> dict[str, str]:
    """The table's column of a model."""
    given, settings, sizes = shipped(name), exports()[name], PUBLISHED[name]
    train = TrainConfig(**given.pop("train"))
    with torch.device("meta"):
        draft = DraftModel(DraftConfig.from_dict(given))
    hidden, table = given["hidden_size"], draft.embed_tokens.weight.numel()
    trained = sum(p.numel() for p in draft.parameters()) - table
    assert sizes.draft == trained + table, "the config's draft is not the one of this base"
    images = IMAGE_TOKENS[given["model_type"]]
    zero = read_json(REPO / "EAGLE/eagle/train/ds_config.json", "DeepSpeed config")["zero_optimization"]
    bucket = zero["reduce_bucket_size"]
    samples = int(ROWS * (1 - train.validation_share))
    steps = [samples // (4 * gpus) * train.epochs for gpus in (1, 8)]
    reading = 2 * sizes.base * 2 * ROWS * TOKENS
    training = 6 * (trained + table) * samples * train.epochs * TOKENS
    words = (f"`{key}={value}`" for key, value in settings.items())
    return {
        "first line: `export`": " ".join(words),
        "download of the base": f"{2 * sizes.base / 1e9:.1f} GB",
        "draft": f"{sizes.draft * 2 / 1e9:.1f} GB, {trained / 1e6:.0f} million weights trained",
        "disk of hidden states (in int8)":
            f"{2 * hidden * ROWS * (2 * TOKENS + images) / 1e12:.2f} TB "
            f"({hidden * ROWS * (2 * TOKENS + 2 * images) / 1e12:.2f} TB)",
        "GPU memory, training": f"{(2 * (trained + 2 * table) + 14 * trained + 4 * bucket) / 1e9:.1f} GB + activations",
        "GPU memory, decoding": f"{sizes.bytes('bfloat16') / 1e9:.0f} GB at {POSITIONS} positions",
        "optimizer steps, 1 GPU (8)": f"{steps[0]:,} ({steps[1]:,})".replace(",", " "),
        "computing of step 3, one A100 at 40 %": f"{reading / SPEED / 3600:.1f} h",
        "computing of step 4, the same": f"{training / SPEED / 3600:.0f} h",
    }  # fmt: skip


def table() -> str:
    columns = {title: column(name) for name, title in COLUMNS.items()}
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in next(iter(columns.values())):
        lines.append(f"| {row} | {' | '.join(each[row] for each in columns.values())} |")
    return "\n".join(lines) + "\n"


def test_the_table_is_derived_as_the_page_says() -> None:
    found = BLOCK.search(README)
    assert found is not None and found[1] == table(), f"README's table should be\n{table()}"


@pytest.mark.parametrize("name", COLUMNS)
def test_settings_are_known(name: str) -> None:
    settings = exports()[name]
    family, model = settings.get("FAMILY", "llava_v15"), settings.get("MODEL", "llava_msd")
    assert TRAINING_NAMES[family] == shipped(name)["model_type"]
    assert model in MODELS
    assert set(shipped(name)["train"]) <= {each.name for each in fields(TrainConfig)}
    scripts = "".join(path.read_text(encoding="utf-8") for path in (REPO / "scripts").glob("*.sh"))
    assert all(f"${{{key}:" in scripts for key in settings)


def test_the_readme_begins_with_the_first_of_them() -> None:
    first = next(line for line in PAGE.splitlines() if line.startswith("export "))
    assert f"\n{first}\n" in README

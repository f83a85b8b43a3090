"""Small things the training tests share: hand-made samples, a tiny base on disk, corpora and configs."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families.base_weights import BaseTensors
from eagle.hidden_states.shards import Index, Sample, Source, write_shard
from eagle.train import main_deepspeed
from eagle.train.engine import METRICS
from eagle.train.loss import DraftObjective
from eagle.train.settings import TrainConfig

SCRIPT = Path(main_deepspeed.__file__)
HIDDEN, VOCAB = 16, 40
DRAFT = {"model_type": "llava", "hidden_size": HIDDEN, "intermediate_size": 32, "num_attention_heads": 2,
         "vocab_size": VOCAB, "rms_norm_eps": 1e-5}  # fmt: skip


def make_sample(length: int = 12, image: int = 0, prompt: int = 4, seed: int = 0, hidden: int = HIDDEN) -> Sample:
    """Random tokens and states; ``image`` image tokens from position 1 on; the answer follows ``prompt + image``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (length,), generator=generator)
    image_mask = torch.zeros(length, dtype=torch.bool)
    image_mask[1 : 1 + image] = True
    loss_mask = torch.arange(length) >= prompt + image
    states = torch.randn(length, hidden, generator=generator)
    features = torch.randn(image, hidden, generator=generator)
    return Sample(f"s{seed}", ids.masked_fill(image_mask, 0), loss_mask, image_mask, states, features)


def make_objective(seed: int = 0, **settings) -> DraftObjective:
    torch.manual_seed(seed)
    base = BaseTensors(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))
    return DraftObjective(DraftModel(DraftConfig.from_dict(DRAFT)), base, TrainConfig(**settings))


def write_base(folder: Path, seed: int = 0, scale: float = 1.0) -> Path:
    """A base model as far as training reads it."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    embed, head = scale * torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN)
    tensors = {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    return folder


def write_corpus(
    folder: Path, count: int, image: int = 0, seed: int = 0, hidden_dtype: str | None = None, **source: Any
) -> Path:
    """``count`` random samples in one shard; ``source`` replaces what it says of the model."""
    folder.mkdir(parents=True)
    about = Source("llava", "base", None, "bfloat16", HIDDEN, VOCAB, 0, hidden_dtype=hidden_dtype)
    about = replace(about, **source)
    samples = [(i, make_sample(8 + i % 5, image, seed=seed + i)) for i in range(count)]
    info = write_shard(folder, 0, count, samples, [], about)
    Index.of(about, [info]).save(folder)
    return folder


def write_configs(folder: Path, bf16: bool = False, **train) -> tuple[Path, Path]:
    """(draft config with a train section, DeepSpeed config)."""
    train = {"epochs": 4, "learning_rate": 1e-3, "log_every": 1, "noise": 0.1, **train}
    config, deepspeed = folder / "draft.json", folder / "ds.json"
    config.write_text(json.dumps({**DRAFT, "train": train}))
    deepspeed.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5,
        "bf16": {"enabled": bf16}, "zero_optimization": {"stage": 2},
    }))  # fmt: skip
    return config, deepspeed


def logged(folder: Path) -> list[dict[str, float]]:
    """What a run has logged of its training steps."""
    return json.loads((folder / "training.json").read_text())["steps"]


def curve(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of each log."""
    return [(row["step"], row["loss"]) for row in logged(folder)]


def assert_same_curve(whole: Path, parts: Path) -> None:
    """Both runs have logged at the same steps, and the same values but for 1e-5."""
    for expected, got in zip(logged(whole), logged(parts), strict=True):
        for name in ("step", "epoch", "learning_rate", *METRICS):
            assert got[name] == pytest.approx(expected[name], abs=1e-5), (name, expected["step"])


def environment() -> dict[str, str]:
    """Of a process that imports the packages from this source tree."""
    paths = [str(SCRIPT.parents[2]), str(SCRIPT.parents[3] / "LLaVA"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def launch(command: list[str]) -> str:
    """Runs a command to its end, as from a shell in eagle/train; returns what it printed. The first start on a machine
    compiles an op for a minute or two."""
    done = subprocess.run(command, cwd=SCRIPT.parent, env=environment(), capture_output=True, text=True, timeout=900,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout

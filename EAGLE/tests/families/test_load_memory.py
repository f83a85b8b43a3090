"""Loading a sharded Qwen2-VL needs little more memory than its weights, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_stock import make_qwen
from transformers import Qwen2VLForConditionalGeneration

PROGRAM = """
import json, resource, sys
import torch
from eagle.families import load_target
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
import transformers.models.qwen2_vl.modeling_qwen2_vl
before = peak()
model = load_target(sys.argv[1], dtype="float32").model
total = sum(float(p.sum()) for p in model.parameters())  # reads every page
print(json.dumps({"grown": peak() - before, "size": sum(p.numel() * p.element_size() for p in model.parameters())}))
"""


@pytest.mark.slow
def test_peak_of_loading(tmp_path: Path) -> None:
    whole = make_qwen(tmp_path / "base", intermediate_size=65536, num_hidden_layers=24)
    Qwen2VLForConditionalGeneration.from_pretrained(whole).save_pretrained(whole, max_shard_size="150MB")
    (whole / "model.safetensors").unlink(missing_ok=True)
    assert len(list(whole.glob("model-*.safetensors"))) > 3
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(whole)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["size"] > 600e6
    assert found["grown"] < 1.15 * found["size"]

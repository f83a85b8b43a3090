"""Loading a sharded checkpoint needs little more memory than its weights, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llava import TinySizes, make_liuhaotian, make_llava_hf

SIZES = TinySizes(hidden=1024, layers=12, heads=8, kv_heads=8, intermediate=2816, vision_hidden=64, spread=0.02)
PROGRAM = """
import json, resource, sys
import torch, transformers
from transformers import LlavaForConditionalGeneration
import llava
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = llava.load_model(sys.argv[1])
after = peak()
print(json.dumps({"grown": after - before, "size": sum(p.numel() * p.element_size() for p in model.parameters())}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["liuhaotian", "llava-hf"])
def test_peak_of_loading(tmp_path: Path, layout: str) -> None:
    make = make_liuhaotian if layout == "liuhaotian" else make_llava_hf
    base = make(tmp_path / "base", sizes=SIZES, shards=4)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(base)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["size"] > 600e6
    assert found["grown"] < 1.15 * found["size"]

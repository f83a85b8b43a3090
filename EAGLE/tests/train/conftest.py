"""Makes `train_support` importable from the tests beside it; a tiny run of the command."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from train_support import write_base, write_configs, write_corpus

from eagle.train import main_deepspeed
from llava.errors import run_cli


@pytest.fixture
def arguments(tmp_path):
    """Gives the command line of a tiny run: 10 text and 8 image samples, 4 epochs of 2 steps."""
    base = write_base(tmp_path / "base")
    text = write_corpus(tmp_path / "text", 12)
    image = write_corpus(tmp_path / "image", 10, image=3, seed=100)

    def make(cpdir, *extra, deepspeed=None, **train):
        config, plain = write_configs(tmp_path, **train)
        return ["--basepath", str(base), "--tmpdir_t", str(text), "--tmpdir_v", str(image),
                "--cpdir", str(tmp_path / cpdir), "--config", str(config),
                "--deepspeed_config", str(deepspeed or plain), *extra]  # fmt: skip

    return make


@pytest.fixture
def run(monkeypatch):
    def call(argv):
        monkeypatch.setattr(sys, "argv", ["main_deepspeed.py", *argv])
        return run_cli(main_deepspeed.main)

    return call

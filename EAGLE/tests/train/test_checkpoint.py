"""State files that DeepSpeed is going to unpickle are looked through first."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle.train.checkpoint import check_pickles


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.folder),))


def test_tensors_and_deepspeeds_own_classes_pass(tmp_path: Path) -> None:
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    (tmp_path / "state").mkdir()
    state = {"step": 3, "sizes": OrderedDict(a=torch.Size([2])), "scaler": loss_scaler.LossScaler(scale=1)}
    torch.save({**state, "weights": torch.ones(2)}, tmp_path / "state" / "optim_states.pt")
    check_pickles(tmp_path)


def test_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    file = tmp_path / "state" / "optim_states.pt"
    torch.save({"weights": torch.ones(2), "more": Evil(tmp_path / "ran")}, file)
    with pytest.raises(pickle.UnpicklingError, match=r"optim_states\.pt names posix\.mkdir"):
        check_pickles(tmp_path)
    for content in (pickle.dumps(Evil(tmp_path / "ran")), b"", b"PK\x03\x04 cut off"):
        file.write_bytes(content)
        with pytest.raises(pickle.UnpicklingError, match="not in torch's format"):
            check_pickles(tmp_path)
    assert not (tmp_path / "ran").exists()

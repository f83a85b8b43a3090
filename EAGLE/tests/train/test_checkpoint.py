"""State files that DeepSpeed is going to unpickle are looked through first."""

from __future__ import annotations

import pickle
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_support import MakesFolder
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from eagle.train.checkpoint import CheckpointStore, Progress, check_pickles, check_same_run, mean_state
from eagle.train.schedule import BatchSizes
from llava.errors import UserError


def test_tensors_and_deepspeeds_own_classes_pass(tmp_path: Path) -> None:
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    (tmp_path / "state").mkdir()
    state = {"step": 3, "sizes": OrderedDict(a=torch.Size([2])), "scaler": loss_scaler.LossScaler(scale=1)}
    file = tmp_path / "state" / "optim_states.pt"
    torch.save({**state, "weights": torch.ones(2)}, file)
    assert any("LossScaler" in name for name in get_unsafe_globals_in_checkpoint(file)), "torch alone would refuse it"
    check_pickles(tmp_path)


def test_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    file = tmp_path / "state" / "optim_states.pt"
    torch.save({"weights": torch.ones(2), "more": MakesFolder(tmp_path / "ran")}, file)
    with pytest.raises(pickle.UnpicklingError, match=r"optim_states\.pt names posix\.mkdir"):
        check_pickles(tmp_path)
    for content in (pickle.dumps(MakesFolder(tmp_path / "ran")), b"", b"PK\x03\x04 cut off"):
        file.write_bytes(content)
        with pytest.raises(pickle.UnpicklingError, match="not in torch's format"):
            check_pickles(tmp_path)
    assert not (tmp_path / "ran").exists()


RUN = {"micro": 2, "accumulation": 4, "world": 1, "text": 10, "image": 8, "epochs": 4, "noise": 0.2,
       "bf16": True, "gradient_clipping": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "step", "told"),
    [
        ({}, 3, None),
        ({"accumulation": 2, "world": 2}, 3, None),
        ({"accumulation": 1, "world": 4}, 3, None),
        (
            {"world": 2},
            3,
            "8 samples a step .* this one has 16: .*with 2 processes set gradient_accumulation_steps to 2",
        ),
        ({"accumulation": 2}, 3, "8 samples a step .* this one has 4: "),
        ({"micro": 4, "accumulation": 2}, 3, "had micro=2, this one has 4"),
        ({"epochs": 6}, 8, None),
        ({"epochs": 6}, 7, "had epochs=4, this one has 6.*finish the 4 epochs first"),
        ({"epochs": 3}, 8, "had epochs=4, this one has 3"),
        ({"noise": 0.1}, 8, "had noise=0.2, this one has 0.1"),
        ({"draft_kind": "MSD"}, 8, None),
        ({"bf16": False}, 3, "had bf16=True, this one has False"),
        ({"gradient_clipping": 1.0}, 3, "had gradient_clipping=0.5, this one has 1.0"),
        ({"fp16": False}, 3, None),  # not known of older runs
    ],
)
def test_what_a_resumed_run_may_change(change: dict[str, Any], step: int, told: str | None, tmp_path: Path) -> None:
    """Two steps an epoch."""
    progress = Progress(step=step, run=RUN)
    if told is None:
        check_same_run(progress, {**RUN, **change}, 2, tmp_path)
        return
    with pytest.raises(UserError, match=told):
        check_same_run(progress, {**RUN, **change}, 2, tmp_path)


class Together:
    """The engine of one of two processes, which are threads here."""

    def __init__(self, rank: int, meeting: threading.Barrier, values: dict[int, Tensor]) -> None:
        self.rank, self.is_main, self.sizes = rank, rank == 0, BatchSizes(1, 1, 2)
        self.barrier, self.values = meeting.wait, values

    def sum(self, value: Tensor) -> Tensor:
        self.values[self.rank] = value
        self.barrier()
        return self.values[0] + self.values[1]


@pytest.mark.parametrize("shared", [True, False])
def test_all_processes_must_see_the_folder(tmp_path: Path, shared: bool) -> None:
    meeting, values = threading.Barrier(2, timeout=30), dict[int, Tensor]()
    folders = [tmp_path / "one", tmp_path / ("one" if shared else "other")]

    def check(rank: int) -> str | None:
        try:
            CheckpointStore(folders[rank], 1, {}).check_shared(Together(rank, meeting, values))  # type: ignore[arg-type]
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(check, range(2)))
    if shared:
        assert said == [None, None]
    else:
        assert all("1 of 2 processes do not see" in (line or "") for line in said)
    assert list(folders[0].iterdir()) == []


def test_sums_since_the_last_log_of_another_number_of_processes() -> None:
    states = [{"sums": torch.full((6,), value), "steps": 3, "seconds": 1.0} for value in (1.0, 3.0)]
    assert mean_state(states)["sums"].tolist() == [2.0] * 6 and mean_state(states)["steps"] == 3
    assert mean_state([{"sums": None, "steps": 0, "seconds": 0.0}] * 2)["sums"] is None


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 4), (3, 2), (4, 3)])
def test_optimizer_state_for_another_number_of_processes(old: int, new: int) -> None:
    """Seven weights, padded to equal parts."""
    pytest.importorskip("deepspeed")
    from eagle.train.engine_deepspeed import repartition

    def parts(whole: Tensor, world: int) -> list[Tensor]:
        size = -(-len(whole) // world)
        return list(torch.nn.functional.pad(whole, (0, world * size - len(whole))).split(size))

    weights, mean = torch.arange(1.0, 8.0), torch.arange(11.0, 18.0)
    states = []
    for rank, (part, moment) in enumerate(zip(parts(weights, old), parts(mean, old), strict=True)):
        kept = part[: max(0, len(weights) - rank * len(part))]
        state = {"exp_avg": moment, "step": torch.tensor(5.0)}
        optimizer = {"state": {0: state}, "param_groups": []}
        states.append({"single_partition_of_fp32_groups": [kept], "base_optimizer_state": optimizer})
    for rank, (weight, moment) in enumerate(zip(parts(weights, new), parts(mean, new), strict=True)):
        got = repartition(states, len(weight), rank)
        own = got["base_optimizer_state"]["state"][0]
        assert torch.equal(got["single_partition_of_fp32_groups"][0], weight)
        assert torch.equal(own["exp_avg"], moment) and own["step"] == 5

"""What comes next is made in a thread, in order, and no further than asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from eagle.train.dataset import Batch
from eagle.train.prefetch import prefetch


class Source:
    """Counts to ``size`` and keeps who asked; a defect at ``broken``."""

    def __init__(self, size: int, broken: int | None = None) -> None:
        self.size, self.broken, self.made, self.threads = size, broken, 0, set()

    def __iter__(self) -> Iterator[int]:
        for number in range(self.size):
            if number == self.broken:
                raise ValueError(f"at {number}")
            self.threads.add(threading.current_thread())
            self.made += 1
            yield number


@pytest.mark.parametrize("size", [0, 1, 2, 9])
def test_all_in_order_from_one_other_thread(size: int) -> None:
    source = Source(size)
    assert list(prefetch(iter(source), 2)) == list(range(size))
    assert len(source.threads) == min(size, 1) and threading.current_thread() not in source.threads


def test_no_more_than_the_depth_is_made_ahead_and_nothing_after_the_end() -> None:
    source = Source(100)
    stream = prefetch(iter(source), 2)
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()
    assert source.made <= 4
    assert not any(thread.is_alive() for thread in source.threads)


def test_a_failure_comes_in_its_place() -> None:
    stream = prefetch(iter(Source(9, broken=3)), 2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="at 3"):
        next(stream)


def test_a_loader_pins_the_tensors_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory itself is stood in for: it needs a GPU."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor + 1)
    zero = torch.zeros(1, 2)
    batch = Batch(zero, zero, zero, zero[..., None], zero, noise=0.1, seeds=(4,), lengths=(2,))
    pinned = pin_memory(batch)
    assert isinstance(pinned, Batch) and pinned.positions is None
    assert pinned.hidden.tolist() == [[[1.0], [1.0]]] and pinned.input_ids.tolist() == [[1.0, 1.0]]
    assert (pinned.noise, pinned.seeds, pinned.lengths) == (0.1, (4,), (2,))

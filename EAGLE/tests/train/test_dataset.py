"""Stored states must be those of the base and of the interrupted run; batches are prefetched in order."""

import json
import shutil
import threading
import time

import pytest
import torch
from train_support import write_base, write_corpus

from eagle.drafts.compression import Compression
from eagle.families.base_weights import load_base_tensors
from eagle.ge_data.extract import fingerprint
from eagle.hidden_states.shards import Index, ShardDataset
from eagle.hidden_states.tensor_file import Rows
from eagle.train.collate import collate
from eagle.train.dataset import Samples, batches, identity, prefetch
from eagle.train.schedule import Item

STOP = ("--tracker", "none", "--max-steps", "1")
GO_ON = ("--tracker", "none", "--resume", "--max-steps", "2")


def print_of(base, dtype=torch.float32):
    """The fingerprint that the allocation writes when it runs in ``dtype``."""
    return fingerprint(load_base_tensors(base).embed.to(dtype))


@pytest.fixture
def refused(run, capsys):
    def call(argv):
        assert run(argv) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        return line

    return call


def test_states_of_another_base_of_the_same_sizes_are_refused(arguments, run, refused, tmp_path):
    other = print_of(write_base(tmp_path / "other", seed=1))
    corpus = write_corpus(tmp_path / "foreign", 10, image=3, fingerprint=other, model="owner/other")
    line = refused(arguments("ck", "--tmpdir_v", str(corpus)))
    assert f"hidden states of another model (owner/other): its embedding is {other}" in line and str(corpus) in line
    assert not (tmp_path / "ck").exists()
    assert run(arguments("ck", *STOP, "--tmpdir_v", str(corpus), "--basepath", str(tmp_path / "other"))) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_states_that_the_base_made_in_any_dtype_are_accepted(arguments, run, tmp_path, dtype):
    """Small weights are rounded differently on the way through float16."""
    base = tmp_path / "small"
    write_base(base, scale=1e-5)
    stored = "float16" if dtype == "float16" else "bfloat16"
    own = print_of(base, getattr(torch, dtype))
    assert (own == print_of(base)) == (dtype != "float16")
    corpus = write_corpus(tmp_path / "own", 10, image=3, fingerprint=own, dtype=stored)
    assert run(arguments("ck", *STOP, "--tmpdir_v", str(corpus), "--basepath", str(base))) == 0


def test_two_families_are_refused(arguments, refused, tmp_path):
    corpus = write_corpus(tmp_path / "qwen", 10, image=3, family="qwen2_vl")
    assert "hidden states of family qwen2_vl, those in" in refused(arguments("ck", "--tmpdir_v", str(corpus)))


@pytest.mark.parametrize(("changed", "key"), [
    ({"seed": 7}, "states_text_sums"),
    ({"hidden_dtype": "int8"}, "states_text_hidden_dtype"),
])  # fmt: skip
def test_a_run_is_not_resumed_on_other_states(arguments, run, refused, tmp_path, changed, key):
    assert run(arguments("ck", *STOP)) == 0
    corpus = write_corpus(tmp_path / "changed", 12, **changed)
    assert f"the interrupted run had {key}=" in refused(arguments("ck", *GO_ON, "--tmpdir_t", str(corpus)))


def test_a_run_is_not_resumed_on_another_base(arguments, run, refused, tmp_path):
    pairs = []
    for seed in (0, 1):
        base = write_base(tmp_path / f"base{seed}", seed=seed)
        corpus = write_corpus(tmp_path / f"text{seed}", 12, fingerprint=print_of(base))
        pairs.append(["--basepath", str(base), "--tmpdir_t", str(corpus)])
    assert run(arguments("ck", *STOP, *pairs[0])) == 0
    line = refused(arguments("ck", *GO_ON, *pairs[1]))
    assert f"had states_text_fingerprint={print_of(tmp_path / 'base0')}, this one has" in line
    assert run(arguments("ck", *GO_ON, *pairs[0])) == 0


def test_what_is_not_known_is_no_difference(arguments, run, tmp_path):
    """An index rebuilt from the shards has no checksums; a run from before states were compared has none of it."""
    moved = tmp_path / "moved"
    assert run(arguments("ck", *STOP)) == 0
    shutil.copytree(tmp_path / "text", moved)
    (moved / "index.json").unlink()
    assert all(shard.sha256 is None for shard in ShardDataset(moved).meta.shards)
    record = tmp_path / "ck" / "step-00000001" / "progress.json"
    progress = json.loads(record.read_text())
    kept = {key: value for key, value in progress["run"].items() if not key.startswith("states_image")}
    assert len(progress["run"]) - len(kept) == 3
    record.write_text(json.dumps({**progress, "run": kept}))
    assert run(arguments("ck", *GO_ON, "--tmpdir_t", str(moved))) == 0
    after = json.loads((tmp_path / "ck" / "step-00000002" / "progress.json").read_text())["run"]
    assert after == progress["run"]


def test_sums_are_those_of_all_shards():
    def index(*sums):
        shards = tuple(Shard(sha256=each) for each in sums)
        return Index("llava", "m", None, "bfloat16", 4, 8, 0, shards=shards)

    class Shard:
        start = end = samples = tokens = image_tokens = 1

        def __init__(self, sha256):
            self.sha256 = sha256

    assert identity(index("a", "b"))["sums"] != identity(index("a", "c"))["sums"]
    assert "sums" not in identity(index("a", None))


class Counter:
    """Doubles a number and keeps which ones in which threads; a defect at ``broken``."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken, self.made, self.threads = broken, [], set()

    def __call__(self, number: int) -> int:
        if number == self.broken:
            raise ValueError(f"at {number}")
        time.sleep(0.002 * (number % 3))
        self.threads.add(threading.current_thread())
        self.made.append(number)
        return 2 * number


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [0, 1, 2, 9])
def test_all_in_order_from_other_threads(size: int, threads: int) -> None:
    load = Counter()
    assert list(prefetch(load, range(size), threads)) == [2 * number for number in range(size)]
    assert len(load.threads) <= min(size, threads) and threading.current_thread() not in load.threads


def test_no_more_than_the_depth_is_made_ahead_and_nothing_after_the_end() -> None:
    load = Counter()
    stream = prefetch(load, range(100), 1)
    assert [next(stream), next(stream)] == [0, 2]
    stream.close()
    assert len(load.made) <= 4
    assert not any(thread.is_alive() for thread in load.threads)


def test_a_failure_comes_in_its_place() -> None:
    stream = prefetch(Counter(broken=3), range(9), 2)
    assert [next(stream) for _ in range(3)] == [0, 2, 4]
    with pytest.raises(ValueError, match="at 3"):
        next(stream)


@pytest.mark.parametrize("stored", [None, "int8"])
@pytest.mark.parametrize(("tokens", "max_length"), [(None, 64), (None, 9), (2, 64)])
def test_batches_read_from_disk_are_those_of_loaded_samples(tmp_path, stored, tokens, max_length):
    """Whole, cut within a picture, and with merged image rows; the first and the last sample of a shard too."""
    data = ShardDataset(write_corpus(tmp_path / "corpus", 7, image=5, hidden_dtype=stored))
    lengths = data.lengths().tolist()
    assert min(lengths) > 3 and max(lengths) > 9
    samples = Samples({"image": (data, range(7))})
    pieces = [[Item("image", 6, 1), Item("image", 0, 2)], [Item("image", 3, 3)]]
    settings = {"vocab_size": data.meta.vocab_size, "max_length": max_length, "compression": Compression(tokens)}
    found = list(batches(samples, pieces, noise=0.1, workers=2, **settings))
    for piece, read in zip(pieces, found, strict=True):
        expected, batch = collate([data[item.row] for item in piece], noise=0.1, seeds=[1], **settings), read.to("cpu")
        assert batch.seeds == tuple(item.noise_seed for item in piece) and batch.lengths == expected.lengths
        for name in ("input_ids", "image_mask", "image_features", "hidden", "loss_mask"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name
        for row, item in enumerate(piece):
            if tokens is None:
                assert torch.equal(batch.hidden[row, : batch.lengths[row]], data[item.row].hidden[:max_length])
            assert not batch.hidden[row, batch.lengths[row] :].any()


@pytest.mark.parametrize("stored", [None, "int8"])
def test_states_of_a_batch_are_read_to_their_place(tmp_path, monkeypatch, stored):
    """No state is read into another tensor first, nothing but a batch's own rows is read, and as it is stored."""
    data = ShardDataset(write_corpus(tmp_path / "corpus", 5, image=5, hidden_dtype=stored))
    data.lengths()
    into, read = Rows.into, []
    monkeypatch.setattr(Rows, "into", lambda rows, out: read.append(out) or into(rows, out))
    (batch,) = batches(Samples({"image": (data, range(5))}), [[Item("image", 4, 0)]], vocab_size=99, max_length=64)
    wide = [out for out in read if out.dim() == 2]
    assert [out.data_ptr() for out in wide] == [batch.hidden.data_ptr(), batch.image_features.data_ptr()]
    assert sum(out.nbytes for out in wide) == batch.hidden.nbytes + batch.image_features.nbytes
    assert batch.hidden.dtype == (torch.bfloat16 if stored is None else torch.int8)
    assert batch.to("cpu").hidden.dtype == torch.bfloat16


def test_a_batch_of_both_kinds_of_states(tmp_path):
    """One sample in 8 bit, one in 16: both are in 16 bit."""
    kinds = {"text": None, "image": "int8"}
    sets = {
        name: ShardDataset(write_corpus(tmp_path / name, 3, image=2, hidden_dtype=kind)) for name, kind in kinds.items()
    }
    samples = Samples({name: (data, range(3)) for name, data in sets.items()})
    (batch,) = batches(samples, [[Item("text", 1, 0), Item("image", 2, 0)]], vocab_size=99, max_length=64)
    assert batch.hidden_scale is None
    for row, sample in enumerate((sets["text"][1], sets["image"][2])):
        assert torch.equal(batch.hidden[row, : batch.lengths[row]], sample.hidden)

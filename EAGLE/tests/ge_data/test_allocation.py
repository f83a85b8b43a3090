"""From annotation file to shards: what is stored is what the stock model computes, and each row exactly once."""

from __future__ import annotations

import json
import multiprocessing
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus_support import Write, allocate, command, image_record, rows_of, snapshot, text_record, turns
from tiny_llava import make_llava_hf

from eagle.conversations import read_conversation
from eagle.decode.self_check import self_check
from eagle.families import Target, template_of
from eagle.ge_data import allocation, extract, inspect
from eagle.ge_data.extract import Extractor, source_of
from eagle.ge_data.folder import locked, missing
from eagle.ge_data.reader import HostCopies, Reader, batches, collate
from eagle.ge_data.workers import Events, Failure, Job, _handle, run_here, run_workers
from eagle.hidden_states.index import ShardInfo, load_index
from eagle.hidden_states.shards import Sample, ShardDataset
from llava.errors import run_cli

ROUNDING = {"rtol": 2**-7, "atol": 1e-4}  # states are stored in bfloat16


def mixed_rows(count: int = 7) -> list[dict[str, Any]]:
    """Text and image records in alternation, of growing length."""
    names = ("a.png", "b.png")
    return [row for n in range(count) for row in (text_record(n, n % 4 + 1), image_record(n, names[n % 2]))]


@torch.no_grad()
def stock_hidden(target: Target, sample: Sample, **inputs: torch.Tensor) -> torch.Tensor:
    """Last hidden states [S, H] of the stock class's own forward."""
    output = target.model.model(input_ids=sample.input_ids[None], **inputs)
    return output.last_hidden_state[0]


def test_text_rows(base: Path, target: Target, annotations: Write, tmp_path: Path) -> None:
    data = annotations(mixed_rows())
    assert allocate(base, data, tmp_path / "out") == 0
    dataset = ShardDataset(tmp_path / "out")
    order = np.random.default_rng(42).permutation(7)
    assert [sample.id for sample in dataset] == [f"text{n}" for n in order]
    assert rows_of(tmp_path / "out") == ([2 * n for n in order], [])
    assert [(shard.start, shard.end) for shard in dataset.meta.shards] == [(0, 3), (3, 6), (6, 7)]
    assert dataset.meta.image_tokens == 0 and dataset.meta.model == "base"
    for sample in dataset:
        assert sample.hidden.dtype == torch.bfloat16 and len(sample.image_features) == 0
        torch.testing.assert_close(sample.hidden.float(), stock_hidden(target, sample), **ROUNDING)


def test_streams_of_chosen_layers(
    base: Path, target: Target, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that the stock model computes, in 16 bit also beside int8 states; sizes are said first."""
    data, out, count = annotations(mixed_rows(3)), tmp_path / "out", len(target.text_model.layers)
    flags = ("--hidden-dtype", "int8", "--max-length", "100")
    assert allocate(base, data, out, "t", *flags, "--feature-layers", "1,0") == 0
    width = target.hidden_size
    told = capsys.readouterr().err
    assert f"streams of layers 0, 1: each token takes {4 * width / 1e3:.2f} kB beside the" in told
    assert f"3 records are at most {300 * (5 * width + 4) / 1e3:.2f} kB (100 tokens each), and" in told
    for sample in ShardDataset(out, (0, 1)):
        states = target.model.model(input_ids=sample.input_ids[None], output_hidden_states=True).hidden_states
        assert sample.streams is not None and sample.streams.dtype == torch.bfloat16
        torch.testing.assert_close(sample.streams.float(), torch.cat(states[:2], dim=-1)[0], **ROUNDING)
    assert allocate(base, data, out, "t", *flags, "--feature-layers", "0") == 2
    assert "begun with feature_layers '0,1' instead of '0'" in capsys.readouterr().err
    assert allocate(base, data, tmp_path / "other", "t", "--feature-layers", f"1,{count + 1}") == 2
    assert f"--feature-layers {count + 1}: the model has {count} layers" in capsys.readouterr().err
    for wrong in ("1,1", "first", "-1", ""):
        assert allocate(base, data, tmp_path / "other", "t", f"--feature-layers={wrong}") == 2
    assert not (tmp_path / "other").exists()


def test_image_rows(base: Path, target: Target, annotations: Write, pictures: Path, tmp_path: Path) -> None:
    data = annotations(mixed_rows())
    assert allocate(base, data, tmp_path / "out", "v", pictures=pictures) == 0
    dataset = ShardDataset(tmp_path / "out")
    assert sorted(sample.id for sample in dataset) == [str(n) for n in range(7)]
    for sample in dataset:
        pixels = target.processor.pixel_values([pictures / ("a.png", "b.png")[int(sample.id) % 2]])
        assert int(sample.image_mask.sum()) == len(sample.image_features) == 16
        torch.testing.assert_close(sample.hidden.float(), stock_hidden(target, sample, pixel_values=pixels), **ROUNDING)
        features = target.model.model.get_image_features(pixel_values=pixels).pooler_output[0].detach()
        torch.testing.assert_close(sample.image_features.float(), features.reshape(16, -1), **ROUNDING)


def test_fewer_records_than_are_stored(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stay, and the user is told; the same command again says nothing."""
    data = annotations(mixed_rows())
    for limit, told in (("5", False), ("5", False), ("2", True), ("7", False)):
        assert allocate(base, data, tmp_path / "out", "t", "--limit", limit) == 0
        errors = capsys.readouterr().err
        assert ("5 records are stored here and 2 were asked for: all stay" in errors) == told, errors
    assert len(ShardDataset(tmp_path / "out")) == 7


def test_a_base_that_the_engine_does_not_read_exactly_is_refused(
    base: Path, annotations: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its states would be stored without an error. Here the positions are wrong."""
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(extract, "self_check", self_check)
    right = Target.prompt_positions
    monkeypatch.setattr(Target, "prompt_positions", lambda *given: (right(*given)[0] * 2, right(*given)[1] * 2))
    data = annotations(mixed_rows())
    assert allocate(base, data, tmp_path / "out", "t", "--dtype", "float32") == 2
    assert "logits of the engine differ" in capsys.readouterr().err and not list(
        (tmp_path / "out").glob("*.safetensors")
    )
    assert allocate(base, data, tmp_path / "out", "t", "--dtype", "float32", "--no-self-check") == 0
    assert not (tmp_path / "cache" / "self-checks").exists()


def test_another_picture_gives_other_states(base: Path, annotations: Write, pictures: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        data = annotations([image_record(1, name)])
        assert allocate(base, data, tmp_path / name, "v", pictures=pictures) == 0
    first, second = (ShardDataset(tmp_path / name)[0] for name in ("a.png", "b.png"))
    assert torch.equal(first.input_ids, second.input_ids)
    after = int(first.image_mask.nonzero()[-1]) + 1
    change = (first.hidden.float() - second.hidden.float()).abs().amax(-1)  # [S]
    assert float(change[after:].min()) > 0.01, "text after the picture must depend on it"
    assert float(change[: int(first.image_mask.nonzero()[0])].max()) == 0


@pytest.mark.parametrize("kind", ["text", "image"])
def test_padded_batch_equals_single(target: Target, pictures: Path, tmp_path: Path, kind: str) -> None:
    template = template_of(target)
    rows = [
        text_record(n, n + 1) if kind == "text" else image_record(10**n, ("a.png", "b.png")[n % 2]) for n in range(4)
    ]
    items = [template.prepare(read_conversation(row, 0), pictures, 400) for row in rows]
    extractor = Extractor(target, template, None, tmp_path, source_of(target, "x"), 10_000)  # type: ignore[arg-type]
    inputs = collate(items)
    assert (inputs["attention_mask"] == 0).any()
    batch = target.prefill(inputs)
    for row, item in enumerate(items):
        alone = target.prefill(collate([item])).hidden[0]
        torch.testing.assert_close(batch.hidden[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
    (samples,) = extractor.stream([items])
    assert extractor._padding_checked
    assert [len(sample.hidden) for sample in samples] == [len(item.input_ids) for item in items]


def test_states_leave_the_gpu_as_they_are_stored(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without padding, already in 8 bit, in one copy of each kind for the whole batch."""
    template, copied = template_of(target), []
    items = [template.prepare(read_conversation(text_record(n, n + 1), 0), tmp_path, 400) for n in range(3)]
    make = HostCopies.__init__
    monkeypatch.setattr(
        HostCopies, "__init__", lambda own, sent, streams: copied.append(sent) or make(own, sent, streams)
    )
    source = source_of(target, "x", hidden_dtype="int8")
    samples = Reader(target, template, source, 10_000)._forward(items).samples
    tokens = sum(len(item.input_ids) for item in items)
    (sent,) = copied
    assert {name: (len(each), each.dtype) for name, each in sent.items()} == {
        "image_features": (0, torch.bfloat16), "hidden": (tokens, torch.int8), "hidden_scale": (tokens, torch.float32),
    }  # fmt: skip
    for item, sample in zip(items, samples, strict=True):
        hidden = target.prefill(collate([item])).hidden[0]
        assert (sample.states() - hidden).abs().max() <= 0.51 * hidden.abs().max() / 127 + 1e-3


def test_shards_are_written_while_later_ones_are_made(
    base: Path, annotations: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time at least: each write waits for another one."""
    write, together = Extractor._write, threading.Barrier(2, timeout=60)

    def meet(self: Extractor, *given: Any) -> ShardInfo:
        together.wait()
        return write(self, *given)

    monkeypatch.setattr(Extractor, "_write", meet)
    data, out = annotations([text_record(n) for n in range(4)]), tmp_path / "out"
    assert allocate(base, data, out, "t", "--shard-size", "1") == 0
    index = load_index(out)
    assert [shard.start for shard in index.shards] == [0, 1, 2, 3] and index.samples == 4


def test_padding_that_changes_states_is_found(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = template_of(target)
    items = [template.prepare(read_conversation(text_record(n, n + 1), 0), tmp_path, 400) for n in range(3)]
    extractor = Extractor(target, template, None, tmp_path, source_of(target, "x"), 10_000)  # type: ignore[arg-type]
    prefill = type(target).prefill

    def shifted(self: Target, inputs: dict[str, torch.Tensor], layers: Sequence[int]) -> Any:
        result = prefill(self, inputs)
        return result._replace(hidden=result.hidden.roll(1, 0) if len(result.hidden) > 1 else result.hidden)

    monkeypatch.setattr(type(target), "prefill", shifted)
    with pytest.raises(RuntimeError, match="padding changes"):
        list(extractor.stream([items]))


def test_the_next_forward_begins_before_the_copies_of_one_are_waited_for(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, order = template_of(target), list[str]()
    items = [template.prepare(read_conversation(text_record(n), 0), tmp_path, 400) for n in range(3)]
    forward, wait = Extractor._forward, HostCopies.wait
    monkeypatch.setattr(Extractor, "_forward", lambda own, batch: order.append("forward") or forward(own, batch))
    monkeypatch.setattr(HostCopies, "wait", lambda own: order.append("wait") or wait(own))
    extractor = Extractor(target, template, None, tmp_path, source_of(target, "x"), 1)  # type: ignore[arg-type]
    samples = list(extractor.read([items[:2], items[2:]]))
    assert [[sample.id for sample in each] for each in samples] == [[items[0].id, items[1].id], [items[2].id]]
    assert order == ["forward", "forward", "wait", "forward", "wait", "wait"]


def test_memory_of_the_gpu_is_shared_in_halves(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = template_of(target)
    items = [template.prepare(read_conversation(text_record(n), 0), tmp_path, 400) for n in range(5)]
    extractor = Extractor(target, template, None, tmp_path, source_of(target, "x"), 10_000)  # type: ignore[arg-type]
    forward, sizes = Extractor._forward, []

    def small(self: Extractor, batch: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return forward(self, batch)

    monkeypatch.setattr(Extractor, "_forward", small)
    (samples,) = extractor.stream([items])
    assert [sample.id for sample in samples if sample] == [item.id for item in items]
    assert sizes[0] == 5 and max(sizes[1:]) == 3


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_a_conversation_that_never_fits_is_skipped_and_the_rest_is_made(
    base: Path, annotations: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    forward = Extractor._forward

    def small(self: Extractor, batch: Any) -> Any:
        if any(item.id == str(text_record(4)["id"]) for item in batch):
            raise error
        return forward(self, batch)

    monkeypatch.setattr(Extractor, "_forward", small)
    data, out = annotations([text_record(n) for n in range(7)]), tmp_path / "out"
    assert allocate(base, data, out, "t") == 0
    (line,) = (out / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "too_large" and load_index(out).samples == 6


def test_batches() -> None:
    lengths = {n: random.Random(n).randint(1, 50) for n in range(100)}
    made = list(batches(lengths, 120))
    assert sorted(key for batch in made for key in batch) == list(range(100))
    assert all(len(batch) * max(lengths[key] for key in batch) <= 120 for batch in made)
    assert list(batches({0: 500}, 120)) == [[0]] and list(batches({}, 120)) == []


SKIPS: dict[str, dict[str, Any]] = {
    "missing_picture": image_record(100, "nothing.png"),
    "broken_picture": image_record(101, "broken.png"),
    "no_mark": {"id": "m", "image": "a.png", "conversations": turns("q", "a")},
    "too_many_marks": {"id": "n", "image": "a.png", "conversations": turns("<image><image>", "a")},
    "empty": {"id": "o", "image": "a.png", "conversations": turns("<image>")},
    "no_conversation": {"id": "p", "image": "a.png"},
    "image_cut": {"id": "q", "image": "a.png", "conversations": turns("word " * 300 + "<image> <image>", "a")},
    "answer_cut": {"id": "r", "image": "a.png", "conversations": turns("<image>" + "word " * 300, "a")},
}


def test_skipped_rows_are_counted_and_listed(
    base: Path, annotations: Write, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SKIPS["image_cut"]["image"] = ["a.png", "b.png"]
    data = annotations([image_record(1), *SKIPS.values(), image_record(2)])
    out = tmp_path / "out"
    assert allocate(base, data, out, "v", "--max-length", "200", pictures=pictures) == 0
    meta = load_index(out)
    assert meta.samples == 2 and meta.skipped == dict.fromkeys(SKIPS, 1)
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    expected = [(n, str(row["id"]), reason) for n, (reason, row) in enumerate(SKIPS.items(), start=1)]
    assert sorted((row["row"], row["id"], row["reason"]) for row in listed) == expected
    assert "skipped: missing_picture" in capsys.readouterr().out


def test_keys_of_records(base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A system key is learnt from, a video record is skipped by name, an unknown key is named once for the file."""
    video = {"id": "v", "video": "a.mp4", "conversations": turns("What happens?", "a")}
    told = {**text_record(1), "system": "Be brief.", "tools": "search"}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data = annotations([text_record(1), told, video, {"id": "m", "messages": messages, "tools": ""}])
    out = tmp_path / "out"
    assert allocate(base, data, out) == 0
    assert load_index(out).samples == 3 and load_index(out).skipped == {"video": 1}
    samples = {len(sample.input_ids) for sample in ShardDataset(out) if sample.id == str(text_record(1)["id"])}
    assert len(samples) == 2, "the system prompt makes a difference"
    assert capsys.readouterr().err.count("keys that are not read: 'tools' (2 records)") == 1


def test_ranges_in_one_folder(base: Path, annotations: Write, tmp_path: Path) -> None:
    data, out = annotations(mixed_rows()), tmp_path / "out"
    assert allocate(base, data, out, "t", "--start", "4", "--limit", "2") == 0
    assert [(s.start, s.end) for s in load_index(out).shards] == [(4, 6)]
    assert allocate(base, data, out, "t", "--end", "5", "--shard-size", "4") == 0
    assert [(s.start, s.end) for s in load_index(out).shards] == [(0, 4), (4, 6)]
    assert allocate(base, data, out) == 0
    assert sorted(rows_of(out)[0]) == list(range(0, 14, 2))


def test_missing_ranges() -> None:
    def info(start: int, end: int) -> ShardInfo:
        return ShardInfo("", start, end, 0, 0, 0, {}, 0)

    assert missing(0, 10, 4, []) == [(0, 4), (4, 8), (8, 10)]
    assert missing(3, 10, 4, [info(4, 8)]) == [(3, 4), (8, 10)]
    assert missing(2, 6, 4, [info(0, 4), info(4, 8)]) == []
    assert missing(0, 6, 4, [info(9, 12)]) == [(0, 4), (4, 6)]
    assert missing(8, 10, 4, [info(0, 4)]) == [(8, 10)]


def test_finished_shards_are_not_touched(base: Path, annotations: Write, tmp_path: Path) -> None:
    data, out = annotations(mixed_rows()), tmp_path / "out"
    assert allocate(base, data, out) == 0
    before = snapshot(out)
    lost, cut = sorted(before)[0], sorted(before)[1]
    (out / lost).unlink()
    (out / cut).write_bytes(before[cut][1][:-5])
    (out / ".rows-0.tmp.safetensors").write_bytes(b"left by a kill")
    assert allocate(base, data, out) == 0
    after = snapshot(out)
    assert {name: content for name, (_, content) in after.items()} == {n: content for n, (_, content) in before.items()}
    assert after[sorted(before)[2]] == before[sorted(before)[2]]
    assert not list(out.glob(".*tmp*")) and len(rows_of(out)[0]) == 7
    assert allocate(tmp_path / "no model needed", data, out) == 0


CHANGES = {
    "seed 42 instead of 43": ["--seed", "43"],
    "max_length 2048 instead of 99": ["--max-length", "99"],
    "dtype 'auto' instead of 'bfloat16'": ["--dtype", "bfloat16"],
}


def test_a_quantised_base_without_its_package_is_one_line(
    annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = make_llava_hf(tmp_path / "quantised")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    assert allocate(copy, annotations([text_record(0)]), tmp_path / "out") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "cannot be loaded" in errors[0]


@pytest.mark.parametrize("message", CHANGES)
def test_other_settings_are_refused(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    data, out = annotations(mixed_rows()), tmp_path / "out"
    assert allocate(base, data, out, "t", "--limit", "1") == 0
    assert allocate(base, data, out, "t", *CHANGES[message]) == 2
    assert message in capsys.readouterr().err
    data.write_text(json.dumps(mixed_rows(6)))
    assert allocate(base, data, out) == 2
    assert "data_sha256" in capsys.readouterr().err


def test_another_model_is_refused(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny_llava import make_liuhaotian

    data, out = annotations(mixed_rows()), tmp_path / "out"
    assert allocate(base, data, out, "t", "--limit", "1") == 0
    other = make_liuhaotian(tmp_path / "other" / "base", seed=5)
    assert allocate(other, data, out) == 2
    assert "another model" in capsys.readouterr().err


def test_two_runs_in_one_folder(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = annotations(mixed_rows()), tmp_path / "out"
    with locked(out):
        assert allocate(base, data, out) == 2
    assert "another run is writing" in capsys.readouterr().err
    assert allocate(base, data, out) == 0


@pytest.mark.slow
def test_worker_processes(base: Path, annotations: Write, pictures: Path, tmp_path: Path) -> None:
    data, out = annotations(mixed_rows()), tmp_path / "out"
    assert allocate(base, data, tmp_path / "one", "v", pictures=pictures) == 0
    assert allocate(base, data, out, "v", "--gpus", "cpu,cpu", pictures=pictures) == 0
    assert rows_of(out) == rows_of(tmp_path / "one")
    for first, second in zip(ShardDataset(out), ShardDataset(tmp_path / "one"), strict=True):
        assert torch.equal(first.hidden, second.hidden)


@pytest.mark.parametrize("gpus", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.slow)])
def test_a_length_above_the_models_is_said_once(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], gpus: str
) -> None:
    data = annotations([{"id": n, "conversations": turns("q", "word " * 600)} for n in range(6)])
    assert allocate(base, data, tmp_path / "out", "t", "--max-length", "600", "--gpus", gpus) == 0
    assert capsys.readouterr().err.count("--max-length 600: the model has 512 positions") == 1
    assert {len(sample.input_ids) for sample in ShardDataset(tmp_path / "out")} == {512}
    assert allocate(base, data, tmp_path / "other", "t", "--max-length", "500", "--limit", "1") == 0
    assert "positions" not in capsys.readouterr().err


@pytest.mark.slow
def test_worker_that_fails_is_named(base: Path, annotations: Write, tmp_path: Path) -> None:
    """One that finds bad input says so."""
    options = allocation.parser().parse_args(command(base, annotations(mixed_rows()), tmp_path))
    selection, span = allocation.select(options)
    job = Job("./nothing", "llava", "auto", selection, tmp_path, 100, None)
    events = Events(lambda rows, tokens: None, lambda source, info: None)
    (failure,) = run_workers(job, [span], ["cpu"], events)
    assert (failure.device, failure.user) == ("cpu", True) and "./nothing" in failure.message


def test_worker_that_dies_is_named() -> None:
    """A killed worker says nothing: its pipe ends."""

    class Dead:
        exitcode = -9

        def join(self) -> None:
            pass

    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    failure = _handle(ours, "cuda:1", Dead(), iter([]), Events(lambda *_: None, lambda *_: None))
    assert failure is not None and failure.device == "cuda:1" and "status -9" in failure.message


@pytest.mark.parametrize(("user", "status"), [(True, 2), (False, 1)])
def test_failed_worker_gives_a_status(
    base: Path, annotations: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], user: bool, status: int,
) -> None:  # fmt: skip
    def fail(job: Job, ranges: Any, devices: Any, events: Events) -> list[Failure]:
        run_here(job, ranges[:1], events)
        return [Failure("cuda:1", "broke", user)]

    monkeypatch.setattr(allocation, "run_workers", fail)
    monkeypatch.setattr(allocation, "devices", lambda gpus: ["cuda:0", "cuda:1"])
    assert allocate(base, annotations(mixed_rows()), tmp_path / "out") == status
    error = capsys.readouterr().err
    assert "cuda:1" in error and "broke" in error
    assert load_index(tmp_path / "out").samples == 3


BAD: dict[str, list[str]] = {
    "not among the 7 text records": ["--start", "7"],
    "records 3 to 2 are not among": ["--start", "3", "--end", "2"],
    "no GPU '9'": ["--gpus", "9"],
    "cannot be read": ["--json_data_path", "nothing.json"],
    "not found": ["--model", "./nothing"],
    "no folder of pictures": ["--model_type", "llava_v15_v", "--image_data_path", "nothing"],
    "family qwen2_vl, this is llava": ["--model_type", "qwen2_vl_t"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    assert allocate(base, annotations(mixed_rows()), tmp_path / "out", "t", *BAD[message]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_empty_selections(
    base: Path, annotations: Write, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = annotations([text_record(1)])
    assert allocate(base, data, tmp_path / "out", "v", pictures=pictures) == 2
    assert "no image records among the 1 records" in capsys.readouterr().err
    data = annotations([image_record(1, "broken.png")])
    assert allocate(base, data, tmp_path / "skipped", "v", pictures=pictures) == 2
    assert "every record was skipped" in capsys.readouterr().err


def test_inspect(
    base: Path, annotations: Write, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = annotations(mixed_rows()), tmp_path / "out"
    assert allocate(base, data, out, "v", pictures=pictures) == 0
    capsys.readouterr()
    assert run_cli(lambda: inspect.main([str(out), "--model", str(base)])) == 0
    shown = capsys.readouterr().out
    for part in ("7, 100% with a picture", "all right", "█", "[16 image tokens]", "What colours? ASSISTANT:"):
        assert part in shown, part
    assert run_cli(lambda: inspect.main([str(out), "--model", str(base), "--sample", "7"])) == 2
    shard = next(out.glob("rows-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run_cli(lambda: inspect.main([str(out)])) == 2
    assert "checksum" in capsys.readouterr().err
    assert run_cli(lambda: inspect.main([str(tmp_path / "nothing")])) == 2

"""`inspect` on corpora that it cannot show as text, and on those that name a model it finds by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus_support import Write, allocate, text_record

from eagle.ge_data import inspect, progress
from eagle.ge_data.folder import finished
from eagle.ge_data.inspect import ASK
from eagle.hidden_states.index import load_index
from eagle.hidden_states.shards import Source, write_shard
from llava.errors import run_cli

from ..hidden_states.test_shards import H, make_sample


def corpus(folder: Path, family: str = "llava", model: str = "tiny") -> Path:
    write_shard(folder, 0, 1, [(0, make_sample("a", 5, 2))], [], Source(family, model, None, "bfloat16", H, 100, 99))
    return folder


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_a_check_that_takes_long_shows_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, patience: float, shown: bool
) -> None:
    """`inspect` over all shards, and the allocation over those that it has no checksum of."""
    monkeypatch.setattr(progress, "CHECKSUM_DELAY", patience)
    folder = corpus(tmp_path)
    said: list[str] = []
    assert [shard.file for shard in finished(folder, said.append)] == ["rows-00000000-00000001.safetensors"]
    assert ("checksums: 100%" in capsys.readouterr().err) is shown and len(said) == 1
    assert inspect.check(folder, load_index(folder)) == 0
    assert ("checksums: 100%" in capsys.readouterr().err) is shown


@pytest.mark.parametrize("more", [[], ["--model", "x"]])
def test_an_unknown_family_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    folder = corpus(tmp_path, family="mamba")
    assert run_cli(lambda: inspect.main([str(folder), *more])) == 2
    assert capsys.readouterr().err == (
        "error: unknown family of models: mamba (known: llava, llava_next, qwen2_vl, qwen2_5_vl)\n"
    )


def test_the_model_that_the_shards_name_is_found(
    base: Path, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert allocate(base, annotations([text_record(1)]), tmp_path / "out") == 0
    for here, expected in ((base.parent, "Name two rivers. ASSISTANT:"), (tmp_path, ASK)):
        monkeypatch.chdir(here)
        capsys.readouterr()
        assert run_cli(lambda: inspect.main([str(tmp_path / "out")])) == 0
        assert expected in " ".join(capsys.readouterr().out.split())


def test_a_named_model_that_is_no_model_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name by chance: the corpus is whole, so the status is good."""
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = corpus(tmp_path / "out")
    assert run_cli(lambda: inspect.main([str(folder)])) == 0
    assert f"{ASK} (" in capsys.readouterr().out
    assert run_cli(lambda: inspect.main([str(folder), "--model", "tiny"])) == 2
    assert run_cli(lambda: inspect.main([str(folder), "--sample", "1"])) == 2

"""The benchmark of the allocation, whole, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_llava import make_image, make_liuhaotian

from experiments.allocation import main
from llava.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("allocation")
    make_liuhaotian(made / "base")
    make_image(made / "a.png")
    rows = [
        {"id": str(n), **({"image": "a.png"} if n % 2 else {}), "conversations": [
            {"from": "human", "value": ("<image>\n" if n % 2 else "") + "What is it?"},
            {"from": "gpt", "value": "A bar. " * (1 + n)}]}
        for n in range(16)
    ]  # fmt: skip
    (made / "rows.json").write_text(json.dumps(rows))
    return made


def options(folder: Path, *more: str) -> list[str]:
    return ["--model", str(folder / "base"), "--json-data-path", str(folder / "rows.json"), "--rows", "8",
            "--shard-size", "4", *more]  # fmt: skip


@pytest.mark.parametrize("pictures", [False, True])
@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_both_ways_read_the_same_rows(folder: Path, pictures: bool, kind: str) -> None:
    out = folder / f"{pictures}-{kind}.json"
    more = ["--image-data-path", str(folder)] if pictures else []
    assert main(options(folder, *more, "--hidden-dtype", kind, "--out", str(out))) == 0
    found = json.loads(out.read_text())
    assert found["samples"] == 8 and len(found["ratios"]) == 1
    assert bool(found["image_tokens"]) == pictures
    one, batched = (rate["tokens_per_second"] / rate["samples_per_second"] for rate in found["rates"].values())
    assert one == pytest.approx(batched), "tokens of a sample are the same both ways"
    assert found["bytes_per_token"] > 0 and found["hardware"]["cpu"]


def test_too_few_rows_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="8 text rows, 9 asked for"):
        main(options(folder, "--rows", "9"))

"""Damage to the files of a corpus. Does not import pytest.

`FLIPS` and `CUTS` damage the bytes of files; `REWRITES` make whole shards that hold something else; `INDEXES` do the
same to ``index.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eagle.hidden_states.index import INDEX

FIRST = "rows-00000000-00000003.safetensors"
Damage = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]
About = dict[str, Any]


def header_length(path: Path) -> int:
    """Bytes of a safetensors file before the tensors."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flip(name: str, part: str, seed: int) -> Damage:
    """Flips a random bit of a file, in its ``part``: length, header, data or all."""

    def damage(folder: Path) -> None:
        path, rng = folder / name, Random(f"{name} {part} {seed}")
        content = bytearray(path.read_bytes())
        header = header_length(path) if part != "all" else 0
        low, high = {"length": (0, 8), "header": (8, header), "data": (header, len(content)), "all": (0, len(content))}[
            part
        ]
        content[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    return damage


def cut(name: str, keep: Callable[[int, int], int]) -> Damage:
    """Keeps the first ``keep(header, size)`` bytes of a file."""

    def damage(folder: Path) -> None:
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[: keep(header_length(path), len(content))])

    return damage


def rewrite(change: Callable[[Tensors, About], Any]) -> Damage:
    """Rewrites the first shard with changed tensors or header, and deletes the index."""

    def damage(folder: Path) -> None:
        path = folder / FIRST
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["msd"])
        tensors = load_file(path)
        changed = change(tensors, about)
        save_file(tensors, path, metadata={"msd": changed if isinstance(changed, str) else json.dumps(about)})
        (folder / INDEX).unlink()

    return damage


def index(change: Callable[[About], Any]) -> Damage:
    """Changes ``index.json``. If ``change`` returns bytes, they become its content."""

    def damage(folder: Path) -> None:
        path = folder / INDEX
        value = json.loads(path.read_text())
        changed = change(value)
        path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(value).encode())

    return damage


def put(*keys: Any, value: Any) -> Callable[..., None]:
    """A change that sets the item ``keys`` of the last argument."""

    def change(*given: Any) -> None:
        place = given[-1]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[..., None]:
    """A change that deletes the item ``keys`` of the last argument."""

    def change(*given: Any) -> None:
        place = given[-1]
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors, About], None]:
    def changed(tensors: Tensors, about: About) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return changed


def without(name: str) -> Callable[[Tensors, About], None]:
    def changed(tensors: Tensors, about: About) -> None:
        del tensors[name]

    return changed


def other_dtype(old: torch.Tensor) -> torch.Tensor:
    return old.to(torch.float32 if old.dtype != torch.float32 else torch.float64)


def shorter(old: torch.Tensor) -> torch.Tensor:
    return old[:-1]


def wider(old: torch.Tensor) -> torch.Tensor:
    return old.unsqueeze(-1).expand(*old.shape, 2)


def moved(old: torch.Tensor) -> torch.Tensor:
    """Other values with the same sum."""
    return old + torch.tensor([1, -1] + [0] * (len(old) - 2), dtype=old.dtype)


FLIPS: dict[str, Damage] = {
    f"{part} {seed}": flip(FIRST, part, seed)
    for part, times in (("length", 8), ("header", 30), ("data", 12))
    for seed in range(times)
}
FLIPS.update({f"index {seed}": flip(INDEX, "all", seed) for seed in range(40)})

CUTS: dict[str, Damage] = {
    "to nothing": cut(FIRST, lambda header, size: 0),
    "to one byte": cut(FIRST, lambda header, size: 1),
    "to the length": cut(FIRST, lambda header, size: 8),
    "in the header": cut(FIRST, lambda header, size: header // 2),
    "to the header": cut(FIRST, lambda header, size: header),
    "in the data": cut(FIRST, lambda header, size: (header + size) // 2),
    "by one byte": cut(FIRST, lambda header, size: size - 1),
    "more at the end": lambda folder: (folder / FIRST).write_bytes((folder / FIRST).read_bytes() + b"\0") and None,
    "index to nothing": cut(INDEX, lambda header, size: 0),
    "index in the middle": cut(INDEX, lambda header, size: size // 2),
}

TENSORS = (
    "lengths", "image_lengths", "input_ids", "loss_mask", "image_mask", "hidden", "image_features", "grid_lengths",
    "image_grids",
)  # fmt: skip
REWRITES: dict[str, Damage] = {
    **{f"{name} {change.__name__}": rewrite(tensor(name, change))
       for name in TENSORS for change in (other_dtype, shorter, wider)},
    **{f"no {name}": rewrite(without(name)) for name in TENSORS},
    "negative lengths": rewrite(tensor("lengths", lambda old: torch.tensor([-1, int(old.sum()) + 1]).int())),
    "image lengths moved": rewrite(tensor("image_lengths", moved)),
    "grid lengths moved": rewrite(tensor("grid_lengths", moved)),
    "grids of more tokens": rewrite(tensor("image_grids", lambda old: old * 2)),
    "negative grids": rewrite(tensor("image_grids", lambda old: old * torch.tensor([-1, -1, 1]).int())),
    "no JSON": rewrite(lambda tensors, about: "{'schema': 2}"),
    "JSON list": rewrite(lambda tensors, about: "[2]"),
    "JSON null": rewrite(lambda tensors, about: "null"),
    "JSON too deep": rewrite(lambda tensors, about: "[" * 100_000),
    "JSON with a huge number": rewrite(lambda tensors, about: '{"schema": ' + "9" * 5000 + "}"),
    **{f"about without {name}": rewrite(drop(name))
       for name in ("schema", "source", "start", "samples", "skipped", "tokens")},
    **{f"source without {name}": rewrite(drop("source", name))
       for name in ("family", "dtype", "hidden_size", "hidden_dtype", "regeneration", "layer_fingerprint")},
    "schema as text": rewrite(put("schema", value="2")),
    "schema true": rewrite(put("schema", value=True)),
    "source a list": rewrite(put("source", value=[1])),
    "unknown field": rewrite(put("more", value=1)),
    "unknown dtype": rewrite(put("source", "dtype", value="int4")),
    "dtype a list": rewrite(put("source", "dtype", value=["bfloat16"])),
    "unknown hidden dtype": rewrite(put("source", "hidden_dtype", value="int4")),
    "regeneration a text": rewrite(put("source", "regeneration", value="yes")),
    "regeneration with nan": rewrite(put("source", "regeneration", value={
        "draft": None, "draft_fingerprint": None, "temperature": float("nan"), "seed": None, "max_new_tokens": 5})),
    "size a float": rewrite(put("source", "hidden_size", value=8.0)),
    "another size": rewrite(put("source", "hidden_size", value=9)),
    "samples a number": rewrite(put("samples", value=2)),
    "sample without id": rewrite(put("samples", 0, value={"row": 0})),
    "sample id a number": rewrite(put("samples", 0, "id", value=5)),
    "one sample more": rewrite(lambda tensors, about: about["samples"].append({"row": 9, "id": "z"})),
    "skipped without reason": rewrite(put("skipped", 0, value={"row": 0, "id": "a"})),
    "other tokens": rewrite(put("tokens", value=999)),
    "negative start": rewrite(put("start", value=-1)),
    "no range": rewrite(put("end", value=0)),
    "overlap": rewrite(put("end", value=5)),
}  # fmt: skip

INDEXES: dict[str, Damage] = {
    "a list": index(lambda value: b"[]"),
    "null": index(lambda value: b"null"),
    "a number": index(lambda value: b"2"),
    "not UTF-8": index(lambda value: b'{"schema": 2, "model": "\xff"}'),
    "too deep": index(lambda value: b"[" * 100_000),
    "huge number": index(lambda value: b'{"schema": ' + b"9" * 5000 + b"}"),
    **{
        f"without {name}": index(drop(name))
        for name in ("schema", "family", "hidden_dtype", "layer_fingerprint", "counts", "shards")
    },
    **{f"shard without {name}": index(drop("shards", 0, name)) for name in ("file", "start", "bytes", "sha256")},
    "unknown field": index(put("more", value=1)),
    "shards a text": index(put("shards", value="rows")),
    "shards numbers": index(put("shards", value=[1, 2])),
    "counts wrong": index(put("counts", "tokens", value=1)),
    "counts a list": index(put("counts", value=[])),
    "samples wrong": index(put("shards", 0, "samples", value=7)),
    "skipped wrong": index(put("shards", 0, "skipped", value={"text": 1})),
    "skipped a list": index(put("shards", 0, "skipped", value=["empty"])),
    "bytes wrong": index(put("shards", 0, "bytes", value=10)),
    "start a text": index(put("shards", 0, "start", value="0")),
    "end before start": index(put("shards", 1, "end", value=1)),
    "another checksum": index(put("shards", 0, "sha256", value="0" * 64)),
    "checksum of no form": index(put("shards", 0, "sha256", value="abc")),
    "file elsewhere": index(put("shards", 0, "file", value="../" + FIRST)),
    "file absolute": index(put("shards", 0, "file", value="/etc/passwd")),
    "file a number": index(put("shards", 0, "file", value=5)),
    "shard that is not there": index(put("shards", 1, "file", value="rows-00000077-00000078.safetensors")),
    "shard twice": index(lambda value: value["shards"].append(value["shards"][0])),
    "another model": index(put("model", value="other")),
    "another hidden dtype": index(lambda value: value.update(hidden_dtype=None if value["hidden_dtype"] else "int8")),
    "another vocabulary": index(put("vocab_size", value=101)),
}

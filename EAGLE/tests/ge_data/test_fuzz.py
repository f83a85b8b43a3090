"""Damaged input of every kind: records, annotation files, pictures, shards and indexes are skipped or refused with a
reason; nothing escapes as another exception and nothing passes unseen. Always the same damage."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pytest
from corpus_support import Write, allocate, rows_of, text_record
from mangle_files import CUTS, FLIPS, INDEXES, REWRITES, Damage
from mangle_records import HALF, Record, good_record, junk_somewhere, make_pictures, mangled_records
from tiny_llava import make_liuhaotian
from tiny_stock import make_qwen

from eagle.conversations import (
    REASONS,
    ROLES,
    Unusable,
    claims_pictures,
    count_unknown_keys,
    image_names,
    read_conversation,
)
from eagle.families import Target, load_target, template_of
from eagle.families.template import Prepared, Template
from eagle.ge_data import allocation, inspect
from eagle.ge_data.annotations import RecordFile, iter_records
from eagle.ge_data.convert import convert
from eagle.ge_data.folder import SETTINGS
from eagle.hidden_states.index import INDEX, Index
from eagle.hidden_states.shards import ShardDataset, Skipped, Source, write_shard
from llava.errors import UserError, run_cli

from ..hidden_states.test_shards import H, make_sample

SEED = 20
MAX_LENGTH = 400


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("fuzz") / "pictures")


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    make = {"llava": make_liuhaotian, "qwen2_vl": make_qwen}[request.param]
    folder = make(tmp_path_factory.mktemp(request.param) / "base")
    loaded = load_target(folder, dtype="float32")
    loaded.folder = folder  # type: ignore[attr-defined]
    return loaded


def allocate_all(target: Any, data: Path, out: Path, kind: str, photos: Path) -> int:
    family = {"llava": "llava_v15"}.get(target.family, target.family)
    flags = ["--outdir", str(out), "--model_type", f"{family}_{kind}", "--model", str(target.folder), "--gpus", "cpu"]
    flags += ["--image_data_path", str(photos), "--json_data_path", str(data), "--max-length", str(MAX_LENGTH)]
    return run_cli(lambda: allocation.main(flags))


def test_every_mangled_row_is_skipped_with_its_reason(
    target: Target, annotations: Write, photos: Path, tmp_path: Path
) -> None:
    mangled = mangled_records(SEED, each=10)
    assert len(mangled) >= 200
    rng = Random(SEED)
    records: list[tuple[Record, str, str | None]] = [tuple(one) for one in mangled]
    records += [(good_record(rng, kind), kind, None) for kind in "tv" for _ in range(8)]
    rng.shuffle(records)
    data = annotations([record for record, _, _ in records])
    for kind in "tv":
        out = tmp_path / kind
        assert allocate_all(target, data, out, kind, photos) == 0
        good, _ = rows_of(out)
        assert sorted(good) == [n for n, (_, of, reason) in enumerate(records) if of == kind and reason is None]
        skipped = {}
        for line in (out / "skipped.jsonl").read_text().splitlines():
            entry = json.loads(line)
            assert len(entry["id"]) <= 256
            skipped[entry["row"]] = entry["reason"]
        assert skipped == {n: reason for n, (_, of, reason) in enumerate(records) if of == kind and reason is not None}


def outcome(template: Template, record: Record, photos: Path, keep_answers: bool = True) -> str | None:
    """Why a record is skipped; None if it is used."""
    try:
        conversation = read_conversation(record, 3, keep_answers)
        if keep_answers:
            assert isinstance(template.prepare(conversation, photos, MAX_LENGTH), Prepared)
        else:
            template.outline(conversation, photos, MAX_LENGTH)
    except Unusable as unusable:
        return unusable.reason
    return None


def well_formed(record: Record, photos: Path) -> bool:
    """Whether a record with two questions is one that may be used; written apart from the code under test."""
    turns = record.get("conversations")
    if (
        not isinstance(turns, list)
        or not isinstance(record.get("id"), str | int | None)
        or isinstance(record["id"], bool)
    ):
        return False
    if not all(isinstance(t, dict) and t.get("from") in list(ROLES) and isinstance(t.get("value"), str) for t in turns):
        return False
    texts = [turn["value"] for turn in turns]
    named = [name for key in ("image", "images") if (name := record.get(key))]
    names = named[0] if named and isinstance(named[0], list) else named
    there = all(isinstance(name, str) and name in ("a.png", "b.png") for name in names)
    return there and HALF not in "".join(texts) and "".join(texts).count("<image>") == len(names)


def test_junk_at_random_places_is_never_used(target: Target, photos: Path) -> None:
    template, used, reasons = template_of(target), 0, set()
    for seed in range(500):
        record = junk_somewhere(Random(seed))
        for keep_answers in (True, False):
            reason = outcome(template, record, photos, keep_answers)
            reasons.add(reason)
            if keep_answers and reason is None:
                used += 1
                assert well_formed(record, photos), record
    assert 5 < used < 200, "some junk is harmless: another id, no id, a word as an answer"
    assert {"id", "no_conversation", "text", "image_name", "missing_picture", "no_mark"} <= reasons <= {*REASONS, None}


FORMS: list[Record] = [
    {"id": "a", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]},
    {"id": 3, "items": [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "Hi"},
                        {"from": "chatgpt", "value": "Hello."}], "model": "m"},
    {"images": ["a.png"], "system": "S", "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "Red."}]},
    {"messages": [
        {"role": "system", "content": [{"type": "text", "text": "S"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                     {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]},
]  # fmt: skip
ODD = (None, True, -1, 0, 0.5, 10**40, float("nan"), "", "x", "<image>", HALF, [], [1], [[]], [{}], {}, {"a": 1})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all keys and list places inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_any_json_anywhere_in_every_form_of_a_record(annotations: Write, photos: Path, tmp_path: Path) -> None:
    """A conversation or a reason, also after it was converted."""
    rows: list[Record] = []
    for form in FORMS:
        for place in places(form):
            for odd in ODD:
                row = deepcopy(form)
                inner: Any = row
                for key in place[:-1]:
                    inner = inner[key]
                inner[place[-1]] = odd
                rows.append(row)

    def outcome_of(row: Record, number: int) -> Any:
        count_unknown_keys(row, Counter())
        claims_pictures(row)
        try:
            found = read_conversation(row, number)
        except Unusable as unusable:
            return unusable.reason
        assert found.turns and all(isinstance(text, str) for turn in found.turns for text in turn)
        return found

    found = [outcome_of(row, number) for number, row in enumerate(rows)]
    assert len(rows) > 600 and 50 < sum(not isinstance(each, str) for each in found) < len(rows) - 200
    assert convert(annotations(rows), tmp_path / "out.json")[0] == len(rows)
    fixed = list(iter_records(tmp_path / "out.json"))
    again = [outcome_of(row.value, number) for number, row in enumerate(fixed)]
    for row, first, second in zip(rows, found, again, strict=True):  # a skipped row may get another reason
        assert first == second or (isinstance(first, str) and isinstance(second, str)), row


SPELLED = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|>",
           "<unk>", "<pad>", "<s>", "</s>", "<|im_end|>", "<|im_start|>", "\x00", "\ufffd", "\u2581", "\u200b",
           "\ufeff")  # fmt: skip


def test_text_that_spells_special_tokens(target: Target, annotations: Write, photos: Path, tmp_path: Path) -> None:
    """It is used as text or skipped, and it never passes for a picture."""
    records = []
    for number, text in enumerate(SPELLED):
        records += [text_record(number), good_record(Random(number), "v")]
        records[-2]["conversations"][number % 4]["value"] += f" {text} and"
        records[-1]["conversations"][number % 4]["value"] += f" {text} and"
    data = annotations(records)
    for kind in "tv":
        assert allocate_all(target, data, tmp_path / kind, kind, photos) == 0
        dataset = ShardDataset(tmp_path / kind)
        assert set(dataset.meta.skipped) <= {"text"}
        assert all(bool(sample.image_mask.any()) == (kind == "v") for sample in dataset)
        if target.family == "qwen2_vl":
            assert dataset.meta.skipped == {"text": 3}


BAD_FILES = ("", "null", "5", '"rows"', "{}", '{"rows": []}', "[5]", '["row"]', "[null]", "[[]]", '[[{"id": 1}]]',
             '[{"id": 1}, 5]', "[{]", '[{"id": 1}', '[{"id": }]', "[{'id': 1}]", '[{"id": 01}]', '[{"id": 1},]',
             '[{"id": 1}]]', '[{"id": ' + "9" * 5000 + "}]", '[{"id": ' + "[" * 100_000 + "}]", '[{"a" 1}]',
             '[{"id": "\x01"}]', '[{"id": "\\ud8"}]', '[{"id": 1}{"id": 2}]')  # fmt: skip


@pytest.mark.parametrize("text", BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_that_is_no_list_of_rows_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "records.json"
    path.write_text(text)
    assert allocate(base, path, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: annotation file") and str(path) in error[0]


def test_flipped_bits_in_an_annotation_file(tmp_path: Path) -> None:
    """Each is refused with its place, or gives records that are used or skipped."""
    rng = Random(SEED)
    records = [good_record(rng, kind) for kind in "tvtv"]
    whole = json.dumps(records, ensure_ascii=False).encode()
    path, refused = tmp_path / "records.json", 0
    for _ in range(300):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            file = RecordFile(path)
        except UserError as error:
            refused += 1
            assert "byte" in str(error)
            continue
        for number in range(len(file)):
            try:
                read_conversation(file[number], number)
            except Unusable as unusable:
                assert unusable.reason in REASONS
    assert 30 < refused < 290


def test_conversion_passes_damage_on(annotations: Write, tmp_path: Path) -> None:
    """It repairs names and ids and leaves the rest to the allocation, record for record: none that has to be skipped
    becomes a good one."""
    records = [record for record, _, _ in mangled_records(SEED, each=3)] + [
        junk_somewhere(Random(seed)) for seed in range(100)
    ]
    assert convert(annotations(records), tmp_path / "out.json")[0] == len(records)
    fixed = list(iter_records(tmp_path / "out.json"))
    assert len(fixed) == len(records)

    def used(record: Record, number: int) -> Any:
        try:
            return read_conversation(record, number)
        except Unusable as unusable:
            return unusable.reason

    found = [used(record, number) for number, record in enumerate(records)]
    assert [used(record.value, number) for number, record in enumerate(fixed)] == found
    assert {"id", "no_conversation", "empty", "image_name"} < {reason for reason in found if isinstance(reason, str)}
    whole = [type(record.get("id")) in (int, str, type(None)) for record in records]
    assert [isinstance(record.value["id"], str) for record in fixed] == whole and not all(whole)


@pytest.fixture(scope="module", params=["int8", "16 bit"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards; the first one has two samples and a skipped record."""
    hidden_dtype = "int8" if request.param == "int8" else None
    source = Source("llava", "tiny", None, "bfloat16", H, 100, 99, None, hidden_dtype)
    folder = tmp_path_factory.mktemp("corpus") / "whole"
    records = [(number, make_sample(f"s{number}", 5 + number, 1 + number)) for number in range(4)]
    infos = [
        write_shard(folder, 0, 3, records[:2], [Skipped(9, "x", "empty")], source),
        write_shard(folder, 3, 5, records[2:], [], source),
    ]
    Index.of(source, infos).save(folder)
    return folder


DAMAGES = {**FLIPS, **CUTS, **REWRITES, **{f"index: {name}": damage for name, damage in INDEXES.items()}}


def read_all(folder: Path) -> bool:
    """Whether training could read it to the end; a UserError is the only other way out."""
    try:
        data = ShardDataset(folder)
        for sample in data:
            assert len(sample.hidden) == len(sample.input_ids) == len(sample.loss_mask)
            assert len(sample.image_features) == int(sample.image_mask.sum())
        assert len(data.lengths()) == len(data.image_lengths()) == len(data)
    except UserError:
        return False
    return True


def only_checksums_differ(whole: Path, folder: Path) -> bool:
    """What training has no time to compare, and inspect does."""
    first, second = (json.loads((one / INDEX).read_text()) for one in (whole, folder))
    for shard in (*first["shards"], *second["shards"]):
        del shard["sha256"]
    return first == second


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_to_a_corpus_is_found(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    damage: Damage = DAMAGES[name]
    damage(folder)
    readable = read_all(folder)
    capsys.readouterr()
    assert run_cli(lambda: inspect.main([str(folder)])) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and str(folder) in error[0]
    assert not readable or name.startswith("data ") or only_checksums_differ(corpus, folder)


def test_the_corpus_itself_is_whole(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(lambda: inspect.main([str(corpus)])) == 0
    assert "all right" in capsys.readouterr().out and read_all(corpus)


STARTS: dict[str, Damage] = {
    **{f"index: {name}": damage for name, damage in INDEXES.items()},
    "settings a list": lambda folder: (folder / SETTINGS).write_text("[]") and None,
    "settings no JSON": lambda folder: (folder / SETTINGS).write_text("{") and None,
    "settings empty": lambda folder: (folder / SETTINGS).write_text("{}") and None,
    "settings of lists": lambda folder: (folder / SETTINGS).write_text('{"seed": [[1]], "rows": {}}') and None,
    "settings missing": lambda folder: (folder / SETTINGS).unlink(),
}


@pytest.fixture(scope="module")
def begun(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    (folder / "records.json").write_text(json.dumps([text_record(n) for n in range(5)]))
    assert allocate(base, folder / "records.json", folder / "out", "t", "--shard-size", "2", "--limit", "4") == 0
    return folder


@pytest.mark.parametrize("name", STARTS)
def test_a_run_in_a_damaged_folder_refuses_or_repairs(
    base: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(begun / "out", out)
    STARTS[name](out)
    capsys.readouterr()
    status = allocate(base, begun / "records.json", out, "t", "--shard-size", "2")
    if status:
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and str(out) in errors[0]
    else:
        assert sorted(rows_of(out)[0]) == list(range(5)), "each record once"
        assert json.loads((out / INDEX).read_text())["counts"]["samples"] == 5


def test_names_that_only_look_strange_are_allowed() -> None:
    for name in ("a..png", "x/..a/b.png", "..x.png", "日.png"):
        assert image_names({"image": name}) == (name,)

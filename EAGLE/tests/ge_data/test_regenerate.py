"""The target's own answers: what stock generation says, the right tokens in the mask, the same on any way there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_support import TOKENS, Write, image_record, regenerate, rows_of, text_record, turns
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian, make_llava_hf
from tiny_stock import make_qwen

from eagle.conversations import Unusable, read_conversation
from eagle.decode.msd import MSDModel
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.families import Target, load_target, template_of
from eagle.families.template import Prepared, Turn
from eagle.ge_data import inspect
from eagle.ge_data.regenerate import Regenerator
from eagle.hidden_states.index import load_index
from eagle.hidden_states.shards import Sample, ShardDataset
from eagle.hidden_states.source import Regeneration
from llava.errors import OutOfMemory, run_cli

MAKERS: dict[str, Any] = {
    "liuhaotian": make_liuhaotian,
    "llava_hf": make_llava_hf,
    "qwen2_vl": make_qwen,
    "qwen2_5_vl": lambda folder: make_qwen(folder, version="2.5"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed, (name, width, height) in enumerate((("a.png", 60, 60), ("b.png", 112, 60))):
        make_image(folder / name, width, height, seed)
    return folder


@pytest.fixture(scope="module", params=MAKERS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A tiny target of each layout and family."""
    base = MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "base")
    loaded = load_target(base, dtype="float32")
    loaded.folder = base  # type: ignore[attr-defined]
    loaded.draft = make_draft(base.parent / "draft", loaded, seed=1, agree=1.0)  # type: ignore[attr-defined]
    return loaded


def runs(mask: torch.Tensor) -> list[tuple[int, int]]:
    """[start, end) of the unbroken runs of a mask [S]."""
    edges = torch.cat([torch.zeros(1), mask.float(), torch.zeros(1)]).diff()
    return list(zip(edges.eq(1).nonzero().flatten().tolist(), edges.eq(-1).nonzero().flatten().tolist(), strict=True))


def stock_answer(target: Target, sample: Sample | Prepared, start: int, images: list[Path], limit: int) -> list[int]:
    """What transformers' own `generate` says after the first ``start`` ids."""
    inputs = target.prepare(target.chat_prompt("x", len(images)), images) if images else {}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs.pop(name, None)
    ids = sample.input_ids[None, :start]
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == target.config.image_token_id).int()
    mask = torch.ones_like(ids)
    said = target.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=limit, **inputs)
    return said[0, start:].tolist()


def assert_same(first: ShardDataset, second: ShardDataset) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.id == other.id
        for name in ("input_ids", "loss_mask", "image_mask", "hidden", "image_features"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_answers_are_those_of_stock_generation(
    target: Target, annotations: Write, photos: Path, tmp_path: Path
) -> None:
    """For each turn, from the ids that stand before it; and as many turns as questions, the last one unanswered."""
    rows = [image_record(n, ("a.png", "b.png")[n % 2]) for n in range(3)]
    rows[2]["conversations"].append({"from": "human", "value": "Nothing else?"})
    assert regenerate(target, annotations(rows), tmp_path / "out", "v", pictures=photos) == 0
    dataset = ShardDataset(tmp_path / "out")
    assert len(dataset) == 3
    for sample in dataset:
        spans = runs(sample.loss_mask)
        assert len(spans) == (3 if sample.id == "2" else 2)
        for start, end in spans:
            picture = photos / ("a.png", "b.png")[int(sample.id) % 2]
            assert sample.input_ids[start:end].tolist() == stock_answer(target, sample, start, [picture], TOKENS)


def test_questions_stand_as_at_inference(target: Target, annotations: Write, photos: Path, tmp_path: Path) -> None:
    assert regenerate(target, annotations([image_record(0)]), tmp_path / "out", "v", pictures=photos) == 0
    sample = ShardDataset(tmp_path / "out")[0]
    (first, end), (second, _) = runs(sample.loss_mask)
    asked = target.prepare(target.chat_prompt("What colours?", 1), [photos / "a.png"])["input_ids"][0]
    assert torch.equal(sample.input_ids[:first], asked)
    between = target.tokenizer.decode(sample.input_ids[end:second]).replace("</s> ", "</s>")
    chat = target.chat_prompt("More?", 0, [("What colours?", "Red.")], None)
    assert between == chat[chat.index("Red.") + len("Red.") :]
    assert "No, only red" not in target.tokenizer.decode(sample.input_ids)


def test_same_with_and_without_draft(target: Any, annotations: Write, photos: Path, tmp_path: Path) -> None:
    """In float32, greedy. The draft must have helped, or the comparison says nothing."""
    data = annotations([image_record(n, ("a.png", "b.png")[n % 2]) for n in range(2)])
    plain, drafted = tmp_path / "plain", tmp_path / "drafted"
    assert regenerate(target, data, plain, "v", pictures=photos) == 0
    assert regenerate(target, data, drafted, "v", "--msd-model", str(target.draft), pictures=photos) == 0
    assert_same(ShardDataset(plain), ShardDataset(drafted))
    with_draft = MSDModel(target, load_draft(target.draft), TreeConfig(depth=1, top_k=64, total_tokens=128))
    accepted = 0
    for n in range(2):
        row = text_record(n, n + 1)
        alone, together = (prepared(model, row, photos, limit=24) for model in (target, with_draft))
        assert torch.equal(alone.input_ids, together.input_ids) and torch.equal(alone.loss_mask, together.loss_mask)
        prompt = target.prepare(target.chat_prompt(row["conversations"][0]["value"]))
        accepted += sum(with_draft.generate(**prompt, max_new_tokens=24, temperature=0.0).stats.accept_lengths)
    assert accepted > 0


def test_states_are_those_of_the_stored_ids(llava: Target, annotations: Write, photos: Path, tmp_path: Path) -> None:
    assert regenerate(llava, annotations([image_record(0)]), tmp_path / "out", "v", pictures=photos) == 0
    sample = ShardDataset(tmp_path / "out")[0]
    pixels = llava.processor.pixel_values([photos / "a.png"])
    with torch.no_grad():
        states = llava.model.model(input_ids=sample.input_ids[None], pixel_values=pixels).last_hidden_state[0]
    torch.testing.assert_close(sample.hidden.float(), states, rtol=2**-7, atol=1e-4)


def prepared(
    model: Target | MSDModel, row: dict[str, Any], folder: Path, limit: int = TOKENS, max_length: int = 400
) -> Prepared:
    """A row with the target's own greedy answers."""
    msd = model if isinstance(model, MSDModel) else MSDModel(model)
    template, settings = template_of(msd.target), Regeneration(None, None, 0.0, None, limit)
    outline = template.outline(read_conversation(row, 0, keep_answers=False), folder, max_length)
    ((_, made),) = Regenerator(msd, template, settings, max_length).answered([outline], [0])
    if isinstance(made, Unusable):
        raise made
    return made


def saying(target: Target, token: int, instead: int) -> Target:
    """A copy of the target that says ``token`` where it said ``instead``."""
    other = copy.copy(target)
    other.model = copy.deepcopy(target.model)
    head = other.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[token] = 1.001 * head.weight[instead]
    return other


ROW = {"id": "r", "conversations": turns("Name two rivers.", "The Nile.", "And?", "That is all.")}


def end_of_turn(target: Target) -> int:
    return target.eos_token_ids[0]


def test_an_answer_that_ends_counts_its_end_token(target: Target, tmp_path: Path) -> None:
    plain = prepared(target, ROW, tmp_path)
    first, _ = runs(plain.loss_mask)[0]
    answer = plain.input_ids[first : first + TOKENS].tolist()
    place = next(n for n in range(1, TOKENS) if answer[n] not in answer[:n])
    ending = saying(target, end_of_turn(target), answer[place])
    made = prepared(ending, ROW, tmp_path)
    start, end = runs(made.loss_mask)[0]
    assert start == first and made.input_ids[start:end].tolist() == [*answer[:place], end_of_turn(target)]
    assert made.input_ids.tolist().count(end_of_turn(target)) == plain.input_ids.tolist().count(end_of_turn(target))


def test_an_answer_at_the_limit_leaves_its_end_token_out(target: Target, tmp_path: Path) -> None:
    """The end token stands in the sequence, but nothing learns to say it there; later turns follow."""
    made = prepared(target, ROW, tmp_path, limit=5)
    spans = runs(made.loss_mask)
    assert [end - start for start, end in spans] == [5, 5]
    for _, end in spans:
        assert int(made.input_ids[end]) == end_of_turn(target) and not made.loss_mask[end]
    assert len(made.input_ids) == spans[-1][1] + 1


def test_another_end_token_does_not_count(target: Target, tmp_path: Path) -> None:
    plain = prepared(target, ROW, tmp_path)
    first, _ = runs(plain.loss_mask)[0]
    answer = plain.input_ids[first : first + TOKENS].tolist()
    place = next(n for n in range(1, TOKENS) if answer[n] not in answer[:n])
    other = copy.copy(target)
    other.model = copy.deepcopy(target.model)
    other.model.generation_config.eos_token_id = [end_of_turn(target), answer[place]]
    made = prepared(other, ROW, tmp_path)
    start, end = runs(made.loss_mask)[0]
    assert made.input_ids[start : end + 1].tolist() == [*answer[:place], end_of_turn(target)]


def test_a_conversation_ends_where_it_is_full(llava: Target, photos: Path, tmp_path: Path) -> None:
    whole = prepared(llava, ROW, tmp_path)
    (first, end), (second, _) = runs(whole.loss_mask)
    cut = prepared(llava, ROW, tmp_path, max_length=second + 3)
    assert torch.equal(cut.input_ids, whole.input_ids[: second + 3]) and int(cut.loss_mask.sum()) == TOKENS + 3
    one = prepared(llava, ROW, tmp_path, max_length=second)
    assert torch.equal(one.input_ids, whole.input_ids[: end + 1]), "no half question at the end"
    assert prepared(llava, ROW, tmp_path, max_length=first + 1).loss_mask.sum() == 1
    with pytest.raises(Unusable, match="answer_cut"):
        prepared(llava, ROW, tmp_path, max_length=first)


def test_pictures_of_turns_without_room_are_left_out(target: Target, photos: Path) -> None:
    row = {"image": ["a.png", "b.png"], "conversations": turns("<image> this?", "a", "<image> and this?", "b")}
    whole = prepared(target, row, photos)
    (_, _), (second, _) = runs(whole.loss_mask)
    cut = prepared(target, row, photos, max_length=second)
    for made, names in ((whole, ["a.png", "b.png"]), (cut, ["a.png"])):
        given = target.prepare(target.chat_prompt("x", len(names)), [photos / name for name in names])
        assert torch.equal(made.images["pixel_values"], given["pixel_values"])
        images = given["input_ids"] == target.config.image_token_id
        assert int((made.input_ids == target.config.image_token_id).sum()) == int(images.sum())


def test_answers_that_cannot_be_used(target: Target, tmp_path: Path) -> None:
    plain = prepared(target, ROW, tmp_path)
    said = int(plain.input_ids[runs(plain.loss_mask)[0][0]])
    with pytest.raises(Unusable, match="answer_picture"):
        prepared(saying(target, target.config.image_token_id, said), ROW, tmp_path)
    silent = {"conversations": turns("Name two rivers.")}
    with pytest.raises(Unusable, match="empty"):
        prepared(saying(target, end_of_turn(target), said), silent, tmp_path)


def test_answers_of_the_data_set_are_not_needed() -> None:
    conversation = read_conversation({"conversations": turns("q", "", "r")}, 0, keep_answers=False)
    assert conversation.turns == (("q", ""), ("r", ""))
    marked = {"image": "a.png", "conversations": turns("q", "see <image>")}
    with pytest.raises(Unusable, match="no_mark"):
        read_conversation(marked, 0, keep_answers=False)
    for row in ({"conversations": turns()}, {"conversations": turns()[1:]}):
        with pytest.raises(Unusable, match="empty"):
            read_conversation(row, 0, keep_answers=False)


@pytest.mark.parametrize("drafted", [False, True])
def test_sampling_depends_on_the_seed_and_not_on_the_order(
    llava: Any, annotations: Write, tmp_path: Path, drafted: bool
) -> None:
    data = annotations([text_record(n) for n in range(5)])
    draft = ("--msd-model", str(llava.draft)) if drafted else ()
    warm = ("--temperature", "1.0", *draft)
    assert regenerate(llava, data, tmp_path / "one", "t", *warm) == 0
    assert regenerate(llava, data, tmp_path / "two", "t", *warm, "--shard-size", "2") == 0
    assert regenerate(llava, data, tmp_path / "other", "t", *warm, "--seed", "7") == 0
    assert regenerate(llava, data, tmp_path / "greedy", "t", *draft) == 0
    one = {sample.id: sample.input_ids.tolist() for sample in ShardDataset(tmp_path / "one")}
    assert len(one) > 1
    for name, same in (("two", len(one)), ("other", 0), ("greedy", 0)):
        found = {sample.id: sample.input_ids.tolist() for sample in ShardDataset(tmp_path / name)}
        assert sum(found[key] == one[key] for key in one.keys() & found.keys()) == same, name
    record = load_index(tmp_path / "one").regeneration
    assert record is not None and bool(record.draft_fingerprint) == drafted
    assert record == Regeneration("draft" if drafted else None, record.draft_fingerprint, 1.0, 42, TOKENS)


def test_the_record_names_draft_and_settings(
    llava: Any, annotations: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = annotations([text_record(1)])
    assert regenerate(llava, data, tmp_path / "out", "t", "--msd-model", str(llava.draft)) == 0
    record = load_index(tmp_path / "out").regeneration
    assert record is not None and (record.draft, record.temperature, record.seed) == ("draft", 0.0, None)
    assert record.max_new_tokens == TOKENS and len(record.draft_fingerprint or "") == 16
    capsys.readouterr()
    assert run_cli(lambda: inspect.main([str(tmp_path / "out"), "--model", str(llava.folder)])) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"the model's own: greedy, at most {TOKENS} tokens, draft draft" in shown and "And? ASSISTANT:" in shown


def some_talk(n: int) -> dict[str, Any]:
    """Conversations of 1 to 3 turns, of different lengths, most with pictures."""
    pictures = [[], ["a.png"], ["b.png", "a.png"], ["b.png"]][n % 4]
    asked = [
        f"{'<image>' * (turn < len(pictures))} {'really ' * n} what of {turn}?" for turn in range(max(n % 3 + 1, 2))
    ]
    return {"id": str(n), "image": pictures, "conversations": turns(*(part for text in asked for part in (text, "x")))}


@pytest.mark.parametrize("warmth", [0.0, 1.0])
def test_many_at_once_are_what_each_is_alone(target: Any, photos: Path, warmth: float) -> None:
    template, settings = template_of(target), Regeneration(None, None, warmth, 3, TOKENS)
    outlines = [template.outline(read_conversation(some_talk(n), n, keep_answers=False), photos, 400) for n in range(7)]
    longest = sorted(sum(len(turn.asked) for turn in outline.turns) for outline in outlines)[-1]
    draft = load_draft(target.draft)
    made: dict[int, dict[int, Prepared | Unusable]] = {}
    for at_once, drafted in ((1, None), (3, None), (4, draft), (7, draft)):
        regenerator = Regenerator(MSDModel(target, drafted), template, settings, longest, at_once)
        made[at_once] = dict(regenerator.answered(outlines, list(range(10, 17))))
        assert made[at_once].keys() == set(range(7))
        for place, alone in made[1].items():
            found = made[at_once][place]
            assert type(found) is type(alone)
            if isinstance(found, Prepared) and isinstance(alone, Prepared):
                assert found.id == str(place) and found.input_ids.tolist() == alone.input_ids.tolist()
                assert torch.equal(found.loss_mask, alone.loss_mask) and found.images.keys() == alone.images.keys()
    done = {place: found for place, found in made[7].items() if isinstance(found, Prepared)}
    assert len({len(found.input_ids) for found in done.values()}) > 3
    answers = {place: len(runs(found.loss_mask)) for place, found in done.items()}
    assert any(answers[place] < len(outlines[place].turns) for place in done), "some turn has no room"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory("out of memory with a single token"), MemoryError()],
)
def test_fewer_at_once_where_memory_does_not_suffice(llava: Any, tmp_path: Path, error: Exception) -> None:
    template, settings = template_of(llava), Regeneration(None, None, 0.0, None, TOKENS)
    rows = [{"conversations": turns(f"{'really ' * n}?", "x", "And?", "y")} for n in range(5)]
    outlines = [template.outline(read_conversation(row, 0, keep_answers=False), tmp_path, 400) for row in rows]
    model, sizes = MSDModel(llava), []
    largest = max(len(outline.turns[0].asked) for outline in outlines)

    def generate(input_ids: torch.Tensor, **settings: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2 or input_ids.shape[1] == largest:
            raise error
        return MSDModel.generate(model, input_ids, **settings)

    model_like = copy.copy(model)
    model_like.generate = generate  # type: ignore[method-assign]
    whole = dict(Regenerator(model, template, settings, 400, 1).answered(outlines, range(5)))
    found = dict(Regenerator(model_like, template, settings, 400, 5).answered(outlines, range(5)))
    assert sizes[:4] == [5, 2, 3, 1]
    refused = [place for place, made in found.items() if isinstance(made, Unusable)]
    assert len(refused) == 1 and str(found[refused[0]]) == "too_large"
    for place in found.keys() - set(refused):
        assert torch.equal(found[place].input_ids, whole[place].input_ids)
    with pytest.raises(RuntimeError, match="a defect"):
        error = RuntimeError("a defect")
        list(Regenerator(model_like, template, settings, 400, 5).answered(outlines, range(5)))


def test_stopped_anywhere_and_resumed(
    llava: Any, annotations: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = annotations([text_record(n) for n in range(5)])
    flags = ("--msd-model", str(llava.draft), "--hidden-dtype", "int8")
    assert regenerate(llava, data, tmp_path / "whole", "t", *flags) == 0
    answered, calls = Regenerator.answered, []

    def interrupted(self: Regenerator, *args: Any) -> Iterator[Any]:
        for made in answered(self, *args):
            calls.append(made)
            if len(calls) == 4:
                raise KeyboardInterrupt
            yield made

    monkeypatch.setattr(Regenerator, "answered", interrupted)
    assert regenerate(llava, data, tmp_path / "parts", "t", *flags) == 130
    assert load_index(tmp_path / "parts").samples == 3
    assert regenerate(llava, data, tmp_path / "parts", "t", *flags) == 0
    assert len(calls) == 4 + 2, "finished shards are not made again"
    assert sorted(rows_of(tmp_path / "parts")[0]) == list(range(5))
    assert_same(ShardDataset(tmp_path / "whole"), ShardDataset(tmp_path / "parts"))


def test_the_first_piece_of_a_written_end_is_not_an_end_token(target: Target) -> None:
    """A vocabulary without "</s>" writes it in pieces, and "</" begins many texts."""
    msd, settings = MSDModel(target), Regeneration(None, None, 0.0, None, TOKENS)
    regenerator = Regenerator(msd, template_of(target), settings, 100)
    piece = target.tokenizer("x", add_special_tokens=False)["input_ids"][-1]
    assert piece not in regenerator._ends(Turn([], [piece, piece], 0))
    assert end_of_turn(target) in regenerator._ends(Turn([], [end_of_turn(target)], 0))

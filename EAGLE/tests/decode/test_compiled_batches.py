"""Compiled decoding of batches: the answers of the other path, whenever sequences end, with sizes that recur.

Functions run uncompiled, as in `test_whole_cycle`; `test_compiled` compiles them. With CUDA graphs a forward computes a
power of two of slots: a test takes that path and counts the sizes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_whole_cycle import TREE, Seen, compiled_for, fail_growth, idle_caches, make_pair
from tiny_llava import make_image

from eagle import MSDModel, TreeConfig
from eagle.decode import decoder as decoder_module
from eagle.decode.adaptive.guard import Guard
from eagle.decode.compiled.cycle import CycleRun, Result
from eagle.decode.compiled.engine import LARGEST_BATCH, StaticEngine
from eagle.decode.compiled.static_cache import STEP, StaticCache, buckets, move_rows
from eagle.decode.decoder import Decoder
from eagle.kv_cache import KVCache
from llava import UserError

TEXTS = ["USER: Name two rivers. ASSISTANT:", "USER: [] How many shapes are there? ASSISTANT:", "USER: Hi ASSISTANT:",
         "USER: [] and [] ASSISTANT:"]  # fmt: skip
TOKENS = 30


@pytest.fixture(
    scope="module", params=["llava", *(pytest.param(p, marks=pytest.mark.slow) for p in ("qwen", "qwen block"))]
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    family, *block = request.param.split()
    return make_pair(tmp_path_factory.mktemp(family), family, block=bool(block))


@pytest.fixture(scope="module")
def compiled(pair: MSDModel) -> MSDModel:
    """Padded slots are those of CUDA graphs; a cycle is launched before the last result is looked at. With a Qwen2-VL
    and a head of levels, one slot each."""
    with pytest.MonkeyPatch.context() as patch:
        if pair.target.family == "llava" or pair.draft.block_size > 1:
            init = StaticEngine.__init__

            def with_graphs(self: StaticEngine, *given: Any) -> None:
                init(self, *given)
                self.graphs = True

            patch.setattr(StaticEngine, "__init__", with_graphs)
        model = compiled_for(pair)
    model.warm_up(progress=False, batch_sizes=[3, 4])
    if model._compiled.graphs:
        for cycle in model._compiled._cycles.values():
            cycle.ahead = 1
    return model


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences of each whole cycle."""
    found, launch = [], CycleRun.launch

    def counted(self: CycleRun, *given: Any) -> bool:
        found.append(len(self.answers))
        return launch(self, *given)

    monkeypatch.setattr(CycleRun, "launch", counted)
    return found


def inputs_of(model: MSDModel, texts: list[str] = TEXTS) -> dict[str, torch.Tensor]:
    mark = "<image>\n" if model.target.family == "llava" else "<|vision_start|><|image_pad|><|vision_end|>"
    pictures = [make_image(width=50, height=64, seed=i) for i in range(sum(text.count("[]") for text in texts))]
    return model.target.prepare([text.replace("[]", mark) for text in texts], pictures)


def check_same(pair: MSDModel, compiled: MSDModel, inputs: dict[str, torch.Tensor], **settings: Any) -> list[list[int]]:
    """Returns the tokens."""
    settings = {"temperature": 0.0, "max_new_tokens": TOKENS, **settings}
    expected, found = (model.generate(**inputs, **settings) for model in (pair, compiled))
    assert found.tokens == expected.tokens
    assert found.stats.new_tokens == expected.stats.new_tokens
    return found.tokens


def test_sequences_that_end_at_different_times(pair: MSDModel, compiled: MSDModel, runs: list[int]) -> None:
    """By end tokens and by the limit; also the last one is decoded in whole cycles."""
    inputs = inputs_of(pair)
    free = check_same(pair, compiled, inputs)
    assert runs[0] == 4
    ends = [free[0][4], free[3][9]]
    runs.clear()
    ended = check_same(pair, compiled, inputs, eos_token_id=ends)
    assert len({len(tokens) for tokens in ended}) > 1
    assert runs == sorted(runs, reverse=True) and len(set(runs)) > 1
    for limit in (1, 2, 3, 5, 8):
        check_same(pair, compiled, inputs, max_new_tokens=limit)


def test_answers_are_those_of_generate(pair: MSDModel, compiled: MSDModel) -> None:
    batch = compiled.generate(**inputs_of(pair), temperature=0.0, max_new_tokens=TOKENS)
    for number in (0, 2):
        inputs = pair.target.prepare(TEXTS[number])
        answer = pair.target.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0]
        assert batch.tokens[number] == answer[inputs["input_ids"].shape[1] :].tolist()


def test_rows_accept_different_numbers_of_tokens(pair: MSDModel, compiled: MSDModel) -> None:
    """Else the tests here would show little."""
    stats = compiled.generate(**inputs_of(pair), temperature=0.0, max_new_tokens=TOKENS).stats
    assert len(set(stats.accept_lengths)) > 1


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8, "temperature": 0.7}], ids=str)
def test_sampling_by_seeds(pair: MSDModel, compiled: MSDModel, runs: list[int], settings: Any) -> None:
    settings = {"temperature": 1.0, **settings, "seed": [3, 5, 7, 9]}
    tokens = check_same(pair, compiled, inputs_of(pair), **settings)
    assert runs and tokens[0] != tokens[2]
    check_same(pair, compiled, inputs_of(pair), **settings, eos_token_id=tokens[1][6])
    assert len(set(runs)) > 1
    check_same(pair, compiled, inputs_of(pair), **{**settings, "seed": 3, "max_new_tokens": 8})


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"tree": TreeConfig(2, 2, 6)}, {"use_msd": False}],
    ids=str,
)
def test_what_whole_cycles_do_not_serve(pair: MSDModel, compiled: MSDModel, runs: list[int], settings: Any) -> None:
    """It takes the compiled parts."""
    free = check_same(pair, compiled, inputs_of(pair), **settings)
    check_same(pair, compiled, inputs_of(pair), **settings, eos_token_id=[free[1][4], free[2][7]])
    assert not runs


def test_columns_and_caches_grow(pair: MSDModel, compiled: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "NEW_TOKENS", 4)
    pools, grown, grow = (compiled._compiled.target_caches, compiled._compiled.draft_caches), [], StaticCache.grow

    def look(self: StaticCache, capacity: int) -> None:
        before = self.capacity
        grow(self, capacity)
        grown.append(self.capacity > before)

    monkeypatch.setattr(StaticCache, "grow", look)
    for pool in pools:
        pool.batches._free = None
    ids = torch.randint(5, 200, (3, 990), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, : 990 - STEP + 20] = 0
    free = check_same(pair, compiled, {"input_ids": ids, "attention_mask": mask})
    check_same(pair, compiled, {"input_ids": ids, "attention_mask": mask}, eos_token_id=free[0][5])
    assert any(grown)


def test_rows_of_earlier_requests_do_not_matter(pair: MSDModel, compiled: MSDModel) -> None:
    with torch.inference_mode():
        for pool in (compiled._compiled.target_caches, compiled._compiled.draft_caches):
            cache = pool.take(10, 4)
            for layer in cache.layers:
                layer.store_k.fill_(3e4)
                layer.store_v.fill_(-3e4)
            pool.give_back(cache)
    check_same(pair, compiled, inputs_of(pair, TEXTS[:3]))
    check_same(pair, compiled, inputs_of(pair, TEXTS[:3]), repetition_penalty=1.2)


def test_pauses(pair: MSDModel, compiled: MSDModel, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain cycles in between, of which the draft then reads several."""
    learnt: list[bool] = []
    monkeypatch.setattr(Guard, "wants_draft", property(lambda self: len(learnt) % 14 < 4))
    monkeypatch.setattr(Guard, "wants_another", lambda self, unknown: self.wants_draft)
    monkeypatch.setattr(Guard, "learn", lambda self, *given: learnt.append(self._drafted))
    inputs = inputs_of(pair)
    expected = pair.generate(**inputs, temperature=0.0, max_new_tokens=60).tokens
    monkeypatch.setattr(compiled, "guarded", True)
    assert compiled.generate(**inputs, temperature=0.0, max_new_tokens=60).tokens == expected
    assert runs and {True, False} <= set(learnt)


@pytest.mark.parametrize("failing", [0, 2])
def test_out_of_memory(
    pair: MSDModel,
    compiled: MSDModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: int,
) -> None:
    """The rest of the answers comes without compiled parts; the next batch is compiled again."""
    calls, launch = 0, CycleRun.launch
    compiled.generate(**inputs_of(pair, TEXTS[:1]), temperature=0.0, max_new_tokens=3)
    idle = idle_caches(compiled)  # also of single sequences

    def fails(self: CycleRun, *given: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls > failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(CycleRun, "launch", fails)
        check_same(pair, compiled, inputs_of(pair))
        assert idle and not idle_caches(compiled)
    assert calls == failing + 1 and caplog.text.count("answered without") == 1
    check_same(pair, compiled, inputs_of(pair))
    assert caplog.text.count("answered without") == 1


@pytest.mark.parametrize("spared", [0, 1], ids=["target", "draft"])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.2}], ids=["whole cycles", "parts"])
def test_out_of_memory_while_caches_grow(
    pair: MSDModel,
    compiled: MSDModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: Any,
    spared: int,
) -> None:
    """The rest of the answers comes without compiled parts, and the cache is dropped."""
    compiled._compiled.drop_idle()
    ids = torch.randint(5, 200, (3, 970), generator=torch.Generator().manual_seed(0))
    settings = {**settings, "max_new_tokens": 45}
    with monkeypatch.context() as patch:
        found = fail_growth(patch, spared)
        check_same(pair, compiled, {"input_ids": ids}, **settings)
    assert caplog.text.count("answered without") == 1 and not idle_caches(compiled)
    gc.collect()
    assert [each() for each in found] == [None]


def test_output_that_is_not_a_number(pair: MSDModel, compiled: MSDModel) -> None:
    norm, calls = pair.target.text_model.norm, 0

    def spoil(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls > 6 else output

    handle = norm.register_forward_hook(spoil)
    try:
        with pytest.raises(UserError, match="not a number"):
            compiled.generate(**inputs_of(pair), temperature=0.0, max_new_tokens=TOKENS)
    finally:
        handle.remove()
    check_same(pair, compiled, inputs_of(pair))  # nothing of it is left in the caches


def test_operations_and_waits_of_a_cycle(pair: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as of a single sequence."""
    seen, wait = Seen(), Result.tokens

    def tokens(self: Result) -> list[list[int]]:
        seen.waits += 1
        return wait(self)

    monkeypatch.setattr(Result, "tokens", tokens)
    model = compiled_for(pair, seen)
    model.warm_up(progress=False, batch_sizes=[4])
    follow, counts = Decoder._follow, []

    def counted(self: Decoder, *given: Any) -> bool:
        before = seen.operations, seen.waits
        with seen:
            result = follow(self, *given)
        counts.append((seen.operations - before[0], seen.waits - before[1]))
        return result

    monkeypatch.setattr(Decoder, "_follow", counted)
    model.generate(**inputs_of(pair), temperature=0.0, max_new_tokens=TOKENS)
    operations, waits = (sum(column) for column in zip(*counts, strict=True))
    assert waits > 4 and operations <= 20 * waits


def test_large_batches_are_not_compiled(pair: MSDModel, compiled: MSDModel, runs: list[int]) -> None:
    check_same(pair, compiled, inputs_of(pair, [TEXTS[2]] * (LARGEST_BATCH + 1)), max_new_tokens=6)
    assert not runs


@pytest.mark.parametrize(
    ("sizes", "what"),
    [([], "no size"), ([0], "0 is no batch size"), ([2, -1], "-1 is no"), ([2.0], "2.0 is no"), ([True], "True is no"),
     (["4"], "'4' is no batch size"), ("4", "'4' is no list"), (4, "4 is no list"), (None, "None is no list"),
     ([4, LARGEST_BATCH + 1], f"17 is more than {LARGEST_BATCH}, the largest batch that is compiled")],
)  # fmt: skip
def test_wrong_batch_sizes(pair: MSDModel, compiled: MSDModel, sizes: Any, what: str) -> None:
    for model in (pair, compiled):
        with pytest.raises(UserError, match=rf"^{what}.*: batch_sizes of warm_up \(.+\)$"):
            model.warm_up(batch_sizes=sizes)


@pytest.mark.parametrize("positions", [0, -3, 100.0, True, "100", None])
def test_wrong_positions(compiled: MSDModel, positions: Any) -> None:
    with pytest.raises(UserError, match=f"positions={positions!r}"):
        compiled.warm_up(positions=positions)


def test_batch_sizes_may_be_any_collection(compiled: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(compiled._compiled, "warm_up", lambda trees, *_: found.append(list(trees)))
    for sizes in ((each for each in (1, LARGEST_BATCH)), [1, LARGEST_BATCH, 1], {1: 0, LARGEST_BATCH: 0}):
        compiled.warm_up(progress=False, batch_sizes=sizes)
    assert found == [[1, LARGEST_BATCH]] * 3


@pytest.fixture
def sizes(pair: MSDModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MSDModel, set[Any]]]:
    """A model that takes itself for one with CUDA graphs, and the sizes with which its functions are called."""
    found: set[Any] = set()

    def compile_(function: Callable[..., object], **_: object) -> Callable[..., object]:
        def call(*given: object) -> object:
            shapes = [tuple(each.shape) for each in given if isinstance(each, torch.Tensor)]
            caches = [each for each in given if isinstance(each, StaticCache)]
            if function.__name__ in ("finish", "move_rows"):  # they do not depend on columns
                caches = []
            found.add((function.__name__, *shapes, *((each.slots, len(each.window.columns)) for each in caches)))
            return function(*given)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    model = MSDModel(pair.target, pair.draft, TREE, compile="eager")
    monkeypatch.setattr(model._compiled, "graphs", True)
    yield model, found


def test_the_warm_up_calls_all_sizes(pair: MSDModel, sizes: tuple[MSDModel, set[Any]]) -> None:
    """With CUDA graphs each size is a recording: later batches need no other, whatever sequences end."""
    model, found = sizes
    model.warm_up(positions=900, progress=False, batch_sizes=[3, 4])
    known = set(found)
    assert {each[-1][0] for each in known if each[0] == "verify"} == {1, 2, 4}
    ids = torch.randint(5, 200, (4, 500), generator=torch.Generator().manual_seed(0))
    inputs = [inputs_of(pair), inputs_of(pair, TEXTS[:3]), {"input_ids": ids}]
    for given in inputs:
        free = check_same(pair, model, given)
        check_same(pair, model, given, eos_token_id=[free[0][3], free[1][8], free[2][15]])
        check_same(pair, model, given, eos_token_id=[free[0][3], free[1][8]], use_msd=False)
        check_same(pair, model, given, eos_token_id=[free[0][3], free[1][8]], repetition_penalty=1.2)
    assert found == known, found - known


@pytest.mark.parametrize("grown", ["target_caches", "draft_caches"])
def test_the_warm_up_after_one_cache_has_grown(pair: MSDModel, sizes: tuple[MSDModel, set[Any]], grown: str) -> None:
    """It calls all sizes of each cache."""
    model, found = sizes
    model.warm_up(progress=False, batch_sizes=[3, 4])
    pools = getattr(model._compiled, grown)
    with torch.inference_mode():
        pools.give_back(pools.take(1500, 4))
    found.clear()
    model.warm_up(progress=False, batch_sizes=[3, 4])
    columns = {name: {each[-1][1] for each in found if each[0] == name} for name in ("verify", "draft_phase")}
    large, small = set(buckets(2048)), set(buckets(1024))
    assert columns == {
        "verify": large if grown == "target_caches" else small,
        "draft_phase": small if grown == "target_caches" else large,
    }
    known = set(found)
    for given in (inputs_of(pair), inputs_of(pair, TEXTS[:3])):
        check_same(pair, model, given)
    assert found == known, found - known


def test_caches_keep_and_select_what_others_do() -> None:
    """Rows of several sequences are written, moved and forgotten as in `KVCache`."""
    generator, device = torch.Generator().manual_seed(0), torch.device("cpu")
    static: KVCache = StaticCache([(3, 4)] * 2, 40, torch.float32, device, move_rows, sequences=3)
    growing = KVCache.allocate([device, device], 3, [(3, 4)] * 2, 40, torch.float32)
    for cache in (static, growing):
        cache.truncate([0, 0, 0])
    steps = [(5, [[0, 1, 2, 3, 4], [0], [0, 1]]), (6, [[0, 2, 5], [0, 1], [0, 4]]), (1, [[0], [0], [0]])]
    for count, paths in [*steps, (4, [[0, 3], [0, 1]])]:
        if len(paths) == 2:
            static, growing = static.select([0, 2]), growing.select([0, 2])
        assert isinstance(static, StaticCache)
        bases = static.lengths
        static.open(count)
        for layer in range(2):
            key, value = (torch.randn(len(paths), 3, count, 4, generator=generator) for _ in range(2))
            static.update(key, value, layer)
            growing.update(key, value, layer)
        static.close(count)
        for cache in (static, growing):
            cache.keep(bases, paths)
        assert static.lengths == growing.lengths
        for number, rows in enumerate(static.lengths):
            for own, other in zip(static.layers, growing.layers, strict=True):
                assert torch.equal(own.store_k[number, :, :rows], other.store_k[number, :, :rows])
                assert torch.equal(own.store_v[number, :, :rows], other.store_v[number, :, :rows])
    assert static.growing().lengths == static.lengths

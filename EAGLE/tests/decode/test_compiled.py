"""Decoding with static shapes: the same tokens as without, graphs without breaks, shapes that recur.

Most tests run the parts uncompiled (`plainly`), which shows that padding, masks and caches are right; two compile.
CUDA graphs are not recorded here: a test counts the sizes for which they would be.
"""

from __future__ import annotations

import gc
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from test_whole_cycle import fail_growth, idle_caches
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian
from tiny_stock import make_qwen
from torch._dynamo.utils import counters

from eagle import MSDModel, TreeConfig
from eagle.arguments import add_model_options
from eagle.decode import decoder as decoder_module
from eagle.decode.compiled import engine as engine_module
from eagle.decode.compiled.engine import LARGEST_BATCH, Compiler, StaticEngine, filled
from eagle.decode.compiled.static_cache import STEP, StaticCache, bucket, buckets, move_rows
from eagle.decode.decoder import Decoder
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from eagle.kv_cache import KVCache
from llava import UserError

TREES = [TreeConfig(4, 6, 24), TreeConfig(5, 2, 12)]
TEXTS = ["USER: [] Which of these can you count? ASSISTANT:", "USER: Hi ASSISTANT:", "USER: [] and [] ASSISTANT:"]


def plainly(function: Callable[..., object], **settings: object) -> Callable[..., object]:
    """In place of `torch.compile`."""
    assert settings["dynamic"] is False
    return function


@pytest.fixture(scope="module", params=["llava", "qwen", "qwen mrope", "qwen mrope block"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[MSDModel]:
    """The same pair without and with static shapes."""
    folder = tmp_path_factory.mktemp("static")
    base = make_liuhaotian(folder / "base") if request.param == "llava" else make_qwen(folder / "base")
    target = load_target(base, dtype="float32")
    changes = {"rope_scaling": {"mrope_section": [1, 1, 2]}} if "qwen" in request.param else {}
    if "mrope" in request.param:
        changes["msd"] = {"positions": "mrope"}
    if "block" in request.param:
        changes.update(block={"size": 4, "layers": 2}, agree=1.0)
    draft = load_draft(make_draft(folder / "draft", target, **changes), dtype=torch.float32)
    if "block" in request.param:  # tokens of answers alone, so that it is often right
        plain = MSDModel(target)
        answers = [plain.generate(**inputs_of(plain, [text]), max_new_tokens=25, temperature=0) for text in TEXTS[:2]]
        draft.draft_vocab = torch.cat([torch.tensor(answer.tokens[0]) for answer in answers]).unique()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", plainly)
        return [MSDModel(target, draft), MSDModel(target, draft, compile="eager")]


def inputs_of(model: MSDModel, texts: list[str]) -> dict[str, torch.Tensor]:
    mark = "<image>\n" if model.target.family == "llava" else "<|vision_start|><|image_pad|><|vision_end|>"
    pictures = [make_image(width=50, height=64, seed=i) for i in range(sum(text.count("[]") for text in texts))]
    prompts = [text.replace("[]", mark) for text in texts]
    return model.target.prepare(prompts if len(prompts) > 1 else prompts[0], pictures)


def check_same(models: list[MSDModel], inputs: dict[str, torch.Tensor], **settings: object) -> list[int]:
    """Both give the same tokens in the same cycles; returns the accepted lengths."""
    plain, compiled = (model.generate(**inputs, **settings) for model in models)
    assert torch.equal(plain.sequences, compiled.sequences)
    assert plain.stats.accept_lengths == compiled.stats.accept_lengths
    return compiled.stats.accept_lengths


def check_same_tokens(models: list[MSDModel], inputs: dict[str, torch.Tensor], **settings: object) -> None:
    plain, compiled = (model.generate(**inputs, **settings) for model in models)
    assert plain.tokens == compiled.tokens


def test_same_tokens_and_cycles(models: list[MSDModel]) -> None:
    accepted = []
    for tree in TREES:
        for text in TEXTS:
            inputs = inputs_of(models[0], [text])
            accepted += check_same(models, inputs, tree=tree, max_new_tokens=25, temperature=0)
    assert max(accepted) > 0, "nothing was accepted, so no rows were ever moved"
    check_same(models, inputs_of(models[0], TEXTS[:1]), max_new_tokens=12, temperature=0, use_msd=False)


@torch.inference_mode()
def test_rows_of_earlier_requests_do_not_matter(models: list[MSDModel]) -> None:
    """A later request finds a used cache; here one full of large values."""
    static = models[1]._compiled
    for pool in (static.target_caches, static.draft_caches):
        cache = pool.take(10)
        for layer in cache.layers:
            layer.store_k.fill_(3e4)
            layer.store_v.fill_(-3e4)
        pool.give_back(cache)
    check_same(models, inputs_of(models[0], TEXTS[:1]), tree=TREES[1], max_new_tokens=15, temperature=0)
    assert static.target_caches.take(10).layers[0].store_v.min() == -3e4


def test_sampling_draws_the_same(models: list[MSDModel]) -> None:
    inputs = inputs_of(models[0], TEXTS[:1])
    check_same(models, inputs, tree=TREES[1], max_new_tokens=15, temperature=1.0, seed=3)


def test_a_batch_decodes_as_without(models: list[MSDModel]) -> None:
    check_same(models, inputs_of(models[0], TEXTS), tree=TREES[1], max_new_tokens=10, temperature=0)


def test_a_prompt_beyond_the_first_columns(models: list[MSDModel]) -> None:
    """Columns grow while it decodes."""
    ids = torch.randint(5, 200, (1, STEP - 10), generator=torch.Generator().manual_seed(0))
    check_same(models, {"input_ids": ids}, tree=TREES[1], max_new_tokens=20, temperature=0)


def test_two_streams_of_requests_do_not_share_a_cache(models: list[MSDModel]) -> None:
    engine = models[1]._compiled
    first, second = engine.target_caches.take(50), engine.target_caches.take(50)
    assert first is not second
    engine.release(first, None)
    assert engine.target_caches.take(50, 2) is not first, "that of single sequences"
    assert engine.target_caches.take(50) is first
    assert engine.target_caches.take(first.capacity + 1).capacity == 2 * first.capacity


def test_unknown_backends_and_spread_models_are_refused(models: list[MSDModel]) -> None:
    target = models[0].target
    with pytest.raises(UserError, match=r"no compiler backend 'inductr'.*inductor"):
        StaticEngine(target, None, "inductr")
    layer = target.text_model.norm
    home = layer.weight
    layer.weight = torch.nn.Parameter(home.to("meta"))
    try:
        with pytest.raises(UserError, match="spread over several devices"):
            StaticEngine(target, None, "eager")
    finally:
        layer.weight = home


def test_columns_grow_in_steps_that_waste_at_most_a_quarter() -> None:
    for columns in range(1, 20000, 37):
        assert columns <= bucket(columns) <= max(columns + STEP, columns * 1.25 + 1)
    assert buckets(8192) == sorted({bucket(columns) for columns in range(1, 8193)})
    assert len(buckets(8192)) == 16


def test_cache_keeps_what_the_growing_cache_keeps() -> None:
    """Rows are written, moved and forgotten as in `KVCache`."""
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cpu")
    static = StaticCache([(3, 4)] * 2, 40, torch.float32, device, move_rows)
    growing = KVCache.allocate([device, device], 1, [(3, 4)] * 2, 40, torch.float32)
    for count, path in ((5, [0, 1, 2, 3, 4]), (6, [0, 2, 5]), (6, [0]), (4, [0, 1, 3])):
        base = static.length
        columns = static.open(count)
        for layer in range(2):
            key, value = (torch.randn(1, 3, count, 4, generator=generator) for _ in range(2))
            seen = static.update(key, value, layer)
            assert seen[0].shape[2] == columns == STEP
            growing.update(key, value, layer)
        static.close(count)
        for cache in (static, growing):
            cache.keep([base], [path])
        assert static.lengths == growing.lengths
        for own, other in zip(static.layers, growing.layers, strict=True):
            rows = static.length
            assert torch.equal(own.store_k[:, :, :rows], other.store_k[:, :, :rows])
            assert torch.equal(own.store_v[:, :, :rows], other.store_v[:, :, :rows])


def test_filled_masks_open_nothing_but_the_first_rows_view() -> None:
    closed = torch.finfo(torch.float32).min
    mask = torch.tensor([[0.0, 0.0, closed], [0.0, closed, 0.0]])[None, None]
    expected = [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 0, 0]]
    found = filled(mask, 2, 3, 5)
    assert found[:, 0].eq(0).int().tolist() == [expected, expected]


def test_caches_grow_with_the_answer(models: list[MSDModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for a part of the limit at the start; answers are the same, of batches too."""
    ids = torch.randint(5, 200, (1, 990), generator=torch.Generator().manual_seed(0))
    settings = {"tree": TREES[0], "max_new_tokens": 25, "temperature": 0}
    together = {**inputs_of(models[0], TEXTS), **settings, "max_new_tokens": 30}
    expected = [models[0].generate(**given).sequences for given in ({"input_ids": ids, **settings}, together)]
    grown, grow = [], KVCache.grow

    def look(self: KVCache, capacity: int) -> None:
        grown.append((type(self), self.capacity))
        grow(self, capacity)

    monkeypatch.setattr(decoder_module, "NEW_TOKENS", 4)
    monkeypatch.setattr(KVCache, "grow", look)
    models[1]._compiled.drop_idle()
    check_same(models, {"input_ids": ids}, **settings)
    assert torch.equal(models[1].generate(input_ids=ids, **settings).sequences, expected[0])
    assert (KVCache, 1018) in grown and (StaticCache, 1024) in grown
    assert torch.equal(models[0].generate(**together).sequences, expected[1])


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_engines_of_a_process_do_not_share_a_limit(fresh_dynamo: None) -> None:
    """torch compiles the same code for 8 sizes at most."""

    def adder(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda values: values + number

    compiler = Compiler("eager", torch.device("cpu"))
    found = [int(compiler(adder(number))(torch.ones(1))) for number in range(12)]
    assert found == list(range(1, 13)) and counters["stats"]["unique_graphs"] == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "models",
    ["llava", "qwen mrope block", *(pytest.param(name, marks=pytest.mark.by_hand) for name in ("qwen", "qwen mrope"))],
    indirect=True,
)
def test_one_compilation_for_all_sizes(models: list[MSDModel], fresh_dynamo: None) -> None:
    """After the warm-up nothing is compiled: other trees, contexts, capacities, plain steps, a second cache, batches
    whose sequences end."""
    plain = models[0]
    compiled = MSDModel(plain.target, plain.draft, TreeConfig(2, 2, 8), compile="eager")
    compiled.warm_up(progress=False)
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    before = counters["stats"]["unique_graphs"]
    own = ["block"] if plain.draft.block_size > 1 else ["extend", "step"]
    others = ["verify", "plain step", "children", "keep", "draft", "masks", "finish"]  # the last three: of whole cycles
    assert before == len(own + others)
    assert compiled.tree_for(2) == compiled.tree_for(4) == compiled.tree
    compiled.warm_up(progress=False, batch_sizes=[2, 4])
    before = counters["stats"]["unique_graphs"]
    assert before == 2 * len(own + others), "the same for batches"
    ids = torch.randint(5, 200, (1, 1100), generator=torch.Generator().manual_seed(0))
    accepted = []
    for tree, length in ((TreeConfig(4, 6, 24), 40), (TreeConfig(3, 1, 5), 250), (TreeConfig(2, 3, 9), 1015)):
        inputs = {"input_ids": ids[:, :length]}
        accepted += check_same([plain, compiled], inputs, tree=tree, max_new_tokens=15, temperature=0)
    check_same([plain, compiled], {"input_ids": ids}, max_new_tokens=5, temperature=0, use_msd=False)
    check_same([plain, compiled], inputs_of(plain, TEXTS[:1]), tree=TREES[0], max_new_tokens=25, temperature=0)
    fixed = {"tree": TreeConfig(2, 2, 8), "max_new_tokens": 20, "seed": 1}
    for length, temperature in ((240, 0.0), (40, 0.7), (1000, 1.1)):
        check_same([plain, compiled], {"input_ids": ids[:, :length]}, **fixed, temperature=temperature)
    for texts in (TEXTS[:2], TEXTS, [*TEXTS, *TEXTS[:2]]):
        inputs = inputs_of(plain, texts)
        answers = plain.generate(**inputs, temperature=0, max_new_tokens=20).tokens
        ends = {"eos_token_id": [answers[0][4], answers[1][9]]}
        for settings in (ends, {"temperature": 0.8, "seed": 2}, {"tree": TREES[0], **ends}, {"tree": TREES[1]},
                         {"use_msd": False, **ends}, {"repetition_penalty": 1.2, **ends}):  # fmt: skip
            check_same_tokens([plain, compiled], inputs, **{"temperature": 0, "max_new_tokens": 20, **settings})
    several = {"input_ids": ids[:, :1050].expand(3, -1)}
    check_same_tokens([plain, compiled], several, temperature=0, max_new_tokens=10)
    engine = compiled._compiled
    for pools in (engine.draft_caches, engine.target_caches):  # one of them is larger than the other
        pools.drop_idle()
        compiled.warm_up(progress=False, batch_sizes=[1, 2, 4])
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == before


@pytest.fixture
def recorded(models: list[MSDModel], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A compiled model that takes itself for one with CUDA graphs, and the sizes of the parts that it calls."""
    seen: set[tuple[object, ...]] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", plainly)
        model = MSDModel(models[0].target, models[0].draft, TREES[1], compile="eager")
    engine = model._compiled
    monkeypatch.setattr(engine, "graphs", True)
    for name in ("verify_nodes", "_extend", "_step", "_children", "_block"):
        own = getattr(engine, name)

        def call(*given: object, name: str = name, part: Callable[..., object] = own) -> object:
            shapes = [tuple(each.shape) for each in given if isinstance(each, torch.Tensor)]
            caches = [(each.capacity, len(each.window.columns)) for each in given if isinstance(each, StaticCache)]
            seen.add((name, *shapes, *caches))
            return part(*given)

        monkeypatch.setattr(engine, name, call)

    def whole(function: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            shapes = [tuple(each.shape) for each in given if isinstance(each, torch.Tensor)]
            columns = [each.window.columns.shape[0] for each in given if isinstance(each, StaticCache)]
            seen.add((function.__name__, *shapes, *(columns if function.__name__ != "finish" else ())))
            return function(*given)

        return call

    monkeypatch.setattr(engine, "_compiler", whole)
    return SimpleNamespace(model=model, seen=seen)


def test_the_warm_up_records_all_graphs(
    models: list[MSDModel], recorded: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CUDA graphs each size is a recording: the warm-up has called all that requests then need."""
    recorded.model.warm_up(positions=2000, progress=False)
    known = set(recorded.seen)
    assert {each[-1][1] for each in known if each[0] == "verify_nodes"} == set(buckets(2048))
    for name in ("draft_phase", "masks"):
        assert {each[-1] for each in known if each[0] == name} == set(buckets(2048))
    ids = torch.randint(5, 200, (1, 1300), generator=torch.Generator().manual_seed(0))
    for length in (40, 500, 1300):
        inputs = {"input_ids": ids[:, :length]}
        check_same([models[0], recorded.model], inputs, tree=TREES[1], max_new_tokens=20, temperature=0)
    check_same([models[0], recorded.model], inputs, max_new_tokens=5, temperature=0, use_msd=False)
    monkeypatch.setattr(Decoder, "_should_draft", lambda self: len(self.active[0].tokens) > 6)  # as if drafting lost
    check_same([models[0], recorded.model], inputs, tree=TREES[1], max_new_tokens=20, temperature=0)
    assert recorded.seen == known


@pytest.mark.parametrize("grown", ["target_caches", "draft_caches"])
def test_the_warm_up_after_one_cache_has_grown(models: list[MSDModel], recorded: SimpleNamespace, grown: str) -> None:
    """It calls all sizes of each cache."""
    recorded.model.warm_up(progress=False)
    ids = torch.randint(5, 200, (1, 1200), generator=torch.Generator().manual_seed(0))
    alone = {"max_new_tokens": 5, "temperature": 0, "use_msd": False}
    if grown == "target_caches":
        check_same([models[0], recorded.model], {"input_ids": ids}, **alone)
    else:
        pools = recorded.model._compiled.draft_caches
        with torch.inference_mode():
            pools.give_back(pools.take(1500))
    recorded.seen.clear()
    recorded.model.warm_up(progress=False)
    capacities = {"target_caches": (2048, 1024), "draft_caches": (1024, 2048)}[grown]
    for name, capacity in zip(("masks", "draft_phase"), capacities, strict=True):
        assert {each[-1] for each in recorded.seen if each[0] == name} == set(buckets(capacity))
    known = set(recorded.seen)
    if grown == "target_caches":
        check_same([models[0], recorded.model], {"input_ids": ids}, **alone)
    inputs = {"input_ids": ids[:, : 900 if grown == "target_caches" else 990]}
    check_same([models[0], recorded.model], inputs, tree=TREES[1], max_new_tokens=20, temperature=0)
    assert recorded.seen == known


def test_cuda_graphs_belong_to_one_thread(
    models: list[MSDModel], recorded: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, settings = inputs_of(models[0], TEXTS[:1]), {"max_new_tokens": 10, "temperature": 0}
    expected = models[0].generate(**inputs, **settings).sequences
    recorded.model.generate(**inputs, **settings)
    calls = len(recorded.seen)
    recorded.seen.clear()
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            found = pool.submit(recorded.model.generate, **inputs, **settings).result()
            assert torch.equal(found.sequences, expected)
    assert calls and not recorded.seen
    assert caplog.text.count("requests of other threads are not compiled") == 1


def test_the_first_request_warms_up(models: list[MSDModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and once for batches that are compiled alike. If memory runs out it is answered nevertheless."""
    monkeypatch.setattr(torch, "compile", plainly)
    model, calls = MSDModel(models[0].target, models[0].draft, TREES[1], compile="eager"), 0

    def warm_up(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model._compiled, "warm_up", warm_up)
    for texts in (TEXTS, TEXTS[:2]):
        model.generate(**inputs_of(model, texts), max_new_tokens=3, temperature=0)
    assert calls == 1
    for text in TEXTS[:2]:
        check_same([models[0], model], inputs_of(model, [text]), tree=TREES[1], max_new_tokens=5, temperature=0)
    assert calls == 2
    many = inputs_of(model, [TEXTS[1]] * (LARGEST_BATCH + 1))
    model.generate(**many, max_new_tokens=3, temperature=0)
    assert calls == 2, "larger batches are not compiled"


@pytest.mark.parametrize("place", ["verify", "allocation"])
def test_out_of_memory_leaves_compiled_decoding(
    models: list[MSDModel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """The request has the same answer, with whole trees; the next one is compiled again."""
    plain, compiled = models
    compiled.warm_up(progress=False, batch_sizes=[1, 2])
    engine, calls, idle = compiled._compiled, 0, idle_caches(compiled)
    verify, inputs, settings = engine.verify, inputs_of(plain, TEXTS[:1]), {"tree": TREES[0], "max_new_tokens": 25}

    def third_fails(*given: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return verify(*given)

    def fails(*_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        if place == "verify":
            patch.setattr(engine, "verify", third_fails)
        else:
            patch.setattr(engine.draft_caches, "take", fails)
        check_same(models, inputs, **settings, temperature=0)
        assert calls == (3 if place == "verify" else 0) and idle and not idle_caches(compiled)
        assert caplog.text.count("this request is answered without") == 1
    monkeypatch.setattr(engine, "verify", third_fails)
    calls = 3
    check_same(models, inputs, **settings, temperature=0)
    assert calls > 3


@pytest.mark.parametrize("spared", [0, 1], ids=["target", "draft"])
def test_out_of_memory_while_caches_grow(
    models: list[MSDModel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spared: int
) -> None:
    """The rest of the answer comes without compiled parts, and the cache is dropped."""
    models[1]._compiled.drop_idle()
    ids = torch.randint(5, 200, (1, 970), generator=torch.Generator().manual_seed(0))
    settings = {"tree": TREES[0], "max_new_tokens": 45, "temperature": 0}
    with monkeypatch.context() as patch:
        found = fail_growth(patch, spared)
        check_same(models, {"input_ids": ids}, **settings)
    assert caplog.text.count("this request is answered without") == 1 and not idle_caches(models[1])
    gc.collect()
    assert [each() for each in found] == [None]
    check_same(models, {"input_ids": ids}, **settings)
    assert caplog.text.count("this request is answered without") == 1


def test_a_cache_whose_growth_failed_is_not_used_again(models: list[MSDModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it after another error in the same request."""
    pools = models[1]._compiled.target_caches
    with torch.inference_mode():
        cache = pools.take(50)
        fail_growth(monkeypatch, 0)
        with pytest.raises(torch.OutOfMemoryError):
            cache.grow(cache.capacity + 1)
        pools.give_back(cache)
        assert pools.take(50) is not cache


@pytest.fixture
def on_cuda(models: list[MSDModel], monkeypatch: pytest.MonkeyPatch) -> MSDModel:
    """The pair, which says that it is on CUDA."""
    monkeypatch.setattr(type(models[0].target), "device", torch.device("cuda"))
    monkeypatch.setattr(engine_module, "has_triton", lambda: True)
    monkeypatch.setattr(torch, "compile", plainly)
    return models[0]


def test_compiled_by_default_on_cuda_only(models: list[MSDModel], on_cuda: MSDModel) -> None:
    made = MSDModel(on_cuda.target, on_cuda.draft)
    assert made.backend == "inductor" and made._compiled.graphs and not made.tree.adaptive
    assert "is compiled" in made.compile_note and "--no-compile" in made.compile_note
    assert MSDModel(on_cuda.target, on_cuda.draft, compile=False).backend is None
    assert models[0].backend is None and not models[0].compile_note, "made on a CPU"


def test_what_is_not_compiled_by_default(on_cuda: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = on_cuda.target, on_cuda.draft
    assert MSDModel(target, draft, "auto").backend == "inductor"
    asked = MSDModel(target, draft, TreeConfig.auto("cuda"))
    assert asked.backend is None and asked.tree.adaptive and "the tree is adaptive" in asked.compile_note
    with monkeypatch.context() as patch:
        patch.setattr(target.config, "quantization_config", {}, raising=False)
        assert "quantised" in MSDModel(target, draft).compile_note
    with monkeypatch.context() as patch:
        patch.setattr(type(target), "verifies_trees", False)
        assert "layers with a state" in MSDModel(target, draft).compile_note
    monkeypatch.setattr(engine_module, "has_triton", lambda: False)
    made = MSDModel(target, draft)
    assert made.backend is None and made.tree.adaptive and "Triton" in made.compile_note


@pytest.mark.parametrize(
    ("given", "expected"), [([], None), (["--compile"], "inductor"), (["--compile", "eager"], "eager"),
                            (["--no-compile"], False)]
)  # fmt: skip
def test_options(given: list[str], expected: object) -> None:
    parser = ArgumentParser()
    add_model_options(parser, required=False)
    assert parser.parse_args(given).compile == expected


@pytest.mark.slow
@pytest.mark.parametrize("models", ["llava", "qwen mrope block"], indirect=True)
def test_inductor(models: list[MSDModel], fresh_dynamo: None) -> None:
    """The real compiler; needs a C++ compiler on a CPU."""
    plain = models[0]
    compiled = MSDModel(plain.target, plain.draft, compile=True)
    check_same([plain, compiled], inputs_of(plain, TEXTS[:1]), tree=TREES[1], max_new_tokens=12, temperature=0)

"""Decoding with static shapes: the same tokens as without, graphs without breaks, shapes that recur.

Most tests run the parts uncompiled (`plainly`), which shows that padding, masks and caches are right; two compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian
from tiny_stock import make_qwen
from torch._dynamo.utils import counters

from eagle import MSDModel, TreeConfig
from eagle.decode.compiled.engine import StaticEngine, filled
from eagle.decode.compiled.static_cache import STEP, StaticCache, bucket, move_rows
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


@pytest.fixture(scope="module", params=["llava", "qwen", "qwen mrope"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[MSDModel]:
    """The same pair without and with static shapes."""
    folder = tmp_path_factory.mktemp("static")
    base = make_liuhaotian(folder / "base") if request.param == "llava" else make_qwen(folder / "base")
    target = load_target(base, dtype="float32")
    changes = {"rope_scaling": {"mrope_section": [1, 1, 2]}} if "qwen" in request.param else {}
    if "mrope" in request.param:
        changes["msd"] = {"positions": "mrope"}
    draft = load_draft(make_draft(folder / "draft", target, **changes), dtype=torch.float32)
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
    assert len({bucket(columns) for columns in range(1, 8193)}) == 16


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
    assert filled(mask, 3, 5)[0, 0].eq(0).int().tolist() == expected


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_graphs_have_no_breaks_and_are_used_again(models: list[MSDModel], fresh_dynamo: None) -> None:
    plain, settings = models[0], {"tree": TreeConfig(2, 2, 8), "max_new_tokens": 10, "temperature": 0}
    compiled = MSDModel(plain.target, plain.draft, compile="eager")
    check_same([plain, compiled], inputs_of(plain, TEXTS[:1]), **settings)
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    before = counters["stats"]["unique_graphs"]
    assert before >= 4, "verify, extend, step and children"
    compiled.generate(**inputs_of(compiled, TEXTS[:1]), **settings)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
def test_inductor(models: list[MSDModel], fresh_dynamo: None) -> None:
    """The real compiler; needs a C++ compiler on a CPU."""
    plain = models[0]
    compiled = MSDModel(plain.target, plain.draft, compile=True)
    check_same([plain, compiled], inputs_of(plain, TEXTS[:1]), tree=TREES[1], max_new_tokens=12, temperature=0)

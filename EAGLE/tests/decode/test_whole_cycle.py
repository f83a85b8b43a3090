"""Whole cycles on the device: answers and statistics of the other path, with one wait and few operations a cycle.

Functions run uncompiled (`plainly`), but nothing in them may read a value on the host. ``ahead`` 1 is what CUDA does: a
cycle is launched before the result of the last one is looked at.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import TinySizes, make_image, make_liuhaotian
from tiny_stock import make_qwen
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import MaxTimeCriteria

from eagle import MSDModel, TreeConfig, kv_cache
from eagle.decode import decoder as decoder_module
from eagle.decode import sampling
from eagle.decode.adaptive.guard import Guard
from eagle.decode.compiled.cycle import CycleRun, Result
from eagle.decode.compiled.static_cache import STEP, StaticCache
from eagle.decode.decoder import Decoder
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from llava import UserError

TREE = TreeConfig(4, 6, 40)
TRIMMED = 12
LAYERS = {"llava": 32, "qwen": 28}
"""Of LLaVA-1.5-7B and Qwen2-VL-7B."""
HOST_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item"}


class Seen(TorchDispatchMode):
    """What the host does: operations it launches, a compiled function being one, and waits for their results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.waits, self.inside = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += func._schema.name in HOST_READS
        self.operations += 1
        return func(*args, **(kwargs or {}))


class Inside(TorchDispatchMode):
    """Inside of a compiled function no value may be read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in HOST_READS, f"{func} needs the host"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Counts, while it is entered, what `Compiler` gets as compiled functions as one operation each."""
    found = Seen()
    wait = Result.tokens

    def tokens(self: Result) -> list[list[int]]:
        found.waits += 1
        return wait(self)

    monkeypatch.setattr(Result, "tokens", tokens)
    return found


def compiled_for(pair: MSDModel, seen: Seen | None = None, tree: TreeConfig = TREE) -> MSDModel:
    """The pair with whole cycles of a tree, their functions uncompiled."""

    def plainly(function: Callable[..., object], **settings: object) -> Callable[..., object]:
        def call(*given: object) -> object:
            if seen is not None:
                seen.operations += 1
            with _disable_current_modes(), Inside():
                return function(*given)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", plainly)
        model = MSDModel(pair.target, pair.draft, tree, compile="eager")
    model.warm_up(progress=False)
    return model


def make_pair(folder: Any, family: str, layers: int = 2, trimmed: bool = True, block: bool = False) -> MSDModel:
    if family == "llava":
        base = make_liuhaotian(folder / "base", sizes=TinySizes(layers=layers))
    else:
        base = make_qwen(folder / "base", num_hidden_layers=layers)
    target = load_target(base, dtype="float32")
    changes: dict[str, Any] = {} if family == "llava" else {"rope_scaling": {"mrope_section": [1, 1, 2]}}
    if family == "qwen":
        changes["msd"] = {"positions": "mrope"}
    if block:
        changes["block"] = {"size": TREE.depth + 1, "layers": 2}
    draft = load_draft(make_draft(folder / "draft", target, agree=1.0, **changes), dtype=torch.float32)
    if trimmed:  # to tokens of the answer, so that it is often right, though nobody trained it
        answer = MSDModel(target).generate(**prompt(SimpleNamespace(target=target)), temperature=0.0, max_new_tokens=60)
        draft.draft_vocab = torch.tensor(sorted(list(dict.fromkeys(answer.tokens[0]))[:TRIMMED]))
    return MSDModel(target, draft, TREE)


@pytest.fixture(
    scope="module",
    params=["llava", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen", "qwen block")), "llava block"],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    family, *block = request.param.split()
    return make_pair(tmp_path_factory.mktemp(family), family, block=bool(block))


@pytest.fixture(scope="module")
def whole(pair: MSDModel) -> MSDModel:
    return compiled_for(pair)


@pytest.fixture(params=[pytest.param(0, marks=pytest.mark.slow), 1])
def ahead(request: pytest.FixtureRequest, whole: MSDModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    cycle = whole._compiled.cycle(TREE)
    monkeypatch.setattr(cycle, "ahead", request.param)
    yield request.param


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cycles in flight at each launch."""
    found, launch = [], CycleRun.launch

    def counted(self: CycleRun, *given: Any) -> bool:
        found.append(len(self.flights))
        return launch(self, *given)

    monkeypatch.setattr(CycleRun, "launch", counted)
    return found


def fail_growth(patch: pytest.MonkeyPatch, spared: int) -> list[weakref.ref[StaticCache]]:
    """Memory runs out at the last layer of a static cache that grows, after so many caches have grown. The result gets
    the cache."""
    failed, grow, storage = list[weakref.ref[StaticCache]](), StaticCache.grow, kv_cache.CacheStorage
    grown = 0

    def fails(self: StaticCache, capacity: int) -> None:
        nonlocal grown
        made, grows = 0, capacity > self.capacity

        def last_fails(*parts: torch.Tensor) -> kv_cache.CacheStorage:
            nonlocal made
            made += 1
            if made == len(self.layers):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return storage(*parts)

        with pytest.MonkeyPatch.context() as inner:
            if grows and grown == spared:
                failed.append(weakref.ref(self))
                inner.setattr(kv_cache, "CacheStorage", last_fails)
            grow(self, capacity)
        grown += grows

    patch.setattr(decoder_module, "NEW_TOKENS", 4)
    patch.setattr(StaticCache, "grow", fails)
    return failed


def idle_caches(model: MSDModel) -> list[StaticCache]:
    """Those that are kept for later requests."""
    engine = model._compiled
    pools = [pool for part in (engine.target_caches, engine.draft_caches) for pool in (part.single, part.batches)]
    return [pool._free for pool in pools if pool._free is not None]


def prompt(model: Any, text: str = "USER: [] Which? ASSISTANT:") -> dict[str, torch.Tensor]:
    mark = "<image>\n" if model.target.family == "llava" else "<|vision_start|><|image_pad|><|vision_end|>"
    pictures = [make_image(width=50, height=64, seed=i) for i in range(text.count("[]"))]
    return model.target.prepare(text.replace("[]", mark), pictures)


def counters_of(stats: Any) -> dict[str, Any]:
    """All statistics but times."""
    timed = {"seconds", "phases", "first_token", "first_token_at", "loop", "wait"}
    return {name: value for name, value in asdict(stats).items() if name not in timed}


def check_same(pair: MSDModel, whole: MSDModel, inputs: dict[str, torch.Tensor], **settings: Any) -> list[int]:
    """Tokens and statistics; returns the tokens."""
    expected, found = (model.generate(**inputs, **{"temperature": 0.0, **settings}) for model in (pair, whole))
    assert found.tokens == expected.tokens
    assert counters_of(found.stats) == counters_of(expected.stats)
    return found.tokens[0]


def test_every_length(pair: MSDModel, whole: MSDModel, ahead: int, launches: list[int]) -> None:
    """The limit falls on each place of a cycle; trees become shorter before it."""
    inputs, lengths = prompt(pair), []
    for limit in range(1, 16):
        launches.clear()
        lengths.append(len(check_same(pair, whole, inputs, max_new_tokens=limit)))
        assert bool(launches) == (limit > 2)
        assert max(launches, default=0) <= ahead
    assert (lengths == list(range(1, 16)) and 1 in launches) or not ahead


def test_equals_generate_while_columns_and_caches_grow(
    pair: MSDModel, whole: MSDModel, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = whole._compiled
    monkeypatch.setattr(decoder_module, "NEW_TOKENS", 4)
    for length in (STEP - 30, 990):
        engine.target_caches.single._free = engine.draft_caches.single._free = None
        ids = torch.randint(5, 200, (1, length), generator=torch.Generator().manual_seed(0))
        expected = pair.target.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=45, do_sample=False
        )
        assert check_same(pair, whole, {"input_ids": ids}, max_new_tokens=45) == expected[0, length:].tolist()


def test_the_answer_ends_within_an_accepted_path(pair: MSDModel, whole: MSDModel, ahead: int) -> None:
    """By an end token and by a stop string at each place; what later cycles have added is dropped."""
    inputs = prompt(pair)
    answer = pair.generate(**inputs, temperature=0.0, max_new_tokens=24)
    assert max(answer.stats.accept_lengths) > 1
    (tokens,) = answer.tokens
    for place in range(1, 12, 2):
        ended = check_same(pair, whole, inputs, max_new_tokens=24, eos_token_id=tokens[place])
        assert ended == tokens[: tokens.index(tokens[place]) + 1]
        text = pair.tokenizer.decode(tokens[place : place + 2])
        if text.strip():
            check_same(pair, whole, inputs, max_new_tokens=24, stop_strings=text)
    check_same(pair, whole, inputs, max_new_tokens=24, stopping_criteria=[MaxTimeCriteria(1000.0)])


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}, {"min_p": 0.1, "temperature": 1.5}], ids=str
)
def test_sampling_by_seed(pair: MSDModel, whole: MSDModel, ahead: int, launches: list[int], settings: Any) -> None:
    for seed in range(2):
        launches.clear()
        check_same(pair, whole, prompt(pair), **{"temperature": 1.0, **settings}, seed=seed, max_new_tokens=30)
        assert launches


def test_what_is_not_served(pair: MSDModel, whole: MSDModel, launches: list[int]) -> None:
    """Processors that read other tokens, other trees and adaptive ones take the other path."""
    for settings in ({"repetition_penalty": 1.3}, {"tree": TreeConfig(2, 2, 6)}, {"use_msd": False}):
        check_same(pair, whole, prompt(pair), max_new_tokens=12, **settings)
    adaptive = whole.generate(**prompt(pair), temperature=0.0, max_new_tokens=12, tree=replace(TREE, adaptive=True))
    assert adaptive.tokens == pair.generate(**prompt(pair), temperature=0.0, max_new_tokens=12).tokens
    assert not launches


def test_pauses(
    pair: MSDModel, whole: MSDModel, ahead: int, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain cycles in between, longer than the draft reads at once; the guard learns from each cycle."""
    learnt: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Guard, "wants_draft", property(lambda self: len(learnt) % 14 < 4))
    monkeypatch.setattr(Guard, "wants_another", lambda self, unknown: self.wants_draft)
    monkeypatch.setattr(Guard, "learn", lambda self, *given: learnt.append((self._drafted, *given)))
    inputs = prompt(pair)
    expected = pair.generate(**inputs, temperature=0.0, max_new_tokens=60).tokens
    monkeypatch.setattr(whole, "guarded", True)
    found = whole.generate(**inputs, temperature=0.0, max_new_tokens=60)
    assert found.tokens == expected
    sizes = found.stats.tree_sizes
    assert 1 in sizes[:-1] and TREE.total_tokens in sizes[sizes.index(1) :]
    assert len(launches) >= sum(size > 1 for size in sizes)
    drafted = [each[0] for each in learnt]
    assert drafted == [size > 1 for size in sizes[: len(learnt)]] and len(learnt) >= len(sizes) - 1


@pytest.mark.parametrize("failing", [0, 2])
def test_out_of_memory(
    pair: MSDModel,
    whole: MSDModel,
    ahead: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: int,
) -> None:
    """The rest of the answer comes without compiled parts."""
    calls, launch = 0, CycleRun.launch

    def fails(self: CycleRun, *given: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls > failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(self, *given)

    monkeypatch.setattr(CycleRun, "launch", fails)
    check_same(pair, whole, prompt(pair), max_new_tokens=24)
    assert calls == failing + 1 and caplog.text.count("answered without") == 1


@pytest.mark.parametrize("spared", [0, 1], ids=["target", "draft"])
def test_out_of_memory_while_caches_grow(
    pair: MSDModel,
    whole: MSDModel,
    ahead: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spared: int,
) -> None:
    """The rest of the answer comes without compiled parts, and the cache is dropped."""
    whole._compiled.drop_idle()
    inputs = {"input_ids": torch.randint(5, 200, (1, 970), generator=torch.Generator().manual_seed(0))}
    with monkeypatch.context() as patch:
        found = fail_growth(patch, spared)
        check_same(pair, whole, inputs, max_new_tokens=45)
    assert caplog.text.count("answered without") == 1 and not idle_caches(whole)
    gc.collect()
    assert [each() for each in found] == [None]
    check_same(pair, whole, inputs, max_new_tokens=45)
    assert caplog.text.count("answered without") == 1 and len(idle_caches(whole)) == 2


def test_output_that_is_not_a_number(pair: MSDModel, whole: MSDModel, ahead: int) -> None:
    """One line, also with a cycle in flight behind it."""
    norm, calls = pair.target.text_model.norm, 0

    def spoil(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls > 2 else output

    handle = norm.register_forward_hook(spoil)
    try:
        with pytest.raises(UserError, match="not a number"):
            whole.generate(**prompt(pair), temperature=0.0, max_new_tokens=24)
    finally:
        handle.remove()
    check_same(pair, whole, prompt(pair), max_new_tokens=24)  # nothing of it is left in the caches


def test_streamed_tokens_arrive_by_cycle(pair: MSDModel, whole: MSDModel, ahead: int) -> None:
    from eagle.decode.cycle_log import CycleLog

    logs = [CycleLog(), CycleLog()]
    for model, log in zip((pair, whole), logs, strict=True):
        model.generate(**prompt(pair), temperature=0.0, max_new_tokens=20, streamer=log)
    assert logs[0].cycles == logs[1].cycles


@pytest.mark.parametrize(
    ("family", "temperature"),
    [
        ("llava", 0.0),
        ("qwen", 1.0),
        ("llava block", 0.0),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("llava", 1.0), ("qwen", 0.0), ("qwen block", 1.0))),
    ],
)
def test_operations_and_waits_of_a_cycle(
    tmp_path: Any, family: str, temperature: float, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 40 operations and exactly one wait, for as many layers as the published models have."""
    family, *block = family.split()
    pair = make_pair(tmp_path, family, LAYERS[family], trimmed=False, block=bool(block))
    tree = replace(TreeConfig.for_device("cuda"), depth=TREE.depth) if block else TreeConfig.for_device("cuda")
    whole, inputs = compiled_for(pair, seen, tree), prompt(pair)
    settings: dict[str, Any] = {"temperature": temperature, "seed": 1, "top_p": 0.9, "max_new_tokens": 40}
    if not temperature:
        del settings["top_p"]
    monkeypatch.setattr(whole._compiled.cycle(tree), "ahead", 1)
    monkeypatch.setattr(sampling, "BEST", 10**6)  # top-p of an accelerator
    follow, counts = Decoder._follow, []

    def counted(self: Decoder, *given: Any) -> bool:
        operations, waits = seen.operations, seen.waits
        with seen:
            result = follow(self, *given)
        counts.append((self.stats.cycles, seen.operations - operations, seen.waits - waits))
        return result

    monkeypatch.setattr(Decoder, "_follow", counted)
    whole.generate(**inputs, **settings)
    ((cycles, operations, waits),) = counts
    assert cycles > 4 and waits == cycles
    assert operations / cycles <= 40, f"{operations / cycles:.1f} operations a cycle"

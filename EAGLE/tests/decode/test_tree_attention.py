"""Tree attention in two parts: the same numbers as masked attention, and the same answers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_draft import make_draft
from tiny_families import make_gemma3
from tiny_llava import make_llava_hf
from tiny_stock import make_qwen
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eagle import MSDModel, TreeConfig, attention
from eagle.attention import (
    TREE_ATTENTION,
    TwoParts,
    plain_attention,
    tree_attention,
    two_part_attention,
    with_tree_attention,
)
from eagle.decode.adaptive import cost
from eagle.decode.masks import MaskBuffer
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from llava import UserError

TREE = TreeConfig(3, 4, 12)


def chain(nodes: int) -> Tensor:
    return torch.ones(nodes, nodes).tril().bool()


def star(nodes: int) -> Tensor:
    return torch.eye(nodes).bool() | (torch.arange(nodes) == 0)


def random_tree(nodes: int) -> Tensor:
    generator, mask = torch.Generator().manual_seed(nodes), torch.eye(nodes).bool()
    for node in range(1, nodes):
        mask[node] |= mask[int(torch.randint(node, (), generator=generator))]
    return mask


def parts(pasts: list[int], block: Tensor, heads: int, key_heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys, values and mask of a tree forward."""
    nodes, generator = len(block), torch.Generator().manual_seed(0)
    mask = MaskBuffer(nodes, max(pasts) + nodes, dtype, torch.device("cpu"))
    window = mask.window(pasts, block.expand(len(pasts), -1, -1))

    def new(heads: int, rows: int) -> Tensor:
        return torch.randn(len(pasts), heads, rows, 16, generator=generator).to(dtype)

    columns = window.shape[-1]
    return new(heads, nodes), new(key_heads, columns), new(key_heads, columns), window


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    layer = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1])
    found, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=scale)  # type: ignore[arg-type]
    return found.transpose(1, 2)


@pytest.mark.parametrize("pasts", [[300], [1], [40, 7, 300]], ids=str)
@pytest.mark.parametrize("make", [chain, star, random_tree])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (28, 4), (6, 1)])
def test_two_parts_are_masked_attention(
    pasts: list[int], make: Callable[[int], Tensor], heads: int, key_heads: int
) -> None:
    given = parts(pasts, make(13), heads, key_heads, torch.float32)
    found = two_part_attention(*given, prefix=min(pasts))
    torch.testing.assert_close(found, masked(*given), rtol=1e-5, atol=2e-6)
    wide = masked(*(each.double() for each in given[:3]), given[3].double())
    assert (found - wide).abs().max() < 1e-6, "float32 rounding"


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_16_bit_is_no_less_exact_than_masked_attention(dtype: torch.dtype, step: float) -> None:
    given = parts([200, 90], random_tree(20), 8, 2, dtype)
    wide = masked(*(each.double() for each in given[:3]), given[3].double())
    own, other = (two_part_attention(*given, prefix=90).double(), masked(*given).double())
    assert (own - wide).abs().max() <= max(2 * (other - wide).abs().max(), step)


def test_the_fused_kernel_gives_the_plain_sums() -> None:
    query, key, value, _ = parts([500], chain(9), 4, 4, torch.float32)
    fused, plain = (each(query, key, value, 0.3) for each in (attention.open_attention, plain_attention))
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-6, atol=1e-5)


def test_a_row_that_sees_no_node_has_the_prefix_alone() -> None:
    """As padding rows of a batch, in float16 too."""
    query, key, value, mask = parts([30], torch.zeros(5, 5).bool(), 4, 4, torch.float16)
    found = two_part_attention(query, key, value, mask, 30)
    alone, _ = plain_attention(query, key[:, :, :30], value[:, :, :30], 16**-0.5)
    torch.testing.assert_close(found.float(), alone, rtol=1e-2, atol=2e-3)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The prefix of each call of `two_part_attention`."""
    real, calls = attention.two_part_attention, []
    monkeypatch.setattr(attention, "two_part_attention", lambda *given: (calls.append(given[4]), real(*given))[1])
    return calls


@pytest.mark.parametrize("other", [{"softcap": 1.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, {}])
def test_what_two_parts_do_not_know_is_left_to_sdpa(
    counted: list[int], monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    """A setting, or another mask than that of the forward, as of a sliding window."""
    *given, mask = parts([30], chain(5), 4, 2, torch.float32)
    seen: list[Any] = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **kwargs: seen.append((args[4], kwargs)))
    own = mask if other else mask.clone()
    tree_attention(torch.nn.Identity(), *given, own, two_parts=TwoParts(mask, 30), **other)
    assert len(seen) == 1 and seen[0][0] is own and seen[0][1].items() >= other.items() and not counted
    tree_attention(torch.nn.Identity(), *given, mask)
    assert len(seen) == 2, "a forward that does not ask for two parts, as of another thread"


def test_the_attention_of_the_model_is_restored() -> None:
    config = SimpleNamespace(_attn_implementation="sdpa")
    with pytest.raises(RuntimeError), with_tree_attention(config):
        assert config._attn_implementation == TREE_ATTENTION
        raise RuntimeError
    assert config._attn_implementation == "sdpa"


@pytest.fixture(scope="module", params=[make_llava_hf, make_qwen, make_gemma3], ids=["llava", "qwen2_vl", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    folder = tmp_path_factory.mktemp("pair")
    target = load_target(request.param(folder / "base"), dtype=torch.float32)
    draft = load_draft(make_draft(folder / "draft", target), dtype=torch.float32)
    return MSDModel(target, draft, TREE, tree_attention="two-part")


@pytest.mark.parametrize("batch", [1, 2])
def test_answers_are_those_of_generate(model: MSDModel, counted: list[int], batch: int) -> None:
    """Layers with sliding windows are masked."""
    ids = torch.randint(5, 100, (batch, 60), generator=torch.Generator().manual_seed(batch))
    expected = model.target.model.generate(input_ids=ids, do_sample=False, max_new_tokens=30)
    output = model.generate(input_ids=ids, temperature=0, max_new_tokens=30)
    assert torch.equal(output.sequences[:, : expected.shape[1]], expected)
    text = model.target.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    full = len(kinds) if model.target.layers.window is None else kinds.count("full_attention")
    cycles = len(output.stats.tree_sizes) if batch == 1 else None
    assert counted and len(counted) % full == 0 and min(counted) >= 60
    if cycles is not None:
        assert len(counted) <= full * cycles
    assert text._attn_implementation == "sdpa"


def test_it_is_used_where_it_was_measured_to_be_faster(
    model: MSDModel, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measured(target: Any, nodes: int) -> int:
        asked.append(nodes)
        return 600

    monkeypatch.setattr("eagle.decode.msd.two_part_from", measured)
    own = MSDModel(model.target, model.draft, TREE)
    for prompt, new, used in ((400, 4, False), (550, 4, False), (620, 4, True)):
        counted.clear()
        ids = torch.randint(5, 100, (1, prompt), generator=torch.Generator().manual_seed(prompt))
        own.generate(input_ids=ids, temperature=0, max_new_tokens=new)
        assert bool(counted) is used, prompt
    assert asked == [TREE.total_tokens], "measured once, and not for short prompts"
    counted.clear()
    MSDModel(model.target, model.draft, TREE, tree_attention="masked").generate(
        input_ids=torch.randint(5, 100, (1, 620)), temperature=0, max_new_tokens=4
    )
    assert not counted
    with pytest.raises(UserError, match=r"tree_attention='fast' .*auto or two-part or masked"):
        MSDModel(model.target, model.draft, TREE, tree_attention="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "place"), [([1.0, 0.5], 512), ([1.0, 2.0], None)])
def test_the_faster_way_follows_from_the_measurement(
    model: MSDModel, monkeypatch: pytest.MonkeyPatch, seconds: list[float], place: int | None
) -> None:
    def pretended(runs: list[Callable[[], None]]) -> list[float]:
        for run in runs:
            run()
        return seconds

    monkeypatch.setattr(cost, "seconds_of", pretended)
    assert cost.two_part_from(model.target, 12) == place

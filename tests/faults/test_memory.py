"""Out of memory while a tree is verified: a smaller tree, the same answer. Anywhere else: one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llava import make_image

from eagle.cli import main
from eagle.decode.msd import MSDModel
from eagle.decode.tree import Candidates, ancestor_mask, prune, select_nodes
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from eagle.families.base import Target
from llava.errors import LESS_MEMORY, UserError

TREE = TreeConfig(depth=4, top_k=4, total_tokens=24)
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.fixture(scope="module")
def model(pair: Path) -> MSDModel:
    return MSDModel(load_target(pair / "base", dtype="float32"), load_draft(pair / "draft", dtype=torch.float32), TREE)


def fail_over(monkeypatch: pytest.MonkeyPatch, nodes: int, error: Exception) -> list[int]:
    """Lets a verification of more than ``nodes`` nodes fail after its first layer; gives the sizes that were tried."""
    sizes: list[int] = []
    verify = Target.verify

    def limited(self: Target, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(tokens.shape[1])
        if tokens.shape[1] <= nodes:
            return verify(self, tokens, *rest)

        def full(*_: Any) -> None:
            raise error

        handle = self.text_model.layers[0].register_forward_hook(full)
        try:
            return verify(self, tokens, *rest)
        finally:
            handle.remove()

    monkeypatch.setattr(Target, "verify", limited)
    return sizes


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), CPU, MemoryError()], ids=type)
@pytest.mark.parametrize("fits", [1, 5, 12])
def test_a_smaller_tree_and_the_same_answer(
    model: MSDModel, monkeypatch: pytest.MonkeyPatch, error: Exception, fits: int
) -> None:
    inputs = model.target.prepare("USER: <image>\nHow many? ASSISTANT:", [make_image()])
    expected = model.generate(**inputs, max_new_tokens=30, temperature=0.0)
    sizes = fail_over(monkeypatch, fits, error)
    output = model.generate(**inputs, max_new_tokens=30, temperature=0.0)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.stats.cut_trees == len([size for size in sizes if size > fits]) > 0
    assert max(output.stats.tree_sizes) <= fits
    assert sizes[: len(sizes) - len(output.stats.tree_sizes)] == sorted(
        sizes[: len(sizes) - len(output.stats.tree_sizes)], reverse=True
    ), "a size that failed is not tried again"
    assert model.tree == TREE, "the next request begins with the whole tree"


def test_a_batch(model: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["USER: <image>\nHow many? ASSISTANT:", "USER: Name a river. ASSISTANT:"]
    inputs = model.target.prepare(prompts, [make_image()])
    expected = model.generate(**inputs, max_new_tokens=20, temperature=0.0)
    fail_over(monkeypatch, 3, CPU)
    output = model.generate(**inputs, max_new_tokens=20, temperature=0.0)
    assert torch.equal(output.sequences, expected.sequences) and output.stats.cut_trees > 0


def test_no_room_for_one_token_is_one_line(model: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = model.target.prepare("USER: Name a river. ASSISTANT:")
    sizes = fail_over(monkeypatch, 0, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(UserError, match="out of memory with a single token"):
        model.generate(**inputs, max_new_tokens=20, temperature=0.0)
    assert sizes == [24, 12, 6, 3, 1]


def test_another_error_is_not_taken_for_it(model: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = fail_over(monkeypatch, 0, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        model.generate(**model.target.prepare("USER: Name a river. ASSISTANT:"), max_new_tokens=20, temperature=0.0)
    assert len(sizes) == 1


def generate(pair: Path) -> list[str]:
    """A command."""
    models = ["--base-model", str(pair / "base"), "--msd-model", str(pair / "draft"), "--dtype", "float32"]
    return ["generate", *models, "--tree", "fixed", "--prompt", "Name a river.", "--max-new-tokens", "12"]


def test_the_command_tells(pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_over(monkeypatch, 4, CPU)
    assert main(generate(pair)) == 0
    assert "trees halved for lack of memory]" in capsys.readouterr().out


def test_a_prompt_without_room_is_one_line(
    pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise CPU

    monkeypatch.setattr(Target, "prefill_each", full)
    assert main(generate(pair)) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert line.startswith("error: out of memory: [enforce fail") and line.endswith(f"({LESS_MEMORY})")


def test_the_best_part_is_the_tree_that_would_have_been_selected() -> None:
    """R - a, b; a - c, d; b - e: the best part of a tree is a tree, in its order."""
    candidates = Candidates(
        torch.tensor([10, 11, 12, 13, 14]),
        torch.tensor([-0.1, -0.5, -0.3, -2.0, -0.9]),
        torch.tensor([-1, -1, 0, 0, 1]),
    )
    whole = select_nodes(candidates, torch.tensor([7]), 6)
    for size in range(1, 7):
        part, expected = prune(whole, size), select_nodes(candidates, torch.tensor([7]), size)
        assert all(torch.equal(a, b) for a, b in zip(part, expected, strict=True))
        assert torch.equal(part.mask, ancestor_mask(part.parents))

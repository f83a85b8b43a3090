"""docs/method.md's figures: the tree is the engine's own, and the page names the commands that draw them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian

from eagle import MSDModel, TreeConfig
from eagle.decode.accept import Accepted
from eagle.decode.tree import DraftTree, ancestor_mask
from eagle.families import load_target
from eagle.hidden_states.index import sha256
from eagle.questions import Question
from experiments import figure_inputs, figure_tree
from experiments.figure_tree import Cycle, record, rows_of, spelling, typical
from llava.errors import UserError

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "method.md").read_text(encoding="utf-8")
TREE = TreeConfig(2, 3, 9)


def tree_of(parents: list[int], scores: list[float]) -> DraftTree:
    mask = ancestor_mask(torch.tensor(parents))
    return DraftTree(torch.arange(len(parents)), torch.tensor(parents), mask.sum(-1) - 1, mask, torch.tensor(scores))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = make_liuhaotian(folder / "base", seed=3)
    return base, make_draft(folder / "draft", load_target(base, dtype=torch.float32), agree=1.0)


def test_the_cycles_are_those_of_the_answer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Their tokens are the answer of `generate`, each after the ones before; every path is drafted."""
    msd = MSDModel.from_pretrained(*pair, dtype=torch.float32, tree=TREE)
    make_image(tmp_path / "a.png")
    question = Question("1", "Which colours?", (tmp_path / "a.png",))
    cycles = record(msd, question, TREE, max_new_tokens=24)
    inputs = question.inputs(msd.target)
    answer = msd.generate(**inputs, temperature=0.0, max_new_tokens=24)
    new = answer.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    told = new[:1] + [token for cycle in cycles for token in cycle.accepted.tokens]
    assert told[: len(new)] == new and answer.stats.cycles == len(cycles)
    assert max(len(cycle.accepted.path) for cycle in cycles) > 1, "a draft that is never right shows nothing"
    for cycle in cycles:
        assert new[len(cycle.before)] == int(cycle.tree.tokens[0])
        assert cycle.tree.tokens[cycle.accepted.path[1:]].tolist() == cycle.accepted.tokens[:-1]


def test_heights_of_a_tree_drawn_by_hand() -> None:
    """R ─┬─ b ─── d ─┬─ bonus      the accepted path first, then by probability
    │           └─ e
    └─ a ─── c"""
    tree = tree_of([-1, 0, 0, 1, 2, 4], [0.0, -0.1, -0.2, -0.3, -0.4, -0.5])
    assert rows_of(tree, Accepted([0, 2, 4], [2, 4, 9])) == ([0, 2, 0, 2, 0, 1], 0)
    assert rows_of(tree, Accepted([0], [9])) == ([0, 1, 2, 1, 2, 2], 0)


def test_the_typical_cycle() -> None:
    chain, bush = tree_of([-1, 0, 1], [0.0] * 3), tree_of([-1, 0, 0], [0.0] * 3)
    cycles = [
        Cycle(tree, Accepted([0] * new, [1] * new), [])
        for tree, new in ((chain, 1), (chain, 2), (bush, 2), (bush, 3), (tree_of([-1], [0.0]), 9))
    ]
    assert typical(cycles) == 2
    with pytest.raises(UserError, match="no cycle of this answer drafted anything"):
        typical(cycles[4:])


def test_the_tree_is_drawn(pair: tuple[Path, Path], tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    row = {"id": "q", "images": ["a.png"], "question": "Which of $1 and $2?", "answer": ""}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    words = ["--base-model", str(pair[0]), "--msd-model", str(pair[1]), "--data", str(tmp_path / "q.jsonl")]
    words += ["--max-new-tokens", "12", "--tree", "2/2/5", "--out", str(tmp_path / "tree.png")]
    assert figure_tree.run([*words, "--question", "q"]) == 0
    first = (tmp_path / "tree.png").read_bytes()
    assert Image.open(tmp_path / "tree.png").text["Source"] == sha256(pair[1] / "model.safetensors")
    assert figure_tree.run([*words, "--question", "q"]) == 0
    assert (tmp_path / "tree.png").read_bytes() == first, "the same weights give the same picture"
    with pytest.raises(UserError, match="no question 'other'"):
        figure_tree.run([*words, "--question", "other"])
    with pytest.raises(UserError, match="no cycle 99"):
        figure_tree.run([*words, "--question", "q", "--cycle", "99"])


def test_the_inputs_are_drawn(tmp_path: Path) -> None:
    assert figure_inputs.run(["--out", str(tmp_path / "inputs.png")]) == 0
    assert Image.open(tmp_path / "inputs.png").size == Image.open(REPO / "docs" / "method-inputs.png").size


def test_spelling_shows_spaces() -> None:
    class Tokenizer:
        def convert_ids_to_tokens(self, token: int) -> str:
            return ["▁the", "Ġthe", "$"][token]

    assert [spelling(Tokenizer(), token) for token in range(3)] == ["␣the", "␣the", r"\$"]


def test_the_page_shows_the_shipped_draft_and_says_how() -> None:
    shown = re.findall(r"!\[[^]]+\]\(([\w-]+\.png)\)", PAGE)
    assert shown == ["method-tree.png", "method-inputs.png"]
    assert all(f"`python -m benchmarks.{name}`" in PAGE for name in ("figure_inputs", "figure_tree"))
    drawn = Image.open(REPO / "docs" / "method-tree.png").text["Source"]
    shipped = sha256(REPO / "pocket" / "llava-msd" / "model.safetensors")
    assert drawn == shipped, "the draft is another one: run python -m experiments.figure_tree"

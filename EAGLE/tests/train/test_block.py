"""Training of block heads: the rows of each depth, the loss, acceptance when decoding, checkpoints, refusals."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny_llava
import tiny_stock
import torch
from online_support import Case
from safetensors.torch import load_file
from test_overfit import CHAIN, NEW, decode, own_answer, prompt, train

from eagle.drafts.block import BlockDraft
from eagle.drafts.checkpoint import load_draft, save_draft
from eagle.drafts.config import BlockConfig, DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.families import Target, load_target
from eagle.families.base_weights import BaseTensors
from eagle.families.llava.target import LlavaTarget
from eagle.train import main_deepspeed
from eagle.train.block import STRIDE, BlockObjective, block_mask
from eagle.train.collate import collate
from eagle.train.rollout import rollout_loss_mask, shift_left
from eagle.train.settings import TrainConfig, read_config, recipe_of
from eagle.train.validation import batch_sums, summary
from llava.errors import UserError, run_cli

SIZE = 6


@pytest.fixture(params=["llava plain", "qwen plain", "qwen mrope"], scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, str]:
    """A target and the kind of its draft's positions."""
    name, positions = request.param.split()
    if name == "llava":
        model = tiny_llava.tiny_model(tiny_llava.TinySizes(), seed=1, vocab_size=120)
        return LlavaTarget(model, processor=None), positions
    folder = tiny_stock.make_qwen(tmp_path_factory.mktemp("qwen"), seed=3)
    return load_target(folder, dtype="float32"), positions


def new_objective(target: Target, positions: str, layers: int = 1, **settings: Any) -> BlockObjective:
    torch.manual_seed(0)
    shape = {"model_type": target.family, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
             "vocab_size": target.vocab_size, "msd": {"positions": positions},
             "rope_scaling": {"mrope_section": [1, 1, 2]}, "block": {"size": SIZE, "layers": layers}}  # fmt: skip
    base = BaseTensors(target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight)
    config = BlockConfig.from_dict(shape)
    return BlockObjective(BlockDraft(config), base, TrainConfig(**{**recipe_of(config), **settings}))


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_each_row_drafts_as_plain_forwards_do(case: tuple[Target, str], layers: int) -> None:
    """One row at a time: the true rows up to it and its mask rows, by a forward without a cache."""
    target, positions = case
    objective = new_objective(target, positions, layers)
    draft = objective.draft.eval()
    torch.nn.init.normal_(draft.mask_rows)
    sample = own_answer(target, prompt(target, 1))
    batch = collate([sample], target.vocab_size, 2048, positions=positions)
    batch.loss_mask[:] = True  # all rows, pictures and prompt included
    predicted = [each for *_, each in objective.predict(batch, batch.features, SIZE)]
    embeds = objective.embeds(batch)
    rows = draft.fuse(batch.features[:, :-1], embeds[:, 1:], batch.image_mask[:, 1:])  # [1, R, H]
    places = torch.arange(rows.shape[1])[None] if batch.positions is None else batch.positions[..., :-1]
    for root in (1, rows.shape[1] // 2, rows.shape[1] - SIZE - 1):
        certain = rows[:, : root + 1]
        x = torch.cat([certain, certain[:, -1:] + draft.mask_rows], dim=1)
        output = draft(x, places[..., : root + SIZE])[0, root:]
        if places.ndim == 2 or not sample.image_mask[root : root + SIZE].any():  # decoding drafts text
            torch.testing.assert_close(torch.stack([each[root] for each in predicted]), output, atol=1e-5, rtol=1e-4)


def test_loss_is_the_cross_entropy_of_each_depth(case: tuple[Target, str]) -> None:
    target, positions = case
    objective = new_objective(target, positions, rollout_decay=0.5)
    sample = own_answer(target, prompt(target, 0))
    silent = replace(sample, loss_mask=torch.zeros_like(sample.loss_mask))
    shorter = replace(sample, loss_mask=sample.loss_mask & (torch.arange(len(sample.loss_mask)) % 9 > 1))
    samples, seeds = [silent, sample, shorter], [2 + 5 * STRIDE, 0, 0]
    batch = collate(samples, target.vocab_size, 2048, seeds=seeds, positions=positions)
    every = replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
    expected, weight = torch.zeros(()), 0.0
    for step, rows, hidden in objective.predict(every, batch.features, SIZE):
        mask = rollout_loss_mask(batch.loss_mask, step)
        predicted = hidden.new_zeros(*rows.shape, hidden.shape[-1])
        predicted[rows] = hidden
        if step > 1:  # some rows alone
            mask[:, torch.arange(mask.shape[1]) % STRIDE != 2] = False
        wanted = (shift_left(batch.hidden, step, predicted.shape[1])[mask] @ objective.head.T).softmax(-1)
        depth = torch.nn.functional.cross_entropy(predicted[mask] @ objective.head.T, wanted)
        expected, weight = expected + 0.5 ** (step - 1) * depth, weight + 0.5 ** (step - 1)
    total = objective(batch).total
    torch.testing.assert_close(total, expected / weight)
    parameters = [objective.draft.mask_rows, objective.draft.fc.weight]
    for ours, theirs in zip(
        torch.autograd.grad(total, parameters), torch.autograd.grad(expected / weight, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().sum() > 0


def test_the_mask_is_that_of_the_picture() -> None:
    mask = block_mask(torch.tensor([[0, 2]]), 3, 2)
    rows = ["1000000", "1100000", "1110000", "1001000", "1110100", "1001010", "1110101"]
    assert ["".join(map(str, row)) for row in mask[0, 0].int().tolist()] == rows


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [0, 1])
def test_a_head_trained_on_one_answer_is_accepted(case: tuple[Target, str], pictures: int, tmp_path: Path) -> None:
    """Simulated and served acceptance are the same when half trained; in the end all drafted tokens are accepted."""
    target, positions = case
    inputs = prompt(target, pictures)
    sample = own_answer(target, inputs)
    objective = new_objective(target, positions, layers=2)
    batch = collate([sample], target.vocab_size, 2048, positions=positions)
    taus = []
    for steps in (40, 600):
        train(objective.train(), sample, steps)
        simulated = summary(batch_sums(objective.eval(), batch), depth=6)["tau"]
        head = load_draft(save_draft(objective.draft, tmp_path / f"after-{steps}", torch.float32), torch.float32)
        assert isinstance(head, BlockDraft)
        stats = decode(target, cast(Any, SimpleNamespace(draft=head)), inputs, sample)
        assert simulated == pytest.approx(stats.tau)
        taus.append(stats.tau)
    assert 1 < taus[0] < taus[1]
    assert CHAIN.depth + 1 == SIZE and stats.cycles <= -(-(NEW - 1) // (SIZE + 1)) + 1, stats.accept_lengths


class BlockCase(Case):
    """Training of a block head by the command."""

    def _write_configs(self) -> None:
        super()._write_configs()
        config = json.loads((self.folder / "draft.json").read_text())
        train = {"epochs": 2, "learning_rate": 1e-3, "log_every": 1}
        train |= {key: config["train"][key] for key in ("validation_share", "max_length")}
        (self.folder / "draft.json").write_text(json.dumps({**config, "block": {"size": 3}, "train": train}))


def test_the_command_trains_resumes_and_starts_from_an_msd_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = BlockCase("llava", tmp_path)
    case.allocate()

    def run(cpdir: str, *flags: str) -> int:
        monkeypatch.setattr(sys, "argv", case.command(cpdir, *case.stored, *flags))
        return run_cli(main_deepspeed.main)

    assert run("whole") == 0
    assert run("parts", "--max-steps", "3") == 0 and run("parts", "--resume") == 0
    assert case.curve("parts") == pytest.approx(case.curve("whole"), abs=1e-5) and len(case.curve("whole")) > 3
    final = case.folder / "whole" / "final"
    config, head = json.loads((final / "config.json").read_text()), load_draft(final, torch.float32)
    assert config["block"] == {"size": 3, "layers": 1} and "train" not in config
    assert isinstance(head, BlockDraft) and head.mask_rows.abs().sum() > 0
    capsys.readouterr()
    config = json.loads((case.folder / "draft.json").read_text())
    shape = {key: config[key] for key in config if key not in ("block", "train")}
    msd = save_draft(DraftModel(DraftConfig.from_dict(shape)), tmp_path / "msd")
    assert run("from-msd", "--init", str(msd), "--learning-rate", "0", "--max-steps", "1") == 0, capsys.readouterr()
    own = load_file(case.folder / "from-msd" / "final" / "model.safetensors")
    assert torch.equal(own["fc.weight"].float(), load_file(msd / "model.safetensors")["fc.weight"].float())
    assert run("again", "--init", str(final), "--max-steps", "1") == 0, capsys.readouterr()
    (case.folder / "draft.json").write_text(json.dumps(shape))
    capsys.readouterr()
    assert run("msd", "--init", str(final), "--rollout-steps", "1") == 2
    assert "--init is one of the block heads, --config one of MSD" in capsys.readouterr().err


def test_settings(case: tuple[Target, str], tmp_path: Path) -> None:
    target, positions = case
    for settings in ({"rollout_steps": 2}, {"simulated_depth": 7}):
        (name,) = settings
        with pytest.raises(UserError, match=f"{name}={settings[name]} for a block of {SIZE} tokens"):
            new_objective(target, positions, **settings)
    path = tmp_path / "draft.json"
    shape = new_objective(target, positions).draft.config.published
    path.write_text(json.dumps({**shape, "block": {"size": 4}, "train": {"epochs": 3}}))
    config, settings = read_config(path)
    assert isinstance(config, BlockConfig) and config.block.size == 4 and settings.epochs == 3
    assert (settings.rollout_steps, settings.simulated_depth, settings.hidden_weight) == (4, 4, 0)
    assert BlockConfig.from_dict(config.to_dict()) == config
    path.write_text(json.dumps({**shape, "block": {"length": 4}}))
    with pytest.raises(UserError, match=r"unknown key 'length'.*section 'block'"):
        read_config(path)
    path.write_text(json.dumps({**{key: shape[key] for key in shape if key != "block"}, "blocks": {}}))
    with pytest.raises(UserError, match=r"unknown key 'blocks'.*did you mean 'block'"):
        read_config(path)


def test_auto_config_of_the_kind(tmp_path: Path) -> None:
    base = tiny_stock.make_qwen(tmp_path / "base")
    config, settings = read_config("auto", str(base), "block")
    assert isinstance(config, BlockConfig) and config.block.size == settings.rollout_steps == 8
    other, _ = read_config("auto", str(base))
    assert type(other) is DraftConfig and other.hidden_size == config.hidden_size

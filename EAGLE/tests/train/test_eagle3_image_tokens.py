"""Training of EAGLE-3 heads with merged image rows: what is trained is what decoding reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from online_support import Case
from test_eagle3 import Eagle3Case, answered, as_served, batch_of, new_objective, sure, train
from test_overfit import CHAIN, NEW
from tiny_families import make_qwen3_vl
from tiny_llava import make_image, make_llava_hf
from tiny_stock import make_qwen

from eagle.decode.msd import MSDModel
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.compression import Compression
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.head import Prompt
from eagle.families import Target, load_target
from eagle.families.base import Prefill
from eagle.hidden_states.shards import Sample
from eagle.train import main_deepspeed
from eagle.train.collate import collate
from eagle.train.rollout import shift_left
from eagle.train.trainer import Trainer
from eagle.train.validation import batch_sums, summary
from llava.errors import run_cli

MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen3_vl": make_qwen3_vl,
    "qwen2_5_vl": partial(make_qwen, version="2.5", num_hidden_layers=3),
    "llava": make_llava_hf,
}
PICTURES = ((60, 50), (112, 60), (56, 100))


@pytest.fixture(scope="module", params=MAKERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Target]:
    base = sure(MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "base"))
    target = load_target(base, dtype="float32")
    target.model.generation_config.eos_token_id = None
    return base, target


@torch.no_grad()
def read(target: Target, layers: tuple[int, ...], pictures: tuple[tuple[int, int], ...]) -> tuple[Prefill, Sample]:
    """A question about pictures of these sizes, as decoding and as training get it."""
    images = [make_image(width=width, height=height) for width, height in pictures]
    inputs = target.prepare(target.chat_prompt("Count the shapes.", len(images)), images)
    prefill, ids = target.prefill(inputs, layers), inputs["input_ids"][0]
    mask, answer = prefill.image_mask[0], torch.arange(len(ids)) >= len(ids) - 9
    grids = inputs.get("image_grid_thw", torch.empty(0, 3).long()) // torch.tensor([1, 2, 2])
    states = (prefill.hidden[0], prefill.embeds[0][mask], grids)
    assert bool(mask.any()) == bool(pictures) and prefill.streams is not None
    return prefill, Sample("one", ids, answer, mask, *states, streams=prefill.streams[0])


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize(
    "msd", [{}, {"image_rows": "feature"}, {"positions": "temporal"}, {"positions": "plain"}], ids=str
)
@torch.no_grad()
def test_rows_of_training_are_those_of_decoding(pair: tuple[Path, Target], msd: dict[str, Any], tokens: int) -> None:
    base, target = pair
    if msd.get("positions") == "temporal" and target.family == "llava":
        pytest.skip("samples of LLaVA have no grids")
    objective = new_objective(base, target, {**msd, "image_tokens": tokens})
    draft = objective.draft
    draft.use_embedding(target.model.get_input_embeddings())
    for pictures in ((), PICTURES[:1], PICTURES):
        prefill, sample = read(target, draft.target_layers, pictures)
        batch = batch_of(objective, [sample])
        rows = batch.hidden.shape[1] - 1
        assert rows == len(sample.input_ids) - 1 - int(sample.image_mask.sum()) + tokens * len(pictures)
        embeds = shift_left(objective.embeds(batch), 1, rows)
        trained = draft.fuse(draft.condense(batch.features[:, :rows]), embeds)
        next_is_image = prefill.image_mask[:, 1:]
        prompt = Prompt(
            prefill.features[:, :-1], sample.input_ids[None, 1:], next_is_image, prefill.embeds[:, 1:],
            prefill.positions[..., :-1], prefill.next_position,
        )  # fmt: skip
        decoded = draft.read_prompt(prompt, draft.compression)
        torch.testing.assert_close(trained, decoded.x)
        if draft.positions == "plain":
            assert batch.positions is None and decoded.positions is None
        else:
            assert batch.positions is not None and decoded.positions is not None
            own = batch.positions if draft.positions == "mrope" else batch.positions[0]
            torch.testing.assert_close(own[..., :-1], decoded.positions.float(), check_dtype=False)


@pytest.mark.parametrize(
    ("pair", "image_rows"),
    [
        ("qwen3_vl", "feature"),
        *(
            pytest.param(family, rows, marks=pytest.mark.slow)
            for family in MAKERS
            for rows in ("token", "feature")
            if (family, rows) != ("qwen3_vl", "feature")
        ),
    ],
    indirect=["pair"],
)
def test_simulated_acceptance_is_that_of_decoding(pair: tuple[Path, Target], tmp_path: Path, image_rows: str) -> None:
    """Three pictures of different sizes, and a half-trained head from its checkpoint."""
    base, target = pair
    objective = new_objective(base, target, {"image_rows": image_rows, "image_tokens": 2})
    inputs, sample = answered(target, objective, PICTURES)
    objective.begin([sample])
    batch = batch_of(objective, [sample])
    train(objective, batch, 40)
    simulated = summary(batch_sums(objective.eval(), batch), depth=6)
    draft = objective.draft
    settings = {"positions": draft.positions, "image_ids": draft.embeds_image_ids}
    whole = collate([sample], draft.config.vocab_size, 2048, **settings)
    with_all = summary(batch_sums(objective, whole), depth=6)
    assert with_all["loss"] != pytest.approx(simulated["loss"], rel=1e-3), "rows were the same both ways"
    head = as_served(objective, tmp_path)
    assert head.compression == Compression(2)
    output = MSDModel(target, head, CHAIN).generate(**inputs, max_new_tokens=NEW, temperature=0)
    assert torch.equal(output.sequences[0], sample.input_ids)
    assert simulated["tau"] == pytest.approx(output.stats.tau) and 1 < output.stats.tau < 7


class Killed(BaseException):
    """Ends a run as a signal would: no handler of errors sees it."""


def test_the_command_trains_resumes_and_records_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Online and stored training, and a run that is killed and resumed, have the same losses."""
    case: Case = Eagle3Case("qwen2_vl", tmp_path)

    def run(cpdir: str, *flags: str, rows: int = 2) -> int:
        chosen = ("--draft-image-tokens", str(rows), "--epochs", "3", "--save-every", "2")
        monkeypatch.setattr(sys, "argv", case.command(cpdir, *chosen, *flags))
        return run_cli(main_deepspeed.main)

    step = Trainer._step

    def killed(trainer: Trainer, batches: Any, epoch: int) -> None:
        if trainer.progress.step == 5:
            raise Killed
        step(trainer, batches, epoch)

    case.allocate("--feature-layers", "auto")
    assert run("online", *case.online) == 0 and run("stored", *case.stored) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(Killed):
            run("killed", *case.stored)
    capsys.readouterr()
    assert run("killed", *case.stored, "--resume", rows=3) == 2
    assert "the interrupted run had image_tokens=2, this one has 3" in capsys.readouterr().err
    assert run("killed", *case.stored, "--resume") == 0
    expected = case.curve("online")
    assert len(set(expected)) == len(expected) > 4
    assert case.curve("stored") == pytest.approx(expected, abs=1e-4)
    assert case.curve("killed") == pytest.approx(case.curve("stored"), abs=1e-6)
    final = case.folder / "stored" / "final"
    assert json.loads((final / "config.json").read_text())["msd"]["image_tokens"] == 2
    head = load_draft(final)
    assert isinstance(head, Eagle3Draft) and head.compression == Compression(2)
    assert run("begun", *case.stored, "--init", str(final), "--max-steps", "1", rows=-1) == 2
    assert "--init has image_tokens=2, --config None" in capsys.readouterr().err
    assert run("begun", *case.stored, "--init", str(final), "--max-steps", "1") == 0

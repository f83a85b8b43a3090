"""Rollouts compute only rows that count: losses and gradients are those of a rollout of all rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_support import DRAFT, HIDDEN, VOCAB, make_sample

from eagle.drafts.config import DraftConfig
from eagle.drafts.eagle3 import Eagle3Draft
from eagle.drafts.eagle3_config import Eagle3Config
from eagle.drafts.head import TrainedHead
from eagle.drafts.msd import DraftModel
from eagle.families.base_weights import BaseTensors
from eagle.hidden_states.shards import Sample
from eagle.train.collate import NO_COMPRESSION, Batch, collate
from eagle.train.eagle3 import Eagle3Objective
from eagle.train.loss import DraftObjective
from eagle.train.objective import Losses, Objective
from eagle.train.rollout import GrowingCache, pack, rollout_loss_mask, rollout_mask, shift_left
from eagle.train.settings import TrainConfig
from eagle.train.validation import batch_sums

STEPS = 4
SETTINGS = {"rollout_steps": STEPS, "rollout_decay": 0.7, "hidden_weight": 0.5, "token_weight": 0.6, "head_chunk": 5,
            "simulated_depth": STEPS}  # fmt: skip
SECTIONS = {"rope_scaling": {"mrope_section": [1, 1, 2]}}
MROPE = {"msd": {"positions": "mrope"}, **SECTIONS}
WINDOW = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 3, "num_hidden_layers": 2}


def sample_of(length: int, image: int, seed: int, answers: tuple[range, ...]) -> Sample:
    """A random sample with streams of three layers, whose answers are these positions."""
    sample = make_sample(length, image, seed=seed)
    positions = torch.arange(length)
    loss_mask = torch.stack([(positions >= each.start) & (positions < each.stop) for each in answers]).any(dim=0)
    streams = torch.randn(length, 3 * HIDDEN, generator=torch.Generator().manual_seed(seed))
    grids = torch.tensor([[1, 2, image // 2]]) if image else torch.empty(0, 3).long()
    return replace(sample, loss_mask=loss_mask, streams=streams, image_grids=grids)


SAMPLES = [
    sample_of(18, 6, seed=1, answers=(range(9, 13), range(15, 18))),
    sample_of(23, 0, seed=2, answers=(range(3, 14), range(16, 18), range(20, 21))),
    sample_of(9, 4, seed=3, answers=(range(0),)),
    sample_of(12, 4, seed=4, answers=(range(9, 11),)),
]
SILENT = [replace(sample, loss_mask=torch.zeros_like(sample.loss_mask)) for sample in SAMPLES[:2]]


def make(kind: str, changes: dict[str, Any], cap: float | None = None) -> Objective[TrainedHead]:
    """An objective with random weights; the samples' own features for an EAGLE-3 head."""
    torch.manual_seed(0)
    base = BaseTensors(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN), cap)
    settings = TrainConfig(**SETTINGS)
    if kind == "msd":
        return DraftObjective(DraftModel(DraftConfig.from_dict({**DRAFT, **changes})), base, settings)
    config = Eagle3Config.from_dict({**DRAFT, "model_type": "llama", "draft_vocab_size": VOCAB, **changes}, "config")
    objective = Eagle3Objective(Eagle3Draft(config), base, settings)
    objective.begin(SAMPLES)
    return objective


def batch_of(objective: Objective[TrainedHead], samples: list[Sample]) -> Batch:
    draft = objective.draft
    if isinstance(draft, DraftModel):
        samples = [replace(sample, streams=None) for sample in samples]
    return collate(
        samples, VOCAB, 64, compression=draft.compression or NO_COMPRESSION, positions=draft.positions,
        image_ids=draft.embeds_image_ids,
    )  # fmt: skip


def all_rows(objective: Objective[TrainedHead], batch: Batch) -> Iterator[tuple[int, Tensor]]:
    """(k, predicted [B, S-1, H]): each step at all rows of the samples, pictures and prompts included."""
    draft, rows = objective.draft, batch.hidden.shape[1] - 1
    embeds, cache, own = objective.embeds(batch), GrowingCache(), torch.eye(rows).bool()
    hidden, causal = draft.condense(batch.features[:, :rows]), torch.ones(rows, rows).bool().tril()
    window, positions = draft.window or 2 * (rows + STEPS), batch.positions
    if positions is not None and draft.positions == "temporal":
        positions = positions[:1].expand(3, -1, -1)
    for step in range(1, STEPS + 1):
        x = draft.fuse(hidden, shift_left(embeds, step, rows), shift_left(batch.image_mask, step, rows))
        seen = causal.triu(step - window)
        mask = torch.cat([seen, *[own & (step - earlier < window) for earlier in range(2, step + 1)]], dim=1)
        if positions is None:
            places = torch.arange(rows)[None] + step - 1
        else:
            places = torch.stack([shift_left(each, step - 1, rows) for each in positions])
        hidden = draft(x, places, mask[None, None], cache)
        yield step, hidden


def expected(objective: Objective[TrainedHead], batch: Batch) -> Tensor:
    """The loss by its definition: full logits of all rows, the mask afterwards."""
    total, weights, ids = torch.zeros(()), 0.0, objective.draft.draft_vocab
    for step, predicted in all_rows(objective, batch):
        mask = rollout_loss_mask(batch.loss_mask, step).float()  # [B, R]
        target = shift_left(batch.hidden, step, mask.shape[1])
        read, logits = objective.draft.head_input(predicted), target @ objective.head.T
        own = read @ (objective.own_head if isinstance(objective, Eagle3Objective) else objective.head).T
        if objective.cap is not None:
            logits = objective.cap * (logits / objective.cap).tanh()
            if not isinstance(objective, Eagle3Objective):
                own = objective.cap * (own / objective.cap).tanh()
        wanted = (logits if ids is None else logits[..., ids]).softmax(-1)
        token = -(wanted * own.log_softmax(-1)).sum(-1)
        regression = F.smooth_l1_loss(read, target, reduction="none").mean(-1)
        each = (mask * (0.6 * token + 0.5 * regression)).sum() / mask.sum().clamp(min=1)
        total, weights = total + 0.7 ** (step - 1) * each, weights + 0.7 ** (step - 1)
    return total / weights


def gradients(objective: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: each for name, each in objective.named_parameters() if each.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


CASES = {
    "msd": ("msd", {}),
    "msd, M-RoPE, grouped heads": ("msd", {**MROPE, "num_key_value_heads": 1}),
    "msd, not decoupled, merged": ("msd", {"msd": {"decoupled": False, "image_tokens": 2}}),
    "placeholders": ("eagle3", {"msd": {"image_rows": "token"}}),
    "features, M-RoPE, feedback after": (
        "eagle3",
        {"msd": {"image_rows": "feature", "positions": "mrope", "feedback": "after"}, **SECTIONS},
    ),
    "merged, temporal": ("eagle3", {"msd": {"image_rows": "feature", "image_tokens": 2, "positions": "temporal"}}),
    "window, two layers, grouped heads": ("eagle3", {**WINDOW, "num_key_value_heads": 1}),
    "two layers": ("eagle3", {"num_hidden_layers": 2}),
    "trimmed vocabulary": ("eagle3", {"draft_vocab_size": 30, "norm_before_residual": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_all_rows(case: str) -> None:
    """Of samples with different numbers of rows that count, several answers, and none."""
    objective = make(*CASES[case], cap=3.0 if case in ("msd", "trimmed vocabulary") else None)
    batch = batch_of(objective, SAMPLES)
    assert [rollout_loss_mask(batch.loss_mask, step).sum(dim=1).tolist() for step in (1, 2)] == [
        [5, 11, 0, 1],
        [3, 9, 0, 0],
    ]
    losses, wanted = objective(batch), expected(objective, batch)
    assert isinstance(losses, Losses)
    torch.testing.assert_close(losses.total, wanted)
    own, theirs = gradients(objective, losses.total), gradients(objective, wanted)
    for name, gradient in theirs.items():
        torch.testing.assert_close(own[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: name + text)
        assert gradient.any(), name


@pytest.mark.parametrize("case", ["msd", "window, two layers, grouped heads", "trimmed vocabulary"])
def test_a_batch_without_a_row_that_counts(case: str) -> None:
    """As one process of several may have it: all parameters have a gradient, of zeros."""
    objective = make(*CASES[case])
    batch = batch_of(objective, SILENT)
    losses = objective(batch)
    assert losses.total == 0 and losses.rows == 0
    assert not any(gradient.any() for gradient in gradients(objective, losses.total).values())
    assert not batch_sums(objective.eval(), batch).any()


def test_rows_that_count_at_the_first_step_alone() -> None:
    """Answers of two tokens have one row, at step 1."""
    objective = make(*CASES["two layers"])
    batch = batch_of(objective, [SAMPLES[3]])
    assert batch.loss_mask.sum() == 1 and not rollout_loss_mask(batch.loss_mask, 2).any()
    losses, wanted = objective(batch), expected(objective, batch)
    torch.testing.assert_close(losses.total, wanted)
    torch.testing.assert_close(gradients(objective, losses.total), gradients(objective, wanted))


def test_rows_that_do_not_count_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make("eagle3", {})
    sizes: list[int] = []
    mlp = objective.draft.layers[0].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: sizes.append(x.shape[1]) or forward(x))
    batch = batch_of(objective, SAMPLES)
    objective(batch)
    most = [int(rollout_loss_mask(batch.loss_mask, step).sum(dim=1).max()) for step in (1, 2)]
    assert sizes == [most[0], *[most[1]] * (STEPS - 1)] and most[0] < batch.loss_mask.shape[1] / 2 + 1


def test_the_mask_is_the_one_in_the_docstring() -> None:
    mask = rollout_mask(torch.tensor([[1, 3], [0, 2]]), 4, 3)
    rows = [["".join(map(str, row)) for row in each[0].int().tolist()] for each in mask]
    assert rows == [["11001010", "11110101"], ["10001010", "11100101"]]
    window = rollout_mask(torch.tensor([[1, 3]]), 4, 3, window=2)[0, 0].int().tolist()
    assert window == [[0, 0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1, 0, 1]]


def test_rows_are_packed_in_their_order() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    rows = pack(mask)
    assert rows[0].tolist() == [1, 3, 4] and rows[1, 0] == 0
    assert not mask[1, rows[1, 1:]].any() and not mask[2, rows[2]].any()
    assert pack(torch.zeros(2, 3).bool()).shape == (2, 1)

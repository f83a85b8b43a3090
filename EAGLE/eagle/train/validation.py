"""Validation: loss, accuracy and acceptance in simulated chain decoding.

From every position of an answer the draft drafts ``depth`` tokens on its own outputs (`rollout.predict_steps`, which is
how decoding feeds it). A drafted token is accepted if it is the target's greedy choice there, the arg-max of
``lm_head(h)``, and all before it are. The samples' own tokens are fed: where an answer is the target's own greedy one,
that is exactly decoding with a chain, otherwise a proxy. A tree accepts more than a chain.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from eagle.drafts.head import TrainedHead
from eagle.train.collate import Batch
from eagle.train.engine import Engine
from eagle.train.objective import TOP, Objective, best_tokens
from eagle.train.rollout import rollout_loss_mask, shift_left


class Acceptance(NamedTuple):
    """``accepted`` [B, R] drafted tokens accepted from each row on, 0 outside the loss mask; ``reached`` [depth]
    rows at which step k was tried with all before it accepted; ``matched`` [depth] of these accepted."""

    accepted: Tensor
    reached: Tensor
    matched: Tensor


def accepted_lengths(predictions: Iterable[tuple[int, Tensor]], greedy: Tensor, loss_mask: Tensor) -> Acceptance:
    """Accepted prefix from every row.

    Args:
        predictions: (k, tokens [B, R]) for k = 1, 2, ...: row t of step k is the draft's ``x_{t+k+1}``.
        greedy: [B, R] row t is the target's choice after ``x_{t+1}``, that is for ``x_{t+2}``.
        loss_mask: [B, R] rows that decoding can draft from.
    """
    active = loss_mask
    accepted = torch.zeros_like(loss_mask, dtype=torch.long)
    reached, matched = [], []
    for step, tokens in predictions:
        tried = active & rollout_loss_mask(loss_mask, step)
        active = tried & (tokens == shift_left(greedy, step - 1, greedy.shape[1]))
        accepted += active
        reached.append(tried.sum())
        matched.append(active.sum())
    return Acceptance(accepted, torch.stack(reached), torch.stack(matched))


def count_cycles(accepted: list[int], loss_mask: list[bool]) -> tuple[int, int]:
    """Decodes one sample by its ``accepted`` lengths: (new tokens after each answer's first one, cycles).

    A cycle at row t gives ``accepted[t] + 1`` tokens, the bonus token included, and the next cycle starts at the
    row after them. An answer ends where the loss mask ends.

    >>> count_cycles([0, 2, 0, 0, 1, 0], [False, True, True, True, True, False])
    (4, 2)
    """
    tokens, cycles, row = 0, 0, 0
    while row < len(loss_mask):
        if not loss_mask[row]:
            row += 1
            continue
        end = row
        while end < len(loss_mask) and loss_mask[end]:
            end += 1
        tokens += end - row
        while row < end:
            cycles += 1
            row += accepted[row] + 1
        row = max(row, end)
    return tokens, cycles


@torch.no_grad()
def batch_sums(objective: Objective[TrainedHead], batch: Batch) -> Tensor:
    """Sums of one batch, see `summary` for their order."""
    config, loss_mask = objective.config, batch.loss_mask
    target = batch.hidden[:, 1:][loss_mask]  # [N, H]
    greedy = torch.full_like(loss_mask, -1, dtype=torch.long)
    greedy[loss_mask] = best_tokens(target, objective.head, config.head_chunk)
    losses = []

    def drafted_tokens() -> Iterable[tuple[int, Tensor]]:
        for step, rows, predicted in objective.predict(batch, batch.features, config.simulated_depth):
            if step == 1:
                losses.append(objective.loss([predicted], [target]))
            tokens = torch.full_like(greedy, -2)
            tokens[rows] = objective.drafted(predicted)
            yield step, tokens

    result = accepted_lengths(drafted_tokens(), greedy, loss_mask)
    cycles_of_samples = [count_cycles(a, m) for a, m in zip(result.accepted.tolist(), loss_mask.tolist(), strict=True)]
    (loss,) = losses
    number = loss_mask.sum()
    parts = torch.stack([loss.total * number, loss.hidden * number, loss.token * number]).double()
    counted = torch.tensor(cycles_of_samples, device=parts.device).sum(dim=0)  # [2] tokens, cycles
    return torch.cat(
        [number[None], parts, loss.hits, result.accepted.sum()[None], counted, result.reached, result.matched]
    ).double()


def summary(sums: Tensor, depth: int) -> dict[str, float | list[float]]:
    """Validation's values from its sums.

    ``tau``: new tokens per verification of simulated chain decoding. ``expected_tau``: 1 + accepted tokens from a
    position, averaged over all positions. ``accept_at``: acceptance at draft step k where all before were accepted.
    """
    rows, *rest = sums.tolist()
    loss, hidden, token, *hits = rest[: 3 + TOP]
    accepted, tokens, cycles = rest[3 + TOP : 6 + TOP]
    reached, matched = rest[6 + TOP : 6 + TOP + depth], rest[6 + TOP + depth :]
    per_row = max(rows, 1.0)
    return {
        "loss": loss / per_row,
        "hidden_loss": hidden / per_row,
        "token_loss": token / per_row,
        **{f"top{k}": hit / per_row for k, hit in enumerate(hits, start=1)},
        "tau": tokens / cycles if cycles else 0.0,
        "expected_tau": 1 + accepted / per_row,
        "accept_at": [m / r if r else 0.0 for r, m in zip(reached, matched, strict=True)],
        "rows": rows,
    }


def validate(engine: Engine, batches: Iterable[Batch]) -> dict[str, float | list[float]]:
    """Validates on this process's ``batches`` and joins the results of all processes."""
    objective = engine.objective
    depth = objective.config.simulated_depth
    sums = torch.zeros(7 + TOP + 2 * depth, dtype=torch.float64, device=engine.device)
    objective.eval()
    for batch in batches:
        sums += batch_sums(objective, batch.to(engine.device))
    objective.train()
    return summary(engine.sum(sums), depth)

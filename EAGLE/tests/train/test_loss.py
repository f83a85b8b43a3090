"""The loss against the naive formula with full logits, chunked and whole, and the gradients of both."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from train_support import make_objective, make_sample

from eagle.train import loss
from eagle.train.collate import collate
from eagle.train.loss import TargetHead, best_tokens, draft_loss


def naive(predicted, target, loss_mask, head, cap=None):
    mask = loss_mask.float()
    hidden = (mask * F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)).sum() / mask.sum()
    own, wanted = ((cap * (each @ head.T / cap).tanh() if cap else each @ head.T) for each in (predicted, target))
    token = -(mask * (wanted.softmax(-1) * own.log_softmax(-1)).sum(-1)).sum() / mask.sum()
    return 1.0 * hidden + 0.1 * token, hidden, token


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_loss_and_gradient_equal_the_full_formula(chunk, cap):
    torch.manual_seed(0)
    predicted, target, head = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, 8), torch.randn(30, 8)
    loss_mask = torch.rand(2, 9) > 0.4
    wanted = naive(predicted, target, loss_mask, head, cap)
    (gradient,) = torch.autograd.grad(wanted[0], predicted)
    losses = draft_loss([predicted[loss_mask]], [target[loss_mask]], head, chunk=chunk, cap=cap)
    torch.testing.assert_close((losses.total, losses.hidden, losses.token), wanted)
    torch.testing.assert_close(torch.autograd.grad(losses.total * 3, predicted)[0], gradient * 3)


def test_autocast_casts_the_head_once(monkeypatch):
    """And gives the numbers of a head that is cast in each product."""
    torch.manual_seed(0)
    predicted, target, head = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, 8), torch.randn(30, 8)
    found = []
    for cast in (loss.cast_once, lambda weight: weight):
        monkeypatch.setattr(loss, "cast_once", cast)
        with torch.autocast("cpu", torch.bfloat16), Casts(head.shape) as casts:
            losses = draft_loss([predicted.flatten(0, 1)], [target.flatten(0, 1)], head, chunk=4)
        found.append([casts.count, losses.total, *torch.autograd.grad(losses.total, predicted)])
    (once, *values), (often, *expected) = found
    assert once == 1 and often >= 10
    torch.testing.assert_close(values, expected, rtol=0, atol=0)


class Casts(TorchDispatchMode):
    """Counts casts of tensors of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_to_copy" and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def test_hits_count_top_1_2_3():
    head = torch.eye(4)
    target = torch.tensor([[[9.0, 0, 0, 0]] * 4])
    predicted = torch.tensor([[[9.0, 1, 2, 3], [2, 9.0, 0, 1], [2, 9.0, 8, 1], [0, 3, 2, 1.0]]])
    losses = draft_loss([predicted[0]], [target[0]], head)
    assert losses.hits.tolist() == [1, 2, 3]
    assert losses.rows == 4
    assert best_tokens(predicted[0], head, chunk=3).tolist() == [0, 1, 1, 1]


def test_no_row_that_counts_gives_zero_loss_and_zero_gradient():
    predicted = torch.randn(1, 3, 8, requires_grad=True)
    losses = draft_loss([predicted[:, :0].flatten(0, 1)], [torch.randn(0, 8)], torch.randn(5, 8))
    losses.total.backward()
    assert losses.total == 0 and not predicted.grad.any()


def test_bf16_is_close():
    torch.manual_seed(0)
    predicted, target, head = torch.randn(9, 8), torch.randn(9, 8), torch.randn(30, 8)
    full, half = (
        draft_loss(*([x.to(dtype)] for x in (predicted, target)), head.to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(full.total, half.total, rtol=2e-2, atol=0)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize(("count", "size", "scale"), [(3000, 200.0, 2.0**7), (1, 0.1, 2.0**17)], ids=["sum", "scale"])
def test_float16_gradients_are_those_of_float32(count, size, scale, autocast):
    """Neither a sum over many rows nor the scale of a loss over few rows exceeds float16."""
    torch.manual_seed(0)
    predicted, head = size * (1 + 0.05 * torch.randn(count, 8)), 0.01 * torch.randn(30, 8)
    target, base = torch.randn(count, 8), TargetHead(torch.randn(30, 8))

    def gradients(kind):
        own, weight, wanted, frozen = (each.half().to(kind) for each in (predicted, head, target, base.head))
        leaves = own.requires_grad_(), weight.requires_grad_()
        settings = {"hidden_weight": 0.0, "token_weight": 1.0, "chunk": 1000}
        losses = draft_loss([own], [wanted], weight, TargetHead(frozen), **settings)
        return torch.autograd.grad(scale * losses.total, leaves)

    expected = gradients(torch.float32)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        found = gradients(torch.float32 if autocast else torch.float16)
    for own, wanted in zip(found, expected, strict=True):
        assert wanted.abs().max() < torch.finfo(torch.float16).max, "such a gradient would overflow"
        torch.testing.assert_close(own.float(), wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


def test_no_regression_without_its_weight(monkeypatch):
    """It is not computed; loss and gradients are those of the tokens."""
    torch.manual_seed(0)
    predicted, target, head = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, 8), torch.randn(30, 8)
    loss_mask = torch.rand(2, 9) > 0.4
    *_, token = naive(predicted, target, loss_mask, head)
    (gradient,) = torch.autograd.grad(0.3 * token, predicted)
    monkeypatch.setattr(F, "smooth_l1_loss", lambda *_, **__: pytest.fail("regression on hidden states"))
    settings = {"hidden_weight": 0.0, "token_weight": 0.3}
    losses = draft_loss([predicted[loss_mask]], [target[loss_mask]], head, **settings)
    torch.testing.assert_close((losses.total, losses.hidden, losses.token), (0.3 * token, torch.tensor(0.0), token))
    torch.testing.assert_close(torch.autograd.grad(losses.total, predicted)[0], gradient)


def test_stored_value():
    """A change of this number is a change of the objective."""
    samples = [make_sample(10, image=2, seed=1), make_sample(13, seed=2)]
    losses = make_objective(seed=3)(collate(samples, 40, 64, noise=0.2, seeds=[1, 2]))
    assert losses.rows == (10 - 6 - 1) + (13 - 4 - 1)
    assert losses.total.item() == pytest.approx(STORED, rel=1e-4)


STORED = 2.2540910

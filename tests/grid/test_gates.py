"""Learned decisions: exact values forward, soft gradients backward; losses and gradients by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sparing.grid.gates import budget_loss, excess_loss, gumbel, mean_over, straight_through

# --------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_has_the_value_of_hard_bit_for_bit(dtype: torch.dtype) -> None:
    """Also where soft is no probability: soft + (hard - soft) would round there."""
    soft = (30 * torch.randn(5000)).to(dtype).requires_grad_()
    hard = torch.rand(5000) < 0.5
    assert torch.equal(straight_through(hard, soft).detach(), hard.to(dtype))


def test_straight_through_has_the_gradient_of_soft() -> None:
    logits = torch.randn(40, requires_grad=True)
    weight = torch.randn(40)
    (straight_through(logits > 0, logits.sigmoid()) * weight).sum().backward()
    p = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, weight * p * (1 - p))
    hard, soft = torch.ones(3, requires_grad=True), torch.full((3,), 0.4, requires_grad=True)
    straight_through(hard, soft).sum().backward()
    assert hard.grad is None and soft.grad is not None


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_gumbel_wins_as_often_as_its_category_is_likely(temperature: float) -> None:
    p = torch.tensor([0.6, 0.25, 0.1, 0.05])
    drawn = gumbel(p.log().expand(60_000, 4), temperature, torch.Generator().manual_seed(3))
    assert (drawn >= 0).all() and torch.allclose(drawn.sum(-1), torch.ones(60_000), atol=1e-5)
    often = drawn.argmax(-1).bincount(minlength=4) / 60_000
    assert (often - p).abs().max() < 5 * 0.5 / 60_000**0.5  # five standard errors at most


def test_gumbel_hardens_as_it_cools_and_repeats_by_its_generator() -> None:
    logits = torch.randn(500, 3)
    draw = lambda t, seed: gumbel(logits, t, torch.Generator().manual_seed(seed))  # noqa: E731
    sharp = [float(draw(t, 0).max(-1).values.mean()) for t in (5.0, 1.0, 0.1)]
    assert sharp[0] < sharp[1] < sharp[2] and sharp[2] > 0.95
    assert torch.equal(draw(1.0, 7), draw(1.0, 7)) and not torch.equal(draw(1.0, 7), draw(1.0, 8))


def test_gumbel_is_finite_at_the_ends_of_the_uniform_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    for end in (0.0, 1.0 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda shape, end=end, **_: torch.full(shape, end))
        assert torch.isfinite(gumbel(torch.tensor([[0.0, 3.0]]))).all()


def test_gumbel_impossible_categories_never_win_and_logits_get_a_gradient() -> None:
    logits = torch.tensor([0.3, -math.inf, 0.1]).expand(200, 3)
    assert (gumbel(logits)[:, 1] == 0).all()
    free = torch.zeros(3, requires_grad=True)
    gumbel(free)[0].backward()
    assert free.grad is not None and free.grad.abs().max() > 0
    assert abs(float(free.grad.sum())) < 1e-6  # a softmax does not change where all logits rise


# --------------------------------------------------------------------------- means and losses


def test_mean_over_broadcasts_from_the_left() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    rows = [x[b, n, i] for b, n, i in itertools.product(range(2), range(3), range(4)) if mask[b, n]]
    assert mean_over(x, mask).item() == pytest.approx(sum(float(v) for v in rows) / len(rows))
    assert mean_over(x, mask.long()).item() == mean_over(x, mask).item()  # an attention mask of numbers
    assert mean_over(x, mask[:, :1]).item() == pytest.approx(x[0].mean().item())
    assert mean_over(x).item() == 11.5
    one = torch.zeros(2, 3, 4, dtype=torch.bool)
    one[1, 2, 3] = True
    assert mean_over(x, one).item() == 23


def test_mean_over_ignores_what_stands_where_the_mask_does_not_hold() -> None:
    x = torch.tensor([[1.0, math.nan], [math.inf, 3.0]], requires_grad=True)
    mean = mean_over(x, torch.tensor([[True, False], [False, True]]))
    mean.backward()
    assert mean.item() == 2 and x.grad is not None
    assert x.grad.tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert mean_over(x, torch.zeros(2, 2)).item() == 0


def test_budget_loss_is_global() -> None:
    """Mean 0.45 against 0.25: 0.04, and 2 * 0.2 / 4 = 0.1 at every entry of every layer."""
    p = torch.tensor([[0.9, 0.1], [0.5, 0.3]], requires_grad=True)
    loss = budget_loss(p, 0.25)
    loss.backward()
    assert loss.item() == pytest.approx(0.04)
    assert p.grad is not None
    torch.testing.assert_close(p.grad, torch.full((2, 2), 0.1))


def test_budget_loss_of_real_tokens_alone() -> None:
    p = torch.tensor([[[0.9, 0.1], [0.5, 0.3]], [[0.2, 0.2], [1.0, 1.0]]], requires_grad=True)  # (B, N, L)
    loss = budget_loss(p, 0.25, torch.tensor([[1, 1], [1, 0]]))
    loss.backward()
    mean = (0.9 + 0.1 + 0.5 + 0.3 + 0.2 + 0.2) / 6
    assert loss.item() == pytest.approx((mean - 0.25) ** 2)
    assert p.grad is not None and p.grad[1, 1].tolist() == [0, 0]
    torch.testing.assert_close(p.grad[0], torch.full((2, 2), 2 * (mean - 0.25) / 6))


def test_excess_loss_forgives_what_lies_below_the_limit() -> None:
    """Targets (0.5, 0.1), achieved (0.3, 0.2): 0.02; pruning too much costs nothing and has no gradient."""
    achieved = torch.tensor([0.3, 0.2], requires_grad=True)
    loss = excess_loss(torch.tensor([0.5, 0.1]), achieved)
    loss.backward()
    assert loss.item() == pytest.approx(0.02)
    assert achieved.grad is not None
    torch.testing.assert_close(achieved.grad, torch.tensor([-0.2, 0.0]))  # -2 * 0.2 / 2
    assert excess_loss(torch.tensor([0.75, 0.2]), 0.25).item() == pytest.approx(0.125)

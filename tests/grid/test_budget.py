"""Budgets: the shape keeps its form, the mean is exact."""

from __future__ import annotations

import pytest

import sparing
from sparing.grid.budget import SHAPES, apportion, kept, spaced, spread


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "step"])
@pytest.mark.parametrize("layers", [1, 2, 7, 32])
@pytest.mark.parametrize("mean", [0.0, 0.111, 0.5, 0.9, 1.0])
def test_mean_is_exact_and_in_range(shape: str, layers: int, mean: float) -> None:
    budget = spread(shape, layers, mean, stages=3 if shape.startswith("pyramid") else None)
    assert len(budget) == layers
    assert sum(budget) / layers == pytest.approx(mean, abs=1e-12)
    assert all(-1e-12 <= b <= 1 + 1e-12 for b in budget)
    assert list(budget) == sorted(budget, reverse=True)


def test_linear_keeps_its_form() -> None:
    assert spread("linear", 5, 0.5) == pytest.approx((1, 0.75, 0.5, 0.25, 0))
    steps = [a - b for a, b in zip(spread("linear", 9, 0.8), spread("linear", 9, 0.8)[1:])]
    assert max(steps) - min(steps) < 1e-12


def test_concave_drops_more_early_than_convex() -> None:
    concave, convex = spread("pyramid-concave", 8, 0.4), spread("pyramid-convex", 8, 0.4)
    assert concave[0] - concave[1] > convex[0] - convex[1]


def test_step() -> None:
    assert spread("step", 8, 0.55, at=2) == pytest.approx((1, 1) + (0.4,) * 6)
    with pytest.raises(sparing.BudgetError, match=r"spends at least 0.25"):
        spread("step", 8, 0.2, at=2)


def test_apportion_adds_up_and_stays_monotone() -> None:
    shares = spread("cosine", 11, 0.37)
    counts = apportion(shares, 97)
    assert sum(counts) == round(sum(shares) * 97)
    assert list(counts) == sorted(counts, reverse=True)
    assert all(abs(c - s * 97) < 1 for c, s in zip(counts, shares))
    assert sum(apportion(shares, 97, total=400)) == 400


def test_kept_rounds_half_up_and_never_to_nothing() -> None:
    assert [kept(s, 10) for s in (0.25, 0.24, 0.001, 0.0, 1.0)] == [3, 2, 1, 0, 10]


def test_spaced_ends() -> None:
    assert spaced(32, 6) == (0, 6, 12, 19, 25, 31)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spread("round", 4, 0.5), "shape = 'round': must be one of constant"),
        (lambda: spread("linear", 0, 0.5), "layers = 0: must be >= 1"),
        (lambda: spread("linear", 4, 1.5), r"mean = 1.5: must lie in \[0, 1\]"),
        (lambda: spaced(4, 1), "count = 1"),
    ],
)
def test_wrong_input(call: object, message: str) -> None:
    with pytest.raises(sparing.Error, match=message):
        call()  # type: ignore[operator]

"""How much: a budget over layers (or steps) of a given shape with exactly the wanted mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sparing.grid.method import BudgetError, Error

# Profiles g(x) over x = 0 (first layer) … 1 (last layer), values in [0, 1], falling with depth.
# "concave"/"convex" follow the usage of the token-pruning papers: concave = most is dropped early.
_PROFILES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda x, p: 1.0,
    "linear": lambda x, p: 1.0 - x,
    "cosine": lambda x, p: 0.5 * (1.0 + math.cos(math.pi * x)),
    "power": lambda x, p: (1.0 - x) ** p,
    "pyramid-concave": lambda x, p: (1.0 - x) ** p,
    "pyramid-convex": lambda x, p: 1.0 - x**p,
}
SHAPES = (*_PROFILES, "step")


def spread(
    shape: str, layers: int, mean: float, *, power: float = 2.0, stages: int | None = None, at: int = 0
) -> tuple[float, ...]:
    """Budgets b_1 … b_L in [0, 1] of the named shape whose mean is exactly `mean`.

    With g the shape's profile and g_ its mean, b = (mean/g_) g if mean <= g_, else b = 1 - (1-mean)/(1-g_) (1-g):
    the profile keeps its form, nothing has to be clipped, and the mean holds to rounding.

    Args:
        shape: constant, linear, cosine, power, pyramid-concave (front-loaded dropping), pyramid-convex, or step
            (all before layer `at`, one level after it).
        layers: L >= 1.
        mean: share of cells that run, in [0, 1].
        power: exponent of power and the pyramids.
        stages: pyramids are held constant within this many equal stages (default: every layer its own).
        at: first thinned layer of the step shape, 0 <= at < L.

    Raises:
        Error: unknown shape or a value out of range.
        BudgetError: a step at `at` cannot have that mean.

    >>> spread("linear", 3, 0.25)
    (0.5, 0.25, 0.0)
    >>> spread("step", 4, 0.625, at=1)
    (1.0, 0.5, 0.5, 0.5)
    """
    if shape not in SHAPES:
        raise Error(f"shape = {shape!r}: must be one of {', '.join(SHAPES)}")
    if layers < 1:
        raise Error(f"layers = {layers}: must be >= 1")
    if not 0 <= mean <= 1:
        raise Error(f"mean = {mean}: must lie in [0, 1]")
    if shape == "step":
        if not 0 <= at < layers:
            raise Error(f"at = {at}: must lie in 0..{layers - 1}")
        level = (mean * layers - at) / (layers - at)
        if level < -1e-9:
            raise BudgetError(f"a step at layer {at} of {layers} spends at least {at / layers:.3g}, {mean:g} was asked")
        return (1.0,) * at + (max(level, 0.0),) * (layers - at)
    profile = []
    for i in range(layers):
        if stages is not None and shape.startswith("pyramid"):
            stage = i * stages // layers
            x = stage / (stages - 1) if stages > 1 else 0.0
        else:
            x = i / (layers - 1) if layers > 1 else 0.0
        profile.append(_PROFILES[shape](x, power))
    average = sum(profile) / layers
    if mean <= average:
        return tuple(mean / average * g for g in profile)
    return tuple(1.0 - (1.0 - mean) / (1.0 - average) * (1.0 - g) for g in profile)


def apportion(shares: Sequence[float], unit: int, total: int | None = None) -> tuple[int, ...]:
    """Whole counts near shares*unit that add up to `total` (default: the rounded sum); largest remainders win.

    Ties go to the earlier entry, no count exceeds `unit`, so a falling budget stays falling.

    >>> apportion((0.5, 0.25, 0.25), 10)
    (5, 3, 2)
    """
    exact = [s * unit for s in shares]
    counts = [min(unit, math.floor(e + 1e-9)) for e in exact]
    wanted = round(sum(exact)) if total is None else total
    if not 0 <= wanted <= unit * len(exact):
        raise BudgetError(f"total = {wanted}: must lie in 0..{unit * len(exact)}")
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    while sum(counts) < wanted:
        for i in order:
            if sum(counts) < wanted and counts[i] < unit:
                counts[i] += 1
    while sum(counts) > wanted:
        for i in reversed(order):
            if sum(counts) > wanted and counts[i] > 0:
                counts[i] -= 1
    return tuple(counts)


def kept(share: float, count: int) -> int:
    """How many of `count` a share keeps: rounded half up, at least 1 where share > 0."""
    return max(1, math.floor(share * count + 0.5)) if share > 0 and count > 0 else 0


def spaced(total: int, count: int) -> tuple[int, ...]:
    """`count` of `total` indices at even spacing, both ends in: unique(round(linspace(0, total-1, count))).

    >>> spaced(8, 4)
    (0, 2, 5, 7)
    """
    if count < 2:
        raise Error(f"count = {count}: must be >= 2")
    return tuple(sorted({round(i * (total - 1) / (count - 1)) for i in range(count)}))

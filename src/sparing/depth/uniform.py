"""Uniform layers: the control that sends generated tokens through the bottom, the top or evenly spaced layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sparing.engine.schedule import ScheduledLayers
from sparing.grid.budget import spaced
from sparing.grid.method import BudgetError, Card, Error, Shape, choice, flag, integer, register


@register(
    "uniform-depth",
    Card(
        "Control: the first layers",
        year=2026,
        axis="depth",
        kind="stream",
        phase="decode",
        summary="generated tokens run the first R layers (a fixed early exit), the last R, or evenly spaced ones",
        controls=(),
        is_control=True,
    ),
)
@dataclass(frozen=True)
class UniformDepth(ScheduledLayers):
    """Generated tokens through a plain block of R layers; the prompt at full depth.

    Args:
        R: layers kept, >= 1.
        part: bottom (the first R: a fixed early exit), top (the last R) or even (spaced, both ends in).
        prompt: the prompt runs these R layers too, as in a static cut.
    """

    R: int = integer(2, "layers kept", low=1)
    part: str = choice("bottom", ("bottom", "top", "even"), "which block")
    prompt: bool = flag(False, "the prompt skips the others too, as a static cut does")

    def at(self, keep: float, shape: Shape) -> Self:
        R = round(keep * shape.layers)
        if R < 1:
            raise BudgetError(f"keep = {keep:g}: uniform-depth keeps at least 1 of {shape.layers} layers")
        return self.replace(R=R)

    def layer_set(self, L: int) -> tuple[int, ...]:
        """Kept layers of L, rising."""
        if self.R > L:
            raise Error(f"uniform-depth: R = {self.R}: the model has {L} layers")
        if self.part == "even" and self.R > 1:
            return spaced(L, self.R)
        return tuple(range(L - self.R, L)) if self.part == "top" else tuple(range(self.R))

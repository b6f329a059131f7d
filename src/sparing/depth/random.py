"""Random layers: the control that sends generated tokens through layers drawn by lot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from sparing.engine.schedule import ScheduledLayers
from sparing.grid.method import BudgetError, Card, Error, Shape, flag, integer, register


@register(
    "random-depth",
    Card(
        "Control: layers by lot",
        year=2026,
        axis="depth",
        kind="stream",
        phase="decode",
        summary="generated tokens run R random layers, first and last included",
        controls=(),
        is_control=True,
    ),
)
@dataclass(frozen=True)
class RandomDepth(ScheduledLayers):
    """Generated tokens through R layers drawn once, the first and the last always among them; the prompt at full depth.

    Args:
        R: layers kept, >= 2.
        seed: of the draw.
        prompt: the prompt runs these R layers too, as in a static cut.
    """

    R: int = integer(2, "layers kept", low=2)
    seed: int = integer(0, "of the draw")
    prompt: bool = flag(False, "the prompt skips the others too, as a static cut does")

    def at(self, keep: float, shape: Shape) -> Self:
        R = round(keep * shape.layers)
        if R < 2:
            raise BudgetError(f"keep = {keep:g}: random-depth keeps at least 2 of {shape.layers} layers")
        return self.replace(R=R)

    def layer_set(self, L: int) -> tuple[int, ...]:
        """Kept layers of L, rising."""
        if self.R > L:
            raise Error(f"random-depth: R = {self.R}: the model has {L} layers")
        draw = torch.randperm(L - 2, generator=torch.Generator().manual_seed(self.seed))[: self.R - 2]
        return tuple(sorted({0, L - 1, *(int(i) + 1 for i in draw)}))

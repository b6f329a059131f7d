"""Summed gates: the control that keeps the experts whose gates add up to most on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparing.engine.experts import KeepExperts
from sparing.engine.view import LayerView
from sparing.grid.method import Card, register


@register(
    "gate-experts",
    Card(
        "Control: experts with the largest gates",
        year=2026,
        axis="experts",
        kind="surgery",
        phase="static",
        saves="memory",
        needs="calibration",
        summary="keeps the experts with the largest summed gates",
        controls=(),
        is_control=True,
    ),
)
@dataclass(frozen=True)
class GateExperts(KeepExperts):
    """Keep the M experts of a layer whose gates add up to most over the demonstrations.

    Several domains count alike: each domain's row is divided by its sum before they are averaged.

    Args:
        M, even, samples, calibration: as of `easy-ep`.
    """

    def importance(self, layers: Sequence[LayerView]) -> Tensor:
        return self.mixed("gate")

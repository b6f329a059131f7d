"""Activation frequency: the control that keeps the experts that calibration tokens visit most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparing.engine.experts import KeepExperts
from sparing.engine.view import LayerView
from sparing.grid.method import Card, register


@register(
    "frequency-experts",
    Card(
        "Control: experts visited most",
        year=2026,
        axis="experts",
        kind="surgery",
        phase="static",
        saves="memory",
        needs="calibration",
        summary="keeps the experts that calibration tokens visit most often",
        controls=(),
        is_control=True,
    ),
)
@dataclass(frozen=True)
class FrequencyExperts(KeepExperts):
    """Keep the M experts of a layer that most tokens of the demonstrations visit.

    Several domains count alike: each domain's row is divided by its sum before they are averaged.

    Args:
        M, even, samples, calibration: as of `easy-ep`.
    """

    def importance(self, layers: Sequence[LayerView]) -> Tensor:
        return self.mixed("count")

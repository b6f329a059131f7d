"""Random widths: the control that keeps given numbers of KV groups and neurons and draws them by lot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparing.engine.surgery import Plan
from sparing.engine.units import keep_units
from sparing.engine.view import View
from sparing.engine.widths import WidthControl
from sparing.grid.method import Card, integer, register
from sparing.grid.select import top_k


@register(
    "random-width",
    Card(
        "Control: heads and neurons by lot",
        year=2026,
        axis="width",
        kind="surgery",
        phase="static",
        needs="calibration",
        summary="cuts random KV groups and neurons, given counts a layer; their mean stays as a bias",
        controls=(),
        is_control=True,
    ),
)
@dataclass(frozen=True)
class RandomWidth(WidthControl):
    """Units by lot, given counts of each layer; what is cut is compensated as by the method it is held against.

    Each module of each layer has a draw of its own, fixed by the seed. Fewer units are a subset of more.

    Args:
        units: both | neurons | groups; what is not cut stays whole and has no count.
        groups: KV groups kept (with their query heads), one number a layer or one for all; none keeps all.
        neurons: MLP neurons kept, likewise.
        compensate: put the mean of what is cut back as a bias; needs `fit`, or the state of a fitted method.
        seed: of the draw.
    """

    seed: int = integer(0, "of the draw")

    def plan(self, model: nn.Module) -> Plan:
        layers = View(model).layers
        groups, neurons = self.counts(layers)
        kept = [self._drawn(layer.groups, k, 2 * layer.index) for layer, k in zip(layers, groups)]
        kept_mlp = [self._drawn(layer.neurons, k, 2 * layer.index + 1) for layer, k in zip(layers, neurons)]
        return keep_units(model, kept, kept_mlp, self.means)

    def _drawn(self, total: int, count: int, place: int) -> Tensor:
        lot = torch.rand(total, generator=torch.Generator().manual_seed(self.seed * 1009 + place))
        return top_k(lot[None], count)[0]

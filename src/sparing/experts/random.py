"""Random experts: the control that keeps a given number of experts of each layer and draws them by lot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.engine.experts import KeepExperts
from sparing.engine.view import LayerView
from sparing.grid.method import Card, integer, register


@register(
    "random-experts",
    Card(
        "Control: experts by lot",
        year=2026,
        axis="experts",
        kind="surgery",
        phase="static",
        saves="memory",
        summary="keeps random experts, the same number in every layer",
        controls=(),
        is_control=True,
    ),
)
@dataclass(frozen=True)
class RandomExperts(KeepExperts):
    """M experts of each layer by lot; a layer has a draw of its own, and fewer experts are a subset of more.

    Args:
        M: experts kept a layer; none keeps half.
        even: keep M / groups of each group of a group-limited router.
        samples, calibration: have no effect.
        seed: of the draw.
    """

    seed: int = integer(0, "of the draw")

    def importance(self, layers: Sequence[LayerView]) -> Tensor:
        width = max((layer.experts.count for layer in layers if layer.experts), default=0)
        draws = [torch.Generator().manual_seed(self.seed * 1009 + layer.index) for layer in layers]
        return torch.stack([torch.rand(width, generator=draw) for draw in draws])

"""Uniform: the control that follows a token schedule and keeps every n-th visual token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.engine.schedule import ScheduledTokens
from sparing.engine.stream import Stream
from sparing.grid.method import Card, register
from sparing.grid.select import evenly


@register(
    "uniform-tokens",
    Card(
        "Control: visual tokens at even spacing",
        year=2026,
        axis="tokens",
        kind="stream",
        phase="prefill",
        summary="keeps every n-th visual token, on any schedule over layers",
        controls=(),
        visual=True,
        is_control=True,
    ),
)
@dataclass(frozen=True)
class UniformTokens(ScheduledTokens):
    """Visual tokens at even spacing in reading order, on a given schedule.

    Args:
        schedule: share of visual tokens that runs each layer; one entry holds for all layers, else length L.
    """

    def choose(self, stream: Stream, count_B: Tensor) -> Tensor:
        alive_BV = ~torch.isinf(stream.of_visual(stream.index.float()))
        keep_BV = torch.zeros_like(alive_BV)
        for row, count in enumerate(count_B.tolist()):
            present = int(alive_BV[row].sum())
            keep_BV[row, :present] = evenly(present, count, alive_BV.device)
        return keep_BV

"""Oracle: the control that follows a token schedule and knows which visual tokens matter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparing.engine.schedule import ScheduledTokens
from sparing.engine.stream import Stream
from sparing.grid.method import Card, register
from sparing.grid.select import top_k


@register(
    "oracle-tokens",
    Card(
        "Control: the visual tokens that the task's world says matter",
        year=2026,
        axis="tokens",
        kind="stream",
        phase="prefill",
        summary="keeps what the answer needs; how little a perfect choice loses",
        controls=(),
        visual=True,
        is_control=True,
    ),
)
@dataclass(frozen=True)
class OracleTokens(ScheduledTokens):
    """Visual tokens by the truth that the task sets as `run.oracle`; equal values keep the lower index.

    Args:
        schedule: share of visual tokens that runs each layer; one entry holds for all layers, else length L.
    """

    def choose(self, stream: Stream, count_B: Tensor) -> Tensor:
        return top_k(stream.oracle, count_B)

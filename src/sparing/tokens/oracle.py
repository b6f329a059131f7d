"""Oracle: the control that follows a token schedule and knows which visual tokens matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sparing.engine.schedule import follow, full
from sparing.engine.stream import Stream, StreamMethod
from sparing.grid.method import Card, Shape, numbers, register
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
class OracleTokens(StreamMethod):
    """Visual tokens by the truth that the task sets as `run.oracle`; equal values keep the lower index.

    Args:
        schedule: share of visual tokens that runs each layer; one entry holds for all layers, else length L.
    """

    schedule: tuple[float, ...] = numbers((0.5,), "share of visual tokens a layer", high=1)

    def at(self, keep: float, shape: Shape) -> Self:
        return self.replace(schedule=(keep,) * shape.layers)

    def shares(self, shape: Shape) -> tuple[float, ...]:
        return full(self.schedule, shape.layers)

    def before_layer(self, stream: Stream, layer: int) -> None:
        follow(stream, layer, full(self.schedule, stream.layers), lambda s, count_B: top_k(s.oracle, count_B))

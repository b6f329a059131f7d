"""Random: the control that follows a token schedule and chooses the tokens by lot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sparing.engine.schedule import follow, full, random_score
from sparing.engine.stream import Stream, StreamMethod
from sparing.grid.method import Card, Shape, integer, numbers, register
from sparing.grid.select import top_k


@register(
    "random-tokens",
    Card(
        "Control: visual tokens by lot",
        year=2026,
        axis="tokens",
        kind="stream",
        phase="prefill",
        summary="keeps random visual tokens, on any schedule over layers",
        controls=(),
        visual=True,
        is_control=True,
    ),
)
@dataclass(frozen=True)
class RandomTokens(StreamMethod):
    """Visual tokens by lot, on a given schedule.

    The draw depends on seed, layer and the token's place in the image, so a sample draws the same in any batch.

    Args:
        schedule: share of visual tokens that runs each layer; one entry holds for all layers, else length L.
        seed: of the draw.
    """

    schedule: tuple[float, ...] = numbers((0.5,), "share of visual tokens a layer", high=1)
    seed: int = integer(0, "of the draw")

    def at(self, keep: float, shape: Shape) -> Self:
        return self.replace(schedule=(keep,) * shape.layers)

    def shares(self, shape: Shape) -> tuple[float, ...]:
        return full(self.schedule, shape.layers)

    def before_layer(self, stream: Stream, layer: int) -> None:
        follow(
            stream,
            layer,
            full(self.schedule, stream.layers),
            lambda s, count_B: top_k(random_score(s, self.seed), count_B),
        )

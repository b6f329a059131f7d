"""Random: the control that follows a token schedule and chooses the tokens by lot."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparing.engine.schedule import ScheduledTokens, random_score
from sparing.engine.stream import Stream
from sparing.grid.method import Card, integer, register
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
class RandomTokens(ScheduledTokens):
    """Visual tokens by lot, on a given schedule.

    The draw depends on seed, layer and the token's place in the image, so a sample draws the same in any batch.

    Args:
        schedule: share of visual tokens that runs each layer; one entry holds for all layers, else length L.
        seed: of the draw.
    """

    seed: int = integer(0, "of the draw")

    def choose(self, stream: Stream, count_B: Tensor) -> Tensor:
        return top_k(random_score(stream, self.seed), count_B)

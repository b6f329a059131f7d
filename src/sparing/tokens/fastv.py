"""FastV: after layer K drop the visual tokens that the last token attends to least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sparing.engine.schedule import counts
from sparing.engine.stream import Stream, StreamMethod
from sparing.grid.method import BudgetError, Card, Shape, integer, register, share
from sparing.grid.select import top_k


@register(
    "fastv",
    Card(
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language "
        "Models",
        year=2024,
        arxiv="2403.06764",
        axis="tokens",
        kind="stream",
        phase="prefill",
        summary="one cut after layer K, by the attention of the last token; the reference of token pruning",
        controls=("random", "uniform", "oracle"),
        visual=True,
    ),
)
@dataclass(frozen=True)
class FastV(StreamMethod):
    """Rank visual tokens by the attention they get in layer K and drop the share R of them.

    1. Layers 1..K run on everything (1-based; K layers see all tokens).
    2. phi_j = attention from the last prompt token to visual token j in layer K, mean over heads.
    3. The R V tokens with the lowest phi leave; layers K+1.. run on the rest, at their original positions.

    Cost: one query row; the keys are those that layer K computes anyway (the released code asks the layer for its full
    attention map, which switches fused attention off). Departure: the count kept is (1-R) V rounded half up, at least
    1; of equal scores the earlier token stays.

    Args:
        K: layers that see all visual tokens, >= 1.
        R: share of visual tokens dropped after layer K.

    >>> FastV(K=2, R=0.5).shares(Shape(4, 4, 4, 8, 32, 64))
    (1.0, 1.0, 0.5, 0.5)
    """

    K: int = integer(2, "layers that see all visual tokens", low=1, source="§4.1")
    R: float = share(0.5, "share of visual tokens dropped after layer K", source="§4.1")

    def at(self, keep: float, shape: Shape) -> Self:
        L = shape.layers
        alive = (keep * L - self.K) / (L - self.K) if self.K < L else 1.0
        if alive < 0 or (alive == 0 and keep < 1):
            raise BudgetError(
                f"keep = {keep:g}: fastv spends all tokens in its first K = {self.K} of {L} layers, at least "
                f"{self.K / L:.3g}; lower K or raise keep"
            )
        return self.replace(R=round(1 - alive, 12))

    def shares(self, shape: Shape) -> tuple[float, ...]:
        return self._shares(shape.layers)

    def _shares(self, layers: int) -> tuple[float, ...]:
        K = min(self.K, layers)
        return (1.0,) * K + (1 - self.R,) * (layers - K)

    def before_layer(self, stream: Stream, layer: int) -> None:
        if layer == self.K - 1 and self.R > 0:
            stream.watch()
        if layer == self.K and self.R > 0:
            count_B = counts(self._shares(stream.layers), layer, stream.visual_total)
            stream.keep_visual(top_k(stream.watched(), count_B))

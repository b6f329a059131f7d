"""Random feed-forward blocks: the control that skips FFNs of generated tokens by lot."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sparing.engine.stream import Stream, StreamMethod
from sparing.grid.method import BudgetError, Card, Error, Shape, integer, numbers, register

_STEPS = 4096  # draws of a layer before they begin again


@register(
    "random-ffn",
    Card(
        "Control: feed-forward blocks by lot",
        year=2026,
        axis="depth",
        kind="stream",
        phase="decode",
        summary="generated tokens run all attention and skip feed-forward blocks by lot, or always the same ones",
        controls=(),
        requires=("mlp",),
        is_control=True,
    ),
)
@dataclass(frozen=True)
class RandomFfn(StreamMethod):
    """Of the generated tokens behind the first W a share skips the FFN of each layer; the prompt runs them all.

    Who skips depends on the seed, the layer and the token's place in its output alone, so that a sequence draws the
    same in any batch. Shares of 1 skip the same FFNs for every token. Decisions cost nothing.

    Args:
        skip: share of tokens that skip a layer's FFN; one entry holds for all layers, else length L.
        W: generated tokens that run everything.
        seed: of the draw.

    >>> RandomFfn().at(0.6, Shape(layers=12, heads=8, groups=4, head_dim=32, hidden=192, neurons=512)).skip
    (0.6,)
    """

    skip: tuple[float, ...] = numbers((0.25,), "share of tokens that skip a layer's FFN", high=1)
    W: int = integer(0, "generated tokens that run everything", low=0)
    seed: int = integer(0, "of the draw")

    def at(self, keep: float, shape: Shape) -> Self:
        """Cells are layers by their weights; the MLP is taken to be gated, three matrices."""
        if keep == 1:
            return self.replace(skip=(0.0,))
        if not shape.neurons:
            raise BudgetError(f"keep = {keep:g}: random-ffn cannot tell the MLP's share of a layer; set skip instead")
        attention = 2 * shape.head_dim * (shape.heads + shape.groups)
        mlp = 3 * shape.neurons / (3 * shape.neurons + attention)
        if keep < 1 - mlp - 1e-9:
            raise BudgetError(f"keep = {keep:g}: random-ffn keeps attention, {1 - mlp:.3g} of the layers' work")
        return self.replace(skip=(round(min(1.0, (1 - keep) / mlp), 12),))

    @property
    def horizon(self) -> int:
        return max(64, 8 * self.W)  # so many steps even out what is drawn

    def before_layer(self, stream: Stream, layer: int) -> None:
        if len(self.skip) not in (1, stream.layers):
            raise Error(f"random-ffn: skip: {len(self.skip)} entries for a model of {stream.layers} layers")
        share = self.skip[layer if len(self.skip) > 1 else 0]
        if stream.generated is False or not share:
            return
        step = stream.common_step
        if step is None:
            drawn_BN = _drawn(self.seed, layer).to(stream.step.device)[stream.step % _STEPS]
            stream.bypass_mlp((drawn_BN < share) & (stream.step >= self.W))  # below 0 in the prompt
        elif step >= self.W and float(_drawn(self.seed, layer)[step % _STEPS]) < share:
            stream.bypass_mlp()


@functools.lru_cache(maxsize=256)
def _drawn(seed: int, layer: int) -> Tensor:
    """Numbers in [0, 1), one a step."""
    return torch.rand(_STEPS, generator=torch.Generator().manual_seed(seed * 1009 + layer))

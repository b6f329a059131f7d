"""Magnitude-sp: cut the KV groups and neurons with the smallest weights, the same widths in every layer, no data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.engine.view import LayerView
from sparing.engine.widths import UniformWidths, unit_weights
from sparing.grid.method import Card, choice, register


@register(
    "magnitude-sp",
    Card(
        "LLM-Pruner: On the Structural Pruning of Large Language Models",
        year=2023,
        arxiv="2305.11627",
        axis="width",
        kind="surgery",
        phase="static",
        summary="cuts heads and neurons with the smallest weights, as many in every layer (LLM-Pruner's baseline)",
    ),
)
@dataclass(frozen=True)
class MagnitudeSp(UniformWidths):
    """Remove the share p of every layer's parameters: the KV groups and neurons whose weights have the smallest norm.

    The magnitude baseline of LLM-Pruner, and with `of = output` that of FLAP (2023, arXiv 2312.11983).

    1. A unit's weights: rows of gate and up and the column of down (a neuron); rows of q, k and v and columns of o of
       all query heads (a KV group). With `of = output` the columns of down or o alone.
    2. Score: their L2 or L1 norm, all of them in one; in float32. Biases do not count.
    3. Every layer keeps as many groups and neurons as any other, those with the largest scores; see `UniformWidths`.

    Nothing is put back for what leaves.

    Departures: p is a share of parameters and neurons make up for the rounding of groups; LLM-Pruner leaves the first
    and last layers whole. FLAP's code adds up the L2 norms of a head's columns, here one norm is taken over them. KV
    groups are cut whole.

    Cost: one reading of the weights.

    Args:
        units: both (published) | neurons | groups; what is not cut stays whole.
        p: share of the parameters of the layers' matrices removed, whatever is cut.
        multiple: neurons a layer are rounded to it.
        norm: L2 | L1.
        of: unit (all weights that leave with it) | output (its columns of o_proj or down_proj).

    >>> from sparing import Shape
    >>> MagnitudeSp().at(0.7, Shape(layers=4, heads=8, groups=4, head_dim=8, hidden=64, neurons=96)).p
    0.3
    """

    norm: str = choice("L2", ("L2", "L1"), "of a unit's weights", source="LLM-Pruner: baselines")
    of: str = choice("unit", ("unit", "output"), "which weights count", source="code of LLM-Pruner, FLAP")

    def scores(self, layer: LayerView) -> tuple[Tensor, Tensor]:
        groups, neurons = (self._norm(parts[-1:] if self.of == "output" else parts) for parts in unit_weights(layer))
        return groups, neurons

    def _norm(self, parts: list[Tensor]) -> Tensor:
        """Norm of the rows of some matrices (U, …) with as many rows, (U,)."""
        order = int(self.norm[1])
        return torch.stack([part.float().norm(order, dim=1) for part in parts]).norm(order, dim=0)

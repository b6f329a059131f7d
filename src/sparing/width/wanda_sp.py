"""Wanda-sp: cut the KV groups and neurons with the least weight times input, the same widths in every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from sparing.engine.units import calibrate
from sparing.engine.view import LayerView
from sparing.engine.widths import UniformWidths
from sparing.grid.method import Card, Error, flag, register


@register(
    "wanda-sp",
    Card(
        "A Simple and Effective Pruning Approach for Large Language Models",
        year=2023,
        arxiv="2306.11695",
        axis="width",
        kind="surgery",
        phase="static",
        needs="calibration",
        summary="cuts heads and neurons of least weight magnitude times input, as many in each layer (FLAP's baseline)",
    ),
)
@dataclass(frozen=True)
class WandaSp(UniformWidths):
    """Remove the share p of every layer's parameters: the KV groups and neurons that write least.

    Wanda scores single weights; this is its structured form, the baseline of FLAP (2023, arXiv 2312.11983). X is what
    o_proj or down_proj reads, W its weight (D, channels), j an input channel.

    1. S_j = mean_i |W_ij| ||X_j||, the norm over all calibration tokens.
    2. A neuron's score is its S_j, a KV group's the sum over the channels of all its query heads.
    3. Every layer keeps as many groups and neurons as any other, those with the largest scores; see `UniformWidths`.

    Nothing is put back for what leaves. Scores are not comparable between layers, which is why no budget is shared.

    Departures: p is a share of parameters and neurons make up for the rounding of groups (released: floor(p H) heads
    and floor(p N) neurons leave, multiple = 1). Calibration is one dense pass (released: a layer reads what the cut
    layers before it give). KV groups are cut whole (released: no grouped queries). `compensate` is not in it; it tells
    what FLAP's bias alone is worth.

    Cost: one dense forward over the calibration data (published: 128 sequences of C4), five vectors a module.

    State: see `calibrate` of the width engine; all fields can change without a new fit.

    Args:
        units: both (published) | neurons | groups; what is not cut stays whole.
        p: share of the parameters of the layers' matrices removed, whatever is cut.
        multiple: neurons a layer are rounded to it.
        compensate: put the mean of what is cut back as a bias, as FLAP does.

    >>> from sparing import Shape
    >>> WandaSp().at(0.5, Shape(layers=4, heads=8, groups=4, head_dim=8, hidden=64, neurons=96)).p
    0.5
    """

    compensate: bool = flag(False, "put the mean of what is cut back as a bias")

    def fit(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: object) -> Self:
        """Record the norms of the channels of every o_proj and down_proj over calibration data, in one dense pass.

        Args:
            model: left unchanged.
            batches: keyword arguments of the model's forward, at least two rows; padding does not count.
        """
        return self.with_state(calibrate(model, batches))

    @property
    def means(self) -> dict[str, Tensor] | None:
        return self.state if self.compensate else None

    def scores(self, layer: LayerView) -> tuple[Tensor, Tensor]:
        if not self.state:
            raise Error("wanda-sp: needs calibration first: method = method.fit(model, batches)")
        groups, neurons = (
            self.state[f"{site}.weight1.{layer.index}"] * self.state[f"{site}.norm.{layer.index}"]
            for site in ("attention", "mlp")
        )
        return groups.reshape(layer.groups, -1).sum(-1), neurons

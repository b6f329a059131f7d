"""Static cuts to the same width in every layer: the weights of a unit, and the counts that a budget leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from sparing.engine.surgery import Plan, SurgeryMethod
from sparing.engine.units import WidthControl, keep_units, rounded
from sparing.engine.view import LayerView, View
from sparing.grid.method import Error, Shape, integer, share
from sparing.grid.select import top_k

# Shape letters: G KV groups, N neurons, U units of either kind, D hidden, L layers.


def unit_weights(layer: LayerView) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that leave with each KV group and with each neuron: matrices (U, weights), a unit a row.

    Returns:
        groups: of q, k, v and, last, o, each (G, …); a group has the query heads that share it.
        neurons: of gate (where there is one), up and, last, down, each (N, D).
    """
    d, G = layer.head_dim, layer.groups
    if layer.fused_qkv is not None:
        read = layer.fused_qkv.weight.split([layer.heads * d, G * d, G * d])
    else:
        read = tuple(layer.projection(name).weight for name in ("q_proj", "k_proj", "v_proj"))
    if layer.fused_gate_up is not None:
        up = layer.fused_gate_up.weight.chunk(2)
    else:
        up = tuple(layer.projection(name).weight for name in ("gate_proj", "up_proj") if hasattr(layer.mlp, name))
    written = (layer.projection("o_proj").weight.T, layer.projection("down_proj").weight.T)
    groups = [weight.detach().reshape(G, -1) for weight in (*read, written[0])]
    return groups, [weight.detach() for weight in (*up, written[1])]


@dataclass(frozen=True)
class UniformWidths(SurgeryMethod):
    """Base of methods that leave the same number of KV groups and of neurons in every layer: those with best scores.

    A class says `scores(layer)`. The share 1 - p of a layer's parameters is split as by the width controls: groups to
    the nearest of (1 - p) of them, neurons make up for their rounding; then neurons are rounded to the nearest
    multiple, at least one. Of equal scores the earlier unit stays; fewer units are a subset of more.

    As all layers are alike, a cut is an ordinary model: transformers loads its checkpoint without this library, unless
    it has compensating biases.
    """

    p: float = share(0.2, "share of the layers' parameters removed")
    multiple: int = integer(16, "neurons a layer are rounded to it", low=1)

    def scores(self, layer: LayerView) -> tuple[Tensor, Tensor]:
        """How much is lost with each KV group (G,) and with each neuron (N,) of a layer."""
        raise Error(f"{type(self).__name__} defines no scores")

    @property
    def means(self) -> dict[str, Tensor] | None:
        """State to compensate with; None, the default, for no compensation."""
        return None

    def at(self, keep: float, shape: Shape) -> Self:
        return self.replace(p=round(1 - keep, 12))

    def widths(self, shape: Shape) -> tuple[int, int]:
        """KV groups and neurons that stay in each layer. Without state a gated MLP is assumed."""
        split = WidthControl().with_state(self.state).at(1 - self.p, shape)
        assert split.groups is not None and split.neurons is not None
        return split.groups[0], rounded(split.neurons[0], shape.neurons, self.multiple)

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        groups, neurons = self.widths(shape)
        return {"groups": (groups,), "neurons": (neurons,), "compensate": self.means is not None}

    def plan(self, model: nn.Module) -> Plan:
        view = View(model)
        shape = view.shape
        for layer in view.layers:
            found = (layer.groups, layer.neurons)
            if 0 in found or found != (shape.groups, shape.neurons):
                raise Error(
                    f"{self.name}: layer {layer.index} has {found[0]} KV groups and {found[1]} neurons that can be "
                    f"cut: every layer must have some, and as many as the others ({shape.groups} and {shape.neurons})"
                )
        counts = self.widths(shape)
        kept = [[top_k(s[None], k)[0].cpu() for s, k in zip(self.scores(v), counts, strict=True)] for v in view.layers]
        return keep_units(model, [keep for keep, _ in kept], [keep for _, keep in kept], self.means)

"""Uniform widths: the control that keeps the same number of KV groups and neurons in every layer, evenly spaced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sparing.engine.surgery import Plan
from sparing.engine.units import keep_units, unit_costs
from sparing.engine.view import View
from sparing.engine.widths import WidthControl, equal_counts
from sparing.grid.method import Card, register
from sparing.grid.select import evenly


@register(
    "uniform-width",
    Card(
        "Control: the same width in every layer",
        year=2026,
        axis="width",
        kind="surgery",
        phase="static",
        needs="calibration",
        summary="cuts every layer to the same width, units at even spacing; their mean stays as a bias",
        controls=(),
        is_control=True,
    ),
)
@dataclass(frozen=True)
class UniformWidth(WidthControl):
    """The same widths in every layer, spending what the given counts spend; units at even spacing.

    Groups a layer are the mean of the given counts, rounded; neurons, rounded to the nearest, fill the budget, so that
    the total is met within half a neuron a layer. Where groups alone are cut nothing can fill it: the total number is
    kept, and layers at even spacing have one more than the others. What is cut is compensated as by the method it is
    held against.

    Args:
        units: both | neurons | groups; what is not cut stays whole and has no count.
        groups: KV groups kept (with their query heads), one number a layer or one for all; none keeps all.
        neurons: MLP neurons kept, likewise.
        compensate: put the mean of what is cut back as a bias; needs `fit`, or the state of a fitted method.
    """

    def plan(self, model: nn.Module) -> Plan:
        layers = View(model).layers
        groups, neurons = self.counts(layers)
        costs = [unit_costs(layer) for layer in layers]
        L = len(layers)
        if self.units == "groups":
            each, more = divmod(sum(groups), L)
            groups = [each + int(extra) for extra in evenly(L, more)]
        elif self.units == "neurons":
            neurons = [round(sum(neurons) / L)] * L
        else:
            spent = sum(g * c[0] + n * c[1] for g, n, c in zip(groups, neurons, costs))
            cost = (sum(c[0] for c in costs) / L, sum(c[1] for c in costs) / L)
            limit = min(layer.neurons for layer in layers)
            group, neuron = equal_counts(spent / L, sum(groups) / L, limit, cost)
            groups, neurons = [group] * L, [neuron] * L
        kept = [evenly(layer.groups, count) for layer, count in zip(layers, groups)]
        return keep_units(model, kept, [evenly(v.neurons, count) for v, count in zip(layers, neurons)], self.means)

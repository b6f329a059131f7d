"""Static cuts of width: which units may go, the counts that a budget leaves, and what all such methods share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from sparing.engine.surgery import NoAttention, NoMLP, Plan, SurgeryMethod, undivided
from sparing.engine.units import calibrate, keep_units
from sparing.engine.view import LayerView, View
from sparing.grid.method import BudgetError, Error, Method, Shape, choice, flag, integer, model_check, numbers, share
from sparing.grid.select import top_k

# Shape letters: G KV groups, N neurons, U units of either kind, D hidden, L layers.

UNITS = ("both", "neurons", "groups")


@dataclass(frozen=True)
class WidthMethod(SurgeryMethod):
    """Base of methods that cut KV groups with their query heads, MLP neurons, or both, out of every layer.

    Their budget is a share of the parameters of all matrices of the layers, whatever `units` says: with neurons alone
    the attentions stay whole, so that the MLPs lose the more.
    """

    units: str = choice("both", UNITS, "what is cut: KV groups and neurons, or one of them")


def cannot_cut(view: View, units: str) -> str | None:
    """Why these units (of `UNITS`) cannot be cut out of a model; None if they can.

    What was cut to nothing before does not count. Where one kind alone is cut, the other must still be told apart: its
    parameters are part of the budget.
    """
    for layer in view.layers:
        where = f"layer {layer.index} ({type(layer.module).__name__})"
        if layer.experts is not None:
            return f"{where} has experts in place of an MLP; methods of the axis experts cut those"
        for there, part, what, needs in (
            (layer.groups, layer.attention, "KV groups", "q_proj, k_proj, v_proj (or qkv_proj) and o_proj"),
            (layer.neurons, layer.mlp, "neurons", "gate_proj, up_proj (or gate_up_proj) and down_proj"),
        ):
            if not there and not isinstance(part, (NoAttention, NoMLP)):
                found = layer.module if part is None else part
                return (
                    f"{where} has no {what} that can be told apart: they are cut out of {needs}, found was "
                    f"{type(found).__name__} with {', '.join(name for name, _ in found.named_children())}"
                )
        for kind, site, other in (("groups", "attention", "neurons"), ("neurons", "mlp", "groups")):
            mixed = undivided(layer, site) if units in ("both", kind) else None
            if mixed is not None:
                return f"{mixed}; units = {other} leaves it whole"
    return None


@model_check
def _falls_apart(method: Method, model: nn.Module) -> None:
    """Refuses, before any work, a model whose layers do not consist of what a width method cuts."""
    why = cannot_cut(View(model), method.units) if isinstance(method, WidthMethod) else None
    if why is not None:
        raise Error(f"method = {method.name!r}: cannot cut {type(model).__name__}: {why}")


# --------------------------------------------------------------------------- budgets


def rounded(count: int, total: int, multiple: int) -> int:
    """`count` rounded to the nearest multiple (half up), at least one multiple, at most `total`; 0 and `total` stay.

    Unaligned widths lose up to a third of the gain: kernels work in tiles.

    >>> rounded(358, 512, 16), rounded(3, 512, 16), rounded(20, 20, 16)
    (352, 16, 20)
    """
    if count in (0, total):
        return count
    return min(total, max(multiple, (count + multiple // 2) // multiple * multiple))


def reaches(name: str, keep: float, units: str, groups: float, neurons: float) -> None:
    """Refuses to keep a share of the parameters that is less than what stays whole.

    Args:
        name: of the method.
        keep: share of the layers' parameters.
        units: what is cut, of `UNITS`.
        groups, neurons: parameters of all KV groups and of all neurons, in any unit.

    Raises:
        BudgetError: says the least that can be kept.
    """
    if units == "both":
        return
    whole, what = (groups, "KV groups") if units == "neurons" else (neurons, "neurons")
    least = whole / max(groups + neurons, 1)
    if keep < least - 1e-9:
        raise BudgetError(
            f"{name}: keep = {keep:.4g}: units = {units} leaves all {what}, at least "
            f"{math.ceil(1000 * least) / 1000:g} of the layers' parameters; keep as much, or cut both"
        )


def unit_cost(method: Method, shape: Shape) -> tuple[int, int]:
    """Parameters of a KV group and of a neuron of the first layer; relative ones, of a gated MLP, without state."""
    if not method.state:
        return (2 + 2 * (shape.heads // max(shape.groups, 1))) * shape.head_dim, 3
    found = []
    for name in ("attention.unit.0", "mlp.unit.0"):
        unit = method.state[name]
        if unit.shape != (2,) or int(unit[1]) < 0:
            raise Error(f"method = {method.name!r}: its state is damaged: {name} is {unit.tolist()!s:.60}")
        found.append(int(unit[1]))
    return found[0], found[1]


def equal_widths(method: WidthMethod, keep: float, shape: Shape) -> tuple[int, int]:
    """KV groups and neurons that every layer keeps where all keep as many.

    Both: groups to the nearest of `keep` of them, at least one where the budget holds it; neurons make up for their
    rounding. One kind alone is rounded to the nearest.

    Raises:
        BudgetError: what the method does not cut is more than `keep`.
    """
    cost = unit_cost(method, shape)
    all_groups, all_neurons = shape.groups * cost[0], shape.neurons * cost[1]
    reaches(method.name, keep, method.units, all_groups, all_neurons)
    budget = keep * (all_groups + all_neurons)
    if method.units == "groups":
        return math.floor((budget - all_neurons) / max(cost[0], 1) + 0.5), shape.neurons
    if method.units == "neurons":
        return equal_counts(budget, shape.groups, shape.neurons, cost)
    one = min(1.0, budget / max(cost[0], 1))  # a group stays where the budget holds one
    return equal_counts(budget, max(keep * shape.groups, one), shape.neurons, cost)


def equal_counts(budget: float, groups: float, limit: int, cost: tuple[float, float]) -> tuple[int, int]:
    """Whole counts of groups and neurons of a layer that spend `budget`.

    Groups are the wanted number rounded to the nearest, or the other way where neurons cannot make up for it; neurons
    fill what is left, to the nearest.

    Args:
        budget: to spend on a layer, in the unit of `cost`.
        groups: wanted.
        limit: neurons there are.
        cost: of a group, of a neuron.

    >>> equal_counts(59.0, 2.4, 20, (10, 2))
    (2, 20)
    """
    found = []
    for count in (math.floor(groups), math.ceil(groups)):
        left = (budget - count * cost[0]) / cost[1] if cost[1] else 0.0
        neurons = min(max(math.floor(left + 0.5), 0), limit)
        beyond = max(abs(budget - count * cost[0] - neurons * cost[1]) - cost[1], 0.0)
        found.append((beyond, abs(count - groups), -count, neurons))
    _, _, count, neurons = min(found)
    return -count, neurons


def counted(units: str, groups: Sequence[int], neurons: Sequence[int], compensate: bool) -> dict[str, Any]:
    """Fields of the control that keeps these counts and cuts the same units; what is not cut is left to be all."""
    return {
        "units": units,
        "groups": None if units == "neurons" else tuple(groups),
        "neurons": None if units == "groups" else tuple(neurons),
        "compensate": compensate,
    }


# --------------------------------------------------------------------------- the same width in every layer


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
class UniformWidths(WidthMethod):
    """Base of methods that leave the same number of KV groups and of neurons in every layer: those with best scores.

    A class says `scores(layer)`. The share 1 - p of a layer's parameters is split as by the width controls, see
    `equal_widths`; then neurons are rounded to the nearest multiple, at least one. Of equal scores the earlier unit
    stays; fewer units are a subset of more.

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
        equal_widths(self, keep, shape)  # which refuses what is out of reach
        return self.replace(p=round(1 - keep, 12))

    def widths(self, shape: Shape) -> tuple[int, int]:
        """KV groups and neurons that stay in each layer. Without state a gated MLP is assumed."""
        groups, neurons = equal_widths(self, 1 - self.p, shape)
        return groups, rounded(neurons, shape.neurons, self.multiple)

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        groups, neurons = self.widths(shape)
        return counted(self.units, [groups], [neurons], self.means is not None)

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


# --------------------------------------------------------------------------- controls


@dataclass(frozen=True)
class WidthControl(WidthMethod):
    """Base of the width controls: given counts of KV groups and neurons a layer, and the mean of the rest as a bias.

    Fields left at None keep all; a single number holds for all layers. Of `units` the ones that are not cut have no
    count.
    """

    groups: tuple[int, ...] | None = numbers(None, "KV groups kept a layer", whole=True, optional=True)
    neurons: tuple[int, ...] | None = numbers(None, "MLP neurons kept a layer", whole=True, optional=True)
    compensate: bool = flag(True, "put the mean of what is cut back as a bias")

    def check(self) -> None:
        for given, kind, other in ((self.groups, "groups", "neurons"), (self.neurons, "neurons", "groups")):
            if given is not None and self.units == other:
                raise Error(f"{self.name}: {kind} = {given}: must be none, as units = {other} leaves them all")

    @property
    def ready(self) -> bool:
        return not self.compensate or bool(self.state)

    def fit(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> Self:
        """Record the channel means that compensation needs."""
        return self.with_state(calibrate(model, batches))

    def at(self, keep: float, shape: Shape) -> Self:
        """The same counts in every layer, see `equal_widths`. Without state a gated MLP is assumed."""
        groups, neurons = equal_widths(self, keep, shape)
        return self.replace(**counted(self.units, [groups], [neurons], self.compensate))

    def counts(self, layers: Sequence[LayerView]) -> tuple[list[int], list[int]]:
        """Kept groups and neurons of each of these layers."""
        found = []
        for name, sizes in (("groups", [v.groups for v in layers]), ("neurons", [v.neurons for v in layers])):
            given = getattr(self, name)
            full = sizes if given is None else list(given) * len(sizes) if len(given) == 1 else list(given)
            if len(full) != len(sizes) or any(k > size for k, size in zip(full, sizes)):
                raise Error(
                    f"{self.name}: {name} = {given}: must be one count, or one for each of the {len(sizes)} layers, of "
                    f"at most {', '.join(map(str, sizes))}"
                )
            found.append(full)
        return found[0], found[1]

    @property
    def means(self) -> dict[str, Tensor] | None:
        """State to compensate with; None if it is not wanted."""
        if not self.ready:
            raise Error(f"{self.name}: needs calibration first: method = method.fit(model, batches)")
        return self.state if self.compensate else None

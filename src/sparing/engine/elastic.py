"""A live model whose sub-layers are switched between widths: a candidate of a search runs as the really cut model."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparing.engine.calls import split
from sparing.engine.routing import cut_experts
from sparing.engine.surgery import (
    LayerCut,
    Plan,
    cut_attention,
    cut_mlp,
    drop_attention,
    drop_mlp,
    irremovable,
    undivided,
)
from sparing.engine.units import compensation, unit_scores
from sparing.engine.view import LayerView, View, evaluating, heads_a_group
from sparing.grid.lists import listed
from sparing.grid.method import Error
from sparing.grid.search import Genome

AXES = ("depth", "width", "experts")


@dataclass(frozen=True)
class Unit:
    """A sub-layer that a search gives a level.

    Attributes:
        layer: its layer, from 0.
        site: "attention", "mlp" or "experts".
        levels: what stays at each level: KV groups, neurons or experts, rising; 0 is the removed sub-layer, the last
            is all there is.
    """

    layer: int
    site: str
    levels: tuple[int, ...]

    @property
    def name(self) -> str:
        """E.g. `mlp.3`."""
        return f"{self.site}.{self.layer}"


def units(model: nn.Module, axes: str | Sequence[str], *, multiple: int = 16, steps: int = 8) -> list[Unit]:
    """The units of a model, attention before MLP, layer by layer.

    Args:
        axes: one or several: "depth" lets sub-layers go, "width" gives them the widths between, "experts" the numbers
            of experts.
        multiple: widths of MLPs are multiples of it; unaligned ones lose up to a third of the gain.
        steps: levels of an MLP, or of experts, above nothing.

    Raises:
        Error: an unknown axis, or one that the model lacks.
    """
    axes = listed(axes)
    for axis in axes:
        if axis not in AXES:
            raise Error(f"axes = {axis!r}: must be among {', '.join(AXES)}")
    if not axes:
        raise Error(f"axes = []: name at least one of {', '.join(AXES)}")
    view = View(model)
    what = type(model).__name__
    if "experts" in axes and not any(layer.experts for layer in view.layers):
        raise Error(f"axes = 'experts': {what} has none (looked for layers with a router beside a module experts)")
    if "width" in axes:
        lacking = view.lacks(("scores", "neurons"))
        if lacking is not None:
            raise Error(f"axes = 'width': {what} cannot be cut in width: {lacking}")
    found = []
    gone = (0,) if "depth" in axes else ()
    for layer in view.layers:
        for site, part in (("attention", layer.attention), ("mlp", layer.mlp)):
            stuck = irremovable(layer, site) if gone and part is not None else None
            if stuck is not None:
                raise Error(f"axes = 'depth': {what} cannot be cut in depth: {stuck}")
        if layer.attention is not None:
            most = max(layer.groups, 1)
            between = "width" in axes and undivided(layer, "attention") is None  # else its MLP alone has widths
            found.append(Unit(layer.index, "attention", (*gone, *_widths(between, most, 1, most))))
        experts = layer.experts
        if experts is not None:
            least = -(-experts.top_k // experts.chosen_groups) * experts.groups  # as many of each group of a router
            levels = [m for m in _widths("experts" in axes, experts.count, experts.groups, steps) if m >= least]
            found.append(Unit(layer.index, "experts", (*gone, *levels)))
        elif layer.mlp is not None:
            most = layer.neurons or 1
            found.append(Unit(layer.index, "mlp", (*gone, *_widths("width" in axes, most, multiple, steps))))
    return found


def _widths(between: bool, most: int, multiple: int, steps: int) -> list[int]:
    """About `steps` widths up to `most`, multiples but for the last; without `between` the last alone."""
    if not between:
        return [most]
    aligned = {round(most * i / steps / multiple) * multiple for i in range(1, steps)}
    return [*sorted(k for k in aligned if 0 < k < most), most]


class Elastic:
    """Switches a model between levels, in place; leaving the block puts every module back.

    Units of a sub-layer stay in the order of their scores, so a smaller width is a subset of a larger one. A switch
    touches the sub-layers whose level changes and no other. Cut modules are kept for the next candidate that has them,
    the last ones used first, up to `room` bytes.

    Args:
        model: left as it was on leaving.
        units: of `units`.
        state: of `calibrate`, for scores, and for the mean of what is cut as a bias; needed where a unit has widths.
        experts: importance of each expert, (L, E); needed where a unit has several numbers of experts.
        compensate: put the mean back; without it a uniform cut loads in plain transformers.
        room: bytes of cut modules held; None takes four times the size of the decoder layers.

    Attributes:
        genome: level of each unit now, index into its levels.
        switched: modules exchanged so far.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        *,
        state: Mapping[str, Tensor] | None = None,
        experts: Tensor | None = None,
        compensate: bool = True,
        room: int | None = None,
    ) -> None:
        self.model = model
        self.view = View(model)
        self.units = list(units)
        self.dense: Genome = tuple(len(unit.levels) - 1 for unit in units)
        self.genome = self.dense
        self.switched = 0
        self._state, self._experts, self._compensate = state, experts, compensate and state is not None
        self._names = [self._name(unit) for unit in units]
        self._own: list[nn.Module] = [
            getattr(self.view.layers[unit.layer].module, name) for unit, name in zip(units, self._names)
        ]
        self._built: OrderedDict[tuple[int, int], nn.Module] = OrderedDict()
        weights = sum(p.numel() * p.element_size() for p in self.view.stack.parameters())
        self._room = 4 * weights if room is None else room
        self._order = [self._ordered(unit) for unit in units]

    def _name(self, unit: Unit) -> str:
        layer = self.view.layers[unit.layer]
        part = layer.attention if unit.site == "attention" else layer.mlp
        return next(name for name, child in layer.module.named_children() if child is part)

    def _ordered(self, unit: Unit) -> Tensor | None:
        """Its groups, neurons or experts, best first; None where it only stays or goes."""
        if len([k for k in unit.levels if k]) < 2:
            return None
        if unit.site == "experts":
            if self._experts is None:
                raise Error("experts: needed to rank the experts of a layer")
            groups = self.view.layers[unit.layer].experts.groups  # type: ignore[union-attr]
            by_group = self._experts[unit.layer].view(groups, -1).sort(dim=1, descending=True, stable=True).indices
            start = torch.arange(groups)[:, None] * by_group.shape[1]
            return (start + by_group).T.flatten()  # the best of each group, then the second best, …
        if self._state is None:
            raise Error("state: needed to rank groups and neurons: state = calibrate(model, batches)")
        score = unit_scores(self._state, unit.site, unit.layer)
        return score.sort(descending=True, stable=True).indices

    # ---- what a level is

    def part(self, index: int, level: int) -> LayerCut:
        """What stays of unit `index` at this level; the other sub-layer of the layer is left whole."""
        unit, order = self.units[index], self._order[index]
        count, most = unit.levels[level], unit.levels[-1]
        if count == most:
            return LayerCut()
        if unit.site == "experts":
            return LayerCut(mlp=False) if not count else LayerCut(experts=_rising(order, count))
        attention = unit.site == "attention"
        if not count and not self._compensate:
            return LayerCut(attention=False) if attention else LayerCut(mlp=False)
        kept = _rising(order, count) if count else torch.zeros(0, dtype=torch.long)
        bias = self._bias(unit, kept) if self._compensate else None
        return LayerCut(groups=kept, attention_bias=bias) if attention else LayerCut(neurons=kept, mlp_bias=bias)

    def _bias(self, unit: Unit, kept: Tensor) -> Tensor:
        assert self._state is not None
        layer = self.view.layers[unit.layer]
        own = self._dense_view(layer)
        width = heads_a_group(own) * own.head_dim if unit.site == "attention" else 1
        mean = self._state[f"{unit.site}.mean.{unit.layer}"]
        keep = torch.zeros(len(mean) // width, dtype=torch.bool)
        keep[kept] = True
        projection = own.projection("o_proj" if unit.site == "attention" else "down_proj")
        return compensation(projection.weight, mean, keep.repeat_interleave(width))

    def _dense_view(self, layer: LayerView) -> LayerView:
        """The layer as it was before anything was switched."""
        own = {u.site: m for u, m in zip(self.units, self._own) if u.layer == layer.index}
        return replace(layer, attention=own.get("attention", layer.attention), mlp=own.get("mlp", layer.mlp))

    def plan(self, genome: Genome) -> Plan:
        """The surgery that makes an ordinary checkpoint of this candidate; a layer with nothing left goes whole."""
        cuts: list[LayerCut | None] = [LayerCut() for _ in self.view.layers]
        for index, (unit, level) in enumerate(zip(self.units, genome, strict=True)):
            part, before = self.part(index, level), cuts[unit.layer]
            assert before is not None
            if unit.site == "attention":
                new = replace(before, groups=part.groups, attention=part.attention, attention_bias=part.attention_bias)
            else:
                new = replace(before, neurons=part.neurons, experts=part.experts, mlp=part.mlp, mlp_bias=part.mlp_bias)
            cuts[unit.layer] = new
        return Plan(tuple(None if cut is not None and not (cut.attention or cut.mlp) else cut for cut in cuts))

    # ---- switching

    def set(self, genome: Genome) -> None:
        """The live model at these levels."""
        now = list(self.genome)
        try:
            for index, (old, new) in enumerate(zip(self.genome, genome, strict=True)):
                if old != new:
                    layer = self.view.layers[self.units[index].layer]
                    setattr(layer.module, self._names[index], self._module(index, new))
                    now[index] = new
                    self.switched += 1
        finally:  # a cut that is refused leaves the others to be undone
            self.genome = tuple(now)

    def empty_layers_are_none(self, input_ids_BT: Tensor) -> None:
        """Tries whether layers without attention and MLP pass on what they read: `plan` takes such a layer out whole.

        Raises:
            Error: one does more, e.g. has a norm or a scale behind the sum; names it.
        """
        more: list[int] = []

        def compare(index: int, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            read, _ = split(module.forward, args, kwargs)
            if not torch.equal(read, out[0] if isinstance(out, tuple) else out):
                more.append(index)

        with contextlib.ExitStack() as stack, evaluating(self.model), torch.no_grad():
            stack.callback(self.set, self.genome)
            for layer in self.view.layers:
                hook = functools.partial(compare, layer.index)
                stack.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)
            self.set((0,) * len(self.units))
            self.model(input_ids=input_ids_BT, use_cache=False)
        if more:
            what = f"layer {more[0]} ({type(self.view.layers[more[0]].module).__name__})"
            raise Error(
                f"{type(self.model).__name__}: {what} does more than add its attention and its MLP to what it reads, "
                "so neither can be taken out alone"
            )

    def _module(self, index: int, level: int) -> nn.Module:
        if level == self.dense[index]:
            return self._own[index]
        key = (index, level)
        if key not in self._built:
            self._built[key] = self._cut(index, level)
            while len(self._built) > 1 and sum(map(_bytes, self._built.values())) > self._room:
                self._built.popitem(last=False)
        self._built.move_to_end(key)
        return self._built[key]

    def _cut(self, index: int, level: int) -> nn.Module:
        """The sub-layer at this level, by the same cuts that make the checkpoint."""
        unit, part = self.units[index], self.part(index, level)
        layer = self.view.layers[unit.layer]
        holder = nn.Module()
        holder.part = copy.deepcopy(self._own[index])
        one = replace(layer, module=holder, attention=None, mlp=None)
        if unit.site == "attention":
            one = replace(one, attention=holder.part)
            if part.attention:
                cut_attention(one, part)
            else:
                drop_attention(one, int(self.view.config.hidden_size))
        else:
            one = replace(one, mlp=holder.part)
            if part.experts is not None:
                cut_experts(one, part.experts)
            elif part.mlp:
                cut_mlp(one, part)
            else:
                drop_mlp(one, int(self.view.config.hidden_size))
        return holder.part.train(layer.module.training)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.set(self.dense)
        self._built.clear()


def _rising(order: Tensor | None, count: int) -> Tensor:
    assert order is not None
    return order[:count].sort().values


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())

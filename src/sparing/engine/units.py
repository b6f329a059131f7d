"""What a width method cuts by: statistics of channels over calibration data, units and what they cost, controls."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparing.engine.surgery import LayerCut, Plan, SurgeryMethod
from sparing.engine.view import LayerView, View, evaluating, heads_a_group
from sparing.grid.method import Error, Method, Shape, flag, model_check, numbers, state_check
from sparing.grid.score import standardise


def rounded(count: int, total: int, multiple: int) -> int:
    """`count` rounded to the nearest multiple (half up), at least one multiple, at most `total`; 0 and `total` stay.

    Unaligned widths lose up to a third of the gain: kernels work in tiles.

    >>> rounded(358, 512, 16), rounded(3, 512, 16), rounded(20, 20, 16)
    (352, 16, 20)
    """
    if count in (0, total):
        return count
    return min(total, max(multiple, (count + multiple // 2) // multiple * multiple))


# --------------------------------------------------------------------------- calibration


_ROWS = 1024  # rows widened to float64 at a time


@dataclass
class Moments:
    """Streaming mean and centred sum of squares of the channels a projection reads (Chan's update, float64).

    Attributes:
        count: rows taken in.
        samples: samples that the rows belong to.
        mean: (C,).
        squares: (C,), sum over rows of (x - mean)^2.
    """

    count: int = 0
    samples: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def add(self, x_NC: Tensor, samples: int) -> None:
        """Take in N rows that belong to `samples` samples."""
        self.samples += samples
        for part in x_NC.detach().split(_ROWS):
            if len(part):
                self._add(part.float() if part.device.type == "mps" else part.double())

    def _add(self, x_NC: Tensor) -> None:
        n, mean = x_NC.shape[0], x_NC.mean(0)
        squares = ((x_NC - mean) ** 2).sum(0)
        if self.count == 0:
            self.count, self.mean, self.squares = n, mean, squares
            return
        total = self.count + n
        gap = mean - self.mean
        self.squares = self.squares + squares + gap**2 * (self.count * n / total)
        self.mean = self.mean + gap * (n / total)
        self.count = total

    @property
    def second(self) -> Tensor:
        """Sum of squares, sum_n x^2."""
        return self.squares + self.count * self.mean**2


def observe(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> tuple[list[Moments], list[Moments]]:
    """Moments of the inputs of every o_proj and down_proj over calibration batches, in one dense pass.

    Padding (attention_mask 0) is left out. The model runs in evaluation mode and is left as it was.

    Args:
        batches: keyword arguments of the model's forward; a row of a batch is a sample. Labels are left out.

    Returns:
        attention (H*d channels a layer) and mlp (neurons a layer).

    Raises:
        Error: there is no batch, or a layer has no o_proj or no down_proj (experts).
    """
    view = View(model)
    sites = {"o_proj": [Moments() for _ in view.layers], "down_proj": [Moments() for _ in view.layers]}
    mask: Tensor | None = None

    def hook(moments: Moments, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        moments.add(x.flatten(0, -2) if mask is None else x[mask.to(x.device)], x.shape[0])

    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        for layer in view.layers:
            for name, site in sites.items():
                handle = layer.projection(name).register_forward_pre_hook(functools.partial(hook, site[layer.index]))
                stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        seen = 0
        for batch in batches:
            given = batch.get("attention_mask")
            mask = given.bool() if given is not None and not bool(given.all()) else None
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
            model(**inputs, use_cache=False)
            seen += 1
    if not seen:
        raise Error("batches: the calibration data is empty")
    return sites["o_proj"], sites["down_proj"]


# --------------------------------------------------------------------------- units: KV groups and neurons


def unit_costs(layer: LayerView) -> tuple[int, int]:
    """Parameters that leave with one KV group (rows of q, k, v, columns of o), and with one neuron."""
    d, per = layer.head_dim, heads_a_group(layer)

    def rows(name: str) -> int:
        linear = layer.projection(name)
        return linear.in_features + (linear.bias is not None)

    group = neuron = 0
    if layer.groups:
        parts = {"q_proj": per, "k_proj": 1, "v_proj": 1} if layer.fused_qkv is None else {"qkv_proj": per + 2}
        group = d * (sum(n * rows(name) for name, n in parts.items()) + per * layer.projection("o_proj").out_features)
    if layer.neurons:
        names = ["gate_proj", "up_proj"] if layer.fused_gate_up is None else ["gate_up_proj", "gate_up_proj"]
        neuron = sum(rows(name) for name in names if hasattr(layer.mlp, name))
        neuron += layer.projection("down_proj").out_features
    return group, neuron


def statistics(moments: Moments, weight_DC: Tensor) -> dict[str, Tensor]:
    """What calibration knows of the C channels that a projection reads, each float32 (C,).

    mean: over rows. var: sum over rows of (x - mean)^2 / (N - 1) with N *samples*, so it grows with their length.
    norm: of the column of X. weight1, weight2: mean |W| and sum W^2 of the column of W.
    """
    if moments.samples < 2:
        raise Error(f"batches: {moments.samples} sequence, a variance needs at least 2")
    weight = weight_DC.detach().float()
    found = {
        "mean": moments.mean,
        "var": moments.squares / (moments.samples - 1),
        "norm": moments.second.sqrt(),
        "weight1": weight.abs().mean(0),
        "weight2": weight.square().sum(0),
    }
    return {name: value.float().cpu() for name, value in found.items()}


def fluctuation(metric: str, var: Tensor, norm: Tensor, weight1: Tensor, weight2: Tensor) -> Tensor:
    """S of each channel, (C,); the arguments are named as in `statistics`."""
    if metric == "WIFN":
        return weight1 * norm
    return var * weight2 if metric == "WIFV" else var


def unit_scores(state: Mapping[str, Tensor], site: str, layer: int, *, metric: str = "WIFV", power: int = 1) -> Tensor:
    """How much the groups ("attention") or neurons ("mlp") of a layer matter, float64 (units,), comparable over layers.

    Fluctuation of each channel (FLAP, arXiv 2312.11983), standardised inside the module, mean over a unit's channels.

    Args:
        state: of `calibrate`.
        metric: WIFV | IFV | WIFN, see `fluctuation`.
        power: that the channel's score is raised to before it is standardised.
    """
    found = {k: state[f"{site}.{k}.{layer}"].double() for k in ("var", "norm", "weight1", "weight2")}
    score_C = fluctuation(metric, **found) ** power
    score_C = standardise(score_C) if len(score_C) > 1 else torch.zeros_like(score_C)
    return score_C.reshape(-1, int(state[f"{site}.unit.{layer}"][0])).mean(-1)


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """State of the width methods: `statistics` of both sites of every layer, and what their units are.

    Returns:
        `attention.mean.0`, … `mlp.weight2.L-1`: float32 (C,); `attention.unit.i`, `mlp.unit.i`: int64, channels of a
        unit and parameters that leave with it.
    """
    view = View(model)
    state: dict[str, Tensor] = {}
    for layer, *moments in zip(view.layers, *observe(model, batches), strict=True):
        group, neuron = unit_costs(layer)
        width = heads_a_group(layer) * layer.head_dim
        units = (("attention", "o_proj", (max(width, 1), group)), ("mlp", "down_proj", (1, neuron)))
        for (site, name, unit), seen in zip(units, moments, strict=True):
            for key, value in statistics(seen, layer.projection(name).weight).items():
                state[f"{site}.{key}.{layer.index}"] = value
            state[f"{site}.unit.{layer.index}"] = torch.tensor(unit)
    return state


@model_check
def _has_units(method: Method, model: nn.Module) -> None:
    """Refuses a model whose layers do not fall apart into units, before anything is calibrated.

    Not asked of methods that name what they need themselves (`Card.requires`), nor of the half that a method leaves
    alone by its field `units`. What an earlier cut left without inputs has nothing more to cut, and may stay.
    """
    card, units = method.card, method.fields().get("units", "both")
    if (card.axis, card.kind) != ("width", "surgery") or card.requires:
        return
    for layer in View(model).layers:
        for name, what, count in (("o_proj", "groups", layer.groups), ("down_proj", "neurons", layer.neurons)):
            if count or units not in ("both", what):
                continue
            try:
                if getattr(layer.projection(name), "in_features", None) == 0:
                    continue
                why = f"its {name} reads no whole {what}"
            except Error as problem:
                why = str(problem)
            raise Error(
                f"{method.name}: layer {layer.index} has {layer.groups} KV groups and {layer.neurons} neurons that can "
                f"be cut, {type(model).__name__} is no model for it ({why})"
            )


_STATISTICS = ("mean", "var", "norm", "weight1", "weight2")
_SITES = (("attention", "o_proj"), ("mlp", "down_proj"))
_NAME = re.compile(rf"({'|'.join(dict(_SITES))})\.({'|'.join((*_STATISTICS, 'unit'))})\.\d+")


@state_check
def calibrated_on(method: Method, model: nn.Module) -> None:
    """Refuses a state of `calibrate` that is not of this model: every tensor must be there, and of its size."""
    given = {name: tensor for name, tensor in method.state.items() if _NAME.fullmatch(name)}
    if not given:
        return
    other, view = f"method = {method.name!r}: was fitted on another model", View(model)
    for layer in view.layers:
        width = max(heads_a_group(layer) * layer.head_dim, 1)
        for (site, projection), cost, channels in zip(_SITES, unit_costs(layer), (width, 1), strict=True):
            size = _channels_of(layer, projection)
            for key in (*_STATISTICS, "unit"):
                name, wanted = f"{site}.{key}.{layer.index}", 2 if key == "unit" else size
                tensor = given.pop(name, None)
                if tensor is None:
                    raise Error(f"{other}: its state has no {name}, and the model has {len(view)} layers")
                if tensor.shape != (wanted,):
                    found = f"{len(tensor)} channels" if tensor.ndim == 1 else f"the shape {tuple(tensor.shape)}"
                    raise Error(f"{other}: {name} has {found}, the model has {wanted}")
                if key == "unit" and tensor.tolist() != [channels, cost]:
                    raise Error(
                        f"{other}: {name} counts channels and parameters of a unit as {tensor.tolist()}, the model has "
                        f"{[channels, cost]}"
                    )
    if given:
        raise Error(f"{other}: its state has {min(given)}, and the model has {len(view)} layers")


def _channels_of(layer: LayerView, projection: str) -> int:
    """Channels that a projection reads, 0 where the layer has none."""
    try:
        return layer.projection(projection).in_features
    except Error:
        return 0


def compensation(weight_DC: Tensor, mean_C: Tensor, keep_C: Tensor) -> Tensor:
    """b = W ((1 - M) mean): what the channels cut away give on average. float32 (D,)."""
    gone = (~keep_C).nonzero().flatten().to(weight_DC.device)
    return weight_DC.detach()[:, gone].float() @ mean_C.to(weight_DC.device)[gone].float()


def keep_units(
    model: nn.Module, groups: Sequence[Tensor], neurons: Sequence[Tensor], state: Mapping[str, Tensor] | None
) -> Plan:
    """The plan that keeps these KV groups and neurons, bool (units,) a layer.

    Args:
        state: of `calibrate`, to put the mean of what is cut back as a bias; None for no compensation.

    Raises:
        Error: masks or state are of another model.
    """
    view = View(model)
    other = "method: was fitted on another model"
    if not len(groups) == len(neurons) == len(view):
        raise Error(f"{other}: it keeps units of {len(groups)} layers, the model has {len(view)}")
    for layer, *both in zip(view.layers, groups, neurons, strict=True):
        for what, keep, there in zip(("KV groups", "neurons"), both, (layer.groups, layer.neurons), strict=True):
            if len(keep) != there:
                raise Error(f"{other}: it knows {len(keep)} {what} in layer {layer.index}, the model has {there}")

    def part(layer: LayerView, site: str, name: str, keep: Tensor, width: int) -> tuple[Tensor | None, Tensor | None]:
        if bool(keep.all()):
            return None, None
        index = keep.nonzero().flatten()
        if state is None:
            return index, None
        mean = state.get(f"{site}.mean.{layer.index}")
        if mean is None or mean.shape != (len(keep) * width,):
            found = "missing" if mean is None else f"of shape {tuple(mean.shape)}"
            raise Error(f"{other}: {site}.mean.{layer.index} is {found}, the model has {len(keep) * width} channels")
        return index, compensation(layer.projection(name).weight, mean, keep.repeat_interleave(width))

    cuts = []
    for layer, group, neuron in zip(view.layers, groups, neurons, strict=True):
        width = heads_a_group(layer) * layer.head_dim
        kept, bias = part(layer, "attention", "o_proj", group, width)
        kept_mlp, bias_mlp = part(layer, "mlp", "down_proj", neuron, 1)
        cuts.append(LayerCut(kept, kept_mlp, attention_bias=bias, mlp_bias=bias_mlp))
    return Plan(tuple(cuts))


@dataclass(frozen=True)
class WidthControl(SurgeryMethod):
    """Base of the width controls: given counts of KV groups and neurons a layer, and the mean of the rest as a bias.

    Fields left at None keep all; a single number holds for all layers.
    """

    groups: tuple[int, ...] | None = numbers(None, "KV groups kept a layer", whole=True, optional=True)
    neurons: tuple[int, ...] | None = numbers(None, "MLP neurons kept a layer", whole=True, optional=True)
    compensate: bool = flag(True, "put the mean of what is cut back as a bias")

    @property
    def ready(self) -> bool:
        return not self.compensate or bool(self.state)

    def fit(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> Self:
        """Record the channel means that compensation needs."""
        return self.with_state(calibrate(model, batches))

    def at(self, keep: float, shape: Shape) -> Self:
        """The same counts in every layer. Without state a gated MLP is assumed."""
        per = shape.heads // max(shape.groups, 1)
        cost = ((2 + 2 * per) * shape.head_dim, 3)
        if self.state:
            cost = (self._cost("attention"), self._cost("mlp"))
        budget = keep * (shape.groups * cost[0] + shape.neurons * cost[1])
        one = min(1.0, budget / max(cost[0], 1))  # a group stays where the budget holds one
        wanted = max(keep * shape.groups, one)
        groups, neurons = equal_counts(budget, wanted, shape.neurons, cost)
        return self.replace(groups=(groups,), neurons=(neurons,))

    def _cost(self, site: str) -> int:
        unit = self.state[f"{site}.unit.0"]
        if unit.shape != (2,) or int(unit[1]) < 0:
            raise Error(f"method = {self.name!r}: its state is damaged: {site}.unit.0 is {unit.tolist()!s:.60}")
        return int(unit[1])

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

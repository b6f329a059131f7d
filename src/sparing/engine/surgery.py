"""Static cuts: really slice layers, KV groups with their query heads, and neurons; save and load the smaller model."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from sparing.engine.view import LayerView, View
from sparing.grid.method import Error, Method, Shape, flag, numbers

SECTION = "sparing"  # of config.json
_SECTION_VERSION = 1
_PLAIN = (("num_attention_heads", "num_key_value_heads"), ("intermediate_size",))  # said together or not at all


@dataclass(frozen=True)
class LayerCut:
    """What stays of one layer.

    Attributes:
        groups: kept KV groups (with all their query heads), rising; None keeps all.
        neurons: kept MLP neurons, rising; None keeps all.
        attention, mlp: False removes the sub-layer (its norm and residual add with it).
        attention_bias, mlp_bias: (D,) added to the output projection, the mean of what was cut away.
    """

    groups: Tensor | None = None
    neurons: Tensor | None = None
    attention: bool = True
    mlp: bool = True
    attention_bias: Tensor | None = None
    mlp_bias: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """What stays of a model: one LayerCut a layer, None where the whole layer goes."""

    layers: tuple[LayerCut | None, ...]


@dataclass(frozen=True)
class SurgeryMethod(Method):
    """A method that says once which heads, neurons and layers stay."""

    def plan(self, model: nn.Module) -> Plan:
        """Which parts of `model` stay, and what compensates the rest."""
        raise Error(f"{type(self).__name__} defines no plan")


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
    modes = [(module, module.training) for module in model.modules()]
    with contextlib.ExitStack() as stack:
        for layer in view.layers:
            for name, site in sites.items():
                handle = layer.projection(name).register_forward_pre_hook(functools.partial(hook, site[layer.index]))
                stack.callback(handle.remove)
        stack.callback(_restore, modes)
        model.eval()
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


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


# --------------------------------------------------------------------------- units: KV groups and neurons


def _heads_a_group(layer: LayerView) -> int:
    return layer.heads // max(layer.groups, 1)


def unit_costs(layer: LayerView) -> tuple[int, int]:
    """Parameters that leave with one KV group (rows of q, k, v, columns of o), and with one neuron."""
    d, per = layer.head_dim, _heads_a_group(layer)

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
        width = _heads_a_group(layer) * layer.head_dim
        units = (("attention", "o_proj", (max(width, 1), group)), ("mlp", "down_proj", (1, neuron)))
        for (site, name, unit), seen in zip(units, moments, strict=True):
            for key, value in statistics(seen, layer.projection(name).weight).items():
                state[f"{site}.{key}.{layer.index}"] = value
            state[f"{site}.unit.{layer.index}"] = torch.tensor(unit)
    return state


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
    fits = len(groups) == len(neurons) == len(view)
    if not fits or any((len(g), len(n)) != (v.groups, v.neurons) for g, n, v in zip(groups, neurons, view.layers)):
        raise Error(f"method: was fitted on another model; {type(model).__name__} has other layers, heads or neurons")

    def part(layer: LayerView, site: str, name: str, keep: Tensor, width: int) -> tuple[Tensor | None, Tensor | None]:
        if bool(keep.all()):
            return None, None
        index = keep.nonzero().flatten()
        if state is None:
            return index, None
        mean = state.get(f"{site}.mean.{layer.index}")
        if mean is None or len(mean) != len(keep) * width:
            raise Error(f"method: was fitted on another model; its state has no {site} means of layer {layer.index}")
        return index, compensation(layer.projection(name).weight, mean, keep.repeat_interleave(width))

    cuts = []
    for layer, group, neuron in zip(view.layers, groups, neurons, strict=True):
        width = _heads_a_group(layer) * layer.head_dim
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
            cost = (int(self.state["attention.unit.0"][1]), int(self.state["mlp.unit.0"][1]))
        budget = keep * (shape.groups * cost[0] + shape.neurons * cost[1])
        one = min(1.0, budget / max(cost[0], 1))  # a group stays where the budget holds one
        wanted = max(keep * shape.groups, one)
        groups, neurons = equal_counts(budget, wanted, shape.neurons, cost)
        return self.replace(groups=(groups,), neurons=(neurons,))

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


# --------------------------------------------------------------------------- masks on the live model


def _channels(layer: LayerView, groups: Tensor) -> Tensor:
    """Channels of o_proj that belong to kept KV groups: all query heads of each group."""
    per = _heads_a_group(layer)
    heads = (groups[:, None] * per + torch.arange(per, device=groups.device)).flatten()
    return (heads[:, None] * layer.head_dim + torch.arange(layer.head_dim, device=groups.device)).flatten()


@contextlib.contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[None]:
    """The live model as if `plan` had been cut: cut channels are zeroed before o_proj/down_proj, the biases added.

    Weights are not touched. It computes what the cut model computes, at dense cost.
    """
    view = _checked(model, plan)
    undo: list[Callable[[], Any]] = []

    def channels(module: nn.Module, keep: Tensor | None, bias: Tensor | None) -> None:
        if keep is not None:
            weight: Any = module.weight
            factor = torch.zeros(weight.shape[1], dtype=weight.dtype, device=weight.device)
            factor[keep.to(weight.device)] = 1
            undo.append(module.register_forward_pre_hook(lambda m, a: (a[0] * factor, *a[1:])).remove)
        if bias is not None:
            undo.append(module.register_forward_hook(lambda m, a, out: out + bias.to(out)).remove)

    def silent(module: nn.Module) -> None:
        def zero(m: nn.Module, a: Any, out: Any) -> Any:
            return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

        undo.append(module.register_forward_hook(zero).remove)

    def passed(module: nn.Module) -> None:
        def identity(m: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        undo.append(module.register_forward_hook(identity, with_kwargs=True).remove)

    try:
        for layer, cut in zip(view.layers, plan.layers, strict=True):
            if cut is None:
                passed(layer.module)
                continue
            if not cut.attention and layer.attention is not None:
                silent(layer.attention)
            elif cut.groups is not None or cut.attention_bias is not None:
                keep = None if cut.groups is None else _channels(layer, cut.groups)
                channels(layer.projection("o_proj"), keep, cut.attention_bias)
            if not cut.mlp and layer.mlp is not None:
                silent(layer.mlp)
            elif cut.neurons is not None or cut.mlp_bias is not None:
                channels(layer.projection("down_proj"), cut.neurons, cut.mlp_bias)
        yield
    finally:
        for step in reversed(undo):
            step()


def _checked(model: nn.Module, plan: Plan) -> View:
    """The model's view, once the plan is known to fit it."""
    view = View(model)
    if len(plan.layers) != len(view):
        raise Error(f"plan: {len(plan.layers)} layers for a model of {len(view)}")
    if all(cut is None for cut in plan.layers):
        raise Error("plan: no layer is left")
    for layer, cut in zip(view.layers, plan.layers, strict=True):
        if cut is not None and cut.attention and cut.groups is not None:
            _fits(layer, "groups", cut.groups, layer.groups)
            if 0 < cut.groups.numel() < layer.groups:
                _splits(layer, layer.attention, _attention_rows(layer))
        if cut is not None and cut.mlp and cut.neurons is not None:
            _fits(layer, "neurons", cut.neurons, layer.neurons)
            if 0 < cut.neurons.numel() < layer.neurons:
                _splits(layer, layer.mlp, _mlp_rows(layer))
    return view


def _fits(layer: LayerView, name: str, keep: Tensor, size: int) -> None:
    index = keep.tolist()
    if index and (min(index) < 0 or max(index) >= size):
        raise Error(f"plan: layer {layer.index} keeps {name} {min(index)}..{max(index)}, it has {size}")
    if index != sorted(set(index)):
        raise Error(f"plan: layer {layer.index} keeps {name} {index[:8]}…: they must rise")


def _attention_rows(layer: LayerView) -> dict[str, int]:
    """Output rows of each projection whose units are KV groups; o_proj gets D, norms are a head wide."""
    d, H, G = layer.head_dim, layer.heads, layer.groups
    return {"q_proj": H * d, "k_proj": G * d, "v_proj": G * d, "qkv_proj": (H + 2 * G) * d, "q_norm": d, "k_norm": d}


def _mlp_rows(layer: LayerView) -> dict[str, int]:
    N = layer.neurons
    return {"gate_proj": N, "up_proj": N, "gate_up_proj": 2 * N}


def _splits(layer: LayerView, parent: nn.Module | None, rows: dict[str, int]) -> None:
    """Refuse a sub-layer whose weights do not fall apart into units."""
    assert parent is not None
    out = layer.projection("o_proj" if parent is layer.attention else "down_proj")
    for name, weight in parent.named_parameters():
        owner = name.split(".")[0]
        if getattr(parent, owner) is not out and rows.get(owner) != weight.shape[0]:
            raise Error(
                f"layer {layer.index}: {type(parent).__name__}.{name} {tuple(weight.shape)} does not fall apart into "
                f"units; only layers whose {', '.join(rows)} have the usual shapes can be cut in part"
            )


# --------------------------------------------------------------------------- real cuts


class Absent(nn.Module):
    """Where a projection was that has no input left: gives its bias, or zero."""

    in_features = 0

    def __init__(self, out_features: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features = out_features
        self.bias = None if bias is None else nn.Parameter(bias)

    @property
    def weight(self) -> Tensor:
        """(out, 0)."""
        return torch.zeros(self.out_features, 0, device=None if self.bias is None else self.bias.device)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class NoAttention(nn.Module):
    """In place of a removed attention: adds nothing but, if all heads were cut with compensation, their mean.

    It notes one number a token in the KV cache: models read the length of the past off the cache of their first layer.
    """

    def __init__(self, hidden: int, head_dim: int, layer_idx: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.layer_idx = layer_idx
        self.k_proj = Absent(0)
        self.o_proj = Absent(hidden, bias)

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            token_B1T1 = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            past_key_values.update(token_B1T1, token_B1T1, self.layer_idx)
        return self.o_proj(hidden_states[..., :0]), None


class NoMLP(nn.Module):
    """In place of a removed MLP: adds nothing but, if all neurons were cut with compensation, their mean."""

    def __init__(self, hidden: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.down_proj = Absent(hidden, bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(hidden_states[..., :0])


class _OwnConfig:
    """The model's config with some values of one layer's own; fused attention reads its head count there."""

    def __init__(self, shared: Any, **own: Any) -> None:
        self.__dict__.update(own, _shared=shared)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_shared":
            raise AttributeError(name)
        return getattr(self._shared, name)


def _slice(linear: nn.Module, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None = None) -> None:
    """Keep rows (outputs) and columns (inputs) of a linear layer, in place; add `bias` to what it has."""
    if not isinstance(linear, nn.Linear):
        raise Error(
            f"{type(linear).__name__}: only plain linear layers can be cut; merge adapters, undo quantisation first"
        )
    weight, old = linear.weight.data, linear.bias.data if linear.bias is not None else None
    if rows is not None:
        weight = weight[rows.to(weight.device)]
        old = None if old is None else old[rows.to(old.device)]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    if bias is not None:
        old = bias.to(weight, copy=True) if old is None else old + bias.to(old)
    trains = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=trains)
    linear.bias = None if old is None else nn.Parameter(old.contiguous(), requires_grad=trains)
    linear.out_features, linear.in_features = weight.shape


def _put(layer: LayerView, old: nn.Module | None, new: nn.Module) -> None:
    """Replace a sub-layer."""
    name = next(name for name, child in layer.module.named_children() if child is old)
    setattr(layer.module, name, new.train(layer.module.training))


def _left(linear: nn.Module, bias: Tensor | None) -> Tensor | None:
    """What a projection gives once all its inputs are cut: its own bias and the compensation."""
    weight: Any = linear.weight
    old: Any = linear.bias
    both = [b.detach().to(weight.device) for b in (old, bias) if b is not None]
    return sum(both[1:], both[0]).to(weight.dtype if old is None else old.dtype, copy=True) if both else None


def _drop_attention(layer: LayerView, bias: Tensor | None = None) -> None:
    hidden = layer.projection("o_proj").out_features
    place = getattr(layer.attention, "layer_idx", layer.index)
    _put(layer, layer.attention, NoAttention(hidden, layer.head_dim, place, bias))


def _drop_mlp(layer: LayerView, hidden: int, bias: Tensor | None = None) -> None:
    _put(layer, layer.mlp, NoMLP(hidden, bias))


def _cut_attention(layer: LayerView, cut: LayerCut) -> None:
    attention: Any = layer.attention
    groups = cut.groups
    if layer.groups == 0 or (groups is not None and groups.numel() == 0):
        _drop_attention(layer, _left(layer.projection("o_proj"), cut.attention_bias))
        return
    if groups is None:
        _slice(layer.projection("o_proj"), None, None, cut.attention_bias)
        return
    query = _channels(layer, groups)
    d, H, G = layer.head_dim, layer.heads, layer.groups
    key = (groups[:, None] * d + torch.arange(d, device=groups.device)).flatten()
    heads = groups.numel() * _heads_a_group(layer)
    fused = layer.fused_qkv
    if fused is not None:
        _slice(fused, torch.cat([query, H * d + key, (H + G) * d + key]), None)
        shared = getattr(attention.config, "_shared", attention.config)
        attention.config = _OwnConfig(shared, num_attention_heads=heads, num_key_value_heads=groups.numel())
    else:
        _slice(layer.projection("q_proj"), query, None)
        _slice(layer.projection("k_proj"), key, None)
        _slice(layer.projection("v_proj"), key, None)
    _slice(layer.projection("o_proj"), None, query, cut.attention_bias)
    # Query heads a group stay as they were; modelling files that keep the numbers read these.
    for name, value in (("num_heads", heads), ("num_key_value_heads", groups.numel())):
        if hasattr(attention, name):
            setattr(attention, name, value)


def _cut_mlp(layer: LayerView, cut: LayerCut) -> None:
    mlp: Any = layer.mlp
    down = layer.projection("down_proj")
    neurons = cut.neurons
    if layer.neurons == 0 or (neurons is not None and neurons.numel() == 0):
        _drop_mlp(layer, down.out_features, _left(down, cut.mlp_bias))
        return
    if neurons is not None:
        fused = layer.fused_gate_up
        if fused is not None:
            _slice(fused, torch.cat([neurons, layer.neurons + neurons]), None)
        else:
            for name in ("gate_proj", "up_proj"):
                if hasattr(mlp, name):
                    _slice(layer.projection(name), neurons, None)
    _slice(down, None, neurons, cut.mlp_bias)
    if neurons is not None and hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = neurons.numel()


def cut_(model: nn.Module, plan: Plan) -> nn.Module:
    """Cut a model in place by `plan`; see `cut`."""
    view = _checked(model, plan)
    kept = []
    for layer, part in zip(view.layers, plan.layers, strict=True):
        if part is None:
            continue
        kept.append(layer)
        if not part.attention and layer.attention is not None:
            _drop_attention(layer)
        elif part.groups is not None or part.attention_bias is not None:
            _cut_attention(layer, part)
        if not part.mlp and layer.mlp is not None:
            _drop_mlp(layer, int(view.config.hidden_size))
        elif part.neurons is not None or part.mlp_bias is not None:
            _cut_mlp(layer, part)
    if len(kept) < len(view):
        _renumber(view, kept)
    _describe(model)
    return model


def _renumber(view: View, kept: list[LayerView]) -> None:
    """Leave only these layers in the stack, and bring indices and per-layer lists of the config in line."""
    name = next(name for name, child in view.decoder.named_children() if child is view.stack)
    setattr(view.decoder, name, nn.ModuleList(layer.module for layer in kept).train(view.stack.training))
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        values = getattr(view.config, key, None)
        if isinstance(values, (list, tuple)) and len(values) == len(view):
            setattr(view.config, key, [values[layer.index] for layer in kept])
    view.config.num_hidden_layers = len(kept)
    for new, layer in enumerate(kept):
        for module in layer.module.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = new  # type: ignore[assignment]


def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """A really smaller copy of `model` by `plan`: an ordinary model with narrower matrices and fewer layers.

    Raises:
        Error: the plan does not fit the model, keeps no layer, or cuts what cannot be cut.
    """
    return cut_(copy.deepcopy(model), plan)


def prune(model: nn.Module, method: Method) -> nn.Module:
    """A really smaller copy of `model`, cut as a surgery method plans.

    Raises:
        Error: `method` is not a surgery method or still needs calibration.
    """
    if not isinstance(method, SurgeryMethod):
        raise Error(f"method = {method.name!r}: only surgery methods cut weights; attach this one instead")
    if not method.ready:
        raise Error(f"method = {method.name!r}: needs calibration first: method = method.fit(model, batches)")
    small = cut(model, method.plan(model))
    small.sparing_origin = {"method": method.name, "fields": method.fields()}  # type: ignore[assignment]
    return small


# --------------------------------------------------------------------------- save and load


def _shapes(view: View) -> list[dict[str, Any]]:
    """Per-layer shapes as they are."""

    def biased(parent: nn.Module | None) -> list[str]:
        children = parent.named_children() if parent is not None else ()
        return [name for name, child in children if getattr(child, "bias", None) is not None]

    return [
        {
            "num_attention_heads": layer.heads,
            "num_key_value_heads": layer.groups,
            "intermediate_size": layer.neurons,
            "attention_bias": biased(layer.attention),
            "mlp_bias": biased(layer.mlp),
        }
        for layer in view.layers
    ]


def _describe(model: nn.Module) -> None:
    """Bring the config in line with the weights: plain numbers where all layers agree, and our section always."""
    view = View(model)
    shapes = _shapes(view)
    config = view.config
    head_dim = {layer.head_dim for layer in view.layers}
    pairs = () if getattr(config, "is_heterogeneous", False) else _PLAIN
    for names in pairs:
        values = {tuple(shape[name] for name in names) for shape in shapes}
        if len(values) > 1 or len(head_dim) > 1 or 0 in next(iter(values)):
            continue
        same = dict(zip(names, next(iter(values)), strict=True))
        new = {k: v for k, v in same.items() if getattr(config, k, None) not in (None, v)}
        if "num_attention_heads" in new:
            new["head_dim"] = next(iter(head_dim))
        try:
            type(config).from_dict({**config.to_dict(), **new})
        except Exception:  # the class insists on, say, hidden a multiple of heads: the section alone says it
            continue
        for name, value in new.items():
            setattr(config, name, value)
    setattr(config, SECTION, {"version": _SECTION_VERSION, "layers": shapes})


def _per_layer_config(config: Any, shapes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Shapes that differ from the global ones, in transformers' own schema, as far as the config class takes it."""
    out: dict[str, dict[str, Any]] = {}
    if getattr(config, "is_heterogeneous", False):  # it says its own per-layer values there
        return out
    for index, entry in enumerate(shapes):
        own: dict[str, Any] = {}
        if entry["intermediate_size"] == 0 or entry["num_key_value_heads"] == 0:
            own["skip"] = [
                name
                for name, size in (("self_attn", entry["num_key_value_heads"]), ("mlp", entry["intermediate_size"]))
                if size == 0
            ]
        for name in ("intermediate_size", "num_key_value_heads"):
            if entry[name] and getattr(config, name, None) not in (None, entry[name]):
                own[name] = entry[name]
        if own:
            out[str(index)] = own
    if out:
        try:
            type(config).from_dict({**config.to_dict(), "per_layer_config": out})
        except Exception:  # this config class has no such schema
            return {}
    return out


def save_pretrained(
    model: nn.Module, folder: str | Path, processor: Any = None, card: Mapping[str, Any] | None = None
) -> Path:
    """Write a (cut) model as an ordinary checkpoint folder with a model card.

    `config.json` gets the per-layer shapes in a section `sparing`, and in transformers' `per_layer_config` schema where
    the config class takes it. Load with `sparing.from_pretrained`. A cut that is the same in every layer and has no
    compensation also loads in plain transformers, if its config class takes the numbers.

    Args:
        model: as `prune` gives it, or any other.
        folder: to write to; made if missing.
        processor: tokenizer or processor to save beside it.
        card: facts for the model card, e.g. {"method": "flap", "keep": 0.7, "data": "wikitext-2"}.
    """
    folder = Path(folder)
    if not isinstance(model, PreTrainedModel):
        raise Error(f"model = {type(model).__name__}: only a transformers model can be saved as a checkpoint")
    view = View(model)
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    section = getattr(view.config, SECTION, None)
    if section is not None:
        place = config if SECTION in config else config.get("text_config", config)
        per_layer = _per_layer_config(view.config, section["layers"])
        if per_layer:
            place["per_layer_config"] = per_layer
        place[SECTION] = {**section, "per_layer_config": bool(per_layer)}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    origin: Any = getattr(model, "sparing_origin", {})
    facts = {**origin, **(card or {})}
    if facts:
        (folder / "README.md").write_text(_model_card(model, facts, section))
    return folder


def _model_card(model: nn.Module, facts: Mapping[str, Any], section: dict[str, Any] | None) -> str:
    lines = ["---", "library_name: transformers", "tags: [sparing, pruned]", "---", "", "# A model cut by sparing", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += [f"- parameters: {sum(p.numel() for p in model.parameters()):,}", ""]
    if section is not None:
        lines += ["| layer | query heads | KV heads | neurons |", "|---|---|---|---|"]
        lines += [
            f"| {i} | {s['num_attention_heads']} | {s['num_key_value_heads']} | {s['intermediate_size']} |"
            for i, s in enumerate(section["layers"])
        ]
    lines += ["", "```python", "import sparing", "", 'model = sparing.from_pretrained("FOLDER")', "```", ""]
    return "\n".join(lines)


def is_cut(folder: str | Path) -> bool:
    """Whether a checkpoint folder holds a model cut by this library."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return False
    config = json.loads(file.read_text())
    return SECTION in config or SECTION in config.get("text_config", {})


def _reshape(model: nn.Module, shapes: list[dict[str, Any]]) -> None:
    """Give a freshly built (meta) model the shapes a checkpoint says; weights come after."""
    view = View(model)
    if len(shapes) != len(view):
        raise Error(f"config.json: section {SECTION!r} has {len(shapes)} layers, the config {len(view)}")
    for layer, entry in zip(view.layers, shapes, strict=True):
        groups, neurons = entry["num_key_value_heads"], entry["intermediate_size"]
        if groups != layer.groups:
            _cut_attention(layer, LayerCut(groups=torch.arange(groups)))
        if neurons != layer.neurons:
            _cut_mlp(layer, LayerCut(neurons=torch.arange(neurons)))
    device = next(model.parameters()).device
    for layer, entry in zip(View(model).layers, shapes, strict=True):
        for parent, names in ((layer.attention, entry["attention_bias"]), (layer.mlp, entry["mlp_bias"])):
            for name, child in parent.named_children() if parent is not None else ():
                linear: Any = child
                if name in names and linear.bias is None:
                    linear.bias = nn.Parameter(torch.empty(linear.out_features, device=device))
                elif name not in names and isinstance(child, (nn.Linear, Absent)):
                    child.bias = None


def from_pretrained(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load a checkpoint folder (or hub id), cut or plain, strictly: every tensor must be used and must fit.

    Args:
        folder: as written by `save_pretrained`, or any transformers checkpoint.
        options: handed to transformers' from_pretrained (dtype, device_map, …).

    Raises:
        Error: the folder is no checkpoint, or its tensors and its config disagree.
    """
    source = str(folder)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise Error(f"model = {source!r}: no checkpoint there (config.json is missing)")
    where = {k: options[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in options}
    try:
        config = AutoConfig.from_pretrained(source, **where)
    except Exception as error:
        raise Error(
            f"model = {source!r}: not a lab model, a checkpoint folder or a reachable hub id ({_first(error)})"
        ) from error
    kind = _class(config)
    section = getattr(config.get_text_config(), SECTION, None)
    try:
        loader = kind if section is None else _cut_class(kind, config, section)
        model, info = loader.from_pretrained(source, config=config, output_loading_info=True, **options)
    except Exception as error:
        raise Error(f"model = {source!r}: its tensors do not fit its config ({_first(error)})") from error
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            first = min(map(str, info[key]))
            raise Error(f"model = {source!r}: its tensors do not fit its config ({key.replace('_', ' ')}: {first})")
    return model


def _class(config: Any) -> Any:
    """The class a config names, or the one that transformers maps it to."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None:
        return named
    auto: Any = AutoModelForCausalLM
    if getattr(config, "vision_config", None) is not None:
        auto = AutoModelForImageTextToText
    return auto._model_mapping[type(config)]


def _cut_class(kind: Any, config: Any, section: dict[str, Any]) -> Any:
    """`kind`, built with the per-layer shapes of a cut checkpoint."""
    if section["version"] != _SECTION_VERSION:
        raise Error(f"config.json: section {SECTION!r} has version {section['version']}, known is {_SECTION_VERSION}")
    if section.get("per_layer_config"):  # modelling code would stumble over it; the layers are built here
        config.get_text_config().per_layer_config = None
    shapes = section["layers"]

    class Cut(kind):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            _reshape(self, shapes)
            self.__class__ = kind  # as which transformers knows how to rename a checkpoint's tensors

    Cut.__name__ = kind.__name__  # by which it finds the loss
    return Cut


def _first(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__

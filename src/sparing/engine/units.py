"""What a width method cuts by: statistics of channels over calibration data, units and what they cost."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparing.engine.surgery import LayerCut, Plan
from sparing.engine.view import LayerView, View, evaluating, heads_a_group
from sparing.grid.method import Error, Method, state_check
from sparing.grid.score import standardise

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

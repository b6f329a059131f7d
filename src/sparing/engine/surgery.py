"""Static cuts: really slice layers, KV groups with their query heads, and neurons out of a live model."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparing.engine.calls import cache_in, parameters, split
from sparing.engine.routing import EXPERT_COUNTS, check_kept, cut_experts, restricted
from sparing.engine.view import LayerView, View, evaluating, heads_a_group
from sparing.grid.method import Error, Method

SECTION = "sparing"  # of config.json
SECTION_VERSION = 1
_PLACES = ("layer_idx", "layer_id")  # under which modules keep their place in the KV cache
_PLAIN = (("num_attention_heads", "num_key_value_heads"), ("intermediate_size",))  # said together or not at all


@dataclass(frozen=True)
class LayerCut:
    """What stays of one layer.

    Attributes:
        groups: kept KV groups (with all their query heads), rising; None keeps all.
        neurons: kept MLP neurons, rising; None keeps all.
        experts: kept experts, rising; None keeps all.
        attention, mlp: False removes the sub-layer (its norm and residual add with it).
        attention_bias, mlp_bias: (D,) added to the output projection, the mean of what was cut away.
    """

    groups: Tensor | None = None
    neurons: Tensor | None = None
    experts: Tensor | None = None
    attention: bool = True
    mlp: bool = True
    attention_bias: Tensor | None = None
    mlp_bias: Tensor | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is cut."""
        return self.attention and self.mlp and self.groups is None and self.neurons is None and self.experts is None


@dataclass(frozen=True)
class Plan:
    """What stays of a model: one LayerCut a layer, None where the whole layer goes."""

    layers: tuple[LayerCut | None, ...]

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is cut."""
        return all(cut is not None and cut.keeps_all for cut in self.layers)


@dataclass(frozen=True)
class SurgeryMethod(Method):
    """A method that says once which heads, neurons and layers stay."""

    def plan(self, model: nn.Module) -> Plan:
        """Which parts of `model` stay, and what compensates the rest."""
        raise Error(f"{type(self).__name__} defines no plan")

    def portable(self) -> Self:
        """The same method cutting all layers alike, without biases: what plain transformers builds from a config."""
        changes = {"compensate": False} if "compensate" in self.fields() else {}
        return self.replace(**changes)


# --------------------------------------------------------------------------- masks on the live model


def _channels(layer: LayerView, groups: Tensor) -> Tensor:
    """Channels of o_proj that belong to kept KV groups: all query heads of each group."""
    per = heads_a_group(layer)
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
        names = tuple(parameters(module.forward))

        def nothing(m: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            first = _onto(names, torch.zeros_like(first), args, kwargs)
            return (first, *out[1:]) if isinstance(out, tuple) else first

        undo.append(module.register_forward_hook(nothing, with_kwargs=True).remove)

    def passed(module: nn.Module) -> None:
        def identity(m: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            hidden, _ = split(m.forward, args, kwargs)
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
            elif cut.experts is not None:
                around = restricted(layer, cut.experts)
                around.__enter__()
                undo.append(functools.partial(around.__exit__, None, None, None))
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
        for site in ("attention", "mlp") if cut is not None else ():
            if not getattr(cut, site) and getattr(layer, site) is None:
                what = type(layer.module).__name__
                raise Error(f"plan: the {site} of layer {layer.index} goes; none was found in {what}")
        if cut is not None and cut.attention and cut.groups is not None:
            _fits(layer, "groups", cut.groups, layer.groups)
            if 0 < cut.groups.numel() < layer.groups:
                _splits(layer, "attention")
        if cut is not None and cut.mlp and cut.experts is not None:
            check_kept(layer, cut.experts)
        if cut is not None and cut.mlp and cut.neurons is not None:
            _fits(layer, "neurons", cut.neurons, layer.neurons)
            if 0 < cut.neurons.numel() < layer.neurons:
                _splits(layer, "mlp")
        for site in () if cut is None else ("attention", "mlp"):
            stuck = None if getattr(cut, site) else irremovable(layer, site)
            if stuck is not None:
                raise Error(f"plan: {stuck}")
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


def undivided(layer: LayerView, site: str) -> str | None:
    """What keeps a layer's "attention" from falling apart into KV groups, or its "mlp" into neurons; None if it does.

    A norm over all heads together (OLMo 2) is no part of any head: with fewer of them it would norm the others by
    another number, which zeroed heads in the whole model do not show.
    """
    attention = site == "attention"
    parent, rows = (layer.attention, _attention_rows(layer)) if attention else (layer.mlp, _mlp_rows(layer))
    if parent is None or isinstance(parent, (NoAttention, NoMLP)):
        return None
    out = layer.projection("o_proj" if attention else "down_proj")
    for name, weight in parent.named_parameters():
        owner = name.split(".")[0]
        if getattr(parent, owner) is not out and rows.get(owner) != weight.shape[0]:
            return (
                f"layer {layer.index}: {type(parent).__name__}.{name} {tuple(weight.shape)} does not fall apart into "
                f"units; only layers whose {', '.join(rows)} have the usual shapes can be cut in part"
            )
    return None


def _splits(layer: LayerView, site: str) -> None:
    mixed = undivided(layer, site)
    if mixed is not None:
        raise Error(mixed)


def irremovable(layer: LayerView, site: str) -> str | None:
    """What keeps a layer's "attention" or "mlp" from being removed without the other; None if nothing does."""
    if (layer.attention if site == "attention" else layer.mlp) is not None:
        return None
    where = f"layer {layer.index} ({type(layer.module).__name__}): its {site} cannot be removed alone"
    return f"{where}: no module of its own was found"


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

    Args:
        names: of the arguments that the removed one took.
    """

    def __init__(
        self, hidden: int, head_dim: int, layer_idx: int, bias: Tensor | None = None, names: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.names = names
        self.head_dim = head_dim
        self.layer_idx = layer_idx
        self.k_proj = Absent(0)
        self.o_proj = Absent(hidden, bias)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        placed = {str(i): value for i, value in enumerate(args)}
        _, cache = cache_in({**placed, **kwargs})  # by value: modelling files name it differently
        if cache is not None:
            token_B1T1 = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(token_B1T1, token_B1T1, self.layer_idx)
        return _onto(self.names, self.o_proj(hidden_states[..., :0]), (hidden_states, *args), kwargs), None


class NoMLP(nn.Module):
    """In place of a removed MLP: adds nothing but, if all neurons were cut with compensation, their mean.

    Args:
        names: of the arguments that the removed one took.
        outputs: that it gave back; some blocks of experts hand on what their router said.
    """

    def __init__(self, hidden: int, bias: Tensor | None = None, names: tuple[str, ...] = (), outputs: int = 1) -> None:
        super().__init__()
        self.names, self.outputs = names, outputs
        self.down_proj = Absent(hidden, bias)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = _onto(self.names, self.down_proj(hidden_states[..., :0]), (hidden_states, *args), kwargs)
        return out if self.outputs == 1 else (out, *[None] * (self.outputs - 1))


def _onto(names: tuple[str, ...], out: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """`out` added to the residual, where a sub-layer is handed that and not its layer adds it (BLOOM, MPT)."""
    residual = {**dict(zip(names, args)), **kwargs}.get("residual")
    return out if residual is None else residual + out


def _outputs(layer: LayerView, hidden: int) -> int:
    """How many things a layer's MLP gives back, seen on one token of zeros; 1 of an MLP without weights."""
    mlp: Any = layer.mlp
    weight = next((p for p in mlp.parameters() if p.is_floating_point()), None)
    if isinstance(mlp, NoMLP) or weight is None or weight.is_meta:
        return getattr(mlp, "outputs", 1)
    zero_11D = torch.zeros(1, 1, hidden, dtype=weight.dtype, device=weight.device)
    extra = {name: zero_11D for name in ("residual",) if name in parameters(mlp.forward)}
    try:
        with torch.no_grad(), evaluating(mlp):
            out = mlp.forward(zero_11D, **extra)
    except Exception as problem:  # of a foreign module, whatever its kind
        raise Error(
            f"layer {layer.index}: {type(mlp).__name__} cannot be removed, as it does not run on hidden states alone "
            f"({type(problem).__name__}: {problem})"
        ) from problem
    return len(out) if isinstance(out, tuple) else 1


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


def drop_attention(layer: LayerView, hidden: int, bias: Tensor | None = None) -> None:
    """Put in place of a layer's attention what adds `bias` or nothing."""
    attention: Any = layer.attention
    place = getattr(attention, "layer_idx", layer.index)
    _put(layer, attention, NoAttention(hidden, layer.head_dim, place, bias, _names(attention)))


def drop_mlp(layer: LayerView, hidden: int, bias: Tensor | None = None, outputs: int | None = None) -> None:
    """Put in place of a layer's MLP or experts what adds `bias` or nothing.

    Args:
        outputs: things that the MLP gives back; None finds out.
    """
    count = _outputs(layer, hidden) if outputs is None else outputs
    _put(layer, layer.mlp, NoMLP(hidden, bias, _names(layer.mlp), count))


def _names(part: Any) -> tuple[str, ...]:
    return part.names if isinstance(part, (NoAttention, NoMLP)) else tuple(parameters(part.forward))


def cut_attention(layer: LayerView, cut: LayerCut) -> None:
    attention: Any = layer.attention
    groups = cut.groups
    if layer.groups == 0 or (groups is not None and groups.numel() == 0):
        out = layer.projection("o_proj")
        drop_attention(layer, out.out_features, _left(out, cut.attention_bias))
        return
    if groups is None:
        _slice(layer.projection("o_proj"), None, None, cut.attention_bias)
        return
    query = _channels(layer, groups)
    d, H, G = layer.head_dim, layer.heads, layer.groups
    key = (groups[:, None] * d + torch.arange(d, device=groups.device)).flatten()
    heads = groups.numel() * heads_a_group(layer)
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


def cut_mlp(layer: LayerView, cut: LayerCut) -> None:
    mlp: Any = layer.mlp
    down = layer.projection("down_proj")
    neurons = cut.neurons
    if layer.neurons == 0 or (neurons is not None and neurons.numel() == 0):
        drop_mlp(layer, down.out_features, _left(down, cut.mlp_bias))
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
            drop_attention(layer, int(view.config.hidden_size))
        elif part.groups is not None or part.attention_bias is not None:
            cut_attention(layer, part)
        if not part.mlp and layer.mlp is not None:
            drop_mlp(layer, int(view.config.hidden_size))
        elif part.experts is not None:
            cut_experts(layer, part.experts)
        elif part.neurons is not None or part.mlp_bias is not None:
            cut_mlp(layer, part)
    if len(kept) < len(view):
        _renumber(view, kept)
    _describe(model)
    return model


def _renumber(view: View, kept: list[LayerView]) -> None:
    """Leave only these layers in the stack, and bring indices and per-layer lists of the config in line."""
    name = next(name for name, child in view.decoder.named_children() if child is view.stack)
    setattr(view.decoder, name, nn.ModuleList(layer.module for layer in kept).train(view.stack.training))
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers"):
        values = getattr(view.config, key, None)
        if isinstance(values, (list, tuple)) and len(values) == len(view):
            setattr(view.config, key, [values[layer.index] for layer in kept])
    places = {layer.index: new for new, layer in enumerate(kept)}
    dense = getattr(view.config, "first_k_dense_replace", None)
    if dense:
        view.config.first_k_dense_replace = sum(layer.index < dense for layer in kept)
    for key in ("mlp_only_layers", "moe_layers"):
        named = getattr(view.config, key, None)
        if named:
            setattr(view.config, key, [places[index] for index in named if index in places])
    view.config.num_hidden_layers = len(kept)
    for new, layer in enumerate(kept):
        for module in layer.module.modules():
            for name in _PLACES:
                if hasattr(module, name):
                    setattr(module, name, new)


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
    small = copy.deepcopy(model)
    own = dict(small.named_parameters())
    for name, tensor in trained_weights(method).items():
        own[name].data = tensor.to(own[name].data, copy=True)
    cut_(small, method.plan(model))
    small.sparing_origin = {"method": method.name, "fields": method.fields()}  # type: ignore[assignment]
    return small


def trained_weights(method: Method) -> dict[str, Tensor]:
    """Parameters of the model that a method was fitted to have, by name; `weight.NAME` in its state."""
    return {k.removeprefix("weight."): v for k, v in method.state.items() if k.startswith("weight.")}


# --------------------------------------------------------------------------- what the config says


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
            **({"experts": layer.experts.count} if layer.experts is not None else {}),
            **({"attention": False} if isinstance(layer.attention, NoAttention) else {}),
            **({"mlp": False} if isinstance(layer.mlp, NoMLP) else {}),
            **({"mlp_outputs": layer.mlp.outputs} if isinstance(layer.mlp, NoMLP) and layer.mlp.outputs != 1 else {}),
            "attention_bias": biased(layer.attention),
            "mlp_bias": biased(layer.mlp),
        }
        for layer in view.layers
    ]


def _builds(model: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether the model's class makes of its config the heads (or neurons) that the model has."""
    with torch.device("meta"):
        built = View(type(model)(copy.deepcopy(model.config)))
    view = View(model)
    same = all(a.head_dim == b.head_dim for a, b in zip(built.layers, view.layers))
    found = [[shape[name] for name in names] for shape in _shapes(built)]
    return same and found == [[shape[name] for name in names] for shape in _shapes(view)]


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
        old = {name: getattr(config, name) for name in new if hasattr(config, name)}
        for name, value in new.items():
            setattr(config, name, value)
        if new and not _builds(model, names):  # the modelling file works out a head size of its own
            for name in new:
                if name in old:
                    setattr(config, name, old[name])
                else:
                    delattr(config, name)
    counts = {shape["experts"] for shape in shapes if "experts" in shape}
    for name in EXPERT_COUNTS if len(counts) == 1 else ():
        if getattr(config, name, None):
            setattr(config, name, next(iter(counts)))
    setattr(config, SECTION, {"version": SECTION_VERSION, "layers": shapes})

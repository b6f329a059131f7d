"""Static cuts: really slice layers, KV groups with their query heads, and MLP neurons; save and load the smaller model."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from sparing.engine.view import LayerView, View
from sparing.grid.method import Error, Method

SECTION = "sparing"  # of config.json
_SECTION_VERSION = 1


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
    """`count` rounded to the nearest multiple (half up), at least one multiple, at most `total`.

    Unaligned widths lose up to a third of the gain: kernels work in tiles.
    """
    return min(total, max(multiple, (count + multiple // 2) // multiple * multiple))


# --------------------------------------------------------------------------- calibration


@dataclass
class Moments:
    """Streaming mean and centred sum of squares of the channels a projection reads (Chan's update, float64)."""

    count: int = 0
    samples: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def add(self, x_NC: Tensor, samples: int) -> None:
        """Take in N rows that belong to `samples` samples."""
        x = x_NC.double()
        n, mean = x.shape[0], x.mean(0)
        squares = ((x - mean) ** 2).sum(0)
        if self.count == 0:
            self.count, self.mean, self.squares = n, mean, squares
        else:
            total = self.count + n
            gap = mean - self.mean
            self.squares = self.squares + squares + gap**2 * (self.count * n / total)
            self.mean = self.mean + gap * (n / total)
            self.count = total
        self.samples += samples

    @property
    def second(self) -> Tensor:
        """Sum of squares, sum_n x^2."""
        return self.squares + self.count * self.mean**2


def observe(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> tuple[list[Moments], list[Moments]]:
    """Moments of the inputs of every o_proj and down_proj over calibration batches, in one dense pass.

    Padding (attention_mask 0) is left out.

    Returns:
        attention (H*d channels a layer) and mlp (neurons a layer).
    """
    view = View(model)
    sites = {"o_proj": [Moments() for _ in view.layers], "down_proj": [Moments() for _ in view.layers]}
    now: dict[str, Any] = {}

    def hook(moments: Moments, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        keep = now["mask"]
        flat = x.reshape(-1, x.shape[-1]) if keep is None else x[keep.to(x.device)]
        moments.add(flat, x.shape[0])

    handles = []
    device = next(model.parameters()).device
    try:
        for layer in view.layers:
            for name, site in sites.items():
                handles.append(
                    layer.projection(name).register_forward_pre_hook(functools.partial(hook, site[layer.index]))
                )
        seen = 0
        with torch.inference_mode():
            for batch in batches:
                mask = batch.get("attention_mask")
                now["mask"] = mask.bool() if mask is not None and not bool(mask.all()) else None
                inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
                model(**inputs, use_cache=False)
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise Error("batches: the calibration data is empty")
    return sites["o_proj"], sites["down_proj"]


# --------------------------------------------------------------------------- masks on the live model


def _channels(layer: LayerView, groups: Tensor) -> Tensor:
    """Channels of o_proj that belong to kept KV groups: all query heads of each group."""
    per = layer.heads // layer.groups
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
        factor = None
        if keep is not None:
            weight: Any = module.weight
            factor = torch.zeros(weight.shape[1], dtype=weight.dtype, device=weight.device)
            factor[keep.to(weight.device)] = 1
        if factor is not None:
            undo.append(module.register_forward_pre_hook(lambda m, a: (a[0] * factor, *a[1:])).remove)
        if bias is not None:
            undo.append(module.register_forward_hook(lambda m, a, out: out + bias.to(out)).remove)

    def silent(module: nn.Module) -> None:
        # A removed sub-layer adds nothing; what it computes is thrown away after its norms.
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
            if layer.attention is not None:
                if not cut.attention:
                    silent(layer.attention)
                elif cut.groups is not None or cut.attention_bias is not None:
                    keep = None if cut.groups is None else _channels(layer, cut.groups)
                    channels(layer.projection("o_proj"), keep, cut.attention_bias)
            if layer.mlp is not None:
                if not cut.mlp:
                    silent(layer.mlp)
                elif cut.neurons is not None or cut.mlp_bias is not None:
                    channels(layer.projection("down_proj"), cut.neurons, cut.mlp_bias)
        yield
    finally:
        for step in reversed(undo):
            step()


def _checked(model: nn.Module, plan: Plan) -> View:
    view = View(model)
    if len(plan.layers) != len(view):
        raise Error(f"plan: {len(plan.layers)} layers for a model of {len(view)}")
    for layer, cut in zip(view.layers, plan.layers, strict=True):
        for name, keep, size in (
            ("groups", cut.groups if cut else None, layer.groups),
            ("neurons", cut.neurons if cut else None, layer.neurons),
        ):
            if keep is not None and keep.numel() and not (int(keep.min()) >= 0 and int(keep.max()) < size):
                raise Error(f"plan: layer {layer.index} keeps {name} up to {int(keep.max())}, it has 0..{size - 1}")
    return view


# --------------------------------------------------------------------------- real cuts


class NoAttention(nn.Module):
    """In place of a removed attention: adds nothing but, if all heads were cut with compensation, their mean."""

    def __init__(self, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        out = torch.zeros_like(hidden_states)
        return (out if self.bias is None else out + self.bias), None


class NoMLP(nn.Module):
    """In place of a removed MLP: adds nothing but, if all neurons were cut with compensation, their mean."""

    def __init__(self, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = torch.zeros_like(hidden_states)
        return out if self.bias is None else out + self.bias


def _slice(linear: nn.Module, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None = None) -> None:
    """Keep rows (outputs) and columns (inputs) of a linear layer, in place; add `bias` to what it has."""
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.data
    if rows is not None:
        weight = weight[rows.to(weight.device)]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    old = linear.bias.data if linear.bias is not None else None
    if old is not None and rows is not None:
        old = old[rows.to(old.device)]
    if bias is not None:
        old = bias.to(weight) if old is None else old + bias.to(weight)
    linear.bias = None if old is None else nn.Parameter(old.contiguous(), requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = weight.shape


def _cut_attention(layer: LayerView, cut: LayerCut) -> None:
    attention: Any = layer.attention
    groups = cut.groups
    if groups is not None and groups.numel() == 0:
        layer.module.self_attn = NoAttention(cut.attention_bias)
        return
    if groups is None:
        _slice(layer.projection("o_proj"), None, None, cut.attention_bias)
        return
    query = _channels(layer, groups)
    d, H, G = layer.head_dim, layer.heads, layer.groups
    key = (groups[:, None] * d + torch.arange(d, device=groups.device)).flatten()
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        if norm is not None and norm.weight.shape[-1] != d:
            raise Error(f"layer {layer.index}: {name} spans all heads; its heads cannot be cut one by one")
    fused = layer.fused_qkv
    if fused is not None:
        _slice(fused, torch.cat([query, H * d + key, (H + G) * d + key]), None)
    else:
        _slice(layer.projection("q_proj"), query, None)
        _slice(layer.projection("k_proj"), key, None)
        _slice(layer.projection("v_proj"), key, None)
    _slice(layer.projection("o_proj"), None, query, cut.attention_bias)
    # Query heads a group stay as they were; modelling files that keep the numbers read these.
    for name, value in (("num_heads", groups.numel() * (H // G)), ("num_key_value_heads", groups.numel())):
        if hasattr(attention, name):
            setattr(attention, name, value)


def _cut_mlp(layer: LayerView, cut: LayerCut) -> None:
    neurons = cut.neurons
    if neurons is not None and neurons.numel() == 0:
        layer.module.mlp = NoMLP(cut.mlp_bias)
        return
    if neurons is not None:
        fused = layer.fused_gate_up
        if fused is not None:
            _slice(fused, torch.cat([neurons, layer.neurons + neurons]), None)
        else:
            for name in ("gate_proj", "up_proj"):
                if hasattr(layer.mlp, name):
                    _slice(layer.projection(name), neurons, None)
    _slice(layer.projection("down_proj"), None, neurons, cut.mlp_bias)
    if neurons is not None and hasattr(layer.mlp, "intermediate_size"):
        layer.mlp.intermediate_size = neurons.numel()  # type: ignore[union-attr]


def cut_(model: nn.Module, plan: Plan) -> nn.Module:
    """Cut a model in place by `plan`; see `cut`."""
    view = _checked(model, plan)
    kept = []
    for layer, part in zip(view.layers, plan.layers, strict=True):
        if part is None:
            continue
        if layer.attention is not None and not isinstance(layer.attention, NoAttention):
            if not part.attention:
                layer.module.self_attn = NoAttention()
            else:
                _cut_attention(layer, part)
        if layer.mlp is not None and not isinstance(layer.mlp, NoMLP):
            if not part.mlp:
                layer.module.mlp = NoMLP()
            elif part.neurons is not None or part.mlp_bias is not None:
                _cut_mlp(layer, part)
        kept.append(layer)
    if not kept:
        raise Error("plan: no layer is left")
    if len(kept) < len(view):
        view.decoder.layers = nn.ModuleList(l.module for l in kept)
        kinds = getattr(view.config, "layer_types", None)
        if kinds:
            view.config.layer_types = [kinds[l.index] for l in kept]
        view.config.num_hidden_layers = len(kept)
        for new, layer in enumerate(kept):
            for module in (layer.module, layer.attention):
                if hasattr(module, "layer_idx"):
                    module.layer_idx = new  # type: ignore[union-attr,assignment]
    _describe(model)
    return model


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
    out = []
    for layer in view.layers:
        entry: dict[str, Any] = {
            "num_attention_heads": layer.heads if not isinstance(layer.attention, NoAttention) else 0,
            "num_key_value_heads": layer.groups if not isinstance(layer.attention, NoAttention) else 0,
            "intermediate_size": layer.neurons if not isinstance(layer.mlp, NoMLP) else 0,
        }
        entry["bias"] = [
            name
            for name in (
                "q_proj",
                "k_proj",
                "v_proj",
                "qkv_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "gate_up_proj",
                "down_proj",
            )
            for parent in (layer.attention, layer.mlp)
            if getattr(getattr(parent, name, None), "bias", None) is not None
        ]
        for name, module in (("attention", layer.attention), ("mlp", layer.mlp)):
            if isinstance(module, (NoAttention, NoMLP)) and module.bias is not None:
                entry["bias"].append(name)
        out.append(entry)
    return out


def _describe(model: nn.Module) -> None:
    """Bring the config in line with the weights: plain numbers where all layers agree, and our section always."""
    view = View(model)
    shapes = _shapes(view)
    config = view.config
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        values = {s[name] for s in shapes}
        if len(values) != 1 or 0 in values or not hasattr(config, name):
            continue
        trial = {**config.to_dict(), "head_dim": view.layers[0].head_dim, name: next(iter(values))}
        try:
            type(config).from_dict(trial)
        except Exception:  # the class insists on hidden = heads x head_dim: the section alone says it
            continue
        if getattr(config, "head_dim", None) is None and name == "num_attention_heads":
            config.head_dim = view.layers[0].head_dim
        setattr(config, name, next(iter(values)))
    setattr(config, SECTION, {"version": _SECTION_VERSION, "layers": shapes})


def _per_layer_config(config: Any, shapes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Shapes that differ from the global ones, in transformers' own schema, as far as the config class takes it."""
    out: dict[str, dict[str, Any]] = {}
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
    the config class takes it. Load with `sparing.from_pretrained`; a cut that is the same in every layer also loads in
    plain transformers.

    Args:
        processor: tokenizer or processor to save beside it.
        card: facts for the model card, e.g. {"method": "flap", "keep": 0.7, "data": "wikitext-2"}.
    """
    folder = Path(folder)
    view = View(model)
    whole: Any = model
    whole.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    section = getattr(view.config, SECTION, None)
    if section is not None:
        place = config if SECTION in config else config.get("text_config", config)
        place[SECTION] = section
        per_layer = _per_layer_config(view.config, section["layers"])
        if per_layer:
            place["per_layer_config"] = per_layer
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    facts = {**getattr(model, "sparing_origin", {}), **(card or {})}
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
        bias = set(entry["bias"])
        device = next(layer.module.parameters()).device
        hidden = layer.projection("o_proj").out_features
        groups = torch.arange(entry["num_key_value_heads"])
        neurons = torch.arange(entry["intermediate_size"])
        if entry["num_key_value_heads"] == 0:
            layer.module.self_attn = NoAttention(torch.empty(hidden, device=device) if "attention" in bias else None)
        elif entry["num_key_value_heads"] != layer.groups:
            _cut_attention(layer, LayerCut(groups=groups))
        if entry["intermediate_size"] == 0:
            layer.module.mlp = NoMLP(torch.empty(hidden, device=device) if "mlp" in bias else None)
        elif entry["intermediate_size"] != layer.neurons:
            _cut_mlp(layer, LayerCut(neurons=neurons))
        for name in bias - {"attention", "mlp"}:
            linear = getattr(layer.module.self_attn if name[0] in "qkvo" else layer.module.mlp, name)
            if linear.bias is None:
                linear.bias = nn.Parameter(torch.empty(linear.out_features, device=device))


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
    try:
        config = AutoConfig.from_pretrained(source)
    except Error:
        raise
    except Exception as error:
        raise Error(
            f"model = {source!r}: not a lab model, a checkpoint folder or a reachable hub id ({_first(error)})"
        ) from error
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    section = getattr(text, SECTION, None) or getattr(config, SECTION, None)
    name = (getattr(config, "architectures", None) or [""])[0]
    known = getattr(transformers, name, None)
    if known is None:
        known = _auto(config)
    if section is None:
        return known.from_pretrained(source, **options)
    text.per_layer_config = None  # the modelling code would stumble over it; the layers are built here
    shapes = section["layers"]

    class Cut(known):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            _reshape(self, shapes)

    Cut.__name__ = Cut.__qualname__ = known.__name__
    try:
        model, info = Cut.from_pretrained(source, config=config, output_loading_info=True, **options)
    except Error:
        raise
    except RuntimeError as error:
        raise Error(f"model = {source!r}: its tensors do not fit its config ({_first(error)})") from error
    wrong = {k: v for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if wrong:
        kind, keys = next(iter(wrong.items()))
        raise Error(f"model = {source!r}: its tensors do not fit its config ({kind}: {sorted(map(str, keys))[0]})")
    model.__class__ = known
    return model


def _auto(config: Any) -> Any:
    if getattr(config, "vision_config", None) is not None:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _first(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__

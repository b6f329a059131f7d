"""Save a (cut) model as an ordinary checkpoint folder, and load it strictly and without remote code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from sparing.engine.surgery import SECTION, SECTION_VERSION, Absent, LayerCut, cut_attention, cut_mlp
from sparing.engine.view import View
from sparing.grid.method import Error


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
            cut_attention(layer, LayerCut(groups=torch.arange(groups)))
        if neurons != layer.neurons:
            cut_mlp(layer, LayerCut(neurons=torch.arange(neurons)))
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
    if section["version"] != SECTION_VERSION:
        raise Error(f"config.json: section {SECTION!r} has version {section['version']}, known is {SECTION_VERSION}")
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

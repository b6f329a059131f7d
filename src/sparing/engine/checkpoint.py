"""Save a (cut) model as an ordinary checkpoint folder, and load it strictly and without remote code."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from sparing.engine.routing import cut_experts, first_kept
from sparing.engine.surgery import (
    SECTION,
    SECTION_VERSION,
    Absent,
    LayerCut,
    _shapes,
    cut_attention,
    cut_mlp,
    drop_attention,
    drop_mlp,
)
from sparing.engine.view import View
from sparing.grid import files, folders
from sparing.grid.files import Entry, short, sized
from sparing.grid.method import Error


def _per_layer_config(config: Any, shapes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Shapes that differ from the global ones, in transformers' own schema, as far as the config class takes it."""
    out: dict[str, dict[str, Any]] = {}
    if getattr(config, "is_heterogeneous", False):  # it says its own per-layer values there
        return out
    for index, entry in enumerate(shapes):
        own: dict[str, Any] = {}
        neurons = entry["intermediate_size"] or entry.get("experts", 0)
        if neurons == 0 or entry["num_key_value_heads"] == 0:
            own["skip"] = [
                name for name, size in (("self_attn", entry["num_key_value_heads"]), ("mlp", neurons)) if size == 0
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
    model: nn.Module,
    folder: str | Path,
    processor: Any = None,
    card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a (cut) model as an ordinary checkpoint folder with a model card, whole or not at all.

    `config.json` gets the per-layer shapes in a section `sparing`, and in transformers' `per_layer_config` schema where
    the config class takes it. Load with `sparing.from_pretrained`. A cut that is the same in every layer and has no
    compensation also loads in plain transformers, if its config class takes the numbers.

    Args:
        model: as `prune` gives it, or any other.
        folder: to write to; made if missing.
        processor: tokenizer or processor to save beside it.
        card: facts for the model card, e.g. {"method": "flap", "keep": 0.7, "data": "wikitext-2"}.
        overwrite: replace what the folder holds, all of it, once the new checkpoint is written.

    Raises:
        Error: the folder holds something, or cannot be written to; the model is none of transformers.
    """
    folder, where = Path(folder), f"folder = {str(folder)!r}"
    if not isinstance(model, PreTrainedModel):
        raise Error(f"model = {type(model).__name__}: only a transformers model can be saved as a checkpoint")
    if not overwrite:
        folders.refuse_content(folder, where, way="overwrite = True")
    with folders.whole(folder, where) as new:
        _write(model, new, processor, card or {})
    return folder


def _write(model: PreTrainedModel, folder: Path, processor: Any, card: Mapping[str, Any]) -> None:
    """The files of a checkpoint, into an empty folder."""
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
    facts = {**origin, **card}
    if facts:
        (folder / "README.md").write_text(_model_card(model, facts, section))


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
    config = files.read_json(file)
    text = config.get("text_config")
    return SECTION in config or (isinstance(text, dict) and SECTION in text)


# --------------------------------------------------------------------------- a folder from a stranger

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_FILES = {  # what makes transformers read other weights than those that are checked here
    "shard-*.safetensors": "a distributed checkpoint; gather it into model.safetensors first",
    "adapter_config.json": "an adapter; merge it into its model first",
}
_OTHER_KEYS = ("configuration_files", "transformers_weights")
_STACKED = re.compile(r"(layers?|blocks|depth)$")
_COUNTED = re.compile(r"^(num|n)_(\w+_)?(labels|experts|heads?|groups|positions|ctx|queries)$")
_MOST = 1 << 21  # labels, experts, heads, …: configs loop over them
_SLACK = 1 << 26  # numbers that a model may hold beyond those of its files: tied weights, tables of positions


def _stored(folder: Path) -> dict[str, Entry]:
    """The tensors of a checkpoint folder by name, from the headers of its safetensors; nothing is loaded."""
    for pattern, why in _OTHER_FILES.items():
        if any(folder.glob(pattern)):
            raise Error(f"{next(folder.glob(pattern)).name}: is part of {why}")
    if (folder / _WEIGHTS).exists():
        return _header(folder, _WEIGHTS)
    if not (folder / _INDEX).exists():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (*files.PICKLES, ".gguf", ".h5"))
        if not others:
            raise Error(f"{_WEIGHTS} is missing")
        raise Error(
            f"its weights are in {others[0]}, and only safetensors are read, because a pickle can run code; if you "
            "trust it, load it in transformers yourself and save it again with save_pretrained"
        )
    index = files.read_json(files.inside(folder, _INDEX))
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not isinstance(index.get("metadata"), dict):
        raise Error(f"{_INDEX}: weight_map and metadata must be objects")
    found: dict[str, Entry] = {}
    for name in sorted({str(shard) for shard in placed.values()}):
        if not name.endswith(".safetensors"):
            raise Error(f"{_INDEX}: {short(name)} is no .safetensors file")
        header = _header(folder, name)
        twice = header.keys() & found.keys()
        if twice:
            raise Error(f"{name}: {short(min(twice))} is in another file of {_INDEX} already")
        found |= header
    for name in sorted(placed.keys() ^ found.keys()):
        raise Error(f"{_INDEX}: {short(name)} is {'in no file' if name in placed else 'not listed'}")
    return found


def _header(folder: Path, name: str) -> dict[str, Entry]:
    file = files.inside(folder, name)
    try:
        return files.read_header(file)
    except Error as error:
        raise Error(f"its tensors do not fit its config ({str(error).removeprefix(f'{folder}/')})") from error


def _checked_config(folder: Path, tensors: int) -> None:
    """Refuses a config.json that would read, run or build more than the folder holds."""
    config = files.read_json(files.inside(folder, "config.json"))
    for key in _OTHER_KEYS:
        if key in config:
            raise Error(f"config.json: {key} = {short(config[key])}: names other files, which are not read")
    level: list[Any] = [config]
    while level:
        parts = [(str(k), v) for item in level if isinstance(item, dict) for k, v in item.items()]
        for key, value in parts:
            if "implementation" in key and "/" in str(value):
                raise Error(f"config.json: {key} = {short(value)}: names code to fetch, which is not run")
            most = tensors + 1024 if _STACKED.search(key) else _MOST if _COUNTED.search(key) else None
            if most is not None and isinstance(value, int) and value > most:
                raise Error(f"config.json: {key} = {short(value)}: at most {most:,} for files with {tensors:,} tensors")
        level = [v for _, v in parts] + [v for item in level if isinstance(item, list) for v in item]


@contextlib.contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Stops a model that is being built from growing beyond so many modules."""
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > modules:
            raise Error(f"the config asks for more than {modules:,} modules, far beyond the tensors in the files")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _agree(model: nn.Module, stored: Mapping[str, Entry], packed: bool) -> None:
    """Refuses tensors of other sizes than a model, still on the meta device, has; before memory is taken for it.

    Names that transformers renames while loading are compared by it; here their number counts.

    Args:
        packed: the files are quantised, so that they hold several numbers in one.
    """
    asked = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = 8 * sum(entry.bytes for entry in stored.values()) if packed else sum(e.numel for e in stored.values())
    for name, tensor in {} if packed else model.state_dict().items():
        if name in stored and stored[name].numel != tensor.numel():
            there, wanted = sized(stored[name].shape), sized(tuple(tensor.shape))
            raise Error(f"{name} is {there} in the files, {wanted} by the config")
    if asked > 2 * held + _SLACK:
        raise Error(f"the config asks for {asked:,} numbers, the files hold {held:,}")


def _checked_section(section: Any) -> list[dict[str, Any]]:
    """The per-layer shapes that a cut checkpoint says, once they are known to be shapes."""
    where = f"config.json: section {SECTION!r}"
    if not isinstance(section, dict) or not {"version", "layers"} <= section.keys():
        raise Error(f"{where}: must be an object with version and layers, is {short(section)}")
    if section["version"] != SECTION_VERSION:
        raise Error(f"{where} has version {short(section['version'])}, known is {SECTION_VERSION}")
    shapes = section["layers"]
    if not isinstance(shapes, list) or not shapes:
        raise Error(f"{where}: layers = {short(shapes)}: must be a list, one object a layer")
    counts = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    for index, entry in enumerate(shapes):
        if not isinstance(entry, dict):
            raise Error(f"{where}: layer {index} = {short(entry)}: must be an object")
        for key in (*counts, *(["experts"] if "experts" in entry else [])):
            if type(entry.get(key)) is not int or not 0 <= entry[key] < 1 << 40:
                raise Error(f"{where}: layer {index}: {key} = {short(entry.get(key))}: must be a whole number >= 0")
        outputs = entry.get("mlp_outputs", 1)
        if type(outputs) is not int or not 1 <= outputs <= 8:
            raise Error(f"{where}: layer {index}: mlp_outputs = {short(outputs)}: must be a whole number in 1..8")
        for key in ("attention", "mlp"):
            if not isinstance(entry.get(key, True), bool):
                raise Error(f"{where}: layer {index}: {key} = {short(entry[key])}: must be true or false")
        for key in ("attention_bias", "mlp_bias"):
            if not isinstance(entry.get(key), list) or not all(isinstance(name, str) for name in entry[key]):
                raise Error(f"{where}: layer {index}: {key} = {short(entry.get(key))}: must be a list of names")
    return shapes


def not_portable(model: nn.Module) -> str | None:
    """What keeps plain transformers (and vLLM) from loading a cut model: the first tensor that its class would build
    otherwise from the config; None if nothing does."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config)).state_dict()
    own = model.state_dict()
    for name in sorted(own.keys() | plain.keys()):
        here, there = (sized(tuple(d[name].shape)) if name in d else "missing" for d in (own, plain))
        if here != there:
            return f"{name} is {here}, transformers would build {there}"
    return None


# --------------------------------------------------------------------------- loading


def _reshape(model: nn.Module, shapes: list[dict[str, Any]]) -> None:
    """Give a freshly built (meta) model the shapes a checkpoint says; weights come after."""
    view = View(model)
    if len(shapes) != len(view):
        raise Error(f"config.json: section {SECTION!r} has {len(shapes)} layers, the config {len(view)}")
    for layer, entry in zip(view.layers, shapes, strict=True):
        experts = layer.experts.count if layer.experts is not None else 0
        for key, most in (
            ("num_key_value_heads", layer.groups),
            ("intermediate_size", layer.neurons),
            ("experts", experts),
        ):
            if entry.get(key, 0) > most:
                raise Error(
                    f"config.json: section {SECTION!r}: layer {layer.index}: {key} = {entry[key]}: "
                    f"the config has {most}"
                )
    for layer, entry in zip(view.layers, shapes, strict=True):
        groups, neurons = entry["num_key_value_heads"], entry["intermediate_size"]
        if not entry.get("attention", True) and layer.attention is not None:
            drop_attention(layer, int(view.config.hidden_size))
        elif groups != layer.groups:
            cut_attention(layer, LayerCut(groups=torch.arange(groups)))
        if not entry.get("mlp", True) and layer.mlp is not None:
            drop_mlp(layer, int(view.config.hidden_size), outputs=entry.get("mlp_outputs", 1))
        elif neurons != layer.neurons:
            cut_mlp(layer, LayerCut(neurons=torch.arange(neurons)))
        elif layer.experts is not None and entry.get("experts", layer.experts.count) != layer.experts.count:
            cut_experts(layer, first_kept(layer.experts, entry["experts"]))
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

    A folder is data: only safetensors and JSON are read, nothing outside it, sizes are compared before memory is
    taken, and nothing in it runs. A hub id goes through transformers' own loader, without remote code.

    Args:
        folder: as written by `save_pretrained`, or any transformers checkpoint.
        options: handed to transformers' from_pretrained (dtype, device_map, …).

    Raises:
        Error: the folder is no checkpoint, its tensors and its config disagree, or it would run code.
    """
    source = str(folder)
    if options.get("trust_remote_code"):
        raise Error("trust_remote_code = True: code that comes with a checkpoint is never run")
    options["trust_remote_code"] = False
    stored = _preflight(Path(source), options) if Path(source).is_dir() else None
    keys = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
    try:
        config = AutoConfig.from_pretrained(source, **{key: options[key] for key in keys if key in options})
        if stored is not None:  # the machine's choice, not the folder's: some of them fetch code
            config._attn_implementation = config._experts_implementation = None
        text = config.get_text_config()
    except Exception as error:
        if "custom code" in str(error):  # whose advice is to trust it
            raise Error(
                f"model = {source!r}: is of a kind that only code of its own can build, and code in a checkpoint is "
                "never run"
            ) from error
        what = "not a lab model, a checkpoint folder or a reachable hub id"
        if stored is not None:
            what = "its config.json cannot be used"
        raise Error(f"model = {source!r}: {what} ({_told(error)})") from error
    kind = _class(config, source)
    section = getattr(text, SECTION, None)
    try:
        loader = kind if section is None and stored is None else _checking_class(kind, config, section, stored)
        model, info = loader.from_pretrained(source, config=config, output_loading_info=True, **options)
    except Exception as error:
        what = "needs what is not installed" if isinstance(error, ImportError) else "its tensors do not fit its config"
        raise Error(f"model = {source!r}: {what} ({_told(error)})") from error
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            first = min(map(str, info[key]))
            raise Error(f"model = {source!r}: its tensors do not fit its config ({key.replace('_', ' ')}: {first})")
    if stored is not None:
        for name, weight in model.named_parameters():
            if not files.finite(weight):
                kind_of = str(weight.dtype).removeprefix("torch.")
                raise Error(
                    f"model = {source!r}: {name} ({sized(tuple(weight.shape))}) holds NaN or infinity as {kind_of}"
                )
    return model


def _preflight(folder: Path, options: dict[str, Any]) -> dict[str, Entry]:
    """The tensors of a local folder, once everything in it is known to be readable as data."""
    for key in ("subfolder", "variant", "gguf_file"):
        if options.get(key):
            raise Error(f"{key} = {options[key]!r}: name the folder that holds model.safetensors itself")
    if options.setdefault("use_safetensors", True) is not True:
        raise Error(f"use_safetensors = {options['use_safetensors']!r}: of a folder only safetensors are read")
    where = f"model = {str(folder)!r}"
    if not (folder / "config.json").exists():
        raise Error(f"{where}: no checkpoint there (config.json is missing)")
    try:
        files.no_way_out(folder)
        stored = _stored(folder)
        _checked_config(folder, len(stored))
    except (Error, OSError) as error:
        raise Error(f"{where}: {str(error).removeprefix(f'{folder}/')}") from error
    return stored


def _class(config: Any, source: str) -> Any:
    """The class a config names, or the one that transformers maps it to."""
    names = config.architectures if isinstance(config.architectures, list) else []
    named: Any = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    known = isinstance(named, type) and issubclass(named, PreTrainedModel) and named.config_class is not None
    if known and isinstance(config, named.config_class):
        return named
    auto: Any = AutoModelForCausalLM
    if getattr(config, "vision_config", None) is not None:
        auto = AutoModelForImageTextToText
    try:
        return auto._model_mapping[type(config)]
    except KeyError as error:
        raise Error(
            f"model = {source!r}: config.json: architectures = {short(config.architectures)}, model_type = "
            f"{short(config.model_type)}: transformers has no model of that kind that writes text"
        ) from error


def _checking_class(kind: Any, config: Any, section: Any, stored: Mapping[str, Entry] | None) -> Any:
    """`kind`, built with the per-layer shapes of a cut checkpoint and held against the tensors of its files."""
    shapes = None if section is None else _checked_section(section)
    if section is not None and section.get("per_layer_config"):
        config.get_text_config().per_layer_config = None  # modelling code would stumble over it; layers are built here
    packed = getattr(config, "quantization_config", None) is not None

    class Checking(kind):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            with contextlib.nullcontext() if stored is None else _at_most(16 * len(stored) + 10_000):
                super().__init__(config, *args, **kwargs)
            if shapes is not None:
                _reshape(self, shapes)
                _as_said(self, shapes)
            if stored is not None:
                _agree(self, stored, packed)
            self.__class__ = kind  # as which transformers knows how to rename a checkpoint's tensors

    Checking.__name__ = kind.__name__  # by which it finds the loss
    return Checking


def _as_said(model: nn.Module, shapes: list[dict[str, Any]]) -> None:
    """Refuses a section that says other shapes than the layers got from it."""
    for index, (said, found) in enumerate(zip(shapes, _shapes(View(model)), strict=True)):
        for key, value in found.items():
            if said.get(key, value) != value:
                where = f"config.json: section {SECTION!r}: layer {index}"
                raise Error(f"{where}: {key} = {short(said[key])}: the layer has {value}")


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__

"""What a method is: a frozen dataclass of hyper-parameters, its Card, and the registry that finds it by name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import math
import os
import pkgutil
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor


class Error(ValueError):
    """Any mistake a user can make; the message names the argument, its value and what is allowed."""


class BudgetError(Error):
    """The asked budget is out of the method's reach on this model."""


# --------------------------------------------------------------------------- card


@dataclass(frozen=True)
class Card:
    """Where a method comes from and what it needs.

    Attributes:
        title: the paper's title (for a control: what it does).
        year: of publication.
        arxiv: arXiv id, "" if there is none.
        axis: the room it lives in: "tokens", "depth", "width", …
        kind: "stream" (acts on tokens x layers while the model runs), "routing" (on tokens x experts) or
            "surgery" (cuts weights once).
        phase: when it acts: "prefill", "decode", "both" or "static".
        needs: "nothing", "calibration" or "training" before it can run.
        summary: one line for the table of methods.
        controls: kinds of control that can mirror its budget.
        trains: training is possible (published so) though the method also runs without.
        visual: works on visual tokens, so needs a vision-language model.
        saves: "flops", "memory" where as much is executed with fewer weights, or "nothing" for a control that spends
            everything.
        bitwise: at full budget the dense model's output comes out bit for bit.
        requires: parts of a model that it works on, of `sparing.engine.view.PARTS`: "mlp", "neurons", "scores".
        fits_budget: what is fitted holds for the one budget that it was fitted at, so each budget is fitted by itself.
        tunes: what is fitted also changes what the model says where nothing is left out (adapters, LoRA).
        is_control: this "method" is a yardstick, not a publication.
    """

    title: str
    year: int
    axis: str
    kind: str
    phase: str
    arxiv: str = ""
    needs: str = "nothing"
    summary: str = ""
    controls: tuple[str, ...] = ("random", "uniform")
    trains: bool = False
    visual: bool = False
    saves: str = "flops"
    bitwise: bool = True
    requires: tuple[str, ...] = ()
    fits_budget: bool = False
    tunes: bool = False
    is_control: bool = False


@dataclass(frozen=True)
class Shape:
    """Sizes that a budget is spread over, read off a model by `sparing.shape(model)`.

    Attributes:
        layers: decoder layers L.
        heads: query heads a layer.
        groups: key/value heads a layer.
        head_dim: channels a head.
        hidden: model width D.
        neurons: MLP width of the first layer (0 where experts replace it).
        visual: visual tokens of one image where that is fixed, else None.
        experts: experts of a layer, 0 without any; shared ones do not count.
        top_k: of them a token visits.
    """

    layers: int
    heads: int
    groups: int
    head_dim: int
    hidden: int
    neurons: int
    visual: int | None = None
    experts: int = 0
    top_k: int = 0


# --------------------------------------------------------------------------- fields


@dataclass(frozen=True)
class Rule:
    """What values a field takes: checked at construction, printed in errors, and a source of wrong values for tests."""

    allowed: str
    accepts: Callable[[Any], bool]
    wrong: tuple[Any, ...]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if _is_int(value):
        return abs(value) < 1 << 1000  # beyond, it is no float any more
    return isinstance(value, float) and math.isfinite(value)


def _field(default: Any, doc: str, source: str, rule: Rule) -> Any:
    return field(default=default, metadata={"doc": doc, "source": source, "rule": rule})


def _or_none(rule: Rule) -> Rule:
    return Rule(
        f"{rule.allowed} or none",
        lambda v: v is None or rule.accepts(v),
        tuple(w for w in rule.wrong if w is not None),
    )


def share(default: float | None, doc: str, *, source: str = "", zero: bool = True, optional: bool = False) -> Any:
    """A field in [0, 1] (in (0, 1] with zero=False)."""
    low = "[" if zero else "("
    rule = Rule(
        f"a number in {low}0, 1]",
        lambda v: _is_number(v) and (0 if zero else 1e-12) <= v <= 1,
        (1.5, -0.1, "half", math.nan),
    )
    return _field(default, doc, source, _or_none(rule) if optional else rule)


def integer(
    default: int | None, doc: str, *, low: int = 0, high: int | None = None, source: str = "", optional: bool = False
) -> Any:
    """A whole number in low..high."""
    allowed = f"a whole number >= {low}" + (f" and <= {high}" if high is not None else "")
    rule = Rule(
        allowed, lambda v: _is_int(v) and v >= low and (high is None or v <= high), (low - 1, low + 0.5, "many")
    )
    return _field(default, doc, source, _or_none(rule) if optional else rule)


def number(default: float | None, doc: str, *, low: float = -math.inf, source: str = "", optional: bool = False) -> Any:
    """A finite number >= low."""
    rule = Rule(
        f"a number >= {low:g}" if low > -math.inf else "a finite number",
        lambda v: _is_number(v) and v >= low,
        ("much", math.nan, *((low - 1,) if low > -math.inf else ())),
    )
    return _field(default, doc, source, _or_none(rule) if optional else rule)


def choice(default: str, options: tuple[str, ...], doc: str, *, source: str = "") -> Any:
    """One of a few names."""
    return _field(default, doc, source, Rule(" | ".join(options), lambda v: v in options, ("no-such-option", 7)))


def flag(default: bool, doc: str, *, source: str = "") -> Any:
    """True or False."""
    return _field(default, doc, source, Rule("true or false", lambda v: isinstance(v, bool), ("yes", 2)))


def numbers(
    default: tuple[float, ...] | None,
    doc: str,
    *,
    whole: bool = False,
    low: float = 0,
    high: float = math.inf,
    source: str = "",
    optional: bool = False,
) -> Any:
    """A tuple of numbers in low..high (written 1/2/3 on the command line)."""
    kind = "whole numbers" if whole else "numbers"
    upper = f" and <= {high:g}" if high < math.inf else ""
    ok = _is_int if whole else _is_number
    rule = Rule(
        f"{kind} >= {low:g}{upper}, e.g. 1/2/3",
        lambda v: isinstance(v, tuple) and all(ok(x) and low <= x <= high for x in v),
        ((low - 1,), "few", 3),
    )
    return _field(default, doc, source, _or_none(rule) if optional else rule)


# --------------------------------------------------------------------------- method


@dataclass(frozen=True)
class Method:
    """Base of every method: its fields are the paper's hyper-parameters and nothing else.

    What is learned or calibrated is `state`, a dict of named tensors apart from the fields; `fit` returns a copy that
    carries it. Instances never change, so validation at construction is enough.
    """

    name: ClassVar[str] = ""
    card: ClassVar[Card]

    def __init_subclass__(cls, **options: Any) -> None:
        """`fit` notes what model it saw, and `plan` refuses another one, without a method having to think of it."""
        super().__init_subclass__(**options)
        for verb, around in (("fit", _noting), ("plan", _refusing)):
            if verb in vars(cls):
                setattr(cls, verb, around(vars(cls)[verb]))

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, f.name, value)
            rule: Rule | None = f.metadata.get("rule")
            if rule is not None and not rule.accepts(value):
                said = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}…"
                raise Error(f"{self.name or type(self).__name__}: {f.name} = {said}: must be {rule.allowed}")
        self.check()

    def check(self) -> None:
        """Constraints between fields; raises Error. None by default."""

    # ---- hyper-parameters

    def fields(self) -> dict[str, Any]:
        """Hyper-parameters by name, as plain values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def replace(self, **changes: Any) -> Self:
        """The same method (and state) with some fields changed."""
        new = dataclasses.replace(self, **changes)
        return new.with_state(self.state, self.fitted_on) if self.state else new

    def at(self, keep: float, shape: Shape) -> Self:
        """The same method with its budget set so that `keep` of the cells of its axis run, on a model of this shape.

        Cells are visual-token-layers (tokens), layer executions a generated token (depth), block parameters (width).

        Raises:
            BudgetError: the method cannot spend as little, or as much.
        """
        raise BudgetError(f"{self.name} has no budget to set")

    def asks_all(self, shape: Shape) -> bool:
        """Whether the budget is the full one, so that leaving nothing out is what was asked for.

        A method without a budget is asked for nothing.
        """
        if type(self).at is Method.at:
            return True
        try:
            return self.at(1.0, shape) == self
        except Error:  # the full budget is out of its reach
            return False

    def control(self, kind: str, shape: Shape, seed: int = 0) -> Method:
        """The control that spends exactly what this method spends but chooses by `kind` ("random", "uniform", …)."""
        if kind not in self.card.controls:
            raise Error(f"control = {kind!r}: {self.name} has {', '.join(self.card.controls) or 'none'}")
        cls = get(f"{kind}-{self.card.axis}")
        values = self.mirrored(shape)
        if "seed" in {f.name for f in dataclasses.fields(cls)}:
            values["seed"] = seed
        new = cls(**values)
        return new.with_state(self.state, self.fitted_on) if self.state else new

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        """Fields of a control with this method's budget; what they are depends on the axis."""
        raise Error(f"{self.name} has no control")

    # ---- state

    @property
    def state(self) -> dict[str, Tensor]:
        """Learned or calibrated tensors by name; empty before `fit`."""
        return getattr(self, "_state", {})

    @property
    def fitted_on(self) -> dict[str, int]:
        """Sizes of the model that `fit` saw, see `sizes`; empty where that is not known."""
        return getattr(self, "_fitted_on", {})

    def with_state(self, state: Mapping[str, Tensor], fitted_on: Mapping[str, int] | None = None) -> Self:
        """A copy that carries these tensors, and the sizes of the model that they were fitted on."""
        new = dataclasses.replace(self)
        object.__setattr__(new, "_state", _State(self.name, state))
        object.__setattr__(new, "_fitted_on", dict(fitted_on or {}))
        return new

    def check_model(self, model: torch.nn.Module) -> None:
        """Refuses a model that lacks what the method works on, or that its state was not fitted on.

        Every engine calls it before the method acts, `fit` before it begins.

        Raises:
            Error: names the tensor or the size, what it is and what the model has.
        """
        _rooms()  # with which the engines come that know what to check
        for check in _MODEL_CHECKS:
            check(self, model)
        if not self.state:
            return
        for check in _CHECKS:
            check(self, model)
        here = sizes(model)
        for key, was in self.fitted_on.items():
            if here.get(key, was) != was:
                raise Error(
                    f"method = {self.name!r}: was fitted on another model: that had {key} = {was}, "
                    f"{type(model).__name__} has {here[key]}"
                )

    @property
    def ready(self) -> bool:
        """Whether everything the Card says it needs is there."""
        return self.card.needs == "nothing" or bool(self.state)

    @property
    def horizon(self) -> int:
        """Generated tokens that a measurement of decoding must span to be fair to it; 0 where all steps are alike."""
        return 0

    @property
    def remark(self) -> str:
        """What a reader of results must know of these settings, in a few words; empty where there is nothing to say."""
        return ""

    @property
    def draws(self) -> int | None:
        """How many `random` controls that differ there are; None as many as there are seeds."""
        return None

    def fit(self, model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> Self:
        """Calibrate or train; only for methods whose Card says so.

        Args:
            model: the model the method will run on.
            batches: keyword arguments of the model's forward, one dict a batch; a single dict is one batch.
        """
        raise Error(f"{self.name} needs {self.card.needs}: there is nothing to fit")

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write `method.json` and, if there is state, `state.safetensors`: both whole, or nothing.

        Args:
            folder: made if missing. A fitted method that it holds is replaced.
            overwrite: replace whatever else it holds, all of it.

        Raises:
            Error: the folder holds something else, or cannot be written to.
        """
        from sparing.grid import folders  # which needs Error

        folder, where = Path(folder), f"folder = {str(folder)!r}"
        if not overwrite:
            folders.refuse_content(folder, where, but=_FILES.__contains__, way="overwrite = True")
        data = {
            "method": self.name,
            "fields": self.fields(),
            "model": self.fitted_on,
            "state": {name: _described(tensor) for name, tensor in self.state.items()},
        }
        with folders.whole(folder, where) as new:
            if self.state:
                save_file({k: v.contiguous() for k, v in self.state.items()}, new / _STATE)
            (new / _METHOD).write_text(json.dumps(data, indent=2) + "\n")
        return folder


_METHOD, _STATE = "method.json", "state.safetensors"
_FILES = (_METHOD, _STATE, "method.new", "state.new")  # the last two were left by a kill, of older versions


# --------------------------------------------------------------------------- the model that a state belongs to


class _State(dict[str, Tensor]):
    """The tensors of a method; one that is missing is named."""

    def __init__(self, method: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self._method = method

    def __missing__(self, name: str) -> Tensor:
        raise Error(f"method = {self._method!r}: was fitted on another model: its state has no {name}")


_SIZES = {  # words for what transformers' configs say
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "KV groups": ("num_key_value_heads",),
    "channels a head": ("head_dim",),
    "hidden": ("hidden_size",),
    "neurons": ("intermediate_size",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
}


def sizes(model: torch.nn.Module) -> dict[str, int]:
    """What the config of a model says of its decoder, as far as it says it; what a fitted method is held against."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    said = {what: [getattr(config, name, None) for name in names] for what, names in _SIZES.items()}
    found = {what: next((v for v in values if _is_int(v)), None) for what, values in said.items()}
    return {what: value for what, value in found.items() if value is not None}


StateCheck = Callable[[Method, torch.nn.Module], None]
_CHECKS: list[StateCheck] = []
_MODEL_CHECKS: list[StateCheck] = []


def model_check(check: StateCheck) -> StateCheck:
    """Decorator: what an engine knows of the models a method can work on; raises Error on another one."""
    _MODEL_CHECKS.append(check)
    return check


def state_check(check: StateCheck) -> StateCheck:
    """Decorator: what an engine knows of a kind of state; raises Error where the state does not fit the model."""
    _CHECKS.append(check)
    return check


def _noting(fit: Callable[..., Method]) -> Callable[..., Method]:
    @functools.wraps(fit)
    def noting(self: Method, model: torch.nn.Module, batches: Any, *args: Any, **options: Any) -> Method:
        _rooms()
        for check in _MODEL_CHECKS:
            check(self, model)
        fitted = fit(self, model, _as_batches(batches), *args, **options)
        return fitted.with_state(fitted.state, sizes(model))

    return noting


def _as_batches(given: Any) -> Any:
    """What `fit` reads: one batch is a list of it; a name is none."""
    if isinstance(given, (str, bytes, os.PathLike)):
        raise Error(
            f"batches = {str(given)!r}: must be batches, each a dict of what the model's forward takes; of a text "
            'they are made by sparing.bench.tasks.parse("ppl:FILE", loaded).batches(32), or by sparing fit --data FILE'
        )
    one = isinstance(given, Mapping) and any(isinstance(value, Tensor) for value in given.values())
    return [given] if one else given


def _refusing(plan: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plan)
    def refusing(self: Method, model: torch.nn.Module, *args: Any, **options: Any) -> Any:
        self.check_model(model)
        return plan(self, model, *args, **options)

    return refusing


def _described(tensor: Tensor) -> str:
    """Number type and shape, e.g. `float32 4x8`."""
    return " ".join([str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape))]).strip()


# --------------------------------------------------------------------------- registry


M = TypeVar("M", bound=type[Method])
_REGISTRY: dict[str, type[Method]] = {}
ROOMS = ("depth", "experts", "tokens", "width")  #: packages of `sparing` that hold methods


def _rooms() -> None:
    """The rooms are imported, so that their methods are registered: when first asked for, as that takes seconds.

    Nothing here remembers that it was done: of modules that are there already, or on the way in this thread, `import`
    knows, and another thread waits for it.
    """
    for room in ROOMS:
        importlib.import_module(f"sparing.{room}")


def register(name: str, card: Card) -> Callable[[M], M]:
    """Class decorator: give a method its public name and Card, and make it findable."""

    def add(cls: M) -> M:
        if not cls.__module__.startswith("sparing."):
            _rooms()  # a name that is taken is refused here, not when it is looked up
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise Error(f"name = {name!r}: already registered by {_REGISTRY[name].__module__}")
        cls.name = name
        cls.card = card
        _REGISTRY[name] = cls
        return cls

    return add


def discover(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that its methods register; a new method needs no other line."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def methods(axis: str | None = None, controls: bool = True) -> dict[str, type[Method]]:
    """Registered methods by name, sorted by axis and name; `controls=False` leaves the yardsticks out."""
    _rooms()
    found = {
        n: c for n, c in _REGISTRY.items() if (axis in (None, c.card.axis)) and (controls or not c.card.is_control)
    }
    if axis is not None and not found:
        raise Error(f"axis = {axis!r}: must be one of {', '.join(sorted({c.card.axis for c in _REGISTRY.values()}))}")
    return dict(sorted(found.items(), key=lambda kv: (kv[1].card.axis, kv[1].card.is_control, kv[0])))


def get(name: str) -> type[Method]:
    """The method class of that name; an unknown name is refused with the nearest ones."""
    _rooms()
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name[:80], _REGISTRY, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "`sparing methods` lists them"
        said = repr(name) if len(name) <= 80 else f"{name[:77]!r}…"
        raise Error(f"method = {said}: there is no method of that name; {hint}")
    return _REGISTRY[name]


def load_fits(folder: str | Path) -> dict[float, Method]:
    """The methods of a folder that `sparing fit --keep` filled, by the budget they were fitted at; {} if it is none."""
    folder, found = Path(folder).expanduser(), {}
    if (folder / "method.json").is_file():  # one fit for all budgets
        return {}
    for each in sorted(folder.glob("keep-*")):
        try:
            keep = float(each.name.removeprefix("keep-"))
        except ValueError:
            continue
        if (each / "method.json").is_file():
            found[keep] = load(each)
    return found


def _read(text: str, default: Any, annotation: str) -> Any:
    """One field's value from the command line."""
    low = text.strip().lower()
    if low in ("none", "auto"):
        return None
    if "tuple" in annotation:
        parts = [p for p in text.replace("|", "/").split("/") if p]
        return tuple(_read(p, None, annotation.replace("tuple", "")) for p in parts)
    if low in ("true", "false"):
        return low == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse(spec: str) -> Method:
    """A method from `name` or `name:field=value,field=value`.

    >>> import sparing
    >>> sparing.parse("fastv:K=3,R=0.75").K
    3
    """
    name, _, rest = spec.partition(":")
    cls = get(name.strip())
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, eq, text = item.partition("=")
        key = key.strip()
        if not eq or key not in known:
            raise Error(
                f"method = {spec!r}: {name} has no field {key!r}; its fields are {', '.join(known) or 'none'} "
                "(written name:field=value,field=value)"
            )
        values[key] = _read(text, known[key].default, str(hints[key]))
    return cls(**values)


def load(folder: str | Path) -> Method:
    """A method saved by `Method.save`, with its state. The folder is data: nothing in it runs, see docs/security.md.

    Raises:
        Error: no method there, or one that is damaged; names file, field or tensor, what was found and expected.
    """
    from sparing.grid import files  # which needs Error

    folder = Path(folder)
    if not (folder / "method.json").exists():
        raise Error(f"folder = {str(folder)!r}: no fitted method there (method.json is missing)")
    file = files.inside(folder, "method.json")
    try:
        data = files.read_json(file)
    except Error as problem:
        raise Error(f"not a method file: {problem}") from problem
    for key in ("method", "fields"):
        if key not in data:
            raise Error(f"{file}: not a method file: {key} is missing")
    kinds = {"method": str, "fields": dict, "model": dict, "state": dict}
    for key, value in data.items():
        if key not in kinds:
            raise Error(f"{file}: not a method file: holds {files.short(key)}, known are {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise Error(f"{file}: not a method file: {key} = {files.short(value)}: must be {_JSON[kinds[key]]}")
    try:
        cls = get(data["method"])
    except Error as problem:
        raise Error(f"{file}: {problem}") from problem
    unknown = sorted(set(data["fields"]) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise Error(f"{file}: {cls.name} has no field {', '.join(map(files.short, unknown[:3]))}")
    for key, value in data.get("model", {}).items():
        if key not in _SIZES or not _is_int(value):
            raise Error(
                f"{file}: model: {files.short(key)} = {files.short(value)}: must be a whole number of "
                f"{', '.join(_SIZES)}"
            )
    try:
        method = cls(**data["fields"])
    except Error as problem:
        raise Error(f"{file}: {problem}") from problem
    listed = data.get("state")  # not there in folders of older versions
    if not os.path.lexists(folder / "state.safetensors") and not listed:
        return method
    tensors = files.read_tensors(files.inside(folder, "state.safetensors"))
    if listed is not None:
        _as_listed(folder / "state.safetensors", tensors, listed)
    return method.with_state(tensors, data.get("model"))


_JSON = {str: "a string", dict: "an object"}


def _as_listed(file: Path, tensors: Mapping[str, Tensor], listed: Mapping[str, Any]) -> None:
    """Refuses a state that is not the one its method.json was written with."""
    for name in sorted({*tensors, *listed}):
        here = _described(tensors[name]) if name in tensors else "missing"
        said = listed.get(name, "no such tensor")
        if here != said:
            raise Error(f"{file}: {name!r} is {here}, method.json says {said!s:.80}")

"""What a method is: a frozen dataclass of hyper-parameters, its Card, and the registry that finds it by name."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors.torch import load_file, save_file
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
        kind: "stream" (acts on tokens x layers while the model runs) or "surgery" (cuts weights once).
        phase: when it acts: "prefill", "decode", "both" or "static".
        needs: "nothing", "calibration" or "training" before it can run.
        summary: one line for the table of methods.
        controls: kinds of control that can mirror its budget.
        trains: training is possible (published so) though the method also runs without.
        visual: works on visual tokens, so needs a vision-language model.
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
    """

    layers: int
    heads: int
    groups: int
    head_dim: int
    hidden: int
    neurons: int
    visual: int | None = None


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
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


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

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, f.name, value)
            rule: Rule | None = f.metadata.get("rule")
            if rule is not None and not rule.accepts(value):
                raise Error(f"{self.name or type(self).__name__}: {f.name} = {value!r}: must be {rule.allowed}")
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
        return new.with_state(self.state) if self.state else new

    def at(self, keep: float, shape: Shape) -> Self:
        """The same method with its budget set so that `keep` of the cells of its axis run, on a model of this shape.

        Cells are visual-token-layers (tokens), layer executions a generated token (depth), block parameters (width).

        Raises:
            BudgetError: the method cannot spend as little, or as much.
        """
        raise BudgetError(f"{self.name} has no budget to set")

    def control(self, kind: str, shape: Shape, seed: int = 0) -> Method:
        """The control that spends exactly what this method spends but chooses by `kind` ("random", "uniform", …)."""
        if kind not in self.card.controls:
            raise Error(f"control = {kind!r}: {self.name} has {', '.join(self.card.controls) or 'none'}")
        cls = get(f"{kind}-{self.card.axis}")
        values = self.mirrored(shape)
        if "seed" in {f.name for f in dataclasses.fields(cls)}:
            values["seed"] = seed
        new = cls(**values)
        return new.with_state(self.state) if self.state else new

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        """Fields of a control with this method's budget; what they are depends on the axis."""
        raise Error(f"{self.name} has no control")

    # ---- state

    @property
    def state(self) -> dict[str, Tensor]:
        """Learned or calibrated tensors by name; empty before `fit`."""
        return getattr(self, "_state", {})

    def with_state(self, state: Mapping[str, Tensor]) -> Self:
        """A copy that carries these tensors."""
        new = dataclasses.replace(self)
        object.__setattr__(new, "_state", dict(state))
        return new

    @property
    def ready(self) -> bool:
        """Whether everything the Card says it needs is there."""
        return self.card.needs == "nothing" or bool(self.state)

    def fit(self, model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> Self:
        """Calibrate or train; only for methods whose Card says so.

        Args:
            model: the model the method will run on.
            batches: keyword arguments of the model's forward, one dict a batch.
        """
        raise Error(f"{self.name} needs {self.card.needs}: there is nothing to fit")

    def save(self, folder: str | Path) -> Path:
        """Write `method.json` and, if there is state, `state.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"method": self.name, "fields": self.fields()}, indent=2)
        (folder / "method.json").write_text(text + "\n")
        if self.state:
            save_file({k: v.contiguous() for k, v in self.state.items()}, folder / "state.safetensors")
        return folder


M = TypeVar("M", bound=type[Method])
_REGISTRY: dict[str, type[Method]] = {}


def register(name: str, card: Card) -> Callable[[M], M]:
    """Class decorator: give a method its public name and Card, and make it findable."""

    def add(cls: M) -> M:
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise Error(f"name = {name!r}: already registered by {_REGISTRY[name].__module__}")
        cls.name = name
        cls.card = card
        _REGISTRY[name] = cls
        return cls

    return add


def methods(axis: str | None = None, controls: bool = True) -> dict[str, type[Method]]:
    """Registered methods by name, sorted by axis and name; `controls=False` leaves the yardsticks out."""
    found = {
        n: c for n, c in _REGISTRY.items() if (axis in (None, c.card.axis)) and (controls or not c.card.is_control)
    }
    if axis is not None and not found:
        raise Error(f"axis = {axis!r}: must be one of {', '.join(sorted({c.card.axis for c in _REGISTRY.values()}))}")
    return dict(sorted(found.items(), key=lambda kv: (kv[1].card.axis, kv[1].card.is_control, kv[0])))


def get(name: str) -> type[Method]:
    """The method class of that name; an unknown name is refused with the nearest ones."""
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "`sparing methods` lists them"
        raise Error(f"method = {name!r}: there is no method of that name; {hint}")
    return _REGISTRY[name]


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
    """A method saved by `Method.save`, with its state."""
    folder = Path(folder)
    file = folder / "method.json"
    if not file.is_file():
        raise Error(f"folder = {str(folder)!r}: no fitted method there (method.json is missing)")
    try:
        data = json.loads(file.read_text())
        name, values = data["method"], data["fields"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise Error(f"{file}: not a method file: {error}") from error
    cls = get(name)
    unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise Error(f"{file}: {name} has no field {', '.join(sorted(unknown))}")
    method = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    tensors = folder / "state.safetensors"
    if tensors.is_file():
        try:
            method = method.with_state(load_file(tensors))
        except Exception as error:
            raise Error(f"{tensors}: cannot be read: {error}") from error
    return method

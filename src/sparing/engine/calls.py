"""What transformers hands to its modules, found by structure and by value: names move between its versions."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from sparing.grid.method import Error


@dataclass(frozen=True)
class _Signature:
    parameters: dict[str, inspect.Parameter]
    positional: tuple[str, ...]
    cache: str | None


_SIGNATURES: weakref.WeakKeyDictionary[Any, _Signature] = weakref.WeakKeyDictionary()


def _signature(function: Callable[..., Any]) -> _Signature:
    """Kept by the function behind methods and wrappers: read once a class, and no module is kept alive."""
    plain = inspect.unwrap(function)
    plain = getattr(plain, "__func__", plain)
    found = _SIGNATURES.get(plain)
    if found is None:
        known = dict(inspect.signature(function).parameters)
        positional = tuple(n for n, p in known.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        cache = next((n for n, p in known.items() if re.search(r"\bCache\b", str(p.annotation))), None)
        found = _SIGNATURES[plain] = _Signature(known, positional, cache)
    return found


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a module's `forward` by name, `self` not among them."""
    return _signature(function).parameters


def named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, positional ones first.

    Raises:
        Error: more positional arguments than the function names.
    """
    names = _signature(function).positional
    if len(args) > len(names):
        raise Error(f"{function!r}: got {len(args)} positional arguments, takes {', '.join(names)}")
    return {**dict(zip(names, args)), **kwargs}


def split(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The first argument of a call, for layers and their parts the hidden states, and the others by name."""
    given = named(function, args, kwargs)
    return given.pop(next(iter(parameters(function)))), given


def mask_parameter(function: Callable[..., Any]) -> str:
    """The parameter that takes the attention mask.

    Raises:
        Error: no parameter has "mask" in its name.
    """
    found = next((name for name in parameters(function) if "mask" in name), None)
    if found is None:
        raise Error(f"{getattr(function, '__qualname__', function)}: no parameter takes an attention mask")
    return found


def cache_parameter(function: Callable[..., Any]) -> str | None:
    """The parameter that takes the KV cache, by its annotation; None where no parameter says so."""
    return _signature(function).cache


def needed_cache_parameter(function: Callable[..., Any]) -> str:
    """The same, where there has to be one.

    Raises:
        Error: no parameter is annotated as a Cache.
    """
    name = cache_parameter(function)
    if name is None:
        said = getattr(function, "__qualname__", function)
        raise Error(f"{said}: no parameter takes a KV cache (looked for one annotated Cache)")
    return name


def cache_in(values: Mapping[str, Any]) -> tuple[str | None, Cache | None]:
    """Name and object of the KV cache among arguments or outputs; (None, None) without one."""
    for name, value in values.items():
        if isinstance(value, Cache):
            return name, value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value
    return None, None


def with_cache(module: nn.Module, cache: Cache | None) -> dict[str, Cache | None]:
    """Keyword argument that hands a KV cache to a model.

    Raises:
        Error: no parameter of its forward is annotated as a Cache.
    """
    return {needed_cache_parameter(module.forward): cache}


# --------------------------------------------------------------------------- arguments of a layer


def is_rotary(value: Any) -> bool:
    """Whether a value is positions as a layer turns by them: (cos, sin), or one complex tensor, a row a column."""
    if isinstance(value, Tensor):
        return value.is_complex()
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 3 for x in value)
        and value[0].shape == value[1].shape
    )


def rotary_in(arguments: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Name and value of the rotary positions among a layer's arguments; (None, None) without any."""
    return next(((name, value) for name, value in arguments.items() if is_rotary(value)), (None, None))


def mask_in(arguments: Mapping[str, Any]) -> str | None:
    """Name of the attention mask among a layer's arguments: what is called one, else a four-dimensional tensor."""
    called = next((name for name in arguments if "mask" in name), None)
    if called is not None:
        return called
    return next((n for n, x in arguments.items() if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] > 1), None)


@dataclass(frozen=True)
class Cut:
    """Cuts what a layer is handed down to the rows that run it, by shape; what cannot be cut is refused by its name.

    Attributes:
        columns: (B, N) columns of the pass that run.
        keys: (B, K) columns of the sequence that the rows attend to, None where they are all there in order.
        past, width: of the pass.
    """

    columns: Tensor
    keys: Tensor | None
    past: int
    width: int

    def __call__(self, name: str, value: Any) -> Any:
        """The argument `name` for these rows."""
        if is_rotary(value) and isinstance(value, (tuple, list)):
            return type(value)(self._rows(name, each) for each in value)
        if isinstance(value, (tuple, list)):
            return type(value)(self(name, each) for each in value)
        if isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values()):
            return {key: self(f"{name}[{key!r}]", each) for key, each in value.items()}
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        total = self.past + self.width
        if value.is_floating_point() and value.ndim == 4 and value.shape[2:] == (1, total):  # (B, heads, 1, K)
            return self._bias(name, value.flatten(0, 1)).view(*value.shape[:2], 1, -1)
        if value.is_floating_point() and value.ndim == 3 and value.shape[1] == 1:
            wider = value.shape[2] > total and value.shape[0] not in (1, len(self.columns))
            return self._bias(name, value) if wider or value.shape[2] == total else self._rows(name, value)
        return self._rows(name, value)

    def _rows(self, name: str, value: Tensor) -> Tensor:
        if self.width == 1:
            return value
        B, T = len(self.columns), self.width
        rows = torch.arange(B, device=value.device)[:, None]
        if value.ndim in (2, 3, 4) and value.shape[1] == T and value.shape[0] in (1, B):
            return value[rows if len(value) == B else 0, self.columns]
        if value.ndim in (3, 4) and value.shape[2] == T and value.shape[1] in (1, B):  # one for each axis of a picture
            return value[:, rows if value.shape[1] == B else 0, self.columns]
        if value.ndim == 1 and len(value) == T:
            return value[self._alike(name, self.columns)]
        if T in value.shape or self.past + T in value.shape:
            raise Error(
                f"{name}: the layer is handed a tensor of shape {tuple(value.shape)} for {T} columns, which cannot be "
                "cut to the rows that run; this model is not supported where rows leave or skip layers"
            )
        return value

    def _bias(self, name: str, value: Tensor) -> Tensor:
        """ALiBi, (heads or B heads, 1, K): a number a key, its last column the last key."""
        keys, total = self.keys, self.past + self.width
        value = value[..., value.shape[2] - total :]
        if keys is None:
            return value
        B = len(keys)
        if len(value) % B or B == 1 or value.shape[0] == 0:
            return value[..., self._alike(name, keys)]
        each = value.view(B, -1, 1, total)
        return each.gather(3, keys[:, None, None].expand(-1, each.shape[1], 1, -1)).flatten(0, 1)

    @staticmethod
    def _alike(name: str, columns: Tensor) -> Tensor:
        if not bool((columns == columns[0]).all()):
            raise Error(f"{name}: is one for all sequences, whose rows differ; run them one at a time")
        return columns[0]

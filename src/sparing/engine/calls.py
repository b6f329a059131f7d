"""What transformers hands to its modules, found by structure and by value: names move between its versions."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from sparing.grid.method import Error


@functools.lru_cache(maxsize=1024)
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind a bound method, so that a signature is read once a class and no module is kept alive."""
    return getattr(function, "__func__", function)


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a module's `forward` by name, `self` not among them."""
    found = dict(_parameters(_plain(function)))
    if _plain(function) is not function:
        found.pop(next(iter(found)))
    return found


def named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, positional ones first.

    Raises:
        Error: more positional arguments than the function names.
    """
    names = [name for name, p in parameters(function).items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(args) > len(names):
        raise Error(f"{function!r}: got {len(args)} positional arguments, takes {', '.join(names)}")
    return {**dict(zip(names, args)), **kwargs}


def cache_parameter(function: Callable[..., Any]) -> str | None:
    """The parameter that takes the KV cache, by its annotation; None where no parameter says so."""
    for name, parameter in parameters(function).items():
        if re.search(r"\bCache\b", str(parameter.annotation)):
            return name
    return None


def cache_in(values: Mapping[str, Any]) -> tuple[str | None, Cache | None]:
    """Name and object of the KV cache among arguments or outputs; (None, None) without one."""
    for name, value in values.items():
        if isinstance(value, Cache):
            return name, value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value
    return None, None


def with_cache(module: nn.Module, cache: Cache) -> dict[str, Cache]:
    """Keyword argument that hands a KV cache to a model.

    Raises:
        Error: no parameter of its forward is annotated as a Cache.
    """
    name = cache_parameter(module.forward)
    if name is None:
        raise Error(f"{type(module).__name__}.forward: no parameter takes a KV cache (looked for one annotated Cache)")
    return {name: cache}

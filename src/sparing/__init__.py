"""sparing: neural networks that spend compute only where it matters, and prove it.

A name is imported when it is first used, so `import sparing` and `sparing --help` need neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparing import depth, experts, lab, tokens, width
    from sparing.bench.compare import compare
    from sparing.engine.attach import Run, attach
    from sparing.engine.checkpoint import from_pretrained, save_pretrained
    from sparing.engine.surgery import prune
    from sparing.engine.view import View, shape
    from sparing.grid.method import BudgetError, Card, Error, Method, Shape, get, load, methods, parse
    from sparing.grid.trace import Trace, count

    view = View

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "Card",
    "Error",
    "Method",
    "Run",
    "Shape",
    "Trace",
    "View",
    "attach",
    "compare",
    "count",
    "depth",
    "experts",
    "from_pretrained",
    "get",
    "lab",
    "load",
    "methods",
    "parse",
    "prune",
    "save_pretrained",
    "shape",
    "tokens",
    "view",
    "width",
]

_PACKAGES = ("depth", "experts", "lab", "tokens", "width")
_FLOORS = ("bench", "engine", "grid")  # not public, but `sparing.engine.view` may be written after `import sparing`
_HOME = {
    "BudgetError": "grid.method",
    "Card": "grid.method",
    "Error": "grid.method",
    "Method": "grid.method",
    "Run": "engine.attach",
    "Shape": "grid.method",
    "Trace": "grid.trace",
    "View": "engine.view",
    "attach": "engine.attach",
    "compare": "bench.compare",
    "count": "grid.trace",
    "from_pretrained": "engine.checkpoint",
    "get": "grid.method",
    "load": "grid.method",
    "methods": "grid.method",
    "parse": "grid.method",
    "prune": "engine.surgery",
    "save_pretrained": "engine.checkpoint",
    "shape": "engine.view",
}


def _found(name: str) -> Any:
    """What a name of this package stands for, imported now (PEP 562)."""
    if name == "view":
        return _found("View")
    if name in _HOME:
        return getattr(import_module(f"sparing.{_HOME[name]}"), name)
    if name in _FLOORS:
        for module in ("bench.compare", *_PACKAGES):  # which stand on all there is
            import_module(f"sparing.{module}")
    if name in _FLOORS or name in _PACKAGES:
        return import_module(f"sparing.{name}")
    raise AttributeError(f"module 'sparing' has no attribute {name!r}")


if not TYPE_CHECKING:  # a type checker has to see when a name is not there

    def __getattr__(name: str) -> Any:
        value = globals()[name] = _found(name)
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

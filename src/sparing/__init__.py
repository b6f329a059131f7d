"""sparing: neural networks that spend compute only where it matters, and prove it."""

from __future__ import annotations

from sparing import depth, experts, lab, tokens, width  # the rooms register their methods
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

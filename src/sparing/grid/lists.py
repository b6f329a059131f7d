"""Lists as people give them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any


def listed(given: Any) -> list[Any]:
    """A list of what is meant as one: a single item may stand for itself, and a string is an item, never its letters.

    >>> listed("flap"), listed(0.5), listed(("flap", "fastv"))
    (['flap'], [0.5], ['flap', 'fastv'])
    """
    single = isinstance(given, (str, bytes, os.PathLike)) or not isinstance(given, Iterable)
    return [given] if single else list(given)

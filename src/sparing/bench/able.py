"""What can be measured at all: refused before any work, with what was looked for and what can be used instead."""

from __future__ import annotations

from collections.abc import Mapping

from sparing.bench.models import Loaded
from sparing.bench.tasks import Task
from sparing.engine.view import View
from sparing.grid.method import Error, Method, methods


def check(asked: Mapping[str, Method], loaded: Loaded, task: Task) -> None:
    """Refuses what the caller cannot have meant, and a comparison in which nothing could run but the dense model.

    Where some of the methods can run, the others are not refused: they become rows that say why they failed.

    Raises:
        Error: one line; names the methods and what they lack.
    """
    try:
        View(loaded.model)
    except Error as problem:
        raise Error(
            f"model = {loaded.name!r}: no method can run on {type(loaded.model).__name__}: {problem}; methods need a "
            "decoder of attention and MLP layers, such as Llama, Qwen or LLaVA"
        ) from problem
    for spec, method in asked.items():
        fits(spec, method, loaded, task)
    lacks = [cannot(method, loaded) for method in asked.values()]
    if all(lacks):
        others = instead(loaded, task)
        raise Error(
            f"{'; '.join(dict.fromkeys(map(str, lacks)))}; "
            + (f"on {loaded.name} can run {others}" if others else f"no method can run on {loaded.name}")
        )


def fits(spec: str, method: Method, loaded: Loaded, task: Task) -> None:
    """Refuses what cannot work, before any work."""
    if method.card.visual and not loaded.sees:
        raise Error(
            f"method = {spec!r}: works on visual tokens, and {loaded.name} reads text only; use a vision-language model"
        )
    if method.card.visual and not task.visual:
        raise Error(
            f"method = {spec!r}: works on visual tokens, and task {task.name} has no images; use find-digit or vqa:FILE"
        )
    if method.card.axis == "experts" and not loaded.view.shape.experts:
        raise Error(f"method = {spec!r}: works on experts, and {loaded.name} has none; use a mixture of experts")
    if method.state:
        method.check_model(loaded.model)
    if not method.ready and not task.calibrates:
        raise Error(
            f"method = {spec!r}: has to be fitted on other data; name the folder of a fitted one, or write the task as "
            f"{task.name},calibration=OTHER"
        )


def cannot(method: Method, loaded: Loaded) -> str | None:
    """Why a method cannot run on this model; None if it can."""
    try:
        method.check_model(loaded.model)
    except Error as problem:
        return str(problem)
    return None


def instead(loaded: Loaded, task: Task) -> str:
    """The published methods that this model and this task have everything for, by axis, in words."""
    found: dict[str, list[str]] = {}
    for name, kind in methods(controls=False).items():
        method = kind()
        if cannot(method, loaded) is None and _applies(method, loaded, task):
            found.setdefault(method.card.axis, []).append(name)
    return "; ".join(f"{', '.join(names)} ({axis})" for axis, names in found.items())


def _applies(method: Method, loaded: Loaded, task: Task) -> bool:
    try:
        fits(method.name, method, loaded, task)
    except Error:
        return False
    return True

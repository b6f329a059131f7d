"""Acts out a schedule of visual tokens over layers: wait, thin, leave. What token methods and their controls share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sparing.engine.stream import Stream, StreamMethod
from sparing.grid.budget import kept
from sparing.grid.method import Error, Shape, numbers


def full(schedule: tuple[float, ...], layers: int) -> tuple[float, ...]:
    """A schedule of one entry holds for every layer; any other must have one entry a layer."""
    if len(schedule) == 1:
        return schedule * layers
    if len(schedule) != layers:
        raise Error(f"schedule: {len(schedule)} entries for a model of {layers} layers")
    return schedule


def counts(schedule: tuple[float, ...], layer: int, total_B: Tensor) -> Tensor:
    """Visual tokens that run `layer` (B,): share x total, rounded half up, at least 1 where share > 0."""
    return torch.tensor([kept(schedule[layer], int(n)) for n in total_B.tolist()], device=total_B.device)


def follow(stream: Stream, layer: int, schedule: tuple[float, ...], choose: Callable[[Stream, Tensor], Tensor]) -> None:
    """Before `layer` bring the visual tokens to their scheduled share.

    A leading run of zeros means late injection: the tokens wait outside the layers and come back unchanged. Where the
    share falls, `choose` says which stay; where it falls to zero, all leave.

    Args:
        schedule: share of visual tokens a layer, length L; only the leading zeros may be followed by a rise.
        choose: (stream, count_B) -> bool (B, V) over alive visual tokens, exactly count_B True a row.
    """
    share = schedule[layer]
    if layer == 0 and share == 0 and any(schedule):
        stream.hold(stream.visual)
    elif share > 0 and stream.holding:
        stream.release()
    if share == 0:
        if not stream.holding and (layer == 0 or schedule[layer - 1] > 0):
            stream.drop_visual()
    elif share < (schedule[layer - 1] if layer and any(schedule[:layer]) else 1.0):
        stream.keep_visual(choose(stream, counts(schedule, layer, stream.visual_total)))


@functools.lru_cache(maxsize=64)
def _drawn(seed: int, layer: int, width: int) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(seed * 1009 + layer))


def random_score(stream: Stream, seed: int) -> Tensor:
    """(B, V) scores that depend on the seed, the layer and each token's original column alone.

    So a sample draws the same in any batch, alone, or with any other tokens beside it.
    """
    start = stream.first_visual()
    place = (stream.index - start[:, None]).clamp(min=0)
    return stream.of_visual(_drawn(seed, stream.layer, stream.width).to(place.device)[place])


@dataclass(frozen=True)
class ScheduledTokens(StreamMethod):
    """Base of the token controls: follow a given schedule and say which visual tokens stay.

    The schedule is the share of visual tokens that runs each layer; one entry holds for all layers, else length L.
    """

    schedule: tuple[float, ...] = numbers((0.5,), "share of visual tokens a layer", high=1)

    def choose(self, stream: Stream, count_B: Tensor) -> Tensor:
        """Bool (B, V) over alive visual tokens, exactly count_B True a row."""
        raise Error(f"{type(self).__name__} defines no choose")

    def at(self, keep: float, shape: Shape) -> Self:
        return self.replace(schedule=(keep,) * shape.layers)

    def shares(self, shape: Shape) -> tuple[float, ...]:
        return full(self.schedule, shape.layers)

    def asks_all(self, shape: Shape) -> bool:
        return all(share == 1 for share in self.schedule)

    def before_layer(self, stream: Stream, layer: int) -> None:
        follow(stream, layer, full(self.schedule, stream.layers), self.choose)


@dataclass(frozen=True)
class ScheduledLayers(StreamMethod):
    """Base of methods and controls in which generated tokens run layers fixed by the model's depth and their position.

    A layer that generated tokens have left they never run again, so every layer that runs finds the keys of all tokens
    before it, and what a left layer holds is given back at once. `run.checks_cache` proves it while it runs.

    A class with a field `prompt` that is True sends the prompt through the same layers, as a static cut does.
    """

    def layer_set(self, L: int) -> tuple[int, ...]:
        """Kept layers of L, rising."""
        raise Error(f"{type(self).__name__} defines no layer_set")

    def lasts(self, layer: int, L: int) -> float:
        """How many generated tokens of a sequence run this layer of L: the first so many, 0 or infinitely many."""
        return math.inf if layer in self.layer_set(L) else 0

    def before_layer(self, stream: Stream, layer: int) -> None:
        lasts = self.lasts(layer, stream.layers)
        if lasts == math.inf:
            return
        if getattr(self, "prompt", False):
            stream.bypass()
        elif lasts == 0:
            stream.bypass(stream.generated, free=True)
        elif stream.common_step is not None:
            stream.bypass(stream.common_step >= lasts, free=True)
        elif stream.generated is not False:
            stream.bypass((stream.step >= lasts) & stream.generated, free=True)

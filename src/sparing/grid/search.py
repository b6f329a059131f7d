"""Search over discrete choices under a budget: children by mutation, selection in stages, the best never lost."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparing.grid.files import short
from sparing.grid.method import Error

Genome = tuple[Any, ...]  #: a choice for each unit: a level, or a number
Breed = Callable[[list[Genome], random.Random], Genome]  #: parents, best first -> one child that keeps the budget
#: candidates, effort of the stage, number that fixes its minibatch -> a value each, lower is better
Fitness = Callable[[Sequence[Genome], int, int], Sequence[float]]

_DRAWS = 100  # children drawn in vain before a generation makes do with less


@dataclass(frozen=True)
class Stage:
    """One round of selection.

    Attributes:
        survivors: candidates that go on.
        effort: handed to the fitness, e.g. tokens to evaluate on.
    """

    survivors: int
    effort: int = 0


class Evolution:
    """A (mu + lambda) search with selection in stages: cheap evaluations weed out, dear ones decide.

    A generation breeds `offspring` children, none of them a parent and no two alike. Every stage scores all that are
    left on one minibatch, which is drawn anew, and keeps its `survivors`; the best `elites` parents join in the last
    stage, so that under a fitness without noise the best never gets worse. Of equals the earlier stays, parents first.
    A value that is not a finite number loses to every other.

    Args:
        start: parents to begin with, best first.
        breed: makes a child; it keeps the budget, nothing here repairs it.
        fitness: see `Fitness`; lower is better.
        offspring: children a generation, lambda.
        stages: rounds of selection; the survivors of the last are the next parents.
        elites: parents that compete with their children.
        seed: of children and minibatches.

    Attributes:
        parents: best first.
        values: theirs, as the last stage saw them; empty before the first generation.
        history: the best value of each generation.

    Raises:
        Error: no start, no stage, or survivors that rise from stage to stage; later, no finite value in the last stage.

    >>> errors = (4, 1, 3, 2)                          # of removing each unit; two of four must go
    >>> def cost(candidates, effort, draw):
    ...     return [sum(e for e, gone in zip(errors, c) if gone) for c in candidates]
    >>> swap = lambda parents, rng: switched(parents[0], [range(4)], 0, 1, rng)
    >>> search = Evolution([(1, 1, 0, 0)], swap, cost, offspring=8, stages=[Stage(1)])
    >>> search.run(3)
    (0, 1, 0, 1)
    """

    def __init__(
        self,
        start: Sequence[Genome],
        breed: Breed,
        fitness: Fitness,
        *,
        offspring: int,
        stages: Sequence[Stage],
        elites: int = 1,
        seed: int = 0,
    ) -> None:
        rounds = [stage.survivors for stage in stages]
        if not start or not rounds or min(rounds) < 1 or rounds != sorted(rounds, reverse=True):
            raise Error(f"stages = {short(rounds)}: survivors must fall from stage to stage and not below 1")
        if offspring < 1 or elites < 0:
            raise Error(f"offspring = {offspring}, elites = {elites}: must be at least 1 and 0")
        self.parents = list(start)
        self.values: list[float] = []
        self.history: list[float] = []
        self._breed, self._fitness = breed, fitness
        self._offspring, self._stages, self._elites = offspring, list(stages), elites
        self._random = random.Random(seed)

    @property
    def best(self) -> Genome:
        """The best candidate so far."""
        return self.parents[0]

    @property
    def generation(self) -> int:
        """Generations that lie behind."""
        return len(self.history)

    def step(self) -> None:
        """One generation."""
        candidates = self._children()
        for stage in self._stages:
            if stage is self._stages[-1]:
                candidates = self.parents[: self._elites] + candidates
            draw = self._random.getrandbits(32)
            judged = len(candidates)
            values = _losing(self._fitness(candidates, stage.effort, draw))
            order = sorted(range(len(candidates)), key=values.__getitem__)[: stage.survivors]
            candidates, values = [candidates[i] for i in order], [values[i] for i in order]
        _must_be_finite(values[0], judged)
        self.parents, self.values = candidates, values
        self.history.append(values[0])

    def run(self, generations: int, each: Callable[[], object] = lambda: None) -> Genome:
        """Goes on until so many generations lie behind, calling `each` after every one; gives back the best."""
        while self.generation < generations:
            self.step()
            each()
        return self.best

    def _children(self) -> list[Genome]:
        children: dict[Genome, None] = {}
        vain = 0
        while len(children) < self._offspring and vain < _DRAWS:
            child = self._breed(self.parents, self._random)
            if child in children or child in self.parents:
                vain += 1
            else:
                children[child] = None
        if not children and not self._elites:
            raise Error("breed: gives nothing but its parents; there is no other candidate within the budget")
        return list(children)

    # ---- to go on after an interruption

    def state(self) -> dict[str, Any]:
        """All that the next generation depends on, as plain values."""
        return {
            "parents": self.parents,
            "values": self.values,
            "history": self.history,
            "random": self._random.getstate(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, also after it went through JSON."""
        self.parents = [tuple(parent) for parent in state["parents"]]
        self.values, self.history = list(state["values"]), list(state["history"])
        version, inner, gauss = state["random"]
        self._random.setstate((version, tuple(inner), gauss))


def best_of(points: Sequence[Genome], scored: Sequence[float]) -> Genome:
    """The point with the lowest value, of equals the first; one that is not a finite number is never it.

    Raises:
        Error: no value is a finite number.
    """
    values = _losing(scored)
    best = min(range(len(points)), key=values.__getitem__)
    _must_be_finite(values[best], len(points))
    return points[best]


def _losing(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else math.inf for value in map(float, values)]


def _must_be_finite(lowest: float, judged: int) -> None:
    if lowest == math.inf:
        raise Error(
            f"fitness: not a finite number for any of {judged} candidates; does the model itself give finite logits on "
            "this text, in this number type?"
        )


def distinct(drawn: Callable[[random.Random], Genome], count: int, rng: random.Random) -> list[Genome]:
    """So many points, no two alike; all that there are where draws keep giving none that is new."""
    points: dict[Genome, None] = {}
    vain = 0
    while len(points) < count and vain < 10 * _DRAWS:
        before = len(points)
        points[drawn(rng)] = None
        vain = vain + 1 if len(points) == before else 0
    return list(points)


# --------------------------------------------------------------------------- ways to make a child


def moves(rng: random.Random) -> int:
    """Switches of one mutation, min(U{1,2,3}, U{1,2,3}): mostly 1. Frequencies 5/9, 3/9, 1/9."""
    return min(rng.randint(1, 3), rng.randint(1, 3))


def switched(
    genome: Sequence[int],
    groups: Sequence[Iterable[int]],
    low: int | Sequence[int],
    high: int | Sequence[int],
    rng: random.Random,
) -> Genome:
    """Level-switch mutation: a few times raise one unit by a level and lower another of the same group.

    The sum of levels of each group stays what it was, exactly. A group is drawn in proportion to its units.

    Args:
        genome: level of each unit.
        groups: units that may exchange levels.
        low, high: least and greatest level, of all units or of each.
    """
    levels = list(genome)
    least = [low] * len(levels) if isinstance(low, int) else list(low)
    most = [high] * len(levels) if isinstance(high, int) else list(high)
    members = [list(group) for group in groups]
    for _ in range(moves(rng)):
        group = rng.choices(members, weights=[len(group) for group in members])[0]
        rise = [i for i in group if levels[i] < most[i]]
        if not rise:
            continue
        up = rng.choice(rise)
        fall = [i for i in group if levels[i] > least[i] and i != up]
        if fall:
            levels[up] += 1
            levels[rng.choice(fall)] -= 1
    return tuple(levels)


def crossed(a: Sequence[Any], b: Sequence[Any], rng: random.Random) -> Genome:
    """Uniform crossover: each unit from one of two parents by a coin."""
    return tuple(x if rng.random() < 0.5 else y for x, y in zip(a, b, strict=True))


def to_mean(values: Sequence[float], mean: float, high: float = 1.0) -> tuple[float, ...]:
    """Values clipped to [0, high] and scaled to this mean: the repair of a budget that is shared out.

    Where scaling up pushes some above `high` they stay there, and the others take the rest.

    Raises:
        Error: the mean is not within [0, high].
    """
    if not 0 <= mean <= high:
        raise Error(f"mean = {mean:g}: must be in [0, {high:g}]")
    clipped = [min(max(float(v), 0.0), high) for v in values]
    full: set[int] = set()
    while True:
        rest = mean * len(clipped) - high * len(full)
        free = [i for i in range(len(clipped)) if i not in full]
        total = sum(clipped[i] for i in free)
        scaled = {i: clipped[i] * rest / total if total > 0 else rest / len(free) for i in free}
        over = {i for i, v in scaled.items() if v > high * (1 + 1e-12)}
        if not over:
            return tuple(high if i in full else min(scaled[i], high) for i in range(len(clipped)))
        full |= over

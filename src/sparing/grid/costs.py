"""What each unit of a model costs at each level, on one machine or in one count: the constraint of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparing.grid.files import short
from sparing.grid.method import Error
from sparing.grid.search import Genome

KINDS = ("seconds", "flops", "params")


@dataclass(frozen=True)
class CostTable:
    """Costs as shares of the dense model's, which is 1.

    Attributes:
        kind: seconds (measured), flops or params (counted).
        names: of the units.
        levels: cost of each unit at each of its levels, rising; 0 at the level where nothing of it is left.
        rest: cost of all that no unit can save; the sum of units may exceed it by the noise of its measurement.
        floor: cost where every unit is at its lowest level, measured as a whole.
        correction: what a whole candidate takes, over what the sum says; measured on some candidates, 1 where counted.
        facts: what it was measured on, for people and for `matches`.

    >>> table = CostTable("params", ("mlp.0", "mlp.1"), ((0.0, 0.2, 0.4), (0.0, 0.2, 0.4)), 0.2)
    >>> round(table.of((2, 1)), 6), round(table.ratio((1, 0)), 6)
    (0.8, 2.5)
    """

    kind: str
    names: tuple[str, ...]
    levels: tuple[tuple[float, ...], ...]
    rest: float
    floor: float = 0.0
    correction: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def of(self, genome: Genome) -> float:
        """Cost of a candidate, dense = 1; the correction is on what is saved, so that dense stays 1."""
        total = self.rest + sum(costs[level] for costs, level in zip(self.levels, genome, strict=True))
        return max(1 - (1 - total) * self.correction, self.floor, 1e-6)

    def ratio(self, genome: Genome) -> float:
        """Dense / candidate: its speed-up, where seconds are counted."""
        return 1 / self.of(genome)

    def matches(self, names: Sequence[str], sizes: Sequence[int], facts: Mapping[str, Any]) -> None:
        """Refuses a table of another model, or one that was measured elsewhere."""
        if tuple(names) != self.names or [len(costs) for costs in self.levels] != list(sizes):
            raise Error(
                f"costs: the table has {len(self.names)} units, {short(self.names[:3])} …; the search has "
                f"{len(names)}, {short(list(names[:3]))} …, or other levels: profile this model again"
            )
        for key, value in facts.items():
            if self.facts.get(key) != value:
                raise Error(f"costs: measured with {key} = {short(self.facts.get(key))}, now {short(value)}")

    def plain(self) -> dict[str, Any]:
        """As values that JSON holds."""
        return {
            "kind": self.kind,
            "names": list(self.names),
            "levels": [list(costs) for costs in self.levels],
            "rest": self.rest,
            "floor": self.floor,
            "correction": self.correction,
            "facts": dict(self.facts),
        }

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> CostTable:
        """What `plain` gave; refuses anything else."""
        try:
            levels = tuple(tuple(float(cost) for cost in costs) for costs in data["levels"])
            names = tuple(str(name) for name in data["names"])
            rest, floor, correction = (float(data[key]) for key in ("rest", "floor", "correction"))
            table = cls(str(data["kind"]), names, levels, rest, floor, correction, dict(data["facts"]))
        except KeyError as problem:
            raise Error(f"costs: no table of costs: {problem} is missing") from problem
        except (TypeError, ValueError, OverflowError) as problem:
            raise Error(f"costs: no table of costs: {problem}") from problem
        finite = all(map(math.isfinite, (rest, floor, correction, *(cost for costs in levels for cost in costs))))
        falls = any(not costs or costs[0] < 0 or list(costs) != sorted(costs) for costs in levels)
        if table.kind not in KINDS or len(names) != len(levels) or not finite or falls:
            raise Error(f"costs: kind = {short(table.kind)}, {len(names)} names, {len(levels)} units: damaged")
        return table

"""What the rows of a comparison say: methods beside their controls, verdicts, the Pareto front, sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

Row = Mapping[str, Any]

CONTROLS = ("random", "uniform", "downsample", "oracle")  #: in the order in which they are shown
RIVALS = ("random", "uniform", "downsample")  #: controls that a method has to beat; the oracle knows the answer
AXES = {"tokens": "visual tokens", "depth": "layers", "width": "parameters of the layers"}  #: what `keep` is a share of


@dataclass(frozen=True)
class Spread:
    """Mean of a figure over seeds, and its standard deviation (0 for one seed)."""

    mean: float
    deviation: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        known = [value for value in values if value is not None and math.isfinite(value)]
        return cls(fmean(known), stdev(known) if len(known) > 1 else 0.0, len(known)) if known else None


@dataclass(frozen=True)
class Line:
    """One method at one budget, with the control rows that ran beside it."""

    label: str
    row: Row
    controls: Mapping[str, Sequence[Row]] = field(default_factory=dict)

    @property
    def keep(self) -> float:
        return float(self.row["keep"])

    @property
    def axis(self) -> str:
        return str(self.row["axis"])

    @property
    def ran(self) -> bool:
        return self.row.get("status", "ok") == "ok"

    @property
    def realised(self) -> float | None:
        """The speed-up that `efficiency` sets against `bound`."""
        bound, efficiency = self.row.get("bound"), self.row.get("efficiency")
        return None if bound is None or efficiency is None else bound * efficiency

    def control(self, kind: str, key: str = "quality_loss_pct") -> Spread | None:
        """That figure of one kind of control, over its seeds; None where it did not run."""
        return Spread.of(row.get(key) for row in self.controls.get(kind, ()) if row.get("status", "ok") == "ok")

    @property
    def rivals(self) -> tuple[str, ...]:
        """Controls that are ahead of this method, and the random one if the method is within its spread."""
        loss = self.row.get("quality_loss_pct")
        found = {kind: rival for kind in RIVALS if (rival := self.control(kind)) is not None}
        if loss is None:
            return ()
        return tuple(
            kind for kind, c in found.items() if (loss >= c.mean - c.deviation if kind == "random" else loss > c.mean)
        )

    @property
    def verdict(self) -> tuple[str, str]:
        """(words, tone), tone one of good, bad, warn, quiet."""
        status, note = self.row.get("status", "ok"), str(self.row.get("note") or "")
        if status != "ok":
            return f"{status}: {note}" if note else status, "bad" if status == "failed" else "quiet"
        parts, tone = [], "quiet"
        beats, rivals, random = self.row.get("beats_control"), self.rivals, self.control("random")
        ahead = [k for k in rivals if k != "random" or (random and self.row["quality_loss_pct"] > random.mean)]
        if beats is True:
            others = [kind for kind in ("random", "uniform") if self.control(kind) is not None]
            parts, tone = [f"beats {_listed(others or ['its control'])}"], "good"
            ahead = [kind for kind in ahead if kind == "downsample"]
        elif beats is False:
            parts, tone = ["no better than random"] if "random" in rivals and "random" not in ahead else [], "bad"
            ahead = ahead or ([] if parts else ["its control"])
        if ahead and beats is not None:
            parts.append(f"LOSES to {_listed([SPOKEN.get(kind, kind) for kind in ahead])}")
            tone = "bad" if beats is False else "warn"
        if self.row.get("slower_than_dense"):
            parts, tone = [*parts, "slower than dense"], "bad" if tone == "bad" else "warn"
        return ", ".join(parts) or "no control", tone


SPOKEN = {"random": "random", "uniform": "uniform", "downsample": "down-sampling", "oracle": "oracle"}


@dataclass(frozen=True)
class Experiment:
    """All rows about one model on one task."""

    model: str
    task: str
    dense: Row | None
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        """The model, a folder by its last part."""
        folder = self.model.startswith((".", "/", "~")) or self.model.count("/") > 1
        return self.model.rstrip("/").rpartition("/")[2] if folder else self.model

    @property
    def rows(self) -> list[Row]:
        everything = [self.dense] if self.dense else []
        for line in self.lines:
            everything += [line.row, *(row for rows in line.controls.values() for row in rows)]
        return everything

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line.axis for line in self.lines))

    def of(self, axis: str) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.axis == axis)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line.label for line in self.lines))

    @property
    def metric(self) -> str:
        return str(next((row["metric"] for row in self.rows if row.get("metric")), "quality"))


def experiments(rows: Iterable[Row]) -> list[Experiment]:
    """Rows sorted into one `Experiment` for each model and task, in order of appearance; budgets descend."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((str(row.get("model", "")), str(row.get("task", ""))), []).append(row)
    return [_experiment(model, task, group) for (model, task), group in groups.items()]


def _experiment(model: str, task: str, rows: list[Row]) -> Experiment:
    dense = next((row for row in rows if row["method"] == "dense"), None)
    methods = [row for row in rows if row["method"] != "dense" and not row.get("control")]
    specs: dict[str, dict[str, None]] = {}
    for row in methods:
        specs.setdefault(row["method"], {})[_spec(row)] = None
    lines = []
    for row in methods:
        mine: dict[str, list[Row]] = {}
        for other in rows:
            if other.get("control") and (_spec(other), other["keep"]) == (_spec(row), row["keep"]):
                mine.setdefault(other["control"], []).append(other)
        alone = len(specs[row["method"]]) == 1
        lines.append(Line(row["method"] if alone else _variant(row), row, mine))
    order = {label: place for place, label in enumerate(dict.fromkeys(line.label for line in lines))}
    axes = list(dict.fromkeys(line.axis for line in lines))
    lines.sort(key=lambda line: (axes.index(line.axis), order[line.label], -line.keep))
    return Experiment(model, task, dense, tuple(lines))


def _spec(row: Row) -> str:
    """What tells one asked-for method from another, the same in its row and its controls'."""
    return str(row.get("spec") or row.get("of") or row["method"])


def _variant(row: Row) -> str:
    """A label for a method that ran with several settings: as it was asked for, a folder by its name."""
    name, spec = str(row["method"]), _spec(row)
    return spec if spec.startswith(name) else f"{name} ({spec.rstrip('/').rpartition('/')[2]})"


def titled(found: Sequence[Experiment], experiment: Experiment, label: str) -> str:
    """The method's label, with what it ran on where there are several."""
    return label if sum(label in e.labels for e in found) < 2 else f"{label} · {placed(found, experiment)}"


def placed(found: Sequence[Experiment], experiment: Experiment) -> str:
    """The model's name, with the task where several ran on that model."""
    alone = sum(e.name == experiment.name for e in found) < 2
    return experiment.name if alone else f"{experiment.name} · {experiment.task}"


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (speed-up, loss) that no other point betters, by rising speed-up.

    >>> front([(1.0, 0.0), (2.0, 5.0), (1.5, 9.0), (3.0, 20.0)])
    [0, 1, 3]
    """

    def bettered(i: int) -> bool:
        speed, loss = points[i]
        return any(s >= speed and q <= loss and (s > speed or q < loss) for s, q in points)

    return sorted((i for i in range(len(points)) if not bettered(i)), key=lambda i: points[i])


def opening(found: Sequence[Experiment], machines: Sequence[str] = ()) -> str:
    """What was measured, and on which machine, as one paragraph."""
    rows = [row for experiment in found for row in experiment.rows]
    what = [
        f"{_listed(experiment.labels or ('nothing',))} on {experiment.name} ({experiment.task})" for experiment in found
    ]
    budgets = len({(line.label, line.keep, e.model) for e in found for line in e.lines})
    kinds = [SPOKEN[kind] for kind in SPOKEN if any(kind in line.controls for e in found for line in e.lines)]
    beside = f" and {_listed(kinds)} controls of the same budget" if kinds else ""
    runs = list(dict.fromkeys(f"{row.get('device')} in {row.get('dtype')}" for row in rows if row.get("device")))
    where = " and ".join([f"{'; '.join(machines)} ({', '.join(runs)})"] if machines else runs or ["this machine"])
    return (
        f"Measured: {'; '.join(what)}. {budgets} settings in all ran beside the dense model{beside}: "
        f"same inputs, same process, taking turns, on {where}."
    )


@dataclass(frozen=True)
class Best:
    """The method that loses least quality at one budget of one axis."""

    experiment: Experiment
    line: Line
    among: int

    @property
    def lost(self) -> str:
        """How much quality goes, in words."""
        loss = self.line.row["quality_loss_pct"]
        if abs(loss) < 0.05:
            return "loses nothing"
        unit = (
            "bits per byte"
            if self.experiment.metric == "bits_per_byte"
            else METRICS.get(self.experiment.metric, "quality")
        )
        if loss < 0:
            return (
                f"gains {-loss:.1f} % {unit}"
                if self.experiment.metric != "bits_per_byte"
                else f"saves {-loss:.1f} % {unit}"
            )
        return (
            f"adds {loss:.1f} % {unit}"
            if self.experiment.metric == "bits_per_byte"
            else f"loses {loss:.1f} % of the {unit}"
        )

    @property
    def speed(self) -> tuple[str, float] | None:
        """The phase that gains more, and its speed-up."""
        known = [(row, phase) for phase, key in PHASES.items() if (row := self.line.row.get(key)) is not None]
        return (max(known)[1], max(known)[0]) if known else None


def best(experiment: Experiment) -> list[Best]:
    """The best method at each budget of each axis, budgets descending."""
    found = []
    for axis in experiment.axes:
        lines = experiment.of(axis)
        for keep in sorted({line.keep for line in lines}, reverse=True):
            known = [
                line
                for line in lines
                if line.keep == keep and line.ran and line.row.get("quality_loss_pct") is not None
            ]
            if known:
                first = min(
                    known, key=lambda line: (line.row["quality_loss_pct"], -(line.row.get("prefill_speedup") or 0))
                )
                found.append(Best(experiment, first, len(known)))
    return found


def findings(experiment: Experiment) -> list[tuple[str, str]]:
    """(tone, sentence): the reference, then what a reader must not overlook: lost to controls, slow, failed."""
    said = []
    if experiment.dense is not None:
        value = quality(experiment.dense.get("quality"), experiment.metric)
        has = {"accuracy": f"reaches an accuracy of {value}", "bits_per_byte": f"needs {value} bits per byte"}
        words = has.get(experiment.metric, f"has {experiment.metric} {value}")
        said.append(("quiet", f"The dense model {words} on {experiment.task}."))
    return said + _complaints(experiment.lines)


def _complaints(lines: Sequence[Line]) -> list[tuple[str, str]]:
    compared = [line for line in lines if line.row.get("beats_control") is not None]
    losers = [line for line in compared if line.row["beats_control"] is False or "downsample" in line.rivals]
    said = []
    if losers:
        said.append(
            ("bad", f"Not better than a control of the same budget: {_listed([_against(line) for line in losers])}.")
        )
    elif compared:
        said.append(("good", f"All {len(compared)} settings that have a control of the same budget beat it."))
    for words, tone, chosen in (
        ("Slower than dense", "warn", [line for line in lines if line.ran and line.row.get("slower_than_dense")]),
        ("Out of reach of the method", "quiet", [line for line in lines if line.row.get("status") == "unreachable"]),
        ("Failed", "bad", [line for line in lines if line.row.get("status") == "failed"]),
    ):
        if chosen:
            said.append((tone, f"{words}: {_listed([f'{line.label} at {percent(line.keep)}' for line in chosen])}."))
    return said


def _against(line: Line) -> str:
    rivals = [f"{SPOKEN[kind]} {rival.mean:.1f} %" for kind in line.rivals if (rival := line.control(kind))]
    behind = f" (loses {line.row['quality_loss_pct']:.1f} %, {', '.join(rivals)})" if rivals else ""
    return f"{line.label} at {percent(line.keep)}{behind}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


PHASES = {"prefill": "prefill_speedup", "decode": "decode_speedup"}
METRICS = {"accuracy": "accuracy", "bits_per_byte": "bits per byte"}


def percent(share: float) -> str:
    """A share as per cent, without decimals it does not need.

    >>> percent(0.25), percent(0.125)
    ('25 %', '12.5 %')
    """
    return f"{round(100 * share, 2):g} %"


def quality(value: float | None, metric: str) -> str:
    """A quality as its metric is read: accuracy in per cent, bits per byte with three decimals."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3f}"


def direction(metric: str) -> str:
    return "higher is better" if metric == "accuracy" else "lower is better"

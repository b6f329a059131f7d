"""What the rows of a comparison say: methods beside their controls, verdicts, the Pareto front, sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

Row = Mapping[str, Any]

CONTROLS = (
    "random",
    "uniform",
    "static",
    "constant",
    "termination",
    "frequency",
    "gate",
    "downsample",
    "oracle",
)  #: in the order in which they are shown
RIVALS = (
    "random",
    "uniform",
    "static",
    "constant",
    "termination",
    "frequency",
    "gate",
    "downsample",
)  #: controls that a method has to beat; the oracle knows the answer
AXES = {
    "tokens": "visual tokens",
    "depth": "layers",
    "width": "parameters of the layers",
    "experts": "experts",
}  #: what `keep` is a share of


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
            return f"{status}: {note}" if note else status, "quiet" if status == "unreachable" else "bad"
        parts, tone = [], "quiet"
        beats, rivals, random = self.row.get("beats_control"), self.rivals, self.control("random")
        ahead = [k for k in rivals if k != "random" or (random and self.row["quality_loss_pct"] > random.mean)]
        if beats is True:
            others = [kind for kind in RIVALS if kind != "downsample" and self.control(kind) is not None]
            parts, tone = [f"beats {_listed([SPOKEN[kind] for kind in others] or ['its control'])}"], "good"
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


SPOKEN = {
    "random": "random",
    "uniform": "uniform",
    "static": "static choice",
    "constant": "constant depth",
    "termination": "early termination",
    "frequency": "frequency",
    "gate": "summed gate",
    "downsample": "down-sampling",
    "oracle": "oracle",
}


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
        return _short(self.model)

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


def _short(model: str) -> str:
    folder = model.startswith((".", "/", "~")) or model.count("/") > 1
    return model.rstrip("/").rpartition("/")[2] if folder else model


def experiments(rows: Iterable[Row]) -> list[Experiment]:
    """Rows sorted into one `Experiment` for each model and task, in order of appearance; budgets descend.

    Rows of sweeps are passed over; they are the business of `breakevens`.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if is_swept(row):
            continue
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


# --------------------------------------------------------------------------- sweeps


def is_swept(row: Row) -> bool:
    """Whether a row is one of a sweep: a method at one context length and batch size."""
    return "context" in row


@dataclass(frozen=True)
class Breakeven:
    """Where one method at one budget makes a generation faster than dense, over context lengths and batch sizes.

    Attributes:
        label: method and budget, and what it ran on where there are several.
        cells: rows by (context, batch).
    """

    label: str
    cells: Mapping[tuple[int, int], Row]

    @property
    def contexts(self) -> list[int]:
        return sorted({context for context, _ in self.cells})

    @property
    def batches(self) -> list[int]:
        return sorted({batch for _, batch in self.cells})

    def state(self, context: int, batch: int) -> str | None:
        """pays | loses | undecided: whether the 20th to the 80th percentile of the ratios lies above 1, below 1, or
        around it; None where nothing was measured."""
        return verdict_of(self.cells.get((context, batch)))

    @property
    def sentence(self) -> str:
        """Where it pays, in words, over the contexts and batches that were measured."""
        states = {at: state for at, row in self.cells.items() if (state := verdict_of(row))}
        if not states:
            row = next(iter(self.cells.values()))
            return f"{row['status']}: {row['note']}" if row.get("note") else str(row["status"])
        where: dict[str, list[str]] = {}
        for batch in self.batches:
            mine = [context for context in self.contexts if (context, batch) in states]
            if mine:
                paying = [context for context in mine if states[context, batch] == "pays"]
                where.setdefault(_where(mine, paying), []).append(str(batch))
        told = sorted(where, key=lambda words: words == "never")
        if len(told) == 1 and told[0] in ("always", "never"):
            said = f"{told[0]} pays"
        else:
            parts = [f"{words} at batch {_listed(where[words])}" for words in told]
            parts[0] = parts[0].replace("always", "always pays") if told[0] == "always" else f"pays {parts[0]}"
            said = ", ".join(parts)
        unsure, missing = list(states.values()).count("undecided"), len(self.cells) - len(states)
        said += f"; undecided in {unsure} of {len(states)} cells" if unsure else ""
        return said + (f"; not measured in {missing} of {len(self.cells)} cells" if missing else "")


def verdict_of(row: Row | None) -> str | None:
    """pays | loses | undecided, for one row of a sweep; None where nothing was measured."""
    if row is None or row.get("status", "ok") != "ok" or row.get("total_speedup") is None:
        return None
    return "pays" if row["total_speedup_low"] > 1 else "loses" if row["total_speedup_high"] < 1 else "undecided"


def _where(contexts: Sequence[int], paying: Sequence[int]) -> str:
    """Which of these contexts pay, in words.

    >>> _where([1, 2, 3], [2, 3]), _where([1, 2, 3], [1]), _where([1, 2, 3], [2]), _where([1, 2], [])
    ('from context 2', 'up to context 1', 'at context 2 alone', 'never')
    """
    if not paying:
        return "never"
    if len(paying) == len(contexts):
        return "always"
    if list(contexts[-len(paying) :]) == list(paying):
        return f"from context {paying[0]:,}"
    if list(contexts[: len(paying)]) == list(paying):
        return f"up to context {paying[-1]:,}"
    return f"at context {_listed([f'{context:,}' for context in paying])} alone"


def breakevens(rows: Iterable[Row]) -> list[Breakeven]:
    """The rows of sweeps as one map for each method and budget, in order of appearance."""
    rows = [row for row in rows if is_swept(row)]
    groups: dict[tuple[str, str, str, float], dict[tuple[int, int], Row]] = {}
    specs: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        place = str(row["model"]), str(row["task"])
        groups.setdefault((*place, _spec(row), row["keep"]), {})[row["context"], row["batch"]] = row
        specs.setdefault((*place, row["method"]), set()).add(_spec(row))
    places = dict.fromkeys((model, task) for model, task, _, _ in groups)
    found = []
    for (model, task, _, keep), cells in groups.items():
        first = next(iter(cells.values()))
        name = first["method"] if len(specs[model, task, first["method"]]) == 1 else _variant(first)
        on = f" · {_short(model)}" if len(places) > 1 else ""
        on += f" · {task}" if len([m for m, _ in places if m == model]) > 1 else ""
        found.append(Breakeven(f"{name} at {percent(keep)}{on}", cells))
    return found


# --------------------------------------------------------------------------- words


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
    return said + _complaints(experiment.lines) + [("quiet", sentence) for sentence in carried(experiment)]


def carrying(name: str) -> str:
    """What the row of a control says that runs on the weights that were trained for the method."""
    return f"carries {name}'s trained weights"


def carried(experiment: Experiment) -> list[str]:
    """One sentence for each method whose controls run on the weights that were trained for it."""
    found: dict[str, dict[str, None]] = {}
    for line in experiment.lines:
        note = carrying(str(line.row["method"]))
        for kind, rows in line.controls.items():
            if any(note in str(row.get("note") or "") for row in rows):
                found.setdefault(note, {})[SPOKEN.get(kind, kind)] = None
    return [f"Control {_listed(list(kinds))}: {note}, no training of its own." for note, kinds in found.items()]


def shortfall(rows: Iterable[Row]) -> str:
    """What keeps a comparison from being a success, in one line; nothing where it is one.

    That is rows that failed or are inert, or that no method could spend any budget that was asked for.
    """
    rows = sorted((row for row in rows if row["method"] != "dense"), key=lambda row: bool(row.get("control")))
    parts = []
    for status, words in (("failed", "failed"), ("inert", "inert, which is no result")):
        names = list(dict.fromkeys(_said(row) for row in rows if row.get("status", "ok") == status))
        if names:
            parts.append(f"{words}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else ""))
    if not parts and rows and all(row.get("status") == "unreachable" for row in rows):
        parts = ["nothing but the dense model was measured: all budgets are out of the methods' reach"]
    return f"Exit code 1: {'; '.join(parts)}." if parts else ""


def _said(row: Row) -> str:
    whose = f", {row['control']} control of {row.get('of')}" if row.get("control") else ""
    return f"{row['method'] if whose else _spec(row)}{whose} at {percent(row['keep'])}"


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
        ("Inert, so no result (everything ran)", "bad", [line for line in lines if line.row.get("status") == "inert"]),
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


def direction(experiment: Experiment) -> str:
    """Which way is up; runs of older versions had accuracy and bits per byte only."""
    known = [row["higher_is_better"] for row in experiment.rows if row.get("higher_is_better") is not None]
    higher = known[0] if known else experiment.metric == "accuracy"
    return "higher is better" if higher else "lower is better"

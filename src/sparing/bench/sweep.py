"""Where does a method start to pay? Its speed against dense over context lengths and batch sizes, as rows.

A sweep measures time, not quality: at each context and batch the dense model and the method generate in turns, and the
row says how much faster prefill, decoding and a whole generation of `tokens` tokens are. The columns are listed at
`BLANK`. `summary.breakevens` reads the rows, `pictures.breakeven` draws them.

Rows go to `OUT/sweep.jsonl` as those of a comparison go to `results.jsonl`: a sweep that is killed goes on with
`resume=True`. It may stand in the folder of a comparison of the same model and task, and then shares what was fitted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from sparing.bench import tasks, timing
from sparing.bench.able import check
from sparing.bench.bounds import Cost
from sparing.bench.compare import (
    Row,
    Store,
    Subject,
    Work,
    bar_of,
    digest,
    named,
    quiet,
    read_rows,
    refuse_idle,
    refuse_other,
    versions,
)
from sparing.bench.models import Loaded
from sparing.bench.tasks import Task
from sparing.bench.timing import Ratio, Stages
from sparing.engine.view import evaluating
from sparing.grid.lists import listed
from sparing.grid.method import Error, Method

TOKENS = 64  #: output tokens of the generation that `total` is about
SECONDS = 1.5  #: of measurement a side, where a pair is short
FEWEST = 3  #: pairs, however long one takes
AXES = ("context", "batch")

BLANK: Row = {
    # what ran
    "method": None,  # name
    "axis": None,  # tokens | depth | width | …
    "keep": None,  # asked share of the axis' cells
    "fields": {},  # hyper-parameters at this budget
    "spec": None,  # the method as it was asked for
    "context": None,  # asked tokens of a prompt
    "batch": None,  # prompts that run together
    "length": None,  # tokens that a prompt really had: whole images do not fill every context
    "visual": None,  # of them visual ones
    "tokens": None,  # output tokens of `total`
    # speed: dense seconds / method seconds; median, 20th and 80th percentile of paired runs
    "prefill_speedup": None,
    "prefill_speedup_low": None,
    "prefill_speedup_high": None,
    "decode_speedup": None,
    "decode_speedup_low": None,
    "decode_speedup_high": None,
    "total_speedup": None,  # prefill and the tokens after the first, of each pair
    "total_speedup_low": None,
    "total_speedup_high": None,
    "prefill_ms": None,  # median
    "decode_ms": None,  # median, an output token of the batch
    "total_ms": None,
    "dense_prefill_ms": None,
    "dense_decode_ms": None,
    "dense_total_ms": None,
    "pairs": None,
    # FLOP bounds: FLOPs of dense / FLOPs executed, counted on one prompt of that length
    "prefill_bound": None,
    "decode_bound": None,
    "total_bound": None,  # if the time of either phase shrank as its FLOPs do
    # how
    "status": "ok",  # ok | unreachable | inert | failed
    "note": "",
    "model": None,
    "task": None,
    "device": None,
    "dtype": None,
    "seed": None,
    "versions": {},
    "seconds": None,  # that the row took
}


def sweep(
    loaded: Loaded,
    task: str | Task,
    methods: str | Path | Method | Sequence[str | Path | Method],
    keep: float | Sequence[float],
    contexts: int | Sequence[int],
    batches: int | Sequence[int] = (1,),
    *,
    tokens: int = TOKENS,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    repeats: int | None = None,
    fitted: Mapping[str, str | Path | Method] | None = None,
    progress: bool = True,
) -> list[Row]:
    """Times methods against dense at every context length and batch size.

    Args:
        loaded: what `load_model` gave.
        task: as for `compare`; its `sized` makes the prompts.
        methods: as for `compare`.
        keep: budgets, one or several: shares of the cells of a method's axis that run.
        contexts: tokens of a prompt, one number or several.
        batches: prompts that run together, one number or several.
        tokens: output tokens of a whole generation; the first one comes from the prefill.
        out: folder for `sweep.jsonl`; None keeps the rows in memory only.
        resume: go on with the sweep that `out` holds.
        seed: of what is fitted.
        repeats: timed pairs; None takes enough for about 1.5 seconds a side, 3 to 30.
        fitted: fitted methods, or their folders, by name; used instead of fitting.
        progress: show a progress bar on standard error.

    Returns:
        One row for each method, budget, context and batch.

    Raises:
        Error: something that the caller asked for cannot be; before any work.
    """
    given = prepare(
        loaded,
        task,
        methods,
        keep,
        contexts,
        batches,
        tokens=tokens,
        out=out,
        resume=resume,
        seed=seed,
        repeats=repeats,
        fitted=fitted,
    )
    return given.run(progress)


def axes(texts: str | Sequence[str]) -> tuple[list[int], list[int]]:
    """Contexts and batches as the command line has them; without batch it is 1.

    >>> axes(["context=512,2048", "batch=1,8"])
    ([512, 2048], [1, 8])
    """
    texts = listed(texts)
    found: dict[str, list[int]] = {}
    usual = "e.g. context=512,2048 batch=1,8"
    for word in (word for text in texts for word in text.split() or [""]):
        name, equals, numbers = word.partition("=")
        if not equals:
            raise Error(f"sweep = {word!r}: must be NAME=NUMBERS with NAME one of {', '.join(AXES)}, {usual}")
        if name not in AXES:
            raise Error(f"sweep = {word!r}: there is no axis {name!r}, only {' and '.join(AXES)}, {usual}")
        if name in found:
            raise Error(f"sweep = {word!r}: {name} is there already; put all its numbers together, {usual}")
        parts = [part.strip() for part in numbers.split(",")]
        for part in parts:
            if not (part.isascii() and part.isdecimal() and int(part) > 0):
                raise Error(f"sweep = {word!r}: {name} = {part!r} must be a whole number of at least 1, {usual}")
        found[name] = sorted({int(part) for part in parts})
    if "context" not in found:
        raise Error(f"sweep = {' '.join(texts)!r}: names no context, {usual}")
    return found["context"], found.get("batch", [1])


@dataclass(frozen=True)
class Prepared:
    """A sweep that can be run: all that could be refused has been.

    Attributes:
        remark: what a user should know before it starts, or nothing.
    """

    loaded: Loaded
    task: Task
    asked: Mapping[str, Method]
    arguments: Row
    out: Path | None
    resume: bool
    remark: str

    def run(self, progress: bool = True) -> list[Row]:
        """Everything that is not there yet; returns all rows."""
        store = SweepStore(self.out, self.arguments, self.resume)
        cells = math.prod(len(self.arguments[key]) for key in ("methods", "keep", "contexts", "batches"))
        with quiet(), bar_of(progress, cells, "sweep") as bar:
            _Sweep(self.loaded, self.task, store, bar, self.arguments).run(self.asked)
        return store.rows


def prepare(
    loaded: Loaded,
    task: str | Task,
    methods: str | Path | Method | Sequence[str | Path | Method],
    keep: float | Sequence[float],
    contexts: int | Sequence[int],
    batches: int | Sequence[int] = (1,),
    *,
    tokens: int = TOKENS,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    repeats: int | None = None,
    fitted: Mapping[str, str | Path | Method] | None = None,
) -> Prepared:
    """Checks what `sweep` is asked for, without work and without touching `out`; its arguments are those of `sweep`."""
    methods, keep, contexts, batches = listed(methods), listed(keep), listed(contexts), listed(batches)
    for share in keep:
        if not (isinstance(share, (int, float)) and 0 < share <= 1):
            raise Error(f"keep = {share!r}: must be above 0 and at most 1")
    asked = named(methods, fitted or {})
    for name, values in (("contexts", contexts), ("batches", batches), ("methods", asked), ("keep", keep)):
        if not len(values):
            raise Error(f"{name} = []: name at least one")
    numbers = [("context", value) for value in contexts] + [("batch", value) for value in batches]
    for name, value in [*numbers, ("tokens", tokens), *([] if repeats is None else [("repeats", repeats)])]:
        if not isinstance(value, int) or value < 1:
            raise Error(f"{name} = {value!r}: must be a whole number of at least 1")
    bound = tasks.parse(task, loaded)
    check(asked, loaded, bound)
    remark = _room(loaded, max(contexts))
    for context in sorted(set(contexts)):
        bound.sized(context, 1)  # says what it needs, if that is more
    arguments: Row = {
        "model": loaded.name,
        "task": bound.name,
        "methods": list(asked),
        "keep": [float(share) for share in keep],
        "contexts": sorted(set(contexts)),
        "batches": sorted(set(batches)),
        "tokens": tokens,
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "seed": seed,
        "repeats": repeats,
        "states": {spec: digest(method) for spec, method in asked.items() if method.state},
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    folder = Path(out).expanduser() if out is not None else None
    if folder is not None:
        comparison = folder / Store.files[0]
        if comparison.is_file():  # what is fitted there is used here
            refuse_other(comparison, {key: arguments[key] for key in ("model", "task", "dtype", "seed")})
        SweepStore.holds(folder, arguments, resume)
    return Prepared(loaded, bound, asked, arguments, folder, resume, remark)


def _positions(loaded: Loaded) -> int | None:
    """Positions that the model was trained on; None where it does not say."""
    most = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def _room(loaded: Loaded, context: int) -> str:
    """A remark where a context is longer than the model was trained on; refuses one that it has no positions for."""
    most = _positions(loaded)
    if most is None or context + timing.STEPS <= most:
        return ""
    if loaded.view.rotary is None:
        raise Error(
            f"context = {context}: {loaded.name} has {most} positions, learned one by one, and {timing.STEPS} tokens "
            f"are generated; at most {most - timing.STEPS}"
        )
    return _beyond(loaded.name, most)


def _beyond(name: str, most: int) -> str:
    return f"longer than the {most:,} positions that {name} was trained on: its speed there is real, its words are not"


class SweepStore(Store):
    """The rows of a sweep: `sweep.json` (its arguments) and `sweep.jsonl`."""

    what = "sweep"
    files = ("sweep.json", "sweep.jsonl")

    def _recover(self) -> None:
        super()._recover()
        _check(self.rows, self._file)


def read_sweep(folder: Path) -> list[Row]:
    """The finished rows of the sweep in a folder; none where there is no sweep.

    Raises:
        Error: a line is damaged or no row of a sweep.
    """
    file = folder / SweepStore.files[1]
    rows = read_rows(file) if file.is_file() else []
    _check(rows, file)
    return rows


def _check(rows: Sequence[Row], file: Path) -> None:
    """Refuses what is no row of a sweep."""
    for number, row in enumerate(rows, 1):
        needed = ("total_speedup", "total_speedup_low", "total_speedup_high") if row.get("status") == "ok" else ()
        wrong = [key for key in ("method", "spec", "model", "task", "status") if not isinstance(row.get(key), str)]
        wrong += [key for key in ("context", "batch", "tokens", "keep", *needed) if not _positive(row.get(key))]
        wrong += [key for key in row if key.endswith(_FIGURES) and not (row[key] is None or _positive(row[key]))]
        if wrong or row.keys() != BLANK.keys():
            about = f"{wrong[0]} = {row.get(wrong[0])!r}" if wrong else "other columns"
            raise Error(f"{file}: row {number} is none of a sweep ({about}); the file is damaged, take another folder")


_FIGURES = ("_speedup", "_low", "_high", "_ms", "_bound")


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e300


@dataclass
class _Sweep(Work):
    blank: ClassVar[Row] = BLANK

    _dense: dict[int, dict[str, Cost]] = field(default_factory=dict)  # by context
    _now: tuple[str, float] | None = None  # spec and budget of the next four
    _made: tuple[Method, Subject] | Exception | None = None
    _costs: dict[int, dict[str, Cost]] = field(default_factory=dict)
    _whole: dict[int, str] = field(default_factory=dict)

    def run(self, asked: Mapping[str, Method]) -> None:
        """Everything that is not there yet."""
        with evaluating(self.model):
            for spec, method in asked.items():
                for keep in self.arguments["keep"]:
                    for context in self.arguments["contexts"]:
                        for batch in self.arguments["batches"]:
                            at = {"spec": spec, "keep": keep, "context": context, "batch": batch}
                            if not self.store.find(**at):
                                self._cell(at, method)
                            self.bar.next()

    def _cell(self, at: Row, method: Method) -> None:
        """The row of one method, budget, context and batch."""
        known = {"method": method.name, "axis": method.card.axis, "fields": method.fields()}
        known |= {"seed": self.arguments["seed"], "tokens": self.arguments["tokens"]}
        what = f"{method.name} at {at['keep']:g}, context {at['context']}, batch {at['batch']}"
        with self.row(what, **at, **known) as row:
            self.bar.say(what)
            method, subject = self._ready_at(at["spec"], at["keep"], method)
            row["fields"] = method.fields()
            inputs = self.task.sized(at["context"], at["batch"])
            ids, token = inputs["input_ids"], self.loaded.view.image_token_id
            row |= {"length": ids.shape[1], "visual": 0 if token is None else int((ids[0] == token).sum())}
            most = _positions(self.loaded)
            row["note"] = _beyond(self.loaded.name, most) if most and ids.shape[1] + timing.STEPS > most else ""
            row |= self._bounds(subject, at["context"])
            if idle := self._idle(method, subject, at["context"]):
                refuse_idle(row, method, idle)
            reference = Subject(self.model)
            speed = timed(
                lambda: self._stages(reference, inputs),
                lambda: self._stages(subject, inputs),
                repeats=self.arguments["repeats"],
            )
            for stage, ratio in speed.items():
                row[f"{stage}_speedup"], row[f"{stage}_ms"] = ratio.median, 1000 * ratio.other
                row[f"{stage}_speedup_low"], row[f"{stage}_speedup_high"] = ratio.low, ratio.high
                row[f"dense_{stage}_ms"], row["pairs"] = 1000 * ratio.dense, ratio.n
            row["total_bound"] = _bound(row)

    def _ready_at(self, spec: str, keep: float, method: Method) -> tuple[Method, Subject]:
        """The method at its budget and what is measured; made once, and if that fails, failed once."""
        if self._now != (spec, keep):
            self._now, self._made, self._costs, self._whole = (spec, keep), None, {}, {}
            try:
                method = self.ready(spec, method, keep)
                self._made = method, self.subject(method)
            except Exception as problem:
                self._made = problem
        assert self._made is not None
        if isinstance(self._made, Exception):
            raise self._made
        return self._made

    def _idle(self, method: Method, subject: Subject, context: int) -> str:
        """Why a method leaves nothing out of a prompt of that length and what is generated behind it; else nothing."""
        if context not in self._whole:
            inputs = self.task.sized(context, 1)
            with subject.running(trace=True) as run:
                subject.generate(inputs)
                self._whole[context] = self.cells(run, subject, method, lambda: inputs)[1]
        return self._whole[context]

    def _stages(self, subject: Subject, inputs: tasks.Batch) -> Stages:
        """Seconds of one generation, with those of a whole one of `tokens` tokens."""
        stages = subject.generation(inputs)
        return {**stages, "total": stages["prefill"] + (self.arguments["tokens"] - 1) * stages["decode"]}

    def _bounds(self, subject: Subject, context: int) -> Row:
        """FLOPs of dense / FLOPs executed, counted on one prompt: a batch has as many times more on both sides."""
        for costs, one in ((self._dense, Subject(self.model)), (self._costs, subject)):
            if context not in costs:
                costs[context] = one.cost(self.task.sized(context, 1))
        flops = [{phase: cost.flops for phase, cost in costs[context].items()} for costs in (self._dense, self._costs)]
        return {f"{phase}_bound": flops[0][phase] / mine if mine else None for phase, mine in flops[1].items()}


def _bound(row: Row) -> float | None:
    """Speed-up of the whole generation if either phase took dense's time divided by its own bound."""
    parts = [(row["dense_prefill_ms"], row["prefill_bound"])]
    parts += [((row["tokens"] - 1) * row["dense_decode_ms"], row["decode_bound"])]
    if not all(bound for _, bound in parts):
        return None
    return sum(ms for ms, _ in parts) / sum(ms / bound for ms, bound in parts)


def timed(
    dense: Callable[[], Stages],
    other: Callable[[], Stages],
    *,
    repeats: int | None = None,
    seconds: float = SECONDS,
    clock: timing.Clock = time.perf_counter,
) -> dict[str, Ratio]:
    """`timing.time_stages` with fewer pairs where they are long.

    A first pair that takes either side more than `seconds` counts; a shorter one, and the one after it, warms up.
    """
    if repeats is not None:
        return timing.time_stages(dense, other, repeats=repeats)
    start = clock()
    first = dense(), other()
    spent = clock() - start
    if spent >= 2 * seconds:
        sides = (_replayed(stages, run) for stages, run in zip(first, (dense, other), strict=True))
        return timing.time_stages(*sides, repeats=FEWEST, warmup=0)
    start = clock()
    dense(), other()
    spent = clock() - start
    pairs = min(timing.MOST, max(FEWEST, math.ceil(2 * seconds / max(spent, 1e-9))))
    return timing.time_stages(dense, other, repeats=pairs, warmup=0)


def _replayed(first: Stages, run: Callable[[], Stages]) -> Callable[[], Stages]:
    """`run`, but the first call answers with what a run gave before."""

    def all_runs() -> Iterator[Stages]:
        yield first
        while True:
            yield run()

    return all_runs().__next__

"""The library's main job: methods against dense and against their controls, on one model and one task, as rows.

Every row is a plain dict that JSON can hold; a value that was not measured is None. There are three sorts: `dense` (one
row), controls (`control` is random, uniform, oracle, downsample, …, `of` names the method) and methods. A method's
controls stand before it, because its `beats_control` is read from their rows. The columns are listed at `BLANK`.

Rows go to `OUT/results.jsonl` one by one and are on the disk before the next one is begun, so a run that is killed at
any moment goes on with `resume=True` and ends in the same table.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from sparing.bench import bounds, tasks, timing
from sparing.bench.able import check
from sparing.bench.bounds import Bounds, Cost, Peaks
from sparing.bench.inert import Inert, acted, experts, parameters, partly, uncut
from sparing.bench.models import Loaded, load_model
from sparing.bench.summary import carrying
from sparing.bench.tasks import Task
from sparing.bench.timing import Ratio, Stages
from sparing.engine.attach import Run, attach
from sparing.engine.checkpoint import save_pretrained
from sparing.engine.surgery import prune
from sparing.engine.view import evaluating
from sparing.grid.files import parse_json, read_json, short
from sparing.grid.folders import refuse_content
from sparing.grid.lists import listed
from sparing.grid.method import BudgetError, Error, Method, load, load_fits, parse
from sparing.grid.method import methods as all_methods

Row = dict[str, Any]

KEEP = (0.5, 0.25, 0.1)
FIT_BATCHES = 32  #: calibration batches
HORIZON = 512  #: decode steps that are timed at most
PHASES = ("prefill", "decode")
_EVERYWHERE = ("model", "task", "limit", "device", "dtype", "versions")  # arguments that every row repeats
SCRATCH = ".size-"  # start of the names of folders that are gone when a row is done

BLANK: Row = {
    # what ran
    "method": None,  # name
    "axis": None,  # tokens | depth | width | …
    "keep": None,  # asked share of the axis' cells
    "fields": {},  # hyper-parameters at this budget
    "control": None,  # None for a method, else random | uniform | static | … | oracle | downsample
    "of": None,  # method that a control belongs to
    "spec": None,  # the method as it was asked for; the same in a method's row and its controls'
    # quality
    "metric": None,
    "higher_is_better": None,
    "quality": None,
    "quality_dense": None,
    "quality_loss_pct": None,  # see Task.loss
    "details": {},  # the same quality in other units
    "beats_control": None,  # better than random by more than its spread over seeds, and not worse than the others
    # speed: dense seconds / method seconds; median, 20th and 80th percentile of paired runs
    "prefill_speedup": None,
    "prefill_speedup_low": None,
    "prefill_speedup_high": None,
    "decode_speedup": None,
    "decode_speedup_low": None,
    "decode_speedup_high": None,
    "prefill_ms": None,  # median
    "decode_ms": None,  # median, an output token of the batch
    "pairs": None,
    "slower_than_dense": None,  # even the 80th percentile is below 1, in a phase where the method acts
    "decision_share": None,  # of the method's own time
    # cost, and what it allows
    "phase": None,  # prefill | decode: the phase of the next seven columns
    "flops_ratio": None,  # method / dense
    "bytes_ratio": None,
    "flop_bound": None,
    "byte_bound": None,
    "roofline": None,
    "bound": None,  # the one that counts: flop_bound for prefill, roofline for decode
    "efficiency": None,  # speed-up in that phase / bound
    "prefill_flops": None,
    "prefill_bytes": None,
    "decode_flops": None,  # an output token of the batch
    "decode_bytes": None,
    "peak_flops": None,  # the machine's, per second; in the dense row
    "peak_bandwidth": None,
    "cells": None,  # share of the axis' cells that really ran
    "peak_memory_mb": None,  # 10^6 bytes: weights and the most that prefill and decode held beside them
    "size_mb": None,  # checkpoint on disk, surgery only
    "size_dense_mb": None,
    # how
    "status": "ok",  # ok | unreachable | inert (everything ran: no result) | failed
    "note": "",  # why it is not ok; else what a reader should know
    "model": None,
    "task": None,
    "limit": None,
    "device": None,
    "dtype": None,
    "seed": None,
    "versions": {},
    "seconds": None,  # that the row took
}


def compare(
    model: str | PreTrainedModel | Loaded,
    task: str | Task,
    methods: str | Path | Method | Sequence[str | Path | Method],
    keep: float | Sequence[float] = KEEP,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    repeats: int | None = None,
    limit: int | None = None,
    controls: bool = True,
    control_seeds: int = 3,
    fitted: Mapping[str, str | Path | Method] | None = None,
    processor: Any = None,
    progress: bool = True,
) -> list[Row]:
    """Measures methods on a model: quality, speed, memory and cost against dense and against their controls.

    Args:
        model: `lab:NAME`, a checkpoint folder, a hub id, a model object, or what `load_model` gave.
        task: `ppl`, `ppl:FILE`, `find-digit`, `vqa:FILE.jsonl`, or a `Task`.
        methods: names, `name:field=value,…`, folders of fitted methods, or `Method` objects; one or several.
        keep: budgets, one or several: shares of the cells of a method's axis that run.
        out: folder for `results.jsonl`; None keeps the rows in memory only.
        resume: go on with the run that `out` holds.
        device: where to run.
        dtype: number type of the weights; None takes the checkpoint's.
        seed: of what is fitted; the random controls take `seed`, `seed + 1`, …
        repeats: timed pairs; None takes enough for about two seconds a side, 5 to 30. 0 times nothing.
        limit: units of the task that are evaluated.
        controls: whether the controls run. Their quality is measured, their speed is not: it would be the method's own,
            because they spend the same.
        control_seeds: seeds of the random control, at least 3.
        fitted: fitted methods, or their folders, by name; used instead of fitting.
        processor: for a model object, its processor or tokenizer.
        progress: show a progress bar on standard error.

    Returns:
        The rows, in the order in which they were measured. One whose `status` is not ok is no result: the method could
        not spend its budget (unreachable), ran everything although less was asked for (inert), or failed.

    Raises:
        Error: something that the caller asked for cannot be, or none of the methods can run; before any work.
    """
    methods, keep = listed(methods), listed(keep)
    for share in keep:
        if not (isinstance(share, (int, float)) and 0 < share <= 1):
            raise Error(f"keep = {share!r}: must be above 0 and at most 1")
    for name, value, least in (("limit", limit, 1), ("repeats", repeats, 0), ("control_seeds", control_seeds, 3)):
        if value is not None and value < least:
            raise Error(f"{name} = {value}: must be at least {least}")
    if not keep or not methods:
        raise Error(f"{'methods' if keep else 'keep'} = []: name at least one")
    asked = named(methods, fitted or {})
    loaded = model if isinstance(model, Loaded) else load_model(model, device, dtype, processor)
    bound_task = tasks.parse(task, loaded)
    check(asked, loaded, bound_task)
    arguments = {
        "model": loaded.name,
        "task": bound_task.name,
        "methods": list(asked),
        "keep": [float(share) for share in keep],
        "device": device,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "seed": seed,
        "repeats": repeats,
        "limit": limit,
        "controls": controls,
        "control_seeds": control_seeds,
        "states": _states(asked),
        "threads": torch.get_num_threads(),  # another number rounds otherwise
        "versions": versions(),
    }
    store = Store(out, arguments, resume)
    fits_of = {spec: found for spec in asked if (found := load_fits(spec))}
    with quiet(), bar_of(progress, len(asked) * len(keep), "dense") as bar:
        _Comparison(loaded, bound_task, store, bar, arguments, fits=fits_of).run(asked)
    return store.rows


# -------------------------------------------------------------------------------------------------------------- store


class Store:
    """The rows of one run, in memory and, with a folder, on the disk.

    The folder holds `run.json` (the arguments), `results.jsonl` (a row a line), `fitted/` (methods fitted on the way)
    and, where something failed, `errors.log`. A line that a kill left unfinished is dropped when the run is resumed.
    A sweep has other names for the first two and may stand beside the comparison that it belongs to.
    """

    what: ClassVar[str] = "run"
    files: ClassVar[tuple[str, str]] = ("run.json", "results.jsonl")

    def __init__(self, folder: str | Path | None, arguments: Row, resume: bool = False) -> None:
        self.rows: list[Row] = []
        self.folder = Path(folder).expanduser() if folder is not None else None
        if self.folder is None:
            return
        arguments = _plain(arguments)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as problem:
            raise Error(f"out = '{self.folder}': cannot be written to ({problem.strerror or problem})") from problem
        file, self._file = (self.folder / name for name in self.files)
        if self.holds(self.folder, arguments, resume):
            self._recover()
        else:
            if not (self.folder / Store.files[0]).is_file():
                refuse_content(
                    self.folder,
                    f"out = '{self.folder}'",
                    but=lambda name: name.endswith(".new"),
                    lacks="run of sparing compare",
                )
            _write(file, json.dumps(arguments, indent=2) + "\n")

    @classmethod
    def holds(cls, folder: str | Path, arguments: Row, resume: bool = False) -> bool:
        """Whether a folder holds this run, to go on with; refuses the folder of another one."""
        file = Path(folder).expanduser() / cls.files[0]
        if not file.is_file():
            return False
        refuse_other(file, arguments, cls.what)
        if not resume:
            words = f"holds this {cls.what} already; pass --resume to go on with it, or another folder"
            raise Error(f"out = '{file.parent}': {words}")
        return True

    def find(self, **wanted: Any) -> Row | None:
        """The first row with these values."""
        return next((row for row in self.rows if all(row[key] == value for key, value in wanted.items())), None)

    def add(self, row: Row) -> Row:
        """Keeps a row; when this returns, it is on the disk."""
        row = _plain(row)
        if self.folder is not None:
            with open(self._file, "ab") as file:
                file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self.rows.append(row)
        return row

    def log(self, what: str) -> None:
        """Adds the traceback of the exception being handled to `errors.log`."""
        if self.folder is not None:
            with open(self.folder / "errors.log", "a") as file:
                file.write(f"{what}\n{traceback.format_exc()}\n")

    def _recover(self) -> None:
        assert self.folder is not None
        data = self._file.read_bytes() if self._file.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self.rows = read_rows(self._file) if whole else []
        for left in self.folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        if whole != data:
            os.truncate(self._file, len(whole))


def refuse_other(file: Path, arguments: Row, what: str = "run") -> None:
    """Refuses a folder whose file of arguments differs from these in any of them."""
    old, new = _json(file), _plain(arguments)
    other = [key for key in new if old.get(key) != new[key]]
    if other:
        was = ", ".join(f"{key} {old.get(key)!r}, now {new[key]!r}" for key in other)
        raise Error(f"out = '{file.parent}': holds another {what} ({was}); take another folder")


def _json(file: Path) -> Row:
    try:
        return read_json(file)
    except Error as problem:
        raise Error(f"out = '{file.parent}': what it holds is damaged ({problem}); take another folder") from problem


def read_rows(file: Path) -> list[Row]:
    """The rows of a run; a last line that a kill left unfinished is no row.

    Raises:
        Error: names the line that is damaged, and what is wrong with it.
    """
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.split(b"\n"), 1):
        where = f"{file}: line {number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line, where)
        except Error as problem:
            raise Error(f"{problem}: the file is damaged; take another folder") from problem
        if file.name == Store.files[1]:
            _check_row(row, where)
        rows.append(row)
    return rows


_WORDS = {"method", "axis", "control", "of", "spec", "metric", "phase", "status", "note", "model", "task"}
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(BLANK, ("a number", (int, float))),
    **dict.fromkeys({*_WORDS, "device", "dtype"}, ("a string", (str,))),
    **dict.fromkeys(("fields", "details", "versions"), ("an object", (dict,))),
    **dict.fromkeys(("higher_is_better", "beats_control", "slower_than_dense"), ("true or false", (bool,))),
}


def _check_row(row: Row, where: str) -> None:
    """Refuses a line that is no row of a comparison."""
    needed = {"method", "keep", *(("quality", "quality_loss_pct") if row.get("status", "ok") == "ok" else ())}
    for key in sorted(needed | (row.keys() & _KINDS.keys())):
        value, (what, kinds) = row.get(key), _KINDS[key]
        right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if right and isinstance(value, (int, float)):
            right = abs(value) < 1e300 and (key != "keep" or 0 < value <= 1)
        if not (right or (value is None and key not in needed)):
            raise Error(f"{where}: {key} = {short(value)}: must be {what}; the file is damaged, take another folder")


def _write(file: Path, text: str) -> None:
    """Writes a whole file or none."""
    beside = file.with_name(file.name + ".new")
    with open(beside, "w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(beside, file)


def _plain(row: Row) -> Row:
    """What a row is after a trip through JSON; a number that JSON does not have becomes None."""

    def known(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {str(key): known(item) for key, item in value.items()}
        return [known(item) for item in value] if isinstance(value, (list, tuple)) else value

    plain: Row = json.loads(json.dumps(known(row), default=str))
    return plain


# --------------------------------------------------------------------------------------------------------- comparison


@dataclass
class Subject:
    """A model with or without something attached: everything a row measures can be measured on it.

    Attributes:
        model: dense, or really cut.
        method: attached while measuring; None for dense and for cut models.
        steps: decode steps of one timed generation.
    """

    model: nn.Module
    method: Method | None = None
    steps: int = timing.STEPS

    @contextmanager
    def running(self, *, trace: bool = False, decisions: bool = False) -> Iterator[Run | None]:
        """The model as the subject runs it; yields the run, or None. Without `trace` it records nothing, for timing."""
        if self.method is None:
            yield None
        else:
            with attach(self.model, self.method, warn=False) as run:
                run.keeps_trace, run.time_decisions = trace, decisions
                yield run

    def generation(self, inputs: tasks.Batch) -> Stages:
        """One timed generation."""
        with self.running():
            return timing.generation(self.model, inputs, self.steps)

    def generate(self, inputs: tasks.Batch) -> None:
        """A prompt and `steps` real decode steps, as it runs now."""
        timing.decode(self.model, inputs, timing.prefill(self.model, inputs), self.steps)

    def cost(self, inputs: tasks.Batch) -> dict[str, Cost]:
        """Of prefill, and of one decode step."""
        out: list[Any] = []
        with self.running():
            first = Cost.of(lambda: out.append(timing.prefill(self.model, inputs)))
            steps = Cost.of(lambda: timing.decode(self.model, inputs, out[0], self.steps))
        return {"prefill": first, "decode": Cost(steps.flops // self.steps, steps.bytes // self.steps)}

    def memory(self, inputs: tasks.Batch) -> int:
        """Bytes of the weights and the most that one generation holds beside them."""

        def generate() -> None:
            timing.decode(self.model, inputs, timing.prefill(self.model, inputs), 2)

        with self.running():
            return timing.weight_bytes(self.model) + timing.peak_memory(generate, inputs["input_ids"].device)

    def deciding(self, inputs: tasks.Batch, repeats: int = 3) -> float:
        """Share of the time of a generation that the method's own decisions take."""
        if self.method is None:
            return 0.0
        shares = []
        for _ in range(repeats):
            with self.running(decisions=True) as run:
                assert run is not None
                stages = timing.generation(self.model, inputs, self.steps)
                total = stages["prefill"] + self.steps * stages["decode"]
                shares.append(run.trace.seconds_deciding / total)
        return statistics.median(shares)


@dataclass
class Work:
    """What a comparison and a sweep have in common: methods made ready, and rows that are kept in any case."""

    loaded: Loaded
    task: Task
    store: Store
    bar: Bar
    arguments: Row
    fitted: dict[str, Method] = field(default_factory=dict)

    blank: ClassVar[Row] = BLANK

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    fits: dict[str, dict[float, Method]] = field(default_factory=dict)

    def ready(self, spec: str, method: Method, keep: float) -> Method:
        """The method at this budget, with what it has to be fitted with; fitted once for all budgets if one fit can."""
        shape = self.loaded.view.shape
        if spec in self.fits:
            if keep not in self.fits[spec]:
                there = ", ".join(f"{k:g}" for k in self.fits[spec])
                raise BudgetError(f"keep = {keep:g}: {spec} was fitted at {there}; sparing fit --keep {keep:g} adds it")
            method = self.fits[spec][keep]
        if method.ready:
            return method.at(keep, shape)
        if method.card.fits_budget:
            method = method.at(keep, shape)
            return self._fit(f"{spec}-keep-{keep:g}", method)
        return self._fit(spec, method).at(keep, shape)

    def _fit(self, spec: str, method: Method) -> Method:
        if spec not in self.fitted:
            folder = self.store.folder and self.store.folder / "fitted" / _slug(spec)
            if folder and (folder / "method.json").is_file():
                self.fitted[spec] = load(folder)
            else:
                self.bar.say(f"{method.name}: fitting")
                with torch.random.fork_rng():
                    torch.manual_seed(self.arguments["seed"])
                    fitted = method.fit(self.model, self.task.batches(FIT_BATCHES))
                if folder:
                    fitted = load(fitted.save(folder))
                self.fitted[spec] = fitted
        return self.fitted[spec]

    def subject(self, method: Method) -> Subject:
        """What is measured: the model with the method attached, or really cut by it."""
        if method.card.kind == "surgery":
            return Subject(prune(self.model, method).eval())
        return Subject(self.model, method, max(timing.STEPS, min(method.horizon, HORIZON)))

    def cells(
        self, run: Run | None, subject: Subject, method: Method, inputs: Callable[[], tasks.Batch]
    ) -> tuple[float | None, str]:
        """Share of the cells that ran, and why a method that was to leave some out left none (else nothing).

        Cells are parameters of the layers or experts that are left of a cut model, or what ran under an attached
        method: in what the trace holds already, and in real decode steps behind `inputs`.
        """
        if subject.model is not self.model:
            count = experts if method.card.axis == "experts" else parameters
            return count(subject.model) / count(self.model), uncut(self.model, subject.model)
        if run is None:
            return None, ""
        return acted(run, method, lambda: subject.generate(inputs()))

    @contextmanager
    def row(self, what: str, **known: Any) -> Iterator[Row]:
        """A row to fill; it is kept in any case, with what went wrong if something did."""
        row = self.blank | {"seconds": time.perf_counter()} | known
        row |= {key: self.arguments[key] for key in _EVERYWHERE if key in row}
        if "metric" in row:
            row |= {"metric": self.task.metric, "higher_is_better": self.task.higher_is_better}
        try:
            yield row
        except BudgetError as problem:
            row |= {"status": "unreachable", "note": str(problem)}
        except Inert as problem:
            row |= {"status": "inert", "note": str(problem)}
        except Exception as problem:  # a method's failure is a result; the run goes on
            if row["method"] == "dense":
                raise Error(f"model = {self.loaded.name!r}: fails on {self.task.name} as it is: {problem}") from problem
            row |= {"status": "failed", "note": f"{type(problem).__name__}: {problem}".splitlines()[0]}
            self.store.log(f"{what}, keep {row['keep']}")
        row["seconds"] = time.perf_counter() - row["seconds"]
        row |= self.store.add(row)


@dataclass
class _Comparison(Work):
    def run(self, asked: Mapping[str, Method]) -> None:
        """Everything that is not there yet."""
        with evaluating(self.model):
            if not self.store.find(method="dense"):
                self._dense()
            for spec, method in asked.items():
                for keep in self.arguments["keep"]:
                    self._budget(spec, method, keep)
                    self.bar.next()

    def _dense(self) -> None:
        with self.row("dense", method="dense", axis=None, keep=1.0, seed=self.arguments["seed"]) as row:
            subject = Subject(self.model)
            self._quality(row, subject)
            if self.arguments["repeats"] != 0:
                inputs = self.task.inputs()
                peaks = bounds.peaks(self.arguments["device"], self.model.dtype)
                row |= {"peak_flops": peaks.flops, "peak_bandwidth": peaks.bandwidth}
                row |= _costs(subject.cost(inputs))
                row |= {"cells": 1.0, "flops_ratio": 1.0, "bytes_ratio": 1.0, "decision_share": 0.0, "phase": "prefill"}
                row |= {"flop_bound": 1.0, "byte_bound": 1.0, "roofline": 1.0, "bound": 1.0, "efficiency": 1.0}
                row["peak_memory_mb"] = subject.memory(inputs) / 1e6
                self._speed(row, subject, inputs)

    def _budget(self, spec: str, method: Method, keep: float) -> None:
        """One method at one budget: its controls, then itself."""
        mine = {"spec": spec, "keep": keep, "axis": method.card.axis}
        if self.store.find(spec=spec, keep=keep, control=None):
            return
        name = f"{method.name} at {keep:g}"
        with self.row(spec, **mine, method=method.name, fields=method.fields(), seed=self.arguments["seed"]) as row:
            self.bar.say(f"{name}: preparing")
            method.check_model(self.model)  # before its controls cost anything
            method = self.ready(spec, method, keep)
            row["fields"] = method.fields()
            plan = self._plan(method)
            for place, (kind, seed) in enumerate(plan):
                self.bar.say(f"{name}: {kind} control", place, len(plan) + 2)
                if not self.store.find(spec=spec, keep=keep, control=kind, seed=seed):
                    self._control({**mine, "control": kind, "of": method.name, "seed": seed}, method)
            row["seconds"] = time.perf_counter()  # the controls have rows of their own
            self.bar.say(f"{name}: quality", len(plan), len(plan) + 2)
            subject = self.subject(method)
            self._quality(row, subject, method)
            row["beats_control"] = self._beats(row)
            self.bar.say(f"{name}: speed", len(plan) + 1, len(plan) + 2)
            if self.arguments["repeats"] != 0:
                self._measure(row, method, subject)

    def _plan(self, method: Method) -> list[tuple[str, int]]:
        """Kind and seed of the controls of a method."""
        first = self.arguments["seed"]
        lots = self.arguments["control_seeds"]
        lots = lots if method.draws is None else min(lots, method.draws)
        seeds = {"random": lots, "oracle": int(self.task.truth)}
        plan = [(kind, first + i) for kind in method.card.controls for i in range(seeds.get(kind, 1))]
        plan += [("downsample", first)] * (method.card.visual and self.task.downsampled(1.0) is not None)
        return plan if self.arguments["controls"] else []

    def _control(self, known: Row, method: Method) -> None:
        """The row of one control."""
        kind, keep = known["control"], known["keep"]
        with self.row(f"{known['spec']}, {kind} control", **known, method=kind) as row:
            if kind != "downsample":
                try:
                    control = method.control(kind, self.loaded.view.shape, known["seed"])
                except Error as problem:  # it has no such control with these settings, and says why
                    raise BudgetError(str(problem)) from problem
                row |= {"method": control.name, "fields": control.fields()}
                self._quality(row, self.subject(control), control)
                if _carries(control, method):
                    row["note"] = "; ".join(filter(None, (row["note"], carrying(method.name))))
                return
            # the dense model on smaller pictures: one number for all methods at this budget
            same = self.store.find(control="downsample", keep=keep, status="ok")
            if same:
                row |= {key: same[key] for key in ("quality", "quality_dense", "quality_loss_pct", "details")}
                return
            task = self.task.downsampled(keep)
            if task is None:
                raise BudgetError(f"keep = {keep:g}: is less than one visual token")
            self._quality(row, Subject(self.model), task=task)

    def _quality(self, row: Row, subject: Subject, method: Method | None = None, task: Task | None = None) -> None:
        """The quality of the subject, made by `method`, or dense; what left nothing out though it was to is Inert."""
        task, limit, idle = task or self.task, self.arguments["limit"], ""
        with subject.running(trace=True) as run:
            quality = task.evaluate(subject.model, run, limit, self.bar.part)
            row["note"] = partly(run.trace) if run is not None else ""
            if method is not None:
                row["note"] = "; ".join(filter(None, (row["note"], method.remark)))
                row["cells"], idle = self.cells(run, subject, method, self.task.inputs)
        if not math.isfinite(quality):
            raise ArithmeticError(f"{task.metric} is {quality}")
        if idle and method is not None:
            refuse_idle(row, method, idle)
        dense = quality if row["method"] == "dense" else self.store.find(method="dense")["quality"]  # type: ignore[index]
        row |= {"quality": quality, "quality_dense": dense, "quality_loss_pct": task.loss(quality, dense)}
        row["details"] = task.details(quality, limit)

    def _beats(self, row: Row) -> bool | None:
        """Better than random by more than its spread over seeds, and not worse than any other control but oracles."""
        rivals: dict[str, list[float]] = {"random": [], "others": []}
        for other in self.store.rows:
            if (other["spec"], other["keep"]) == (row["spec"], row["keep"]) and other["status"] == "ok":
                kind = other["control"]
                if kind not in (None, "oracle", "downsample"):
                    rivals[kind if kind == "random" else "others"].append(other["quality"])
        if not rivals["random"]:
            return None
        sign = 1 if self.task.higher_is_better else -1
        spread = statistics.stdev(rivals["random"]) if len(rivals["random"]) > 1 else 0.0
        better = sign * (row["quality"] - statistics.fmean(rivals["random"])) > spread
        return better and all(sign * (row["quality"] - other) >= 0 for other in rivals["others"])

    def _measure(self, row: Row, method: Method, subject: Subject) -> None:
        """Speed, cost, bounds, memory and, for cut models, size."""
        inputs, dense = self.task.inputs(), self.store.find(method="dense")
        assert dense is not None
        speed = self._speed(row, subject, inputs)
        row["decision_share"] = subject.deciding(inputs)
        row["peak_memory_mb"] = subject.memory(inputs) / 1e6
        row |= _costs(subject.cost(inputs))
        peaks = Peaks(dense["peak_flops"], dense["peak_bandwidth"])
        against = (
            dense if subject.steps == timing.STEPS else _costs(Subject(self.model, steps=subject.steps).cost(inputs))
        )
        limits = {phase: Bounds.of(_cost(against, phase), _cost(row, phase), peaks) for phase in PHASES}
        phase = "decode" if method.card.phase == "decode" else "prefill"
        mine = limits[phase]
        row |= {"phase": phase, "flop_bound": mine.flops, "byte_bound": mine.bytes, "roofline": mine.roofline}
        row["flops_ratio"] = mine.flops and 1 / mine.flops
        row["bytes_ratio"] = mine.bytes and 1 / mine.bytes
        row["bound"] = mine.roofline if phase == "decode" else mine.flops
        row["efficiency"] = row["bound"] and speed[phase].median / row["bound"]
        acts = (method.card.phase,) if method.card.phase in PHASES else PHASES
        slow = [p for p in PHASES if speed[p].high < 1]
        row["slower_than_dense"] = any(p in acts for p in slow)
        notes = [row["note"]] if row["note"] else []
        notes += [f"{p} is slower than dense" for p in slow]
        if row["bound"] and speed[phase].low > row["bound"]:
            notes.append(f"{phase} is faster than its bound of {row['bound']:.2f}")
        row["note"] = "; ".join(notes)
        if method.card.kind == "surgery":
            row |= {"size_mb": self._size(subject.model), "size_dense_mb": self._size(self.model)}

    def _speed(self, row: Row, subject: Subject, inputs: tasks.Batch) -> dict[str, Ratio]:
        reference = Subject(self.model, steps=subject.steps)
        speed = timing.time_stages(
            lambda: reference.generation(inputs), lambda: subject.generation(inputs), repeats=self.arguments["repeats"]
        )
        for phase, ratio in speed.items():
            row[f"{phase}_speedup"], row[f"{phase}_ms"] = ratio.median, 1000 * ratio.other
            row[f"{phase}_speedup_low"], row[f"{phase}_speedup_high"] = ratio.low, ratio.high
            row["pairs"] = ratio.n
        return speed

    def _size(self, model: nn.Module) -> float:
        """10^6 bytes of the weights as a checkpoint on the disk."""
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.store.folder) as folder:
            save_pretrained(model, folder)
            return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6


# -------------------------------------------------------------------------------------------------------------- parts


def named(
    methods: str | Path | Method | Sequence[str | Path | Method], fitted: Mapping[str, str | Path | Method]
) -> dict[str, Method]:
    """The methods by a name that tells them apart; one by itself is a list of one."""
    found: dict[str, Method] = {}
    for item in [methods] if isinstance(methods, (str, Path, Method)) else methods:
        if isinstance(item, Method):
            fields = ",".join(f"{key}={value}" for key, value in item.fields().items())
            spec, method = f"{item.name}:{fields}" if fields else item.name, item
        elif fits := load_fits(str(item)):
            spec, method = str(item), next(iter(fits.values()))
        elif (Path(item) / "method.json").is_file() or (Path(item).is_dir() and str(item) not in all_methods()):
            spec, method = str(item), load(item)
        else:
            spec, method = str(item), parse(str(item))
        given = fitted.get(spec, fitted.get(method.name))
        if given is not None and not method.state:
            method = given if isinstance(given, Method) else load(given)
        found[spec] = method
    return found


def _states(asked: Mapping[str, Method]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for spec, method in asked.items():
        several = load_fits(spec)
        if several:
            found[spec] = {f"{keep:g}": digest(each) for keep, each in several.items()}
        elif method.state:
            found[spec] = digest(method)
    return found


def _carries(control: Method, method: Method) -> bool:
    """Whether a control runs on weights that were trained for the method, and not on a training of its own."""
    card = method.card
    if not control.state or not (card.trains or card.needs == "training") or method.draws is not None:
        return False
    return type(control) is type(method) or any(name.startswith(("weight.", "lora.")) for name in control.state)


def refuse_idle(row: Row, method: Method, why: str) -> None:
    """Makes a row inert in which a method left nothing out, where it was to spend less than everything."""
    if row["keep"] < 1 and method.card.saves != "nothing":
        asked = row.get("control") is None and row["spec"].startswith(method.name)
        raise Inert(f"{row['spec'] if asked else method.name} {why}; keep = {row['keep']:g} was asked for")


def digest(method: Method) -> str:
    """A number for what a method has learned."""
    learned = hashlib.sha256()
    for name, tensor in sorted(method.state.items()):
        learned.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return learned.hexdigest()[:16]


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "sparing")},
    }


def _costs(costs: Mapping[str, Cost]) -> Row:
    return {f"{phase}_{key}": getattr(cost, key) for phase, cost in costs.items() for key in ("flops", "bytes")}


def _cost(row: Row, phase: str) -> Cost:
    return Cost(row[f"{phase}_flops"], row[f"{phase}_bytes"])


def _slug(spec: str) -> str:
    return "".join(char if char.isalnum() or char in "-_.=," else "_" for char in spec)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers between ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Bar:
    """Progress over methods and budgets, with what goes on inside one of them."""

    def __init__(self, progress: Progress, total: int, first: str) -> None:
        self._progress, self._done, self._stretch = progress, 0, (0.0, 0.0)
        self._task = progress.add_task(first, total=total)

    def say(self, what: str, place: int = 0, places: int = 0) -> None:
        """What is going on: step `place` of `places` of this budget."""
        self._stretch = (place / places, 1 / places) if places else (0.0, 0.0)
        self._progress.update(self._task, description=what)
        self.part(0, 1)

    def part(self, done: int, total: int) -> None:
        """How far this step is."""
        start, length = self._stretch
        self._progress.update(self._task, completed=self._done + start + length * done / total)

    def next(self) -> None:
        """This budget is done."""
        self._done += 1
        self._stretch = (0.0, 0.0)
        self.part(1, 1)


@contextmanager
def bar_of(shown: bool, total: int, first: str) -> Iterator[Bar]:
    """A bar of `total` steps on standard error, `first` being what is said before anything else."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        yield Bar(progress, total, first)

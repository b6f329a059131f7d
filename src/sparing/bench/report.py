"""The result of a comparison for people: a table in the terminal, and one HTML file that needs only a browser."""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from sparing.bench import summary
from sparing.bench.summary import (
    AXES,
    METRICS,
    SPOKEN,
    Breakeven,
    Experiment,
    Line,
    Row,
    breakevens,
    experiments,
    is_swept,
    percent,
    placed,
    quality,
    titled,
)
from sparing.grid.folders import content, kind_of
from sparing.grid.lists import listed
from sparing.grid.method import Error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "report.html"
_TONES = {"good": "green", "bad": "bold red", "warn": "yellow", "quiet": "dim"}


# --------------------------------------------------------------------------- cells


def _number(value: float | None, pattern: str = "{:.1f}") -> str:
    return "–" if value is None else pattern.format(value)


def _speed(row: Row, key: str) -> str:
    """`1.62× [1.58–1.70]`: median, 20th and 80th percentile."""
    value, low, high = row.get(key), row.get(f"{key}_low"), row.get(f"{key}_high")
    if value is None:
        return "–"
    return f"{value:.2f}×" + (f" [{low:.2f}–{high:.2f}]" if low is not None and high is not None else "")


def _controlled(line: Line, kind: str) -> str:
    """What a control of the same budget loses; with its standard deviation where several seeds ran."""
    loss = line.control(kind)
    if loss is None:
        return "–"
    return f"{loss.mean:.1f}" + (f" ± {loss.deviation:.1f}" if loss.seeds > 1 else "")


_COLUMNS: tuple[tuple[str, str, Any], ...] = (
    # head, explanation, cell of a line (Experiment, Line) -> str
    ("keep", "share of the axis' cells that run", lambda e, x: percent(x.keep)),
    ("quality", "on the task", lambda e, x: quality(x.row.get("quality"), e.metric)),
    ("loss %", "of quality, against dense", lambda e, x: _number(x.row.get("quality_loss_pct"))),
    ("random", "loss % of random choice, mean ± standard deviation over seeds", lambda e, x: _controlled(x, "random")),
    ("uniform", "loss % of evenly spaced choice", lambda e, x: _controlled(x, "uniform")),
    ("static", "loss % of one choice for all inputs", lambda e, x: _controlled(x, "static")),
    ("const.", "loss % of the same depth for every token", lambda e, x: _controlled(x, "constant")),
    ("termin.", "loss % where the last layers leave first", lambda e, x: _controlled(x, "termination")),
    ("freq.", "loss % when the experts visited most stay", lambda e, x: _controlled(x, "frequency")),
    ("gate", "loss % when the experts with the largest gates stay", lambda e, x: _controlled(x, "gate")),
    ("down-s.", "loss % of images made smaller", lambda e, x: _controlled(x, "downsample")),
    ("oracle", "loss % when the right choice is known", lambda e, x: _controlled(x, "oracle")),
    ("prefill", "measured speed-up: median [20th–80th percentile]", lambda e, x: _speed(x.row, "prefill_speedup")),
    ("decode", "measured speed-up: median [20th–80th percentile]", lambda e, x: _speed(x.row, "decode_speedup")),
    ("bound", "the most that the work left allows", lambda e, x: _number(x.row.get("bound"), "{:.2f}×")),
    ("efficiency", "measured speed-up / bound", lambda e, x: _number(x.row.get("efficiency"), "{:.0%}")),
    ("FLOPs", "executed, share of dense", lambda e, x: _number(x.row.get("flops_ratio"), "{:.0%}")),
    ("memory", "peak MB, weights included", lambda e, x: _number(x.row.get("peak_memory_mb"), "{:.0f}")),
    ("size", "MB of the checkpoint", lambda e, x: _number(x.row.get("size_mb"), "{:.1f}")),
)


def _shown(experiment: Experiment, among: Iterable[str] | None = None) -> list[tuple[str, str, Any]]:
    """The columns that hold something."""
    columns = [column for column in _COLUMNS if among is None or column[0] in among]
    filled = [
        c
        for c in columns
        if c[0] in ("keep", "quality", "loss %") or any(c[2](experiment, line) != "–" for line in experiment.lines)
    ]
    if len({line.row.get("size_mb") for line in experiment.lines}) < 2:
        filled = [column for column in filled if column[0] != "size"]
    return filled


def _metric(experiment: Experiment) -> str:
    return f"{METRICS.get(experiment.metric, experiment.metric)}, {summary.direction(experiment)}"


def _dense_cell(experiment: Experiment, head: str) -> str:
    row = experiment.dense or {}
    cells = {
        "keep": "100 %",
        "quality": quality(row.get("quality"), experiment.metric),
        "loss %": "0.0",
        "FLOPs": "100%",
        "memory": _number(row.get("peak_memory_mb"), "{:.0f}"),
        "size": _number(
            next((x.row["size_dense_mb"] for x in experiment.lines if x.row.get("size_dense_mb")), None), "{:.1f}"
        ),
        "prefill": "1.00×" if row.get("prefill_speedup") is None else _speed(row, "prefill_speedup"),
        "decode": "1.00×" if row.get("decode_speedup") is None else _speed(row, "decode_speedup"),
    }
    return cells.get(head, "–")


# --------------------------------------------------------------------------- terminal


def terminal(rows: Iterable[Row]) -> RenderableType:
    """The table for the terminal: dense first, then one line a method and budget, with the verdict in words.

    A narrow terminal gets fewer columns, never a table without names or verdicts. Rows of a sweep become a table of
    their own, with one sentence a method.
    """
    rows = list(rows)
    maps = breakevens(rows)
    return Group(_Fitting(experiments(rows)), *([_Swept(maps)] if maps else []))


@dataclass(frozen=True)
class _Fitting:
    """Tables with as many columns as the terminal has room for."""

    found: list[Experiment]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for experiment in self.found:
            yield next(
                table
                for heads, spread in _DETAIL
                if (table := _terminal_table(experiment, heads, spread, options.max_width))
            )
            yield Text()
            for sentence in summary.carried(experiment):
                yield Text(sentence, style="dim")
        if any(line.controls for experiment in self.found for line in experiment.lines):
            yield Text("random, uniform, …, oracle: what a control of the same budget loses, in %.", style="dim")


_ALL = (
    "keep",
    "quality",
    "loss %",
    "random",
    "uniform",
    "static",
    "const.",
    "termin.",
    "freq.",
    "gate",
    "down-s.",
    "oracle",
    "prefill",
    "decode",
    "bound",
    "efficiency",
)
_SOME = ("keep", "quality", "loss %", "random", "uniform", "static", "freq.", "prefill", "decode", "efficiency")
_FEW = ("keep", "loss %", "random", "prefill", "decode")
_DETAIL = (
    (_ALL, True),
    (_ALL, False),
    (_SOME, False),
    (_FEW, False),
    (("keep", "loss %", "prefill"), False),
    (("keep", "loss %"), False),
)
_VERDICT = 24  # least width of a verdict, characters


def _terminal_table(experiment: Experiment, heads: Sequence[str], spread: bool, width: int) -> Table | None:
    """The table with these columns; None if it needs more than `width` characters and fewer columns could help."""
    columns = _shown(experiment, heads)

    def texts(name: str, cells: Iterable[str]) -> list[str]:
        return [name, *(cell if spread else cell.partition(" [")[0] for cell in cells)]

    body = [(texts(x.label, (cell(experiment, x) for _, _, cell in columns)), x.verdict) for x in experiment.lines]
    if experiment.dense is not None:
        body.insert(
            0, (texts("dense", (_dense_cell(experiment, head) for head, _, _ in columns)), ("reference", "quiet"))
        )
    widths = [
        max(map(len, column))
        for column in zip(["method", *(head for head, _, _ in columns)], *(row for row, _ in body))
    ]
    room = width - sum(widths) - 2 * len(widths)
    if room < _VERDICT and len(heads) > len(_DETAIL[-1][0]):
        return None
    if room < _VERDICT:  # the narrowest form: fold the names
        widths[0] = max(8, widths[0] + room - _VERDICT)
        room = max(8, width - sum(widths) - 2 * len(widths))
    longest = max([len("verdict"), *(len(words) for _, (words, _) in body)])

    title = f"{experiment.name} · {experiment.task} · {_metric(experiment)}"
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        header_style="bold",
        pad_edge=False,
        padding=(0, 2, 0, 0),
        box=None,
    )
    table.add_column("method", overflow="fold", width=widths[0])
    for (head, _, _), wide in zip(columns, widths[1:]):
        table.add_column(head, justify="right", no_wrap=True, width=wide)
    table.add_column("verdict", overflow="fold", width=min(room, longest))
    previous = None
    for (name, *cells), (words, tone) in body:
        table.add_row(
            Text(name if name != previous else "", style="bold"), *map(Text, cells), Text(words, style=_TONES[tone])
        )
        previous = name
    return table


# --------------------------------------------------------------------------- sweeps

_STATES = {"pays": "good", "loses": "bad", "undecided": "quiet"}


def _swept_cells(row: Row) -> dict[str, str]:
    """One line of the table of a sweep, by heading."""
    used = row.get("length")
    return {
        "context": f"{row['context']:,}" + (f" ({used:,})" if used not in (None, row["context"]) else ""),
        "batch": str(row["batch"]),
        "prefill": _speed(row, "prefill_speedup"),
        "decode": _speed(row, "decode_speedup"),
        "total": _speed(row, "total_speedup"),
        "FLOP bound": _number(row.get("total_bound"), "{:.2f}×"),
        "dense ms": _number(row.get("dense_total_ms"), "{:,.0f}"),
        "method ms": _number(row.get("total_ms"), "{:,.0f}"),
        "verdict": summary.verdict_of(row) or str(row["status"]),
    }


def _swept_lines(mine: Breakeven) -> list[dict[str, str]]:
    return [
        _swept_cells(mine.cells[at])
        for at in ((context, batch) for batch in mine.batches for context in mine.contexts)
        if at in mine.cells
    ]


def _swept_words(rows: Iterable[Row]) -> str:
    """What the columns of a sweep's table mean."""
    tokens = ", ".join(dict.fromkeys(str(row["tokens"]) for row in rows if is_swept(row)))
    return (
        f"total: prefill and {tokens} output tokens. Speed-ups are medians of paired runs [20th–80th percentile]; a "
        "cell pays where even the 20th is above 1. FLOP bound: the total if the time of either phase shrank as its "
        "FLOPs do. In brackets after the context: tokens really used, where whole images do not fill it."
    )


def breakeven(rows: Iterable[Row]) -> str:
    """The rows of sweeps as Markdown: a sentence for each method and budget, then the table."""
    rows = [row for row in rows if is_swept(row)]
    found = breakevens(rows)
    if not found:
        raise Error("rows: there is no sweep among them")
    lines = ["# Where does it start to pay?", ""]
    lines += [f"- **{mine.label}**: {mine.sentence}." for mine in found]
    heads = list(_swept_cells(rows[0]))
    lines += ["", f"| method | {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1) + "---|"]
    for mine in found:
        lines += [f"| {mine.label} | {' | '.join(cells.values())} |" for cells in _swept_lines(mine)]
    notes = dict.fromkeys(
        f"{mine.label}: {row['note']}" for mine in found for row in mine.cells.values() if row["note"]
    )
    return "\n".join([*lines, "", _swept_words(rows), *(f"\n{note}." for note in notes)]) + "\n"


@dataclass(frozen=True)
class _Swept:
    """The table of sweeps, without the spread where the terminal is narrow, and the sentences."""

    found: list[Breakeven]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heads = list(_swept_cells(next(iter(self.found[0].cells.values()))))
        wide = options.max_width >= 130
        shown = heads if wide else [head for head in heads if head not in ("FLOP bound", "dense ms", "method ms")]
        table = Table(
            title=Text("Where does it start to pay?", style="bold"),
            title_justify="left",
            header_style="bold",
            pad_edge=False,
            padding=(0, 2, 0, 0),
            box=None,
        )
        table.add_column("method", overflow="fold")
        for head in shown:
            table.add_column(head, justify="left" if head == "verdict" else "right", no_wrap=True)
        for mine in self.found:
            for place, cells in enumerate(_swept_lines(mine)):
                texts = [Text(cells[head] if wide else cells[head].partition(" [")[0]) for head in shown[:-1]]
                word = cells["verdict"]
                tone = _TONES[_STATES.get(word, "bad")]
                table.add_row(Text("" if place else mine.label, style="bold"), *texts, Text(word, style=tone))
        yield table
        yield Text()
        for mine in self.found:
            yield Text.assemble((mine.label, "bold"), f": {mine.sentence}.")
        yield Text()


# --------------------------------------------------------------------------- html


def slug(text: str) -> str:
    """A name as a part of a file name.

    >>> slug("fastv:K=2,R=0.5")
    'fastv-K-2-R-0.5'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "unnamed"


def machine(device: str = "cpu") -> str:
    """This machine in words: its processor or accelerator, and the cores that may be used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = platform.processor() or platform.machine()
    about = Path("/proc/cpuinfo")
    if about.is_file():
        names = re.findall(r"^model name\s*:\s*(.+)$", about.read_text(), re.MULTILINE)
        name = names[0] if names else name
    if device.startswith("cuda"):
        import torch

        name = f"{torch.cuda.get_device_name(device)} with {name}"
    return f"{' '.join(name.split())}, {cores} core{'s' * (cores > 1)}, {platform.system()}"


def write(
    rows: Sequence[Row],
    out: str | Path,
    pictures: Mapping[str, Figure] | None = None,
    machines: str | Sequence[str] = (),
) -> Path:
    """Writes `report.html`, the pictures as PNG and SVG, and the tables as Markdown (`report.md`, of a sweep
    `breakeven.md`) into `out`.

    Pictures of what ran that an earlier call left in `out` are shown again, so a resumed comparison need not draw them
    twice.

    Args:
        rows: of one or several comparisons, and of their sweeps.
        out: folder, made if it is missing.
        pictures: figures of what ran: by the names of `shots`.
        machines: where the rows were measured, one or several, see `machine`.

    Returns:
        the path of the report.
    """
    from sparing.bench import pictures as draw

    rows, out = list(rows), Path(out)
    if not rows:
        raise Error("rows: there is nothing to report yet")
    drawn = {"pareto": draw.pareto(rows), "controls": draw.controls(rows), "bounds": draw.bounds(rows)}
    drawn |= {"breakeven": draw.breakeven(rows)} | dict(pictures or {})
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            if figure is not None:
                (out / f"{slug(name)}.png").write_bytes(draw.png(figure))
                (out / f"{slug(name)}.svg").write_text(draw.svg(figure), encoding="utf-8")
        if not all(map(is_swept, rows)):
            (out / "report.md").write_text(markdown(rows, machines), encoding="utf-8")
        if any(map(is_swept, rows)):
            (out / "breakeven.md").write_text(breakeven(rows), encoding="utf-8")
        path = out / FILE
        path.write_text(html(rows, _gallery(rows, out, drawn), machines), encoding="utf-8")
    except OSError as problem:
        raise Error(f"out: {out} cannot be written to: {problem.strerror or problem}") from problem
    return path


@dataclass(frozen=True)
class Shot:
    """A picture of what ran: `name` is its file's, `key` tells it from others whatever else is in the report."""

    kind: str
    title: str
    name: str
    key: tuple[str, ...]


def shots(found: Sequence[Experiment]) -> list[Shot]:
    """The pictures of what ran that a report of these experiments shows, if they are there."""
    shown = []
    for e in found:
        for kind in ("map", "kept"):
            for label in e.labels:
                title = titled(found, e, label)
                shown.append(Shot(kind, title, slug(f"{kind}-{title}"), (kind, e.model, e.task, label)))
        title = placed(found, e)
        shown.append(Shot("budgets", title, slug(f"budgets-{title}"), ("budgets", e.model, e.task)))
    return shown


def takes(out: Path, runs: Iterable[Path]) -> Callable[[str], bool]:
    """Which names may be in the folder of a report: any in that of an earlier report and of one of the runs, else
    folders that this library made, which no file of the report is mixed up with."""
    page = out / FILE
    earlier = page.is_file() and b"<title>sparing: " in page.read_bytes()[:2000] and not kind_of(content(out))
    if earlier or out.resolve() in [run.resolve() for run in runs]:
        return lambda name: True
    return lambda name: bool(kind_of(content(out / name)))


def gather(runs: Sequence[tuple[Path, Sequence[Row]]], out: Path) -> list[Row]:
    """The rows of several comparisons and of their sweeps; pictures of what ran are copied to `out` under the names of
    one report.

    Args:
        runs: folder and rows of each.
        out: folder, made if it is missing.
    """
    from sparing.bench.sweep import read_sweep

    rows = [row for _, mine in runs for row in mine]
    rows += [row for folder, _ in runs for row in read_sweep(folder)]
    names = {shot.key: shot.name for shot in shots(experiments(rows))}
    out.mkdir(parents=True, exist_ok=True)
    for folder, mine in runs:
        for shot in shots(experiments(mine)):
            for suffix in (".svg", ".png"):
                file = folder / f"{shot.name}{suffix}"
                if file.is_file():
                    (out / f"{names[shot.key]}{suffix}").write_bytes(file.read_bytes())
    return rows


def _gallery(rows: Sequence[Row], out: Path, drawn: Mapping[str, Figure | None]) -> dict[str, str]:
    """Name -> SVG of the pictures to show: those just drawn, and earlier ones of what ran in these rows."""
    names = [slug(name) for name, figure in drawn.items() if figure is not None]
    names += [shot.name for shot in shots(experiments(rows))]
    files = {name: out / f"{name}.svg" for name in dict.fromkeys(names)}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}


def markdown(rows: Iterable[Row], machines: str | Sequence[str] = ()) -> str:
    """The tables of the page, their sentences and what the columns mean, to paste where Markdown is read."""
    machines = listed(machines)
    rows = [row for row in rows if not is_swept(row)]
    found = experiments(rows)
    lines = [summary.opening(found, machines), ""]
    for experiment in found:
        table = _table(experiment)
        lines += [f"## {table['model']} on {table['task']}", "", f"{table['metric']}.", ""]
        lines += [f"- {sentence}" for _, sentence in summary.findings(experiment)]
        heads = ["method", *(head for head, _, _ in table["heads"]), "verdict"]
        lines += ["", f"| {' | '.join(heads)} |", "|---|" + "---:|" * len(table["heads"]) + "---|"]
        for line in table["lines"]:
            cells = (line["name"], *line["cells"], line["verdict"])
            lines.append("|" + "|".join(f" {cell.replace('|', '/')} " for cell in cells) + "|")
        lines += ["", "; ".join(f"{head}: {meaning}" for head, meaning, _ in table["heads"]) + ".", ""]
    lines += [f"- {name}: {text}" for name, text in _facts(rows, machines)]
    return "\n".join(escape(line, quote=False) for line in lines) + "\n"


def html(rows: Sequence[Row], gallery: Mapping[str, str], machines: str | Sequence[str] = ()) -> str:
    """The page. `gallery` holds SVG elements by name; everything else in it is escaped."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    machines = listed(machines)
    found = experiments(rows)
    environment = Environment(
        loader=PackageLoader("sparing.bench", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    script = _SCRIPT.strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    there = [shot for shot in shots(found) if shot.name in gallery]
    return environment.get_template("report.html.j2").render(
        title=" · ".join(f"{e.name} on {e.task}" for e in found),
        date=datetime.now().astimezone().strftime("%-d %B %Y, %H:%M"),
        opening=summary.opening(found, machines),
        best=[
            (axis, AXES.get(axis, axis), e, [b for b in summary.best(e) if b.line.axis == axis])
            for e in found
            for axis in e.axes
        ],
        findings=[(e.name if len(found) > 1 else "", *pair) for e in found for pair in summary.findings(e)],
        tables=[_table(e) for e in found],
        swept=[
            (mine.label, mine.sentence, [list(cells.values()) for cells in _swept_lines(mine)])
            for mine in breakevens(rows)
        ],
        swept_heads=next((list(_swept_cells(row)) for row in rows if is_swept(row)), []),
        swept_words=_swept_words(rows),
        swept_tones=_STATES,
        figures={name: Markup(_unique(svg, name)) for name, svg in gallery.items()},
        maps=[shot for shot in there if shot.kind == "map"],
        kept=[shot for shot in there if shot.kind == "kept"],
        budgets=[shot for shot in there if shot.kind == "budgets"],
        facts=_facts(rows, machines),
        percent=percent,
        script=Markup(script),
        digest=digest,
    )


def _unique(svg: str, prefix: str) -> str:
    """An SVG whose ids cannot meet those of another one on the page; HTML needs no namespaces."""
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    prefix = re.sub(r"[^A-Za-z0-9]", "-", prefix)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)


def _table(experiment: Experiment) -> dict[str, Any]:
    columns = _shown(experiment)
    lines: list[dict[str, Any]] = []
    if experiment.dense is not None:
        lines.append(
            {
                "name": "dense",
                "cells": [_dense_cell(experiment, c[0]) for c in columns],
                "verdict": "reference",
                "tone": "quiet",
            }
        )
    for line in experiment.lines:
        words, tone = line.verdict
        lines.append(
            {
                "name": line.label,
                "cells": [c[2](experiment, line) for c in columns],
                "verdict": words,
                "tone": tone,
                "note": line.row.get("note"),
            }
        )
    return {
        "model": experiment.name,
        "task": experiment.task,
        "metric": _metric(experiment),
        "heads": [
            (
                head,
                meaning,
                head in SPOKEN.values() or head in ("down-s.", "freq.", "gate", "static", "const.", "termin."),
            )
            for head, meaning, _ in columns
        ],
        "lines": lines,
    }


def _facts(rows: Sequence[Row], machines: Sequence[str]) -> list[tuple[str, str]]:
    """What ran where: machine, number types, seeds, versions, time."""

    def every(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row.get(key) is not None))

    versions: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, version in (row.get("versions") or {}).items():
            versions.setdefault(name, {})[str(version)] = None
    facts = [
        ("Model", every("model")),
        ("Task", every("task")),
        ("Machine", "; ".join(machines)),
        ("Device", every("device")),
        ("Number type", every("dtype")),
        ("Seeds", every("seed")),
    ]
    facts += [(name, ", ".join(found)) for name, found in versions.items()]
    for name, key in (("Peak arithmetic", "peak_flops"), ("Peak memory traffic", "peak_bandwidth")):
        unit = "GFLOP/s" if key == "peak_flops" else "GB/s"
        peaks = dict.fromkeys(f"{row[key] / 1e9:.1f} {unit}, measured" for row in rows if row.get(key))
        facts.append((name, ", ".join(peaks)))
    spent = sum(row.get("seconds") or 0 for row in rows)
    facts.append(("Time measured", f"{spent / 60:.1f} minutes in {len(rows)} rows"))
    return [(name, text) for name, text in facts if text]


_SCRIPT = """
const value = text => isNaN(parseFloat(text)) ? text : parseFloat(text);
const rank = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
for (const head of document.querySelectorAll("th[data-sort]")) head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], at = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  const key = row => value(row.cells[at].textContent.trim());
  const rows = [...body.rows].filter(row => !row.classList.contains("dense"));
  rows.sort((a, b) => (up ? 1 : -1) * rank(key(a), key(b)));
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows);
});
"""

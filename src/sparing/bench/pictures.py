"""Pictures of a comparison: pure functions from rows or from what ran to matplotlib figures.

Every colour is one of a few fixed ones, so that `svg` can hand them over to the style sheet of the page: the same
picture is then readable on a light and on a dark ground. Nothing here needs a display or touches matplotlib's global
state.
"""

from __future__ import annotations

import io
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from sparing.grid.trace import Trace

from sparing.bench.summary import (
    CONTROLS,
    METRICS,
    PHASES,
    SPOKEN,
    Breakeven,
    Experiment,
    Line,
    Row,
    breakevens,
    experiments,
    front,
    percent,
    titled,
)
from sparing.grid.method import Error

INK, MUTED, RULE, CARD = "#1f2430", "#6a7180", "#dfe2e8", "#fefefe"
ORACLE, RANDOM = "#12855a", "#8a909c"
SERIES = (
    "#0a6cb4",
    "#d0560e",
    "#8a4fb0",
    "#b8860b",
    "#c2396f",
    "#2a8c9b",
)  #: told apart with any colour vision, and by marker
MARKERS = ("o", "s", "D", "^", "v", "P")
VISUAL, TEXT, STEP = "#e06a1f", "#2f86cc", "#9a60c0"  #: cells of a compute map: the same on light and dark

_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", CARD: "card", ORACLE: "oracle", RANDOM: "random"} | {
    colour: f"series{i}" for i, colour in enumerate(SERIES)
}
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": CARD,
    "savefig.facecolor": CARD,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "sparing",
}


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, NDArray[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def png(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as a PNG on a white ground."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": "sparing"})
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element for a page, in the page's own colours (`--ink`, …) where it has them."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Type": None, "Format": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    wide = round(100 * figure.get_figwidth())  # pixels at which its letters have the size of the page's
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="max-width: {wide}px"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for colour, name in _VARIABLES.items():
        text = re.sub(colour, f"var(--{name}, {colour})", text, flags=re.IGNORECASE)
    return text


_MADE = "made by sparing"  # in the file, by which it is known again


def save(figure: Figure, path: Path) -> None:
    """Writes the figure in the format that the file's name says, .png, .svg or .pdf: whole, or not at all.

    Raises:
        Error: the file cannot be written.
    """
    beside = path.with_name(f"{path.stem}.new{path.suffix}")
    key = "Software" if path.suffix.lower() == ".png" else "Creator"
    with _style():
        try:
            figure.savefig(beside, dpi=160, metadata={key: _MADE})
            os.replace(beside, path)
        except OSError as problem:
            beside.unlink(missing_ok=True)
            raise Error(f"out: {path} cannot be written: {problem.strerror or problem}") from problem


def made_here(path: Path) -> bool:
    """Whether a file is a picture that `save` wrote, and so may be written again."""
    return path.is_file() and _MADE.encode() in path.read_bytes()


# --------------------------------------------------------------------------- rows


def _phases(lines: Sequence[Line]) -> list[str]:
    """The phases that were timed."""
    return [phase for phase, key in PHASES.items() if any(line.row.get(key) is not None for line in lines)]


def looks_of(found: Sequence[Experiment]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each method, the same in all pictures of one report."""
    names = dict.fromkeys(name for experiment in found for name in experiment.labels)
    return {name: (SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def pareto(rows: Sequence[Row]) -> Figure | None:
    """Quality loss against measured speed-up, a row of panels for each axis and a column for each timed phase.

    A method is a line over its budgets with a horizontal bar from the 20th to the 80th percentile of the paired ratios.
    Its controls are grey: the random one as a band, mean ± standard deviation over seeds. The pale line joins the
    Pareto front, whose points are filled. None where no method was timed.
    """
    found = experiments(rows)
    panels = [(e, axis, phase) for e in found for axis in e.axes for phase in _phases(e.of(axis))]
    if not panels:
        return None
    strips = list(dict.fromkeys((e.model, e.task, axis) for e, axis, _ in panels))
    phases = [phase for phase in PHASES if any(phase == p for _, _, p in panels)]
    looks = looks_of(found)
    with _style():
        figure, axes = _figure(5.2 * len(phases), 3.7 * len(strips) + 0.4, len(strips), len(phases))
        for ax in axes.flat:
            ax.set_visible(False)
        for experiment, axis, phase in panels:
            ax = axes[strips.index((experiment.model, experiment.task, axis)), phases.index(phase)]
            ax.set_visible(True)
            ax.set_title(f"{phase.capitalize()} · {axis} · {experiment.name}")
            ax.set_xlabel(f"measured {phase} speed-up")
            ax.set_ylabel(_lost(experiment.metric))
            _pareto_panel(ax, experiment, axis, PHASES[phase], looks)
        lines = [line for e, axis, _ in panels for line in e.of(axis)]
        _legend(figure, lines, extra=[Line2D([], [], color=INK, alpha=0.15, lw=7, label="Pareto front")])
        figure.draw_without_rendering()  # the layout has to stand before words can be placed between the points
        figure.set_layout_engine("none")
        for ax in axes.flat:
            _place_words(ax)
    return figure


def _pareto_panel(ax: Axes, experiment: Experiment, axis: str, key: str, looks: Mapping[str, tuple[str, str]]) -> None:
    lines = [
        line
        for line in experiment.of(axis)
        if line.ran and line.row.get(key) and line.row.get("quality_loss_pct") is not None
    ]
    points = [(1.0, 0.0)] + [(line.row[key], line.row["quality_loss_pct"]) for line in lines]
    best = front(points)
    _loss_axis(ax, [loss for _, loss in points] + _control_losses(lines))
    ax.axvline(1, color=MUTED, lw=0.8, ls=(0, (2, 3)), zorder=1)
    ax.plot(1, 0, "*", color=INK, ms=11, zorder=6)
    words: list[_Word] = [_Word(1.0, 0.0, "dense", INK, 9, "bold")]
    flat = all(abs(speed - 1) < _FLAT for speed, _ in points)
    if flat:
        ax.set_xlabel(f"{ax.get_xlabel()} (within {100 * _FLAT:.0f} % of dense: no front, no controls)")
    else:
        ax.plot(*zip(*[points[i] for i in best]), color=INK, alpha=0.12, lw=9, solid_capstyle="round", zorder=1)
    for name in dict.fromkeys(line.label for line in lines):
        mine = [line for line in lines if line.label == name]
        colour, marker = looks[name]
        for kind in () if flat else _ORDER:
            known = [
                (at, loss) for line in mine if (loss := line.control(kind)) and (at := _control_speed(line, kind, key))
            ]
            _draw_control(ax, kind, known)
        x, y = [line.row[key] for line in mine], [line.row["quality_loss_pct"] for line in mine]
        ax.plot(x, y, color=colour, lw=1.7, zorder=4)
        for line, px, py in zip(mine, x, y):
            low, high = line.row.get(f"{key}_low") or px, line.row.get(f"{key}_high") or px
            ax.plot((min(low, px), max(high, px)), (py, py), color=colour, lw=1.1, alpha=0.55, zorder=3)
            filled = not flat and points.index((px, py)) in best
            ax.plot(px, py, marker, color=colour, mfc=colour if filled else CARD, ms=6.5, mew=1.5, zorder=5)
            words.append(_Word(px, py, percent(line.keep).replace(" ", ""), colour, 7.5, "normal"))
        words.insert(0, _Word(x[-1], y[-1], name, colour, 9, "bold"))
    speeds = [speed for speed, _ in points] + [
        at for line in lines for kind in line.controls if (at := _control_speed(line, kind, key))
    ]
    low, high = min(*speeds, 0.95), max(*speeds, 1.25)
    ax.set_xlim(low - 0.07 * (high - low), high + 0.12 * (high - low))
    ax.margins(y=0.12)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax._sparing_words = words  # type: ignore[attr-defined]


def _control_speed(line: Line, kind: str, key: str) -> float | None:
    """A control's own speed, else the method's, because it spends the same; smaller images do not."""
    own = line.control(kind, key)
    return own.mean if own else None if kind == "downsample" else float(line.row[key])


_FLAT = 0.08  # a phase that the methods of an axis do not change: noise, not a result


@dataclass(frozen=True)
class _Word:
    x: float
    y: float
    text: str
    colour: str
    size: float
    weight: str


def _place_words(ax: Axes) -> None:
    """Write each word beside its point, where it covers least of points, lines and other words: one after the other."""
    scale = 72 / ax.figure.dpi
    box = ax.get_window_extent()
    left, bottom, right, top = box.x0 * scale, box.y0 * scale, box.x1 * scale, box.y1 * scale
    words = getattr(ax, "_sparing_words", [])
    solid = [tuple(ax.transData.transform((word.x, word.y)) * scale) for word in words]
    thin = [spot for line in ax.lines for spot in _along(ax, line, scale)]
    taken: list[tuple[float, float, float, float]] = []
    for word in words:
        px, py = ax.transData.transform((word.x, word.y)) * scale
        wide, high = 0.60 * word.size * len(word.text), 1.15 * word.size
        spots = []
        for rank, (dx, dy) in enumerate(_AROUND):
            x0 = px + dx * 8 - (wide if dx < 0 else wide / 2 if dx == 0 else 0)
            y0 = py + dy * 8 - (high if dy < 0 else high / 2 if dy == 0 else 0)
            x1, y1 = x0 + wide, y0 + high
            cost = 0.02 * rank + 9 * (x0 < left or x1 > right or y0 < bottom or y1 > top)
            cost += sum(4 for a, b, c, d in taken if x0 < c and a < x1 and y0 < d and b < y1)
            cost += sum(2 for a, b in solid if x0 - 4 < a < x1 + 4 and y0 - 4 < b < y1 + 4)
            cost += sum(0.12 for a, b in thin if x0 < a < x1 and y0 < b < y1)
            spots.append((cost, (x0, y0, x1, y1)))
        x0, y0, x1, y1 = min(spots)[1]
        taken.append((x0, y0, x1, y1))
        ax.annotate(
            word.text,
            (word.x, word.y),
            (x0 - px, y0 - py + 0.2 * word.size),
            textcoords="offset points",
            va="baseline",
            ha="left",
            fontsize=word.size,
            fontweight=word.weight,
            color=word.colour,
            zorder=7,
            annotation_clip=False,
        )


_AROUND = (
    (1, 0),
    (0, 1),
    (0, -1),
    (-1, 0),
    (1, 1),
    (1, -1),
    (-1, 1),
    (-1, -1),
    (1, 2),
    (1, -2),
    (-1, 2),
    (-1, -2),
    (0, 2),
    (0, -2),
)


def _along(ax: Axes, line: Line2D, scale: float) -> Iterator[tuple[float, float]]:
    """Points every few points along a line, where words would cover it."""
    if line.get_transform() != ax.transData:
        return
    path = ax.transData.transform(np.column_stack(line.get_data()).astype(float)) * scale
    for (ax_, ay), (bx, by) in pairwise(path):
        for t in np.linspace(0, 1, max(2, int(np.hypot(bx - ax_, by - ay) // 4))):
            yield ax_ + t * (bx - ax_), ay + t * (by - ay)


def _lost(metric: str) -> str:
    return "bits per byte added, %" if metric == "bits_per_byte" else f"{METRICS.get(metric, metric)} lost, %"


def _control_losses(lines: Sequence[Line]) -> list[float]:
    return [spread.mean for line in lines for kind in line.controls if (spread := line.control(kind))]


def _draw_control(ax: Axes, kind: str, known: Sequence[tuple[float, Any]]) -> None:
    if not known:
        return
    x, mean = [x for x, _ in known], np.array([loss.mean for _, loss in known])
    if kind == "random":
        spread = np.array([loss.deviation for _, loss in known])
        ax.fill_between(x, mean - spread, mean + spread, color=RANDOM, alpha=0.25, lw=0, zorder=1.5)
        ax.plot(x, mean, color=RANDOM, lw=1.2, marker=".", ms=5, zorder=2)
        if len(x) == 1:
            ax.plot(x * 2, (*(mean - spread), *(mean + spread)), color=RANDOM, alpha=0.5, lw=4, zorder=1.5)
    else:
        colour, dashes, marker = _CONTROL_LOOKS[kind]
        ax.plot(x, mean, color=colour, lw=1.4, ls=dashes, marker=marker, ms=4, mfc=CARD, zorder=2.5)


_ORDER = CONTROLS
_CONTROL_LOOKS: dict[str, tuple[str, Any, str]] = {
    "uniform": (RANDOM, (0, (5, 2.5)), "s"),
    "static": (RANDOM, (0, (3, 1.5, 1, 1.5)), "D"),
    "constant": (RANDOM, (0, (1, 1)), "P"),
    "termination": (RANDOM, (0, (4, 1, 1, 1, 1, 1)), "X"),
    "frequency": (RANDOM, (0, (5, 2.5)), "D"),
    "gate": (RANDOM, (0, (3, 1.5, 1, 1.5)), "^"),
    "downsample": (RANDOM, (0, (1, 1.5)), "v"),
    "oracle": (ORACLE, (0, (1, 1.5)), "o"),
}


_SPAN = 5.0  # least height of a loss axis, %


def _loss_axis(ax: Axes, losses: Sequence[float]) -> None:
    """Per cent lost; logarithmic above 10 % where a loss of bits per byte runs far beyond 100 %."""
    ax.set_ylim(
        min(0.0, *losses) - 0.06 * _SPAN, max(_SPAN, *losses)
    )  # where all lose next to nothing: noise is not stretched
    ax.autoscale(enable=max(losses) >= _SPAN, axis="y")
    if max(losses) > 150:
        ax.set_yscale("symlog", linthresh=10, linscale=1.2)
        ticks = [0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
        ax.set_yticks([tick for tick in ticks if tick <= 1.5 * max(losses)])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(figure: Figure, lines: Sequence[Line], extra: Sequence[Any] = ()) -> None:
    kinds = [kind for kind in SPOKEN if any(kind in line.controls for line in lines)]
    handles = list(extra)
    for kind in kinds:
        if kind == "random":
            seeds = max(len(line.controls.get("random", ())) for line in lines)
            handles.append(Patch(color=RANDOM, alpha=0.45, lw=0, label=f"random control, mean ± s.d. of {seeds} seeds"))
        else:
            colour, dashes, marker = _CONTROL_LOOKS[kind]
            handles.append(
                Line2D([], [], color=colour, ls=dashes, marker=marker, ms=4, mfc=CARD, label=f"{SPOKEN[kind]} control")
            )
    if handles:
        columns = min(len(handles), 5, max(1, int(figure.get_figwidth() / 1.9)))  # as many as the picture is wide
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, labelcolor=MUTED)


def controls(rows: Sequence[Row]) -> Figure | None:
    """Each method against its own controls, budget by budget: quality loss over `keep`. None where no control ran."""
    found = experiments(rows)
    methods = [
        (e, name, [line for line in e.lines if line.label == name and line.ran]) for e in found for name in e.labels
    ]
    panels = [(e, name, mine) for e, name, mine in methods if any(line.controls for line in mine)]
    if not panels:
        return None
    columns, looks = min(len(panels), 4), looks_of(found)
    with _style():
        figure, axes = _figure(
            2.6 * columns + 0.4, 2.7 * -(-len(panels) // columns) + 0.5, -(-len(panels) // columns), columns
        )
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        for ax, (experiment, name, mine) in zip(axes.flat, panels):
            colour, marker = looks[name]
            budgets = sorted({line.keep for line in mine}, reverse=True)
            for kind in _ORDER:
                known = [(budgets.index(line.keep), loss) for line in mine if (loss := line.control(kind))]
                _draw_control(ax, kind, known)
            own = [
                (budgets.index(line.keep), loss)
                for line in mine
                if (loss := line.row.get("quality_loss_pct")) is not None
            ]
            _loss_axis(ax, [loss for _, loss in own] + _control_losses(mine))
            ax.plot([x for x, _ in own], [loss for _, loss in own], color=colour, marker=marker, lw=2, ms=6.5, zorder=5)
            ax.axhline(0, color=INK, lw=0.8, zorder=1)
            ax.set_xticks(range(len(budgets)), [percent(keep).replace(" ", "") for keep in budgets])
            ax.grid(visible=False, axis="x")
            ax.margins(x=0.12, y=0.1)
            ax.set_title(name, color=colour)
            ax.set_xlabel(f"kept ({mine[0].axis}{f', {experiment.name}' if len(found) > 1 else ''})")
            ax.set_ylabel(_lost(experiment.metric))
        _legend(figure, [line for _, _, mine in panels for line in mine])
    return figure


def bounds(rows: Sequence[Row]) -> Figure | None:
    """Realised speed-up (bar) inside what the work left allows (pale), with their ratio, the efficiency."""
    found = experiments(rows)
    bars = [(e, line) for e in found for line in e.lines if line.ran and line.row.get("bound") and line.realised]
    if not bars:
        return None
    looks = looks_of(found)
    with _style():
        figure, axes = _figure(8.6, 0.34 * len(bars) + 0.16 * len({(id(e), b.label) for e, b in bars}) + 1.1)
        ax, y, ticks, names = axes[0, 0], 0.0, [], []
        widest = max(max(line.row["bound"], line.realised or 0) for _, line in bars)
        previous = None
        for experiment, line in bars:
            colour, _ = looks[line.label]
            name = titled(found, experiment, line.label)
            y += 1.0 if previous in (None, name) else 1.5
            previous = name
            bound, real = line.row["bound"], line.realised or 0.0
            ax.barh(y, bound, 0.72, color=colour, alpha=0.16, lw=0)
            ax.barh(y, real, 0.72, color=colour, lw=0)
            ax.plot((bound, bound), (y - 0.36, y + 0.36), color=colour if real < bound else CARD, lw=1.6)
            text = f"{real:.2f}× of {bound:.2f}×  ({100 * real / bound:.0f} %)"
            ax.text(max(bound, real) + 0.015 * widest, y, text, va="center", fontsize=8.5)
            ticks.append(y)
            names.append(f"{name}  {percent(line.keep).replace(' ', '')}")
        ax.axvline(1, color=MUTED, lw=0.9, ls=(0, (2, 3)))
        ax.set_yticks(ticks, names)
        ax.tick_params(axis="y", colors=INK)
        ax.set_ylim(y + 0.7, 0.3)
        ax.set_xlim(0, 1.24 * widest)
        ax.grid(visible=False, axis="y")
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        ax.set_xlabel("speed-up against dense")
        handles = [
            Patch(color=MUTED, lw=0, label="measured"),
            Patch(color=MUTED, alpha=0.2, lw=0, label="allowed by the work left (bound)"),
        ]
        ax.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, labelcolor=MUTED, borderaxespad=0.2
        )
    return figure


# --------------------------------------------------------------------------- sweeps

FASTER, SLOWER = SERIES[0], SERIES[1]
_STRONGEST = 0.6  # opacity of the strongest colour of a map, so that numbers stay readable on it


def breakeven(rows: Sequence[Row]) -> Figure | None:
    """Speed-up of a whole generation over context length and batch size, a panel for each method and budget.

    Blue is faster than dense, orange slower, the stronger the further from 1. Hatched cells are undecided: the 20th to
    80th percentile of their pairs lies around 1. The thick line parts the cells that pay from those that do not. None
    where no sweep was measured.
    """
    found = breakevens(rows)
    if not found:
        return None
    ratios = [row["total_speedup"] for m in found for row in m.cells.values() if row.get("total_speedup")]
    widest = max([math.log(2), *(abs(math.log(ratio)) for ratio in ratios)])
    budgets = len({row["keep"] for m in found for row in m.cells.values()})
    across, up = max(len(m.contexts) for m in found), max(len(m.batches) for m in found)
    width = min(max(0.8 * across + 0.9, 4.2), 6.4)
    columns = min(max(1, int(13 / width)), budgets if budgets > 1 else len(found))
    lines = -(-len(found) // columns)
    with _style():
        figure, axes = _figure(width * columns, (max(0.62 * up, 1.0) + 1.2) * lines + 0.55, lines, columns)
        for ax in axes.flat[len(found) :]:
            ax.set_visible(False)
        for place, (ax, mine) in enumerate(zip(axes.flat, found)):
            _breakeven_panel(ax, mine, widest, int(width * 14))
            if place % columns == 0:
                ax.set_ylabel("batch")
            if place + columns >= len(found):
                tokens = next(iter(mine.cells.values()))["tokens"]
                ax.set_xlabel(f"context: tokens of a prompt, before {tokens} generated ones")
        handles: list[Any] = [
            Patch(fc=FASTER, alpha=_STRONGEST, lw=0, label="faster than dense"),
            Patch(fc=SLOWER, alpha=_STRONGEST, lw=0, label="slower"),
            Patch(fc="none", ec=MUTED, hatch="////", lw=0, label="undecided"),
            Line2D([], [], color=INK, lw=3, label="break-even"),
        ]
        fits = max(2, int(figure.get_figwidth() / 1.9))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, fits), labelcolor=MUTED)
    return figure


def _breakeven_panel(ax: Axes, mine: Breakeven, widest: float, letters: int) -> None:
    contexts, batches = mine.contexts, mine.batches
    states = {(x, y): mine.state(c, b) for x, c in enumerate(contexts) for y, b in enumerate(batches)}
    for (x, y), state in states.items():
        row = mine.cells.get((contexts[x], batches[y]), {})
        if state is None:
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=MUTED, alpha=0.16, lw=0))
            ax.text(x, y, row.get("status", "–"), ha="center", va="center", fontsize=7.5, color=MUTED)
            continue
        ratio = row["total_speedup"]
        strength = _STRONGEST * min(1.0, abs(math.log(ratio)) / widest) ** 0.7
        ax.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, fc=FASTER if ratio > 1 else SLOWER, alpha=max(strength, 0.05), lw=0)
        )
        if state == "undecided":
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc="none", ec=MUTED, alpha=0.4, hatch="////", lw=0))
        ax.text(x, y + 0.05, f"{ratio:.2f}×", ha="center", va="center", fontsize=9.5, fontweight="bold")
        spread = f"{row['total_speedup_low']:.2f}–{row['total_speedup_high']:.2f}"
        ax.text(x, y - 0.27, spread, ha="center", va="center", fontsize=6.5)
    for (x, y), state in states.items():
        for dx, dy, ends in ((1, 0, ((0.5, 0.5), (-0.5, 0.5))), (0, 1, ((-0.5, 0.5), (0.5, 0.5)))):
            beside = states.get((x + dx, y + dy))
            if state and beside and (state == "pays") != (beside == "pays"):
                ax.plot(
                    [x + end for end in ends[0]], [y + end for end in ends[1]], color=INK, lw=3, solid_capstyle="round"
                )
    ax.set_xlim(-0.5, len(contexts) - 0.5)
    ax.set_ylim(-0.5, len(batches) - 0.5)
    ax.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    ax.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    told = textwrap.wrap(mine.sentence, letters)
    ax.set_title(mine.label, pad=9 + 11 * len(told))
    ax.annotate("\n".join(told), (0, 1), (0, 6), "axes fraction", "offset points", fontsize=8, color=MUTED, va="bottom")


# --------------------------------------------------------------------------- what ran


@dataclass(frozen=True)
class Footprint:
    """Which cells ran for one sample.

    Attributes:
        prompt: (layers, tokens) bool: the token of the prompt ran in the layer.
        visual: (tokens,) bool: the token stands for a part of the image.
        steps: (layers, steps) bool: the layer ran when that token was generated.
        share: (layers,) what is left of a layer: of its visual tokens (of all tokens where there are none, of the
            generated ones where only they skip), or of its parameters where weights were cut.
        image: (height, width, 3) uint8, the picture that was asked about; None for text.
        experts: `prompt` is (layers, experts) bool instead: the expert stays. `share` is then of the experts.
    """

    prompt: NDArray[np.bool_]
    visual: NDArray[np.bool_]
    steps: NDArray[np.bool_]
    share: NDArray[np.float64]
    image: NDArray[np.uint8] | None = None
    experts: bool = False

    @property
    def layers(self) -> int:
        return len(self.share)


def compute_map(footprints: Mapping[str, Footprint], title: str = "") -> Figure:
    """Token × layer: what ran, a strip for each budget; beside it how much of every layer is left.

    Prompt tokens stand left (text and visual ones in their colours), generated ones right of them; pale cells did not
    run. Where experts were removed, the cells are layer × expert.
    """
    items = list(footprints.items())
    layers, steps = items[0][1].layers, max(print_.steps.shape[1] for _, print_ in items)
    tokens = max(print_.prompt.shape[1] for _, print_ in items)
    shown = max(tokens // 8, 1) if steps else 0
    with _style():
        height = min(max(0.13 * layers, 1.15), 4.5)
        widths = [max(tokens, 1), *([max(shown, tokens // 6, 1)] if steps else []), max(tokens, 1) * 0.22]
        figure, axes = _figure(
            9.6, (height + 0.62) * len(items) + 0.75, len(items), len(widths), width_ratios=widths, sharey=True
        )
        for row, (name, seen) in zip(axes, items):
            _cells(row[0], _paint(seen.prompt, np.where(seen.visual, 0, 1), (VISUAL, TEXT)))
            row[0].set_title(name)
            row[0].set_ylabel("layer")
            if steps:
                _cells(row[1], _paint(seen.steps, np.zeros(seen.steps.shape[1], int), (STEP,)))
                row[1].xaxis.set_major_locator(MaxNLocator(4, integer=True))
            _share_bars(row[-1], seen.share)
            row[-1].set_title(f"{100 * seen.share.mean():.0f} % left", fontweight="normal", fontsize=9, color=MUTED)
        experts = any(seen.experts for _, seen in items)
        first = "expert" if experts else "token of the prompt"
        last = "experts left" if experts else "left of the layer"
        for ax, words in zip(axes[-1], [first, *(["generated"] if steps else []), last]):
            ax.set_xlabel(words)
        if title:
            figure.suptitle(title, fontweight="bold", x=0.01, ha="left")
        visual, text = any(seen.visual.any() for _, seen in items), any((~seen.visual).any() for _, seen in items)
        handles = [
            Patch(color=c, label=n)
            for c, n, on in (
                (VISUAL, "visual token ran", visual),
                (TEXT, "expert stays" if experts else "text token ran", text),
                (STEP, "generated token ran", bool(steps)),
            )
            if on
        ]
        figure.legend(
            handles=[*handles, Patch(fc=RULE, label="removed" if experts else "did not run")],
            loc="outside lower left",
            ncols=4,
            labelcolor=MUTED,
        )
    return figure


def _paint(ran: NDArray[np.bool_], kind: NDArray[Any], colours: tuple[str, ...]) -> NDArray[np.float64]:
    """(layers, tokens, 4): the colour of a cell that ran, a faint grey for one that did not."""
    cells = np.zeros((*ran.shape, 4))
    cells[..., :3], cells[..., 3] = to_rgb(MUTED), 0.16
    palette = np.array([to_rgb(colour) for colour in colours])
    cells[ran, :3] = np.broadcast_to(palette[kind], (*ran.shape, 3))[ran]
    cells[ran, 3] = 1
    return cells


def _cells(ax: Axes, cells: NDArray[np.float64]) -> None:
    layers, tokens = cells.shape[:2]
    ax.imshow(
        cells, aspect="auto", interpolation="nearest", extent=(0, max(tokens, 1), layers - 0.5, -0.5), origin="upper"
    )
    for layer in range(1, layers):
        ax.axhline(layer - 0.5, color=CARD, lw=min(1.2, 14 / layers))
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.yaxis.set_major_locator(MaxNLocator(min(layers, 8), integer=True))


def _share_bars(ax: Axes, share: NDArray[np.float64]) -> None:
    ax.barh(range(len(share)), np.ones(len(share)), 0.72, color=MUTED, alpha=0.16, lw=0)
    ax.barh(range(len(share)), share, 0.72, color=MUTED, lw=0)
    ax.set_xlim(0, 1)
    ax.set_xticks((0, 0.5, 1), ("0", "50 %", "100 %"))
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def budgets(
    shares: Mapping[str, Mapping[str, NDArray[np.float64]]], colours: Mapping[str, str] | None = None
) -> Figure:
    """How much of each layer is left: a row for each method, a column for each of its budgets, a bar for each layer.

    Args:
        shares: method -> budget -> (layers,) share.
        colours: of the methods, where they have some already.
    """
    columns = max(len(mine) for mine in shares.values())
    with _style():
        figure, axes = _figure(2.7 * columns + 1.0, 1.55 * len(shares) + 0.5, len(shares), columns, sharey=True)
        for i, (row, (name, mine)) in enumerate(zip(axes, shares.items())):
            for ax in row[len(mine) :]:
                ax.set_visible(False)
            for j, (ax, (budget, share)) in enumerate(zip(row, mine.items())):
                colour = (colours or {}).get(name, SERIES[i % len(SERIES)])
                ax.bar(range(len(share)), np.ones(len(share)), 0.78, color=colour, alpha=0.13, lw=0)
                ax.bar(range(len(share)), share, 0.78, color=colour, lw=0)
                ax.set_title(f"{name}  {budget}" if j == 0 else budget, color=colour)
                ax.set_ylim(0, 1.02)
                ax.set_yticks((0, 0.5, 1), ("0", "50 %", "100 %"))
                ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
                ax.grid(visible=False, axis="x")
                ax.spines["left"].set_visible(False)
                if i == len(shares) - 1:
                    ax.set_xlabel("layer")
    return figure


def kept(footprints: Mapping[str, Footprint], most: int = 5) -> Figure | None:
    """The picture at some layers, patches that no longer run darkened, a row for each budget; None without one."""
    items = [(name, seen) for name, seen in footprints.items() if seen.image is not None and seen.visual.any()]
    items = [(name, seen) for name, seen in items if _square(int(seen.visual.sum()), seen.image)]
    if not items:
        return None
    chosen = [_layers_worth_showing(seen, most) for _, seen in items]
    columns = max(map(len, chosen))
    with _style():
        figure, axes = _figure(1.85 * columns + 0.6, 2.1 * len(items) + 0.2, len(items), columns)
        for row, (name, seen), layers in zip(axes, items, chosen):
            for ax in row[len(layers) :]:
                ax.set_visible(False)
            for ax, layer in zip(row, layers):
                alive = seen.prompt[layer][seen.visual]
                ax.imshow(_veiled(seen.image, alive), interpolation="nearest")
                ax.set_title(
                    f"layer {layer}: {int(alive.sum())}", fontsize=8.5, fontweight="normal", loc="center", pad=4
                )
                ax.set_xticks([])
                ax.set_yticks([])
                ax.grid(visible=False)
                ax.spines[:].set_visible(False)
            row[0].set_ylabel(name, color=INK, fontweight="bold", fontsize=9)
    return figure


def _square(tokens: int, image: NDArray[np.uint8] | None) -> tuple[int, int] | None:
    """(rows, columns) of the patches, as near to the picture's shape as their number allows; None if nothing fits."""
    if image is None or not tokens:
        return None
    ratio = image.shape[0] / image.shape[1]
    sizes = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    rows, columns = min(sizes, key=lambda size: abs(np.log(size[0] / size[1] / ratio)))
    return (rows, columns) if abs(np.log(rows / columns / ratio)) < 0.35 else None


def _layers_worth_showing(seen: Footprint, most: int) -> list[int]:
    """The first layer, those where the set of visual tokens changes, and the last; evenly thinned to `most`."""
    alive = seen.prompt[:, seen.visual]
    changes = [0] + [layer for layer in range(1, seen.layers) if (alive[layer] != alive[layer - 1]).any()]
    if seen.layers - 1 not in changes and len(changes) < 2:
        changes.append(seen.layers - 1)
    if len(changes) <= most:
        return changes
    return [changes[i] for i in np.linspace(0, len(changes) - 1, most).round().astype(int)]


def _veiled(image: NDArray[np.uint8] | None, alive: NDArray[np.bool_], least: int = 448) -> NDArray[np.uint8]:
    """The picture enlarged, dropped patches darkened and greyed, a line around those kept."""
    assert image is not None
    size = _square(len(alive), image)
    assert size is not None
    rows, columns = size
    scale = max(1, -(-least // max(image.shape[:2])))
    big = image.repeat(scale, 0).repeat(scale, 1).astype(np.float64)
    row_of = np.arange(big.shape[0]) * rows // big.shape[0]
    column_of = np.arange(big.shape[1]) * columns // big.shape[1]
    mask = alive.reshape(rows, columns)[row_of][:, column_of]
    grey = big.mean(-1, keepdims=True)
    big = np.where(mask[..., None], big, 0.22 * (0.4 * big + 0.6 * grey))
    edge = np.zeros(mask.shape, bool)
    edge[1:] |= row_of[1:, None] != row_of[:-1, None]
    edge[:, 1:] |= (column_of[1:] != column_of[:-1])[None]
    big[edge & mask] = 0.75 * big[edge & mask] + 0.25 * 255
    big[edge & ~mask] *= 0.6
    border = np.zeros(mask.shape, bool)
    border[1:] |= mask[1:] != mask[:-1]
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[:-1] |= border[1:]  # two pixels wide
    border[:, :-1] |= border[:, 1:]
    big[border] = 255 * np.array(to_rgb(VISUAL))
    return big.round().astype(np.uint8)


def footprint(
    trace: Trace, visual: Tensor, *, sample: int = 0, here: Tensor | None = None, image: NDArray[np.uint8] | None = None
) -> Footprint:
    """What ran for one sample, read off the trace of one generation (or of one pass).

    Args:
        trace: of a run that kept its indices.
        visual: (tokens,) bool, the image tokens of the prompt.
        sample: of the batch.
        here: (tokens,) bool, columns of the prompt that are no padding.
        image: the picture that was asked about.
    """
    passes = [(cells.phase, trace.map(sample, at).numpy()) for at, cells in enumerate(trace.cells)]
    looks = visual.numpy().astype(bool)
    prompt = next(ran for phase, ran in passes if phase == "prefill")
    if here is not None:
        prompt, looks = prompt[:, here.numpy()], looks[here.numpy()]
    decode = [ran[:, -1:] for phase, ran in passes if phase == "decode"]
    steps = np.concatenate(decode, axis=1) if decode else np.zeros((len(prompt), 0), bool)
    telling = steps if prompt.all() and steps.size else prompt[:, looks] if looks.any() else prompt
    return Footprint(prompt, looks, steps, telling.mean(1), image)

"""What a search found, for people: the way there, the structure layer by layer, the speed it really has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparing.bench import pictures
from sparing.bench.search import Found, Search
from sparing.bench.summary import percent
from sparing.engine.checkpoint import not_portable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "report.html"
_WORDS = {"attention": "attention, KV groups", "mlp": "MLP, neurons", "experts": "experts"}


def facts(search: Search, found: Found) -> list[tuple[str, str]]:
    """What the report says in words, name and value."""
    target = search.target
    rows = [("Model", search.loaded.name), ("Target", str(target))]
    if found.ratio is not None:
        r = found.ratio
        rows.append(("Measured", f"{r.median:.3f}× prefill [{r.low:.3f}–{r.high:.3f}], {r.n} pairs, dense interleaved"))
        rows.append(("Off the target", f"{r.median / target.value - 1:+.1%}"))
        rows.append(("Prefill", f"{1000 * r.dense:.1f} ms dense, {1000 * r.other:.1f} ms cut"))
    rows.append(("Cost by the table", percent(found.cost)))
    known = search.table.facts
    if target.kind != "params":
        threads = f", {known['threads']} threads" if "threads" in known else ""
        how = "Timed on" if threads else "Counted on"
        rows.append((how, f"{known['batch']} × {known['tokens']} tokens{threads}"))
    rows += [
        ("KL to dense", f"{found.fitness:.4f} nats a token"),
        ("Generations", f"{len(found.history)}, {search.fitness.evaluated:,} tokens evaluated in this process"),
        (
            "Parameters",
            f"{_size(found.model) / _size(search.model):.1%} of {_size(search.model):,}, embeddings included",
        ),
        ("Loads in", "sparing.from_pretrained" if not_portable(found.model) else "plain transformers"),
    ]
    return rows


def _size(model: object) -> int:
    return sum(p.numel() for p in model.parameters())  # type: ignore[attr-defined]


def picture(search: Search, found: Found) -> Figure:
    """Best fitness by generation, and beside it what stays of each layer's sub-layers."""
    sites = [s for s in _WORDS if any(name.startswith(s + ".") for name in found.kept)]
    with pictures._style():
        figure, axes = pictures._figure(10, 1.4 + 1.5 * len(sites), len(sites), 2, gridspec_kw={"width_ratios": [2, 3]})
        for row in axes[1:, 0]:
            row.remove()
        way = figure.add_subplot(axes[0, 0].get_gridspec()[:, 0])
        axes[0, 0].remove()
        generations = range(1, len(found.history) + 1)
        way.step(generations, found.history, where="post", color=pictures.SERIES[0], linewidth=1.8)
        way.set_title(f"Best of each generation, {search.target}")
        way.set_xlabel("generation")
        way.set_ylabel("KL to dense, nats a token")
        way.set_ylim(bottom=0)
        for place, site in enumerate(sites):
            _bars(axes[place, 1], site, found, last=place == len(sites) - 1)
    return figure


def _bars(ax: Axes, site: str, found: Found, last: bool) -> None:
    kept = {int(name.split(".")[1]): value for name, value in found.kept.items() if name.startswith(site + ".")}
    for layer, (stays, there) in kept.items():
        ax.bar(layer, 1, width=0.8, color=pictures.RULE)
        ax.bar(layer, stays / there, width=0.8, color=pictures.SERIES[0])
        ax.text(layer, 1.03, str(stays) if stays else "gone", ha="center", va="bottom", fontsize=7, color=pictures.INK)
    ax.set_title(f"What stays: {_WORDS[site]} of {max(t for _, t in kept.values())}")
    ax.set_ylim(0, 1.2)
    ax.set_yticks([])
    ax.grid(False)
    ax.set_xticks(sorted(kept))
    if last:
        ax.set_xlabel("layer")


def write(search: Search, found: Found) -> Path:
    """`found.png` and `report.html` in the folder of the search; gives back the page."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    figure = picture(search, found)
    pictures.save(figure, search.out / "found.png")
    environment = Environment(loader=PackageLoader("sparing.bench", "."), autoescape=True, trim_blocks=True)
    page = environment.get_template("search.html.j2").render(
        title=f"{search.loaded.name} at {search.target}",
        facts=facts(search, found),
        figure=Markup(pictures.svg(figure)),
        layers=_rows(found),
    )
    path = search.out / FILE
    path.write_text(page, encoding="utf-8")
    return path


def _rows(found: Found) -> list[tuple[str, list[str]]]:
    """Layer by layer what stays, for the table."""
    layers: dict[int, list[str]] = {}
    for name, (stays, there) in found.kept.items():
        site, layer = name.split(".")
        layers.setdefault(int(layer), []).append(f"{site} {stays} of {there}" if stays else f"{site} gone")
    return [(str(layer), words) for layer, words in sorted(layers.items())]

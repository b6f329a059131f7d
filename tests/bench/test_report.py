"""The report says what the rows say, in words, and needs nothing but a browser."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from sparing.bench import pictures, report
from sparing.bench.pictures import Footprint
from sparing.bench.summary import Row, best, experiments, findings, front, opening
from sparing.grid.method import Error
from sparing.grid.trace import Cells, Trace

EVIL = "<script>alert('x')</script><img src=https://example.org/x.png>"


def row(method: str, keep: float, loss: float | None, **more: Any) -> Row:
    """A row as `compare` writes them; `more` overwrites."""
    speed = 1 / keep if loss is not None else None
    usual: dict[str, Any] = {
        "method": method,
        "spec": method,
        "axis": "tokens",
        "keep": keep,
        "control": None,
        "of": None,
        "metric": "accuracy",
        "quality": None if loss is None else 0.9 * (1 - loss / 100),
        "quality_dense": 0.9,
        "quality_loss_pct": loss,
        "prefill_speedup": speed,
        "prefill_speedup_low": speed and 0.95 * speed,
        "prefill_speedup_high": speed and 1.05 * speed,
        "decode_speedup": speed and 1.0,
        "decode_speedup_low": speed and 0.99,
        "decode_speedup_high": speed and 1.01,
        "bound": speed and 1.25 * speed,
        "efficiency": speed and 0.8,
        "beats_control": None,
        "slower_than_dense": False,
        "status": "ok",
        "note": "",
        "model": "lab:vlm",
        "task": "find-digit",
        "device": "cpu",
        "dtype": "float32",
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "seconds": 3.0,
    }
    return usual | more


def control(kind: str, of: str, keep: float, loss: float, seed: int = 0, **more: Any) -> Row:
    unmeasured = dict.fromkeys([key for key in row("", 1.0, 0.0) if "speedup" in key] + ["bound", "efficiency"])
    return row(f"{kind}-tokens", keep, loss, **unmeasured, control=kind, of=of, spec=of, seed=seed, **more)


@pytest.fixture
def rows() -> list[Row]:
    """One winner, one that loses to each control in turn, one slow, one out of reach, one that failed."""
    found = [row("dense", 1.0, 0.0, axis=None)]
    for seed, loss in enumerate((39.0, 40.0, 41.0)):
        found.append(control("random", "fastv", 0.5, loss, seed))
        found.append(control("random", "fastv", 0.25, loss + 20, seed))
    found += [
        control("uniform", "fastv", 0.5, 30.0),
        control("uniform", "fastv", 0.25, 50.0),
        control("oracle", "fastv", 0.5, 1.0),
    ]
    found += [row("fastv", 0.5, 2.0, beats_control=True), row("fastv", 0.25, 70.0, beats_control=False)]
    found += [
        row("slow", 0.5, 9.0, slower_than_dense=True, prefill_speedup=0.8, prefill_speedup_high=0.9, efficiency=0.32)
    ]
    found += [row("narrow", 0.1, None, status="unreachable", note="keep = 0.1: at least 0.2")]
    found += [row("broken", 0.5, None, status="failed", note=EVIL, axis="depth")]
    return found


def printed(rows: list[Row], width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.terminal(rows))
    return console.export_text()


# --------------------------------------------------------------------------- words


def test_every_verdict_is_said_in_words(rows: list[Row]) -> None:
    text = printed(rows)
    for words in (
        "beats random and uniform",
        "LOSES to random and uniform",
        "slower than dense",
        "unreachable: keep = 0.1: at least 0.2",
        "failed: <script>",
        "reference",
    ):
        assert words in text
    assert text.index("dense") < text.index("fastv")


@pytest.mark.parametrize("width", [50, 70, 80, 100, 120, 160])
def test_a_narrow_terminal_loses_columns_and_never_names_or_verdicts(rows: list[Row], width: int) -> None:
    text = printed(rows, width)
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    for words in ("fastv", "narrow", "beats random", "LOSES to", "slower than", "unreachable", "50 %"):
        assert words in flat


def test_losing_names_the_controls_that_are_ahead() -> None:
    def verdict(loss: float, **more: Any) -> str:
        rivals = [control("random", "m", 0.5, loss, seed) for seed, loss in enumerate((20.0, 30.0, 40.0))]
        rivals += [control("uniform", "m", 0.5, 15.0), control("downsample", "m", 0.5, 5.0)]
        return experiments([*rivals, row("m", 0.5, loss, **more)])[0].lines[0].verdict[0]

    assert verdict(16.0, beats_control=False) == "LOSES to uniform and down-sampling"
    # random loses 30 ± 10: within its spread is not better
    assert verdict(21.0, beats_control=False) == "no better than random, LOSES to uniform and down-sampling"
    assert verdict(31.0, beats_control=False) == "LOSES to random, uniform and down-sampling"
    assert verdict(4.0, beats_control=True) == "beats random and uniform"
    assert (
        verdict(10.0, beats_control=True, slower_than_dense=True)
        == "beats random and uniform, LOSES to down-sampling, slower than dense"
    )
    assert verdict(4.0, beats_control=None) == "no control"


def test_controls_belong_to_their_variant_and_budget() -> None:
    found = [
        control("random", "m:K=1", 0.5, 10.0),
        control("random", "m:K=2", 0.5, 20.0),
        control("random", "m:K=1", 0.25, 30.0),
    ]
    found = [{**r, "spec": r["of"], "of": "m"} for r in found]
    found += [row("m", keep, 1.0, spec=spec) for keep, spec in ((0.25, "m:K=1"), (0.5, "m:K=1"), (0.5, "m:K=2"))]
    lines = experiments(found)[0].lines
    assert [(line.label, line.keep) for line in lines] == [("m:K=1", 0.5), ("m:K=1", 0.25), ("m:K=2", 0.5)]
    assert [spread.mean for line in lines if (spread := line.control("random"))] == [10.0, 30.0, 20.0]


def test_the_summary_names_the_best_and_the_losers(rows: list[Row]) -> None:
    experiment = experiments(rows)[0]
    winners = {(b.line.axis, b.line.keep): b.line.label for b in best(experiment)}
    assert winners == {("tokens", 0.5): "fastv", ("tokens", 0.25): "fastv"}
    said = " ".join(sentence for _, sentence in findings(experiment))
    assert "fastv at 25 % (loses 70.0 %, random 60.0 %, uniform 50.0 %)" in said
    assert "Slower than dense: slow at 50 %" in said
    assert "Failed: broken at 50 %" in said
    assert "cpu in float32" in opening([experiment])


def test_front() -> None:
    assert front([(1, 0), (2, 5), (2, 6), (1.5, 5), (3, 4), (3, 4)]) == [0, 4, 5]


def test_losses_of_bits_per_byte_are_added() -> None:
    dense = row("dense", 1.0, 0.0, metric="bits_per_byte", quality=1.7, axis=None)
    found = experiments([dense, row("m", 0.5, 12.0, metric="bits_per_byte", quality=1.904)])[0]
    assert best(found)[0].lost == "adds 12.0 % bits per byte"
    assert "1.904" in printed([dense, *found.rows])


# --------------------------------------------------------------------------- page


class _Loads(HTMLParser):
    """What a page would fetch, and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.images += tag == "img"
        for name, value in attrs:
            if (
                name in ("src", "href", "xlink:href", "srcset", "data", "action")
                and value
                and not value.startswith(("#", "data:"))
            ):
                self.fetched.append(value)


@pytest.fixture(scope="module")
def seen() -> Footprint:
    rng = np.random.default_rng(0)
    visual = np.array([False, *[True] * 16, False])
    prompt = np.ones((4, 18), bool)
    prompt[2:, 1:17] = rng.random(16) < 0.5
    steps = np.array([[True] * 5, [False] * 5, [True] * 5, [True] * 5])
    return Footprint(prompt, visual, steps, prompt[:, visual].mean(1), rng.integers(0, 255, (32, 32, 3), np.uint8))


def test_the_markdown_table_has_every_row_and_passes_no_html(rows: list[Row]) -> None:
    rows[-1] = rows[-1] | {"note": f"a | b {EVIL}"}
    text = report.markdown(rows, ["2 cores"])
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in table} == {len(table[0])}
    heads = [cell.strip() for cell in table[0]]
    lines = [dict(zip(heads, (cell.strip() for cell in line))) for line in table[2:]]
    assert [(x["method"], x["keep"]) for x in lines] == [
        ("dense", "100 %"),
        *(("fastv", "50 %"), ("fastv", "25 %"), ("slow", "50 %"), ("narrow", "10 %"), ("broken", "50 %")),
    ]
    assert lines[1]["loss %"] == "2.0" and lines[1]["random"] == "40.0 ± 1.0" and lines[1]["bound"] == "2.50×"
    assert lines[2]["verdict"].startswith("LOSES to random and uniform")
    assert "<" not in text and "2 cores" in text


def test_the_page_stands_alone_and_escapes(rows: list[Row], seen: Footprint, tmp_path: Path) -> None:
    shown = {"keep 50 %": seen}
    figure = pictures.kept(shown)
    assert figure is not None
    drawn = {
        "map-fastv": pictures.compute_map(shown),
        "kept-fastv": figure,
        "budgets-lab:vlm": pictures.budgets({"fastv": {"50 %": seen.share}}),
    }
    path = report.write(rows, tmp_path, drawn)
    assert path == tmp_path / "report.html"
    page = path.read_text()
    found = _Loads()
    found.feed(page)
    assert found.fetched == []
    assert found.scripts == 1 and found.images == 0  # our own script, not the note's
    assert EVIL not in page and "&lt;script&gt;" in page
    assert not re.search(r"""(src|href)=["']https?:|url\(['"]?https?:|@import""", page)
    assert page.count("<svg") == 6
    ids = re.findall(r'\bid="([^"]+)"', page)
    wanted = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(ids)
    for name in ("pareto", "controls", "bounds", "map-fastv", "kept-fastv", "budgets-lab-vlm"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_report_shows_earlier_pictures(rows: list[Row], seen: Footprint, tmp_path: Path) -> None:
    first = report.write(rows, tmp_path, {"map-fastv": pictures.compute_map({"keep 50 %": seen})}).read_text()
    again = report.write(rows, tmp_path).read_text()
    assert "Compute map of fastv" in first
    stamp = re.compile(r"comparison of [^<]+")
    assert stamp.sub("", first) == stamp.sub("", again)


def test_runs_of_one_method_on_several_models_keep_their_pictures_apart(seen: Footprint, tmp_path: Path) -> None:
    runs = []
    for model in ("lab:a", "org/b"):
        mine = [row("dense", 1.0, 0.0, axis=None, model=model), row("fastv", 0.5, 2.0, model=model)]
        folder = tmp_path / model.replace(":", "-").replace("/", "-")
        report.write(mine, folder, {"map-fastv": pictures.compute_map({"keep 50 %": seen}, model)})
        runs.append((folder, mine))
    out = tmp_path / "both"
    rows = report.gather(runs, out)
    page = report.write(rows, out).read_text()
    assert "Compute map of fastv · lab:a" in page and "Compute map of fastv · org/b" in page
    assert "org/b" in (out / "map-fastv-org-b.svg").read_text()


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(Error, match="nothing to report"):
        report.write([], tmp_path)


def test_a_page_of_dense_alone(tmp_path: Path) -> None:
    assert "reference" in report.write([row("dense", 1.0, 0.0, axis=None)], tmp_path).read_text()


# --------------------------------------------------------------------------- pictures


def test_pictures_of_rows_without_anything_measured() -> None:
    nothing = [row("m", 0.5, None, status="failed")]
    assert pictures.pareto(nothing) is None and pictures.controls(nothing) is None and pictures.bounds(nothing) is None


def test_pareto_has_a_panel_for_each_axis_and_phase(rows: list[Row]) -> None:
    more = [row("skip", keep, 3.0, axis="depth") for keep in (0.5, 0.25)]
    figure = pictures.pareto([*rows, *more])
    assert figure is not None
    titles = {ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()}
    assert titles == {f"{phase} · {axis} · lab:vlm" for phase in ("Prefill", "Decode") for axis in ("tokens", "depth")}


def test_colours_follow_the_page_and_text_is_not_mathematics(rows: list[Row]) -> None:
    figure = pictures.bounds([row("a$b$<c>", 0.5, 2.0)])
    assert figure is not None
    text = pictures.svg(figure)
    assert "var(--series0, " in text and "var(--ink, " in text
    assert "a$b$&lt;c&gt;" in text


def test_a_footprint_is_read_off_a_trace() -> None:
    full, some = None, torch.tensor([[0, 3, 5, 6], [1, 2, 5, 6]])
    prefill = Cells("prefill", tokens=14, visual=8, batch=2, rows=[14, 8], visual_rows=[8, 2], index=[full, some])
    step = Cells(
        "decode",
        tokens=2,
        visual=0,
        batch=2,
        rows=[2, 0],
        visual_rows=[0, 0],
        index=[full, torch.zeros(2, 0, dtype=torch.long)],
    )
    visual = torch.tensor([0, 1, 1, 1, 1, 0, 0]).bool()
    here = torch.tensor([1, 1, 1, 1, 1, 1, 0]).bool()  # the last column is padding
    seen = pictures.footprint(Trace([prefill, step, step]), visual, sample=0, here=here)
    assert seen.prompt.astype(int).tolist() == [[1] * 6, [1, 0, 0, 1, 0, 1]]
    assert seen.visual.tolist() == [False, True, True, True, True, False]
    assert seen.steps.tolist() == [[True, True], [False, False]]
    assert seen.share.tolist() == [1.0, 0.25]  # of the visual tokens


def test_dropped_patches_are_darkened(seen: Footprint) -> None:
    figure = pictures.kept({"keep 50 %": seen})
    assert isinstance(figure, Figure)
    images = [np.asarray(ax.get_images()[0].get_array()) for ax in figure.axes if ax.get_images()]
    assert len(images) == 2  # the first layer and the one where tokens leave
    alive = seen.prompt[2][1:17].reshape(4, 4)
    side = images[0].shape[0] // 4
    cells = images[1].reshape(4, side, 4, side, 3).mean((1, 3, 4)) / images[0].reshape(4, side, 4, side, 3).mean(
        (1, 3, 4)
    )
    assert (cells[alive] > 0.95).all() and (cells[~alive] < 0.4).all()


def test_no_picture_of_kept_tokens_where_patches_do_not_fit(seen: Footprint) -> None:
    odd = Footprint(seen.prompt[:, :14], seen.visual[:14], seen.steps, seen.share, seen.image)  # 13 visual tokens
    assert pictures.kept({"": odd}) is None
    assert pictures.kept({"": Footprint(seen.prompt, seen.visual, seen.steps, seen.share)}) is None


def test_experts_that_stay_are_drawn() -> None:
    """Cells are layer x expert: as many coloured as the plan keeps, layer by layer."""
    import sparing
    from sparing.bench.capture import footprint
    from sparing.bench.models import load_model
    from sparing.bench.tasks import parse

    loaded = load_model("lab:moe")
    seen = footprint(loaded, parse("ppl", loaded), sparing.parse("random-experts:M=5,seed=2"))
    assert seen.experts and seen.prompt.shape == (6, 16) and seen.prompt.sum(1).tolist() == [5] * 6
    assert seen.share.tolist() == [5 / 16] * 6
    figure = pictures.compute_map({"keep": seen})
    words = [ax.get_xlabel() for ax in figure.axes] + [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"expert", "experts left", "expert stays", "removed"} <= set(words)

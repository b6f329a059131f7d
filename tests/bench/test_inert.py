"""What left nothing out is no result: which rows are inert, what they say, and where a reader sees it."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from sparing.bench import inert, pictures, report, tasks
from sparing.bench.compare import BLANK, _carries, compare
from sparing.bench.models import Loaded
from sparing.bench.summary import carrying, experiments, findings, shortfall
from sparing.bench.sweep import sweep
from sparing.depth.unified_layer_skipping import UnifiedLayerSkipping
from sparing.engine.surgery import LayerCut, Plan, cut
from sparing.grid.method import Method, Shape, parse
from sparing.grid.trace import Cells, Trace

Rows = list[dict[str, Any]]
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(30))
SHAPE = Shape(6, 4, 2, 8, 32, 64)


def run(loaded: Loaded, task: tasks.Task, methods: list[str | Method], keep: float, **more: Any) -> Rows:
    return compare(loaded, task, methods, keep, limit=2, repeats=0, progress=False, **more)


def inert_rows(rows: Rows) -> list[str]:
    return [row["note"] for row in rows if row["status"] == "inert"]


# --------------------------------------------------------------------------- which rows


@pytest.mark.parametrize("method", ["unified-layer-skipping", "shortgpt", "flap:multiple=64"])
def test_a_budget_that_rounds_to_nothing(reader: Loaded, method: str) -> None:
    """0.95 of six layers are six; 0.95 of 64 neurons in steps of 64 are 64."""
    rows = run(reader, tasks.Text(reader, TEXT), [method], 0.95)
    row = rows[-1]
    name = method.partition(":")[0]
    assert row["status"] == "inert" and row["note"].startswith(f"{method} ran everything: ") and row["cells"] == 1
    assert row["note"].endswith("keep = 0.95 was asked for")
    assert all(row[key] is None for key in ("quality", "quality_loss_pct", "beats_control", "prefill_speedup"))
    controls = [row for row in rows if row["control"]]
    assert controls and all(row["of"] == name for row in controls)
    for control in controls:  # they spend what it spends, and say it of themselves
        assert control["status"] == "inert" and control["note"].startswith(f"{control['method']} ran everything")


def test_fastv_behind_the_last_layer(viewer: Loaded) -> None:
    rows = run(viewer, tasks.FindDigit(viewer, batch=2), ["fastv:K=8", "fastv:K=7"], 0.9, controls=False)
    assert [row["status"] for row in rows] == ["ok", "inert", "ok"]
    assert rows[1]["note"] == "fastv:K=8 ran everything: all visual tokens in 8 of 8 layers; keep = 0.9 was asked for"


def test_the_full_budget_is_a_result(reader: Loaded) -> None:
    rows = run(reader, tasks.Text(reader, TEXT), ["unified-layer-skipping"], 1.0)
    assert {row["status"] for row in rows} == {"ok"} and rows[-1]["quality"] == rows[0]["quality"]


def test_a_control_that_saves_nothing_is_a_result(reader: Loaded) -> None:
    lora = parse("lora-depth").with_state({"lora.scale": torch.tensor(1.0)})
    assert run(reader, tasks.Text(reader, TEXT), [lora], 0.5)[-1]["status"] == "ok"


def test_a_task_that_generates_nothing(viewer: Loaded) -> None:
    """The digit is read off the prompt's last column: layers would be left by tokens that never come."""
    row = run(viewer, tasks.FindDigit(viewer, batch=2), ["unified-layer-skipping"], 0.5, controls=False)[-1]
    assert row["status"] == "inert" and row["cells"] == 0.5
    assert "did nothing: it acts on generated tokens, and the task scores none" in row["note"]


def test_acting_in_the_score_alone_is_no_result(reader: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that left layers in the pass that is scored, and none in real decode steps (5.24 hid the cache so)."""
    whole = UnifiedLayerSkipping.before_layer

    def scored_only(self: UnifiedLayerSkipping, stream: Any, layer: int) -> None:
        if stream.phase == "prefill":
            whole(self, stream, layer)

    monkeypatch.setattr(UnifiedLayerSkipping, "before_layer", scored_only)
    row = run(reader, tasks.Text(reader, TEXT), ["unified-layer-skipping"], 0.5, controls=False)[-1]
    assert row["status"] == "inert" and "each generated token in 6 of 6 layers" in row["note"]


def test_a_cut_that_is_none(reader: Loaded) -> None:
    """As many parameters are not enough: other weights in the same places are another model."""
    model = reader.model
    same = cut(model, Plan((LayerCut(),) * 6))
    assert "cut nothing" in inert.uncut(model, same)
    with torch.no_grad():
        next(same.model.layers[3].parameters())[0, 0] += 1  # type: ignore[index,union-attr,operator]
    assert inert.uncut(model, same) == ""


def test_passes_that_kept_their_image() -> None:
    pruned, whole = Cells("prefill", 20, 16, 1, [20, 10], [16, 6]), Cells("prefill", 20, 16, 1, [20, 20], [16, 16])
    text = Cells("decode", 1, 0, 1, [1, 1], [0, 0])
    assert inert.partly(Trace([pruned, whole, text])) == "all visual tokens ran in 1 of 2 passes"
    assert inert.partly(Trace([pruned, text])) == inert.partly(Trace([whole, text])) == ""


def test_no_prompt_with_an_image() -> None:
    run = SimpleNamespace(trace=Trace([Cells("prefill", 4, 0, 1, [4, 4], [0, 0])]))
    _, why = inert.acted(cast(Any, run), parse("fastv"), lambda: None)
    assert why == "did nothing: it acts on visual tokens, and no prompt of the task had one"


def test_a_sweep_says_it_too(reader: Loaded) -> None:
    task = tasks.Text(reader, TEXT)
    rows = sweep(reader, task, "unified-layer-skipping", [0.95, 0.5], [8], repeats=1, progress=False)
    assert [row["status"] for row in rows] == ["inert", "ok"]
    assert rows[0]["total_speedup"] is None and "6 of 6 layers" in rows[0]["note"]
    assert shortfall(rows) == "Exit code 1: inert, which is no result: unified-layer-skipping at 95 %."


# --------------------------------------------------------------------------- where it is seen


def test_it_is_said_and_never_drawn(reader: Loaded) -> None:
    rows = run(reader, tasks.Text(reader, TEXT), ["unified-layer-skipping"], 0.95)
    found = experiments(rows)[0]
    line = found.lines[0]
    assert not line.ran and line.verdict == (f"inert: {rows[-1]['note']}", "bad")
    assert ("bad", "Inert, so no result (everything ran): unified-layer-skipping at 95 %.") in findings(found)
    for text in (terminal(rows), report.markdown(rows), report.html(rows, {})):
        assert "inert: unified-layer-skipping ran everything" in " ".join(text.split())
    assert pictures.pareto(rows) is None and pictures.controls(rows) is None and pictures.bounds(rows) is None


def terminal(rows: Rows) -> str:
    console = Console(width=180, file=io.StringIO())
    console.print(report.terminal(rows))
    return console.file.getvalue()  # type: ignore[attr-defined]


def row(method: str, status: str = "ok", **more: Any) -> dict[str, Any]:
    return BLANK | {"method": method, "spec": method, "axis": "depth", "keep": 0.5, "status": status} | more


def test_what_makes_a_comparison_no_success() -> None:
    dense, ok = row("dense", keep=1.0), row("a", quality=1.0, quality_loss_pct=0.0)
    control = row("random-depth", "failed", spec="a", control="random", of="a")
    assert shortfall([dense, ok]) == shortfall([dense, ok, row("b", "unreachable")]) == ""
    assert shortfall([dense, row("b", "unreachable")]).startswith("Exit code 1: nothing but the dense model")
    assert shortfall([dense, ok, row("b", "failed")]) == "Exit code 1: failed: b at 50 %."
    said = shortfall([dense, control, ok, row("b", "inert")])
    assert said == (
        "Exit code 1: failed: random-depth, random control of a at 50 %; inert, which is no result: b at 50 %."
    )
    assert "a0 at 50 %, a1 at 50 %, a2 at 50 % and 2 more" in shortfall([row(f"a{i}", "inert") for i in range(5)])


# --------------------------------------------------------------------------- controls of trained methods


def test_who_carries_trained_weights() -> None:
    lora = {"lora.scale": torch.tensor(1.0)}
    first = parse("first:R=3").with_state(lora)
    assert _carries(first.control("random", SHAPE), first) and _carries(first.control("static", SHAPE), first)
    skip = parse("skipdecode").with_state({"weight.a": torch.zeros(1)})
    assert _carries(skip.control("constant", SHAPE), skip)
    assert not _carries(parse("skipdecode").control("constant", SHAPE), parse("skipdecode"))  # not trained
    das = parse("das:n=2").with_state({"skip": torch.tensor([1, 2]), "random0.skip": torch.tensor([2, 3])})
    assert not _carries(das.control("random", SHAPE), das)  # whose lots have a training of their own
    gpt = parse("shortgpt:R=3").with_state({"influence": torch.zeros(6)})
    assert not _carries(gpt.control("random", SHAPE), gpt)  # calibrated, not trained


def test_carried_weights_are_said(reader: Loaded) -> None:
    skip = parse("skipdecode:w=1,e_max=4,e_min=2").with_state(
        {"weight.model.norm.weight": reader.model.get_parameter("model.norm.weight").detach()}
    )
    rows = run(reader, tasks.Text(reader, TEXT), [skip], 0.5)
    note = carrying("skipdecode")
    assert all((row["note"] == note) == bool(row["control"]) for row in rows)
    sentence = f"Control random, uniform, constant depth and early termination: {note}, no training of its own."
    for text in (terminal(rows), report.markdown(rows), report.html(rows, {}).replace("&#39;", "'")):
        assert sentence in text


def test_a_control_that_there_is_not(reader: Loaded) -> None:
    """Settings without a control of their own: out of reach, and no fault of the run."""
    name = "model.layers.0.mlp.up_proj.weight"
    state = {f"weight.{name}": torch.zeros_like(reader.model.get_parameter(name))}
    rows = run(reader, tasks.Text(reader, TEXT), [parse("evopress:levels=bits,amount=6").with_state(state)], 0.375)
    found = {(row["control"], row["status"]) for row in rows[1:]}
    assert found == {("random", "unreachable"), ("uniform", "unreachable"), (None, "ok")}
    assert shortfall(rows) == ""

"""The benchmarks run, say what they promise to say, and compare like with like."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sparing.bench import timing
from sparing.engine.execute import Pass
from sparing.engine.stream import put

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def _printed(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str
) -> Any:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *args])
    module.main()
    return json.loads(capsys.readouterr().out)  # nothing but JSON on stdout


@pytest.fixture
def efficiency(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load("efficiency", monkeypatch)


@pytest.fixture
def versus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load("vs_lightcompress", monkeypatch)


def test_efficiency_prints_every_action_in_both_dtypes(
    efficiency: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = _printed(efficiency, monkeypatch, capsys, "--json", "--size", "tiny", "--pairs", "2")
    assert {(e["action"], e["dtype"]) for e in entries} == {
        (action, dtype)
        for action in ("drop-tokens", "hold", "remove-layers", "width", "experts")
        for dtype in ("float32", "bfloat16")
    }
    assert len(entries) == 10
    for entry in entries:
        assert set(efficiency.KEYS) <= set(entry)
        assert entry["speedup_low"] <= entry["speedup"] <= entry["speedup_high"]
        assert entry["efficiency"] == pytest.approx(entry["speedup"] / entry["bound"], rel=1e-3)
        assert entry["bound"] > 1
        decides = entry["action"] in ("drop-tokens", "hold", "experts")
        assert 0 <= entry["decision_share"] < 1 and (entry["decision_share"] > 0) == decides


def test_table_names_the_machine(
    efficiency: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["efficiency.py", "--size", "tiny", "--pairs", "1", "--actions", "width", "--dtypes", "float32"]
    )
    efficiency.main()
    out = capsys.readouterr().out
    assert "thread" in out.splitlines()[0] and "| width | float32 |" in out


def test_bounds_are_those_of_the_shapes(efficiency: ModuleType) -> None:
    """By hand: a layer costs 2 x weights x rows and 4 x rows^2 x hidden; the head runs on the last row only."""
    size = efficiency.SIZES["tiny"]
    D, L, T = size.hidden, size.layers, size.tokens
    weights = 4 * D * D + 3 * D * size.neurons
    head = 2 * D * size.vocab

    def stack(rows: list[int], share: float = 1.0) -> float:
        return sum(2 * share * weights * n + 4 * share * n * n * D for n in rows) + head

    kept = T // 4
    held = T - T // 4
    expected = {
        "drop-tokens": stack([T] * 2 + [kept] * (L - 2)) + 2 * D * D + 2 * T * D,  # one query, one row of attention
        "hold": stack([held] * (L // 2) + [T] * (L // 2)),
        "remove-layers": stack([T] * (L // 2)),
        "width": stack([T] * L, 0.5),
    }
    models: dict[str, Any] = {}
    for action, want in expected.items():
        this = efficiency.case(action, size, torch.float32, "cpu", models)
        inputs = efficiency.prompt(size, "cpu")
        dense = efficiency.flops(lambda this=this, inputs=inputs: timing.prefill(this.dense, inputs))
        assert dense[0] == stack([T] * L)
        assert dense[0] - dense[1] == 2 * L * T * T * D  # half of the causal rectangle
        with this.attached():
            assert efficiency.flops(lambda this=this, inputs=inputs: timing.prefill(this.model, inputs))[0] == want, (
                action
            )


@pytest.mark.parametrize("action", ["drop-tokens", "hold"])
def test_attention_stays_plainly_causal_where_tokens_are_missing(efficiency: ModuleType, action: str) -> None:
    """Rows keep their order, so that no mask is built and the causal kernel goes on skipping half of the rectangle."""
    size = efficiency.SIZES["tiny"]
    this = efficiency.case(action, size, torch.float32, "cpu", {})
    with this.attached() as run:
        full, less = efficiency.flops(lambda: timing.prefill(this.model, efficiency.prompt(size, "cpu")))
        rows = run.trace.cells[0].rows
    assert min(rows) < size.tokens
    assert full - less == sum(2 * n * n * size.hidden for n in rows)


def test_half_of_the_expert_pairs_run(efficiency: ModuleType) -> None:
    size = efficiency.SIZES["tiny"]
    this = efficiency.case("experts", size, torch.float32, "cpu", {})
    inputs = efficiency.prompt(size, "cpu")
    dense = efficiency.flops(lambda: timing.prefill(this.dense, inputs))[0]
    with this.attached() as run:
        less = efficiency.flops(lambda: timing.prefill(this.model, inputs))[0]
        assert run.trace.share("experts") == 0.5
    pairs = size.tokens * size.top_k * size.moe_layers
    assert dense - less == pairs // 2 * 2 * 3 * size.hidden * size.expert_neurons


@pytest.mark.parametrize("world", ["llama", "llava"])
def test_both_fastvs_keep_the_same_tokens_and_say_the_same(
    efficiency: ModuleType, versus: ModuleType, world: str
) -> None:
    size = efficiency.SIZES["tiny"]
    if world == "llama":
        this = versus.text(size, efficiency.llama(size, torch.float32, "cpu"), "cpu")
    else:
        this = versus.seeing(size, torch.float32, "cpu")
    with torch.no_grad():
        for p in this.model.parameters():
            if p.ndim == 2:
                p.mul_(4)  # attention that is not flat
        dense = this.model(**this.inputs).logits[:, -1]
        with this.theirs() as cut:
            theirs = this.model(**this.inputs, logits_to_keep=1).logits[:, -1]
        with this.ours() as run:
            run.keeps_index = True
            ours = this.model(**this.inputs, logits_to_keep=1).logits[:, -1]
            index = run.trace.cells[0].index[-1]
        after = this.model(**this.inputs).logits[:, -1]
    assert cut.keep is not None and index is not None
    assert index[0].tolist() == cut.keep.tolist()
    assert len(cut.keep) == this.width - this.length + round(this.length * 0.25)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, dense)
    assert torch.equal(after, dense)  # both take themselves off again


def test_versus_prints_ratios_and_memory(
    versus: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--json", "--size", "tiny", "--rounds", "2", "--dtypes", "float32")
    entries = _printed(versus, monkeypatch, capsys, *args)
    assert [e["model"] for e in entries] == ["llama", "llava"]
    for entry in entries:
        assert entry["same"] == 1
        assert entry["ratio"] > 0 and entry["peak_theirs"] > entry["peak_ours"] > 0


def test_put_writes_whole_rows_and_passes_gradients_to_both() -> None:
    x, rows = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 3, 3, requires_grad=True)
    slot = torch.tensor([[0, 2, 3], [1, 4, 4]])  # the second sample fills up in the last column, which is cut off
    out = put(x, slot, rows)
    for b, kept in ((0, 3), (1, 1)):
        for i in range(kept):
            assert torch.equal(out[b, slot[b, i]], rows[b, i])
    out[:, :4].sum().backward()
    assert x.grad is not None and rows.grad is not None
    assert x.grad[:, :4, 0].tolist() == [[0, 1, 0, 0], [1, 0, 1, 1]]
    assert rows.grad[:, :, 0].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_decision_does_not_pay_for_the_work_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator the clock waits for queued work, at the start of a decision as at its end."""
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    Pass._clock(SimpleNamespace(device=torch.device("cuda")))  # type: ignore[arg-type]
    assert len(waits) == 1
    Pass._clock(SimpleNamespace(device=torch.device("cpu")))  # type: ignore[arg-type]
    assert len(waits) == 1

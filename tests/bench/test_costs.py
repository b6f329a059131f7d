"""Profiles against really cut models, one by one; what is measured in seconds has the right form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparing.bench import costs, timing
from sparing.engine.elastic import Elastic, units
from sparing.engine.experts import expert_statistics
from sparing.engine.surgery import cut
from sparing.engine.units import calibrate
from sparing.grid.trace import count
from sparing.testing.models import build, prompt


def _elastic(name: str, axes: tuple[str, ...], **options: Any) -> Elastic:
    model = build(name)
    data = [prompt(name, (9, 9, 9), side="none", seed=3)]
    state = calibrate(model, data) if "width" in axes else None
    experts = expert_statistics(model, data)["score"] if "experts" in axes else None
    return Elastic(model, units(model, axes), state=state, experts=experts, **options)


def _inputs(name: str = "llama") -> dict[str, torch.Tensor]:
    return {"input_ids": prompt(name, (24, 24), side="none", seed=5)["input_ids"]}


def _spent(kind: str, model: Any, inputs: dict[str, torch.Tensor]) -> float:
    if kind == "params":
        return sum(p.numel() for p in model.model.layers.parameters())
    return count(lambda: timing.prefill(model, inputs))[0]


@pytest.mark.parametrize(
    ("kind", "name", "axes", "options"),
    [
        ("params", "llama", ("depth", "width"), {}),
        ("params", "llama", ("depth", "width"), {"compensate": False}),
        ("params", "llama", ("width",), {}),
        ("params", "gemma3", ("depth", "width"), {}),
        ("params", "qwen3-moe", ("depth", "experts"), {}),
        ("flops", "llama", ("depth", "width"), {}),
        ("flops", "gemma3", ("width",), {}),
    ],
)
def test_a_profile_counts_what_really_cut_models_have(
    kind: str, name: str, axes: tuple[str, ...], options: dict[str, Any]
) -> None:
    close = {"params": 1e-6, "flops": 0.01}[kind]
    elastic, inputs = _elastic(name, axes, **options), _inputs(name)
    table = costs.profile(elastic, inputs, kind, progress=False)
    assert elastic.genome == elastic.dense
    dense = _spent(kind, elastic.model, inputs)
    for index, unit in enumerate(elastic.units):
        if unit.layer not in ((0, 2, 5) if kind == "params" else (2,)):
            continue
        for level in range(len(unit.levels)):
            genome = tuple(level if i == index else top for i, top in enumerate(elastic.dense))
            small = cut(elastic.model, elastic.plan(genome))
            assert table.of(genome) == pytest.approx(_spent(kind, small, inputs) / dense, rel=close), (unit, level)
    mixed = tuple(i % len(unit.levels) for i, unit in enumerate(elastic.units))
    small = cut(elastic.model, elastic.plan(mixed))
    assert table.of(mixed) == pytest.approx(_spent(kind, small, inputs) / dense, rel=close)
    assert table.of(elastic.dense) == pytest.approx(1, abs=1e-9) and table.correction == 1
    assert all(list(levels) == sorted(levels) and levels[0] == 0 for levels in table.levels)
    assert table.facts == {"kind": kind, "parameters": sum(p.numel() for p in elastic.view.stack.parameters())} | {
        "batch": 2,
        "tokens": 24,
    }


def test_seconds_have_the_form_of_a_table() -> None:
    elastic, inputs = _elastic("llama", ("depth",)), _inputs()
    table = costs.profile(elastic, inputs, "seconds", progress=False)
    table.matches([u.name for u in elastic.units], [2] * 12, costs.facts("seconds", elastic.model, inputs))
    assert all(low == 0 <= high for low, high in table.levels) and table.floor > 0
    assert table.of(elastic.dense) == pytest.approx(1) or table.of(elastic.dense) == table.floor
    assert table.facts["threads"] == 1 and table.facts["dtype"] == "float32" and table.facts["device"] == "cpu"
    assert elastic.genome == elastic.dense and not elastic.model.training


@pytest.mark.parametrize("seconds", [1.0, 1.3])
def test_where_nothing_saves_time_no_correction_is_made_up(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """All candidates measured as slow as dense, or slower."""
    elastic = _elastic("llama", ("depth",))
    monkeypatch.setattr(costs, "_measure", lambda *_: lambda genome, pairs: seconds)
    table = costs.profile(elastic, _inputs(), "seconds", progress=False)
    assert table.correction == 1 and table.floor == seconds
    assert table.of((0,) * 12) == pytest.approx(max(1, seconds))


def test_the_correction_is_what_mixed_candidates_really_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which two cuts together save 0.8 of what each saves alone."""
    elastic = _elastic("llama", ("depth",))

    def measured(genome: tuple[int, ...], pairs: int) -> float:
        alike = len(set(genome[::2])) == len(set(genome[1::2])) == 1  # as the profile cuts: all of a sort
        gone = genome.count(0) / len(genome)
        return 1 - 0.9 * gone * (1 if alike else 0.8)

    monkeypatch.setattr(costs, "_measure", lambda *_: measured)
    table = costs.profile(elastic, _inputs(), "seconds", progress=False)
    assert [levels[-1] for levels in table.levels] == pytest.approx([0.9 / 12] * 12)
    assert table.correction == pytest.approx(0.8)
    assert table.of((0, 1) * 3 + (1, 1) * 3) == pytest.approx(1 - 0.8 * 0.9 * 3 / 12)


def test_an_interrupted_profile_leaves_the_model_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic, inputs = _elastic("llama", ("depth", "width")), _inputs()
    with torch.no_grad():
        before = elastic.model(**inputs).logits
    calls = []

    def weights(model: Any) -> int:
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return 7

    monkeypatch.setattr(costs, "weights", weights)
    with pytest.raises(KeyboardInterrupt):
        costs.profile(elastic, inputs, "params", progress=False)
    with torch.no_grad():
        assert torch.equal(elastic.model(**inputs).logits, before)
    assert elastic.genome == elastic.dense

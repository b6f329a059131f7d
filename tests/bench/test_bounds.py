"""Bounds: formulas by hand, peaks that a machine can have."""

import pytest
import torch

from sparing.bench.bounds import Bounds, Cost, Peaks, peaks
from sparing.bench.models import Loaded


def test_bounds_by_hand() -> None:
    machine = Peaks(flops=100.0, bandwidth=10.0)
    # dense: 1000/100 = 10 s of arithmetic, 20/10 = 2 s of moving; method: 2.5 s and 2 s
    found = Bounds.of(Cost(1000, 20), Cost(250, 20), machine)
    assert (found.flops, found.bytes, found.roofline) == (4.0, 1.0, 4.0)
    # with a tenth of the arithmetic moving takes longer: 10 s against 2 s
    assert Bounds.of(Cost(1000, 20), Cost(100, 20), machine).roofline == 5.0
    assert Bounds.of(Cost(1000, 20), Cost(0, 0), machine) == Bounds(None, None, None)


def test_bounds_grow_as_less_runs() -> None:
    machine = Peaks(flops=100.0, bandwidth=10.0)
    speeds = [Bounds.of(Cost(1000, 80), Cost(100 * k, 10 + 7 * k), machine).roofline for k in range(10, 0, -1)]
    assert speeds == sorted(speeds) and speeds[0] == 1.0


def test_cost_counts_what_runs(reader: Loaded) -> None:
    linear = torch.nn.Linear(32, 16, bias=False)
    cost = Cost.of(lambda: linear(torch.zeros(8, 32)))
    assert cost.flops == 2 * 8 * 32 * 16
    assert cost.bytes == 4 * (8 * 32 + 32 * 16 + 8 * 16)


def test_peaks_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparing.bench import bounds

    monkeypatch.setattr(bounds, "SECONDS", 0.0)
    monkeypatch.setitem(bounds.COPY, "cpu", 1 << 24)
    monkeypatch.setitem(bounds.MATRIX, "cpu", 256)
    bounds._peaks.cache_clear()
    found = peaks("cpu", torch.float32)
    assert found.flops > 1e8 and found.bandwidth > 1e7
    assert peaks("cpu", torch.float32) is found
    bounds._peaks.cache_clear()

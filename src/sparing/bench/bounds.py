"""How fast could it be? Bounds on a speed-up from what a pass executes and from what the machine can do.

For a dense pass of F operations and B bytes, and a method's pass of F' and B':

    FLOP bound      F / F'                                    reached when arithmetic is all that takes time
    byte bound      B / B'                                    reached when moving data is
    roofline bound  max(F/p, B/b) / max(F'/p, B'/b)           p FLOP/s and b bytes/s being this machine's measured peaks

F and B count everything that runs, also what a method cannot touch (image tower, head), so a bound is Amdahl's, not
1/keep. *Efficiency* is the measured speed-up over its bound: the FLOP bound for prefill, which is bound by arithmetic,
the roofline bound for decode, which mostly reads weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from sparing.bench.timing import Watch
from sparing.grid.trace import count

MATRIX = {"cpu": 1024, "cuda": 8192}  #: side of the square matrices that are multiplied
COPY = {"cpu": 1 << 28, "cuda": 1 << 31}  #: bytes copied: more than any cache holds
SECONDS = 0.3  #: of measurement for either peak


@dataclass(frozen=True)
class Peaks:
    """What a machine reaches: `flops` per second in a large matrix product, `bandwidth` bytes per second (read and
    written) in a large copy."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Cost:
    """What ran: floating-point operations and bytes moved."""

    flops: int
    bytes: int

    @classmethod
    def of(cls, run: Callable[[], object]) -> Cost:
        """Counts what `run` executes."""
        return cls(*count(run))

    def seconds(self, peaks: Peaks) -> float:
        """The roofline time: the longer one of computing at the peak and moving at the peak."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)


@dataclass(frozen=True)
class Bounds:
    """The speed-ups that a method's cost allows; None where it cannot be said."""

    flops: float | None
    bytes: float | None
    roofline: float | None

    @classmethod
    def of(cls, dense: Cost, other: Cost, peaks: Peaks) -> Bounds:
        """The bounds of `other` against `dense`.

        >>> Bounds.of(Cost(100, 10), Cost(25, 10), Peaks(flops=1, bandwidth=1))
        Bounds(flops=4.0, bytes=1.0, roofline=4.0)
        >>> Bounds.of(Cost(100, 10), Cost(25, 10), Peaks(flops=10, bandwidth=1))
        Bounds(flops=4.0, bytes=1.0, roofline=1.0)
        """
        return cls(
            _ratio(dense.flops, other.flops),
            _ratio(dense.bytes, other.bytes),
            _ratio(dense.seconds(peaks), other.seconds(peaks)),
        )


def peaks(device: str | torch.device, dtype: torch.dtype) -> Peaks:
    """The machine's peaks for this device and number type, measured once per process: the best of many runs each."""
    return _peaks(str(device), dtype, torch.get_num_threads())


@cache
def _peaks(device: str, dtype: torch.dtype, threads: int) -> Peaks:
    kind = torch.device(device).type
    side, size = MATRIX.get(kind, MATRIX["cpu"]), COPY.get(kind, COPY["cpu"])
    a = torch.ones(side, side, dtype=dtype, device=device)
    product = torch.empty_like(a)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Peaks(
        flops=2 * side**3 / _fastest(lambda: torch.mm(a, a, out=product), device),
        bandwidth=2 * size / _fastest(lambda: target.copy_(source), device),
    )


def _fastest(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest run within the time for it; three runs at least."""
    run()
    best, runs, end = float("inf"), 0, time.perf_counter() + SECONDS
    while runs < 3 or time.perf_counter() < end:
        watch = Watch(device)
        run()
        best, runs = min(best, watch.lap()), runs + 1
    return best


def _ratio(dense: float, other: float) -> float | None:
    return dense / other if other > 0 else None

"""Time two programs against each other in one process, interleaved, and measure what they hold in memory.

A speed-up is the median of *paired* ratios: dense and method run one right after the other, the order alternates, and
each pair gives one ratio. A machine that slows down for a second slows both sides of a pair. Beside the median stand
the 20th and 80th percentiles (`low`, `high`; not the extremes).
"""

from __future__ import annotations

import gc
import inspect
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparing.engine.calls import cache_in, with_cache
from sparing.grid.method import Error

FEWEST, MOST = 5, 30  #: pairs, where the caller leaves their number open
LOW, HIGH = 20, 80  #: percentiles reported beside the median
STEPS = 16  #: decode steps of one timed generation

Clock = Callable[[], float]
Stages = Mapping[str, float]


@dataclass(frozen=True)
class Ratio:
    """A speed-up: dense seconds / other seconds, over `n` pairs.

    Attributes:
        median: of the paired ratios; above 1 the other one is faster than dense.
        low: their 20th percentile.
        high: their 80th percentile.
        n: pairs.
        dense: median seconds of dense.
        other: median seconds of the other.
    """

    median: float
    low: float
    high: float
    n: int
    dense: float
    other: float

    @classmethod
    def of(cls, dense: list[float], other: list[float]) -> Ratio:
        """The statistics of two lists of seconds, paired by place.

        >>> Ratio.of([2.0, 4.0, 3.0], [1.0, 1.0, 1.0]).median
        3.0
        """
        ratios = np.asarray(dense) / np.asarray(other)
        low, median, high = np.percentile(ratios, (LOW, 50, HIGH)).tolist()
        return cls(median, low, high, len(ratios), float(np.median(dense)), float(np.median(other)))


def time_stages(
    dense: Callable[[], Stages],
    other: Callable[[], Stages],
    *,
    repeats: int | None = None,
    warmup: int = 1,
    seconds: float = 2.0,
    clock: Clock = time.perf_counter,
) -> dict[str, Ratio]:
    """Runs the two programs in turns; each reports the seconds of its own stages, and every stage gets its `Ratio`.

    Args:
        dense: the reference.
        other: what is held against it; it reports the same stages.
        repeats: pairs; None takes as many as give either side about `seconds`, at least 5 and at most 30.
        warmup: runs of either side that are thrown away.
        seconds: of measurement a side, for `repeats=None`.
        clock: for choosing the repeats only.
    """
    if repeats is not None and repeats < 1:
        raise Error(f"repeats = {repeats}: must be at least 1")
    spent = 0.0
    for _ in range(warmup):
        start = clock()
        dense(), other()
        spent = clock() - start  # the last one: the first also pays for what is set up once
    if repeats is None:
        repeats = min(MOST, max(FEWEST, math.ceil(2 * seconds / max(spent, 1e-9)))) if warmup else FEWEST
    runs: tuple[list[Stages], list[Stages]] = ([], [])
    with _no_garbage():
        for pair in range(repeats):
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                runs[side].append((dense, other)[side]())
    return {stage: Ratio.of([run[stage] for run in runs[0]], [run[stage] for run in runs[1]]) for stage in runs[0][0]}


def time_pair(
    dense: Callable[[], object],
    other: Callable[[], object],
    *,
    repeats: int | None = None,
    warmup: int = 1,
    seconds: float = 2.0,
    clock: Clock = time.perf_counter,
    device: str | torch.device = "cpu",
) -> Ratio:
    """The speed-up of `other` over `dense`, two programs without arguments; see `time_stages`."""

    def whole(run: Callable[[], object]) -> Callable[[], Stages]:
        def timed() -> Stages:
            watch = Watch(device, clock)
            run()
            return {"": watch.lap()}

        return timed

    return time_stages(whole(dense), whole(other), repeats=repeats, warmup=warmup, seconds=seconds, clock=clock)[""]


class Watch:
    """Seconds between laps. On an accelerator a lap waits until the work given to it so far is done (CUDA events)."""

    def __init__(self, device: str | torch.device = "cpu", clock: Clock = time.perf_counter) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._clock = clock
        self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap, or since the start."""
        now = self._now()
        before, self._last = self._last, now
        if isinstance(now, torch.cuda.Event):
            assert isinstance(before, torch.cuda.Event)
            return before.elapsed_time(now) / 1000
        assert not isinstance(before, torch.cuda.Event)
        return now - before

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event


class Forward(Protocol):
    """Anything that is called like a transformers model."""

    def __call__(self, **inputs: Any) -> Any: ...


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's `forward` names this argument."""
    return argument in inspect.signature(module.forward).parameters


@torch.no_grad()
def prefill(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """One pass over the prompt, with a cache, and logits of the last position only where the model can do that."""
    last = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    return model(**inputs, use_cache=True, **last)


@torch.no_grad()
def decode(model: nn.Module, inputs: Mapping[str, Any], out: Any, steps: int = STEPS) -> Tensor:
    """`steps` greedy steps of one token after `prefill` returned `out`; (B, steps) token ids."""
    last: dict[str, Any] = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    ids, shift = inputs["input_ids"], _shift(model, inputs)
    past = inputs.get("attention_mask")
    mask = torch.cat([torch.ones_like(ids) if past is None else past, ids.new_ones(len(ids), steps)], 1)
    (_, cache), said = cache_in(out), []
    if cache is None:
        raise Error(f"{type(model).__name__}: gave no KV cache back, so its decoding cannot be timed")
    for step in range(1, steps + 1):
        token = out.logits[:, -1:].argmax(-1)
        said.append(token)
        here = mask[:, : ids.shape[1] + step]
        if shift is not None:
            last["position_ids"] = (here.cumsum(1)[:, -1:] - 1 + shift).expand(3, -1, -1)
        out = model(input_ids=token, attention_mask=here, use_cache=True, **with_cache(model, cache), **last)
    return torch.cat(said, 1)


def _shift(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | int | None:
    """What a decode step adds to its place for its position, in a model that counts a picture's rows and columns.

    Without positions, such a model takes those of the whole mask. None for the others, which know their place.
    """
    shifts = [vars(module)["rope_deltas"] for module in model.modules() if "rope_deltas" in vars(module)]
    if not shifts:
        return None
    return shifts[0] if "image_grid_thw" in inputs else 0  # without a picture it is that of an earlier prompt


def generation(
    model: nn.Module, inputs: Mapping[str, Any], steps: int = STEPS, clock: Clock = time.perf_counter
) -> Stages:
    """Seconds of one real generation: `prefill` whole, `decode` per output token, prefill not included."""
    watch = Watch(inputs["input_ids"].device, clock)
    out = prefill(model, inputs)
    first = watch.lap()
    if not steps:
        return {"prefill": first}
    decode(model, inputs, out, steps)
    return {"prefill": first, "decode": watch.lap() / steps}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def peak_memory(run: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Most bytes of tensors that `run` held at one time, beyond what was there before it.

    On CUDA this is the allocator's own peak. On a CPU it follows the storage of every tensor that an operator returns,
    from the operator to the moment nobody holds it; on a Llama's forward pass that equals what the profiler records at
    the allocator, byte for byte. Not seen: scratch space inside a single CPU kernel.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Living() as living:
        run()
    return living.peak


class _Living(TorchDispatchMode):
    """Adds up the storages that operators create while it is on, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in given and key not in self._seen:
                    self._seen[key] = weakref.ref(storage, partial(self._gone, key, size))
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int, _: object) -> None:
        del self._seen[key]
        self.now -= size


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collects garbage now and not while the clock runs."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

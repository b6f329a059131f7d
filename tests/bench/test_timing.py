"""Timing: the statistics on a fake clock, real generations, memory that adds up."""

from itertools import count

import pytest
import torch

from sparing.bench import timing
from sparing.bench.models import Loaded
from sparing.grid.method import Error


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_ratio_statistics_on_a_fake_clock() -> None:
    clock, calls = Clock(), []
    dense_takes, other_takes = count(2.0), iter([9.0, *(1.0, 2.0, 1.0, 2.0, 1.0)])

    def dense() -> None:
        calls.append("dense")
        clock.now += next(dense_takes)

    def other() -> None:
        calls.append("other")
        clock.now += next(other_takes)

    ratio = timing.time_pair(dense, other, repeats=5, clock=clock)
    # warm-up took 2 and 9; the pairs are 3/1, 4/2, 5/1, 6/2, 7/1
    assert ratio.median == 3.0 and ratio.n == 5
    assert ratio.low == pytest.approx(2.8) and ratio.high == pytest.approx(5.4)
    assert (ratio.dense, ratio.other) == (5.0, 1.0)
    assert calls[2:] == ["dense", "other", "other", "dense"] * 2 + ["dense", "other"]


@pytest.mark.parametrize("seconds, pairs", [(10.0, 5), (0.2, 10), (1e-3, 30)])
def test_repeats_adapt(seconds: float, pairs: int) -> None:
    clock = Clock()

    def run() -> None:
        clock.now += seconds

    assert timing.time_pair(run, run, clock=clock).n == pairs


def test_a_slower_one_is_below_one() -> None:
    assert timing.Ratio.of([1.0, 1.0], [2.0, 4.0]).high < 1
    with pytest.raises(Error, match="repeats = 0"):
        timing.time_pair(lambda: None, lambda: None, repeats=0)


def test_generation_times_prefill_and_decode_apart(reader: Loaded) -> None:
    clock, model = Clock(), reader.model
    hook = model.register_forward_hook(
        lambda m, a, out: setattr(clock, "now", clock.now + (3 if out.logits.shape[1] == 1 else 0))
    )
    ids = torch.arange(2, 22).view(2, 10)
    try:
        assert timing.generation(model, {"input_ids": ids}, steps=4, clock=clock) == {"prefill": 3.0, "decode": 3.0}
    finally:
        hook.remove()


def test_decode_is_generate(reader: Loaded) -> None:
    ids = torch.arange(2, 22).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    said = timing.decode(reader.model, inputs, timing.prefill(reader.model, inputs), 5)
    expected = reader.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    eos = reader.model.generation_config.eos_token_id
    if eos not in said:
        assert torch.equal(said, expected[:, 10:])


def test_peak_memory_counts_what_lives() -> None:
    x = torch.zeros(1000)

    def run() -> None:
        a = x + 1  # 4000 bytes
        b = a * 2  # 4000 more
        del a
        c = b.view(10, 100)[:, :50]  # a view is free
        (c + 1).sum()  # 2000, and a scalar of 4

    assert timing.peak_memory(run) == 8000
    assert timing.peak_memory(lambda: x.view(10, 100).t()) == 0


def test_weight_bytes_count_shared_ones_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    assert timing.weight_bytes(model) == 2 * 256
    model[1].weight = model[0].weight
    assert timing.weight_bytes(model) == 256

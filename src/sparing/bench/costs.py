"""Profiles what each sub-layer costs at each width, in place: seconds on this machine, FLOPs or parameters."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from sparing.bench import timing
from sparing.engine.elastic import Elastic
from sparing.engine.view import View, evaluating
from sparing.grid.costs import CostTable
from sparing.grid.search import Genome
from sparing.grid.trace import count

PAIRS = 9  # timed pairs of a level
CANDIDATES = 4  # mixed candidates that the correction is measured on
CAREFUL = 15  # … with so many pairs each


def facts(kind: str, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a table depends on: its kind, the dense model and, where time counts, number type, threads and device."""
    ids = inputs["input_ids"]
    known = {"kind": kind, "parameters": weights(model), "batch": len(ids), "tokens": ids.shape[1]}
    if kind != "seconds":
        return known
    weight = next(model.parameters())
    return {
        **known,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": timing_device(ids.device),
    }


def timing_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def profile(elastic: Elastic, inputs: Mapping[str, Any], kind: str = "seconds", *, progress: bool = True) -> CostTable:
    """The cost of every unit at every level.

    Layers that are alike share a measurement: all units of a sort are set to one level at once and the whole model is
    timed against dense, interleaved, so a unit's cost is that of its place in the running model and the noise is
    divided by the number of layers. What is measured must fall with the level, so that noise cannot make less cost
    more. Mixed candidates then say by how much whole models differ from the sum of their units.

    Args:
        elastic: entered already, or not; it is dense afterwards, also after an exception.
        inputs: of a prefill.
        kind: seconds (prefill), flops (prefill) or params (of the decoder layers).
    """
    sorts: dict[tuple[Any, ...], list[int]] = {}
    for i, unit in enumerate(elastic.units):
        layer = elastic.view.layers[unit.layer]
        alike = (unit.site, unit.levels, layer.heads, layer.head_dim, layer.sliding)
        sorts.setdefault(alike, []).append(i)
    model, dense = elastic.model, elastic.dense
    saved: dict[int, list[float]] = {}
    work = [(members, level) for members in sorts.values() for level in range(len(elastic.units[members[0]].levels))]
    bar = tqdm(work, desc=f"profiling {kind}", disable=not progress)
    measure = _measure(elastic, inputs, kind)
    with evaluating(model), elastic:
        for members, level in bar:
            share = 0.0
            if level < dense[members[0]]:
                genome = tuple(level if i in members else top for i, top in enumerate(dense))
                share = (1 - measure(genome, PAIRS)) / len(members)
            for i in members:
                saved.setdefault(i, []).append(share)
        # a unit that can go for good is 0 at its lowest level; one that cannot still shows what its levels differ by
        levels = []
        for i in range(len(elastic.units)):
            most = max(saved[i])
            falling = [most - share for share in saved[i]]
            rising = list(accumulate(falling, max))
            levels.append(tuple(cost - rising[0] for cost in rising))
        names = tuple(unit.name for unit in elastic.units)
        rest = 1 - sum(costs[-1] for costs in levels)
        floor = measure((0,) * len(names), CAREFUL)
        table = CostTable(kind, names, tuple(levels), rest, floor)
        if kind == "seconds":
            table = replace(table, correction=_correction(table, elastic, measure, progress))
    return replace(table, facts=facts(kind, model, inputs))


def _measure(elastic: Elastic, inputs: Mapping[str, Any], kind: str) -> Callable[[Genome, int], float]:
    """candidate, pairs -> its cost, dense = 1."""
    model, dense = elastic.model, elastic.dense

    def at(genome: Genome) -> Callable[[], timing.Stages]:
        def run() -> timing.Stages:
            elastic.set(genome)
            return timing.generation(model, inputs, steps=0)

        return run

    def seconds(genome: Genome, pairs: int) -> float:
        return 1 / timing.time_stages(at(dense), at(genome), repeats=pairs)["prefill"].median

    def flops(genome: Genome, pairs: int) -> float:
        found = []
        for candidate in (dense, genome):
            elastic.set(candidate)
            found.append(count(lambda: timing.prefill(model, inputs))[0])
        return found[1] / found[0]

    def params(genome: Genome, pairs: int) -> float:
        found = []
        for candidate in (dense, genome):
            elastic.set(candidate)
            found.append(weights(model))
        return found[1] / found[0]

    return {"seconds": seconds, "flops": flops, "params": params}[kind]


def weights(model: nn.Module) -> int:
    """Parameters of the decoder layers."""
    return sum(p.numel() for p in View(model).stack.parameters())


def _correction(table: CostTable, elastic: Elastic, measure: Callable[[Genome, int], float], progress: bool) -> float:
    """Share of the summed saving that whole candidates really save; the median of some at about half the cost."""
    rng = random.Random(0)
    found = []
    for _ in tqdm(range(CANDIDATES), desc="checking whole candidates", disable=not progress):
        genome = elastic.dense
        while table.of(genome) > (1 + table.floor) / 2 and any(genome):
            i = rng.randrange(len(genome))
            genome = (*genome[:i], max(0, genome[i] - 1), *genome[i + 1 :])
        if table.of(genome) < 1:  # else nothing is seen to save anything
            found.append((1 - measure(genome, CAREFUL)) / (1 - table.of(genome)))
    return statistics.median(found) if found else 1.0

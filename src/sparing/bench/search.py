"""`sparing search`: the cut that loses least at a wanted, measured speed-up on this machine."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparing.bench import costs as profiling
from sparing.bench import timing
from sparing.bench.compare import refuse_other, versions
from sparing.bench.models import Loaded
from sparing.bench.timing import Ratio
from sparing.engine.checkpoint import save_pretrained
from sparing.engine.elastic import Elastic, Unit, units
from sparing.engine.experts import expert_statistics
from sparing.engine.fitness import Fidelity
from sparing.engine.surgery import cut
from sparing.engine.units import calibrate, unit_scores
from sparing.engine.view import evaluating
from sparing.grid.costs import CostTable
from sparing.grid.files import read_json
from sparing.grid.folders import refuse_content
from sparing.grid.lists import listed
from sparing.grid.method import Error
from sparing.grid.search import Evolution, Genome, Stage, best_of, moves

TARGETS = {"speedup": "seconds", "flops": "flops", "params": "params"}
GENERATIONS = 40
OFFSPRING = 16
STAGES = (Stage(4, 2048), Stage(1, 8192))  # survivors and tokens
TOLERANCE = 0.03  # of the measured speed-up; beyond it the table is corrected and the search goes on
ROUNDS = 3
TIMED = 21  # pairs of a measurement that decides


@dataclass(frozen=True)
class Target:
    """What the search must reach.

    Attributes:
        kind: speedup (dense seconds over the cut model's, prefill, at least 1), flops or params (share that stays).
        value: the number.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in TARGETS:
            raise Error(f"target = {self.kind!r}: must be one of {', '.join(TARGETS)}")
        if self.kind == "speedup" and not self.value >= 1:
            raise Error(f"speedup = {self.value:g}: must be at least 1; it is dense seconds over the cut model's")
        if self.kind != "speedup" and not 0 < self.value <= 1:
            raise Error(f"{self.kind} = {self.value:g}: must be in (0, 1]; it is the share that stays")

    @property
    def cost(self) -> float:
        """Share of the dense cost that may be spent."""
        return 1 / self.value if self.kind == "speedup" else self.value

    def __str__(self) -> str:
        return f"{self.value:g}×" if self.kind == "speedup" else f"{self.value:.0%} of the {self.kind}"


@dataclass
class Found:
    """What came of a search.

    Attributes:
        genome: level of each unit.
        kept: unit name -> (what stays, what there is).
        fitness: KL to dense on the last minibatch, nats a token.
        history: best fitness of each generation.
        ratio: measured speed-up of prefill of the saved model; None where none was asked for.
        cost: of the candidate, dense = 1, by the table.
        model: the cut model.
    """

    genome: Genome
    kept: dict[str, tuple[int, int]]
    fitness: float
    history: list[float]
    ratio: Ratio | None
    cost: float
    model: nn.Module = field(repr=False)


class Search:
    """A search for the levels of a model's sub-layers under a cost.

    Everything it needs to go on lies in `out`: `search.json` (the arguments), `costs.json` (the table) and `state.json`
    (after each generation). A search that is resumed ends with the same structure as one that was never stopped.

    Args:
        loaded: model and tokenizer.
        batches: calibration text, rows are sequences.
        axes: of depth, width, experts; one or several.
        target: see `Target`.
        out: folder.
        generations, offspring, stages: of the evolution.
        portable: whole layers go, all others have one width, nothing is compensated: loads in plain transformers.
        resume: go on with what `out` holds.
        table: costs measured before, for the same model, inputs and machine; None profiles.
        inputs: of the timed prefill; None takes four sequences of the calibration text.
        seed: of all that is drawn.
        data: name of the calibration text, for the folder's arguments.
        progress: show bars.

    Raises:
        Error: an axis that the model lacks, a target out of reach (says how far it goes), too little text, another
            search in the folder.
    """

    def __init__(
        self,
        loaded: Loaded,
        batches: Sequence[Mapping[str, Tensor]],
        axes: str | Sequence[str],
        target: Target,
        out: str | Path,
        *,
        generations: int = GENERATIONS,
        offspring: int = OFFSPRING,
        stages: Sequence[Stage] = STAGES,
        portable: bool = False,
        resume: bool = False,
        table: CostTable | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        data: str = "",
        progress: bool = True,
    ) -> None:
        self.model, self.loaded, self.target = loaded.model, loaded, target
        self.out, self.portable, self.progress = Path(out), portable, progress
        self._generations, self._seed = generations, seed
        axes = listed(axes)
        found = units(self.model, axes)
        dearest = max(stage.effort for stage in stages)
        text = Fidelity(self.model, batches, lambda genome: None, (), dearest=dearest)  # refuses too little at once
        arguments = {
            "model": loaded.name,
            "axes": sorted(axes),
            "target": [target.kind, target.value],
            "portable": portable,
            "generations": generations,
            "offspring": offspring,
            "stages": [[stage.survivors, stage.effort] for stage in stages],
            "seed": seed,
            "data": data,
            "tokens": text.tokens,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        self.inputs = inputs or {"input_ids": batches[0]["input_ids"][:4]}
        self._refuse(arguments, resume)
        table = self._given(table, found)
        self._write("search.json", arguments)
        state = calibrate(self.model, batches) if "width" in axes else None
        experts = expert_statistics(self.model, batches)["score"] if "experts" in axes else None
        self._state = state
        self.elastic = Elastic(self.model, found, state=state, experts=experts, compensate=not portable)
        self.table = table or profiling.profile(self.elastic, self.inputs, TARGETS[target.kind], progress=self.progress)
        self._write("costs.json", self.table.plain())
        self._reachable()
        self.fitness = Fidelity(self.model, batches, self.elastic.set, self.elastic.dense, dearest=dearest)
        self._evolution: dict[str, Any] = {"offspring": offspring, "stages": stages, "seed": seed}
        self._tops = self.elastic.dense

    # ---- the folder

    def _refuse(self, arguments: dict[str, Any], resume: bool) -> None:
        """Refuses a folder that holds anything but this search, or a table."""
        file = self.out / "search.json"
        if file.is_file():
            refuse_other(file, arguments, "search")
            if not resume:
                raise Error(f"out = '{self.out}': holds this search already; pass --resume to go on, or another folder")
        else:
            refuse_content(self.out, f"out = '{self.out}'", but=lambda name: name == "costs.json", lacks="search")

    def _write(self, name: str, data: Any) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            beside = self.out / f"{name}.new"
            beside.write_text(json.dumps(data, indent=1, default=str) + "\n")
            os.replace(beside, self.out / name)
        except OSError as problem:
            raise Error(f"out = '{self.out}': cannot be written to ({problem.strerror or problem})") from problem

    def _given(self, table: CostTable | None, found: Sequence[Unit]) -> CostTable | None:
        """The table that the caller or the folder brings, None if none does; refused where it is of something else."""
        file = self.out / "costs.json"
        if table is None and file.is_file():
            table = CostTable.from_plain(read_json(file))
        if table is not None:
            known = profiling.facts(TARGETS[self.target.kind], self.model, self.inputs)
            table.matches([unit.name for unit in found], [len(unit.levels) for unit in found], known)
        return table

    def _reachable(self) -> None:
        least = self._least(self.table)
        if least > self.target.cost * (1 + 1e-9):
            (self.out / "search.json").unlink()  # the table stays, for another target in this folder
            speedup = self.target.kind == "speedup"
            reach = (
                f"the largest is {floor(100 / least) / 100:.2f}"
                if speedup
                else f"the least is {ceil(1000 * least) / 1000}"
            )
            raise Error(
                f"{self.target.kind} = {self.target.value:g}: out of reach on these axes, {reach}, where next to "
                "nothing is left of the layers"
            )

    def _least(self, table: CostTable) -> float:
        """Cost of the cheapest candidate that leaves something of the model."""
        units = self.elastic.units
        lowest = (0,) * len(units)
        if self.portable:
            layers = {unit.layer for unit in units}
            narrow = {unit.site: self._lowest(unit.site) for unit in units}
            goes = [layers - {stays} for stays in layers] if self._removable else [set()]
            points = [self._alike(narrow, sorted(gone)) for gone in goes]
        elif any(unit.levels[0] for unit in units):
            points = [lowest]
        else:
            points = [(*lowest[:i], 1, *lowest[i + 1 :]) for i in range(len(units))]
        return min(map(table.of, points))

    # ---- candidates within the budget

    def fits(self, genome: Genome) -> bool:
        """Whether a candidate keeps the budget and leaves something of the model."""
        return self.table.of(genome) <= self.budget and any(
            unit.levels[level] for unit, level in zip(self.elastic.units, genome)
        )

    def filled(self, genome: Genome, rng: random.Random) -> Genome:
        """Brought below the budget by random steps down, then up wherever there is room."""
        levels = list(genome)
        while not self.fits(tuple(levels)):
            down = [i for i, level in enumerate(levels) if level]
            if not down:
                break
            levels[rng.choice(down)] -= 1
        order = list(range(len(levels)))
        rng.shuffle(order)
        for i in order:
            while levels[i] < self._tops[i] and self.fits((*levels[:i], levels[i] + 1, *levels[i + 1 :])):
                levels[i] += 1
        return tuple(levels)

    def child(self, parents: list[Genome], rng: random.Random) -> Genome:
        """A few units change, by a level or all the way; random others pay for it."""
        if self.portable:
            child = self._portable_child(parents[0], rng)
            return child if self.fits(child) else parents[0]  # one layer may be dearer than another
        levels = list(parents[0])
        for _ in range(moves(rng)):
            i = rng.randrange(len(levels))
            if rng.random() < 0.3:
                levels[i] = rng.choice((0, self._tops[i]))
            else:
                levels[i] = min(max(levels[i] + rng.choice((-1, 1)), 0), self._tops[i])
        return self.filled(tuple(levels), rng)

    # ---- candidates that load anywhere: whole layers go, all others are alike

    def _alike(self, widths: Mapping[str, int], gone: Sequence[int]) -> Genome:
        return tuple(0 if unit.layer in gone else widths[unit.site] for unit in self.elastic.units)

    def _portable_child(self, parent: Genome, rng: random.Random) -> Genome:
        widths, gone = self._read(parent)
        roll, site = rng.random(), rng.choice(sorted(widths))
        if roll < 0.5:
            top = max(t for u, t in zip(self.elastic.units, self._tops) if u.site == site)
            widths[site] = min(max(widths[site] + rng.choice((-1, 1)), self._lowest(site)), top)
        elif gone:
            for _ in range(min(moves(rng), len(gone))):
                gone.remove(rng.choice(gone))
        return self._portable_filled(widths, gone, rng)

    def _portable_filled(self, widths: dict[str, int], gone: list[int], rng: random.Random) -> Genome:
        """Layers go by lot until the budget holds, and come back by lot where it allows."""
        layers = sorted({unit.layer for unit in self.elastic.units})
        while not self.fits(self._alike(widths, gone)):
            left = [layer for layer in layers if layer not in gone]
            narrower = [site for site, width in widths.items() if width > self._lowest(site)]
            if self._removable and len(left) > 1:
                gone.append(rng.choice(left))
            elif narrower:
                widths[rng.choice(narrower)] -= 1
            else:
                break
        for layer in rng.sample(gone, len(gone)):
            fewer = [other for other in gone if other != layer]
            if self.fits(self._alike(widths, fewer)):
                gone = fewer
        return self._alike(widths, gone)

    @property
    def _removable(self) -> bool:
        """Whether whole layers may go."""
        return all(unit.levels[0] == 0 for unit in self.elastic.units)

    def _lowest(self, site: str) -> int:
        """Lowest level of a layer that stays; above 0 where depth is an axis, since level 0 is the removed layer."""
        return min(1 if unit.levels[0] == 0 else 0 for unit in self.elastic.units if unit.site == site)

    def _read(self, genome: Genome) -> tuple[dict[str, int], list[int]]:
        """Width of each site and layers that are gone."""
        here = list(zip(self.elastic.units, genome))
        gone = sorted({u.layer for u, level in here if not u.levels[level]})
        tops = {u.site: top for u, top in zip(self.elastic.units, self._tops)}  # of a site that is gone everywhere
        return tops | {u.site: level for u, level in here if u.levels[level]}, gone

    # ---- where it starts

    def starts(self) -> list[Genome]:
        """Candidates within the budget by the usual rules: one width for all, FLAP's order, what matters least.

        Where widths are searched also one kind of unit alone at one width, the others whole: neurons, or KV groups.
        """
        rng = random.Random(self._seed)
        if self.portable:
            sites = {unit.site for unit in self.elastic.units}
            tops = {s: max(t for u, t in zip(self.elastic.units, self._tops) if u.site == s) for s in sites}
            return list(dict.fromkeys(self._portable_filled(dict(tops), [], rng) for _ in range(8)))
        found = [self._uniform(rng), self._by_harm(rng)]
        if self._state is not None:
            found.append(self._by_score(rng))
            found += [self._uniform(rng, site) for site in ("mlp", "attention")]
        return list(dict.fromkeys(found))

    def _uniform(self, rng: random.Random, site: str | None = None) -> Genome:
        """One width for all units, or for those of one site; where that alone is too little others follow by lot."""
        levels = list(self._tops)
        cut = [site in (None, unit.site) for unit in self.elastic.units]
        while not self.fits(tuple(levels)):
            share = [level / top if top and may else 0.0 for level, top, may in zip(levels, self._tops, cut)]
            i = max(range(len(levels)), key=share.__getitem__)
            if not share[i]:
                break
            levels[i] -= 1
        return self.filled(tuple(levels), rng)

    def _greedy(self, loss: Any, rng: random.Random) -> Genome:
        """Step by step the unit whose next step down loses least for what it saves."""
        levels = list(self._tops)
        while not self.fits(tuple(levels)) and any(levels):
            saved = [c[level] - c[level - 1] if level else 0.0 for c, level in zip(self.table.levels, levels)]
            down = [i for i, level in enumerate(levels) if level]
            levels[min(down, key=lambda i: loss(i, levels[i]) / max(saved[i], 1e-9))] -= 1
        return self.filled(tuple(levels), rng)

    def _by_score(self, rng: random.Random) -> Genome:
        """FLAP's order over all layers, held against seconds instead of parameters."""
        assert self._state is not None
        ranked = []
        for unit in self.elastic.units:
            score = unit_scores(self._state, unit.site, unit.layer).sort(descending=True).values
            below = torch.cat([score.new_zeros(1), (score - score.min()).cumsum(0)])
            ranked.append([float(below[k]) for k in unit.levels])
        return self._greedy(lambda i, level: ranked[i][level] - ranked[i][level - 1], rng)

    def _by_harm(self, rng: random.Random) -> Genome:
        """By what the whole model loses where one sub-layer alone is at its lowest level, spread over its steps."""
        alone = [tuple(0 if j == i else top for j, top in enumerate(self._tops)) for i in range(len(self._tops))]
        harm = self.fitness(alone, self._evolution["stages"][0].effort, self._seed)
        return self._greedy(lambda i, level: harm[i] / max(self._tops[i], 1), rng)

    # ---- the search

    @property
    def budget(self) -> float:
        """Cost that a candidate may have by the table."""
        return self.target.cost

    def run(self) -> Found:
        """Searches, cuts, measures; corrects the table and goes on where the measured speed-up is off."""
        with self.elastic, evaluating(self.model):
            state, search = self._restored()
            while True:
                self._generate(search, state)
                found = self._found(search)
                if state["done"] or not self._off(found, state):
                    break
                search = Evolution(
                    [self._again(search.best, state["round"])], self.child, self.fitness, **self._evolution
                )
                search.restore({**search.state(), "history": found.history})
            state["done"] = True
            self._save(state, search)
        return found

    def _restored(self) -> tuple[dict[str, Any], Evolution]:
        """Where the search stands: at its start, or where the folder says."""
        file = self.out / "state.json"
        if not file.is_file():
            start = Evolution(self._start(), self.child, self.fitness, **self._evolution)
            return {"round": 0, "done": False}, start
        state = read_json(file)
        try:
            self.table = CostTable.from_plain(state["table"])
            search = Evolution([self._tops], self.child, self.fitness, **self._evolution)
            search.restore(state["search"])
            for parent in search.parents:
                self.table.of(parent)
            return {"round": int(state["round"]), "done": bool(state["done"])}, search
        except (KeyError, TypeError, ValueError, IndexError) as problem:
            raise Error(f"{file}: is damaged ({type(problem).__name__}: {problem}); take another folder") from problem

    def _start(self) -> list[Genome]:
        """The best of the starts."""
        points = [point for point in self.starts() if self.fits(point)]
        if not points:
            raise Error(f"{self.target.kind} = {self.target.value:g}: no candidate keeps it; lower it, or add an axis")
        values = self.fitness(points, self._evolution["stages"][-1].effort, self._seed)
        return [best_of(points, values)]

    def _generate(self, search: Evolution, state: dict[str, Any]) -> None:
        total = self._generations * (state["round"] + 2) // 2  # a round after the first is half as long
        bar = tqdm(
            total=total, initial=search.generation, desc=f"search {self.target}", unit="gen", disable=not self.progress
        )

        def each() -> None:
            bar.update()
            bar.set_postfix_str(f"best KL {search.values[0]:.4f}")
            self._save(state, search)

        with bar:
            if not state["done"]:
                search.run(total, each)

    def _save(self, state: dict[str, Any], search: Evolution) -> None:
        self._write("state.json", {**state, "table": self.table.plain(), "search": search.state()})

    def _found(self, search: Evolution) -> Found:
        small = cut(self.model, self.elastic.plan(search.best)).eval()
        ratio = measured(self.model, small, self.inputs) if self.target.kind == "speedup" else None
        kept = {u.name: (u.levels[level], u.levels[-1]) for u, level in zip(self.elastic.units, search.best)}
        fitness = search.values or self.fitness([search.best], self._evolution["stages"][-1].effort, self._seed)
        return Found(search.best, kept, fitness[0], list(search.history), ratio, self.table.of(search.best), small)

    def _off(self, found: Found, state: dict[str, Any]) -> bool:
        """Whether another round is due: then the table says what was measured."""
        if found.ratio is None or state["round"] + 1 >= ROUNDS:
            return False
        if abs(found.ratio.median / self.target.value - 1) <= TOLERANCE:
            return False
        saved = 1 - found.cost
        if saved <= 0 or found.ratio.median <= 1:  # what was measured says nothing of what more cuts would save
            return False
        table = replace(self.table, correction=self.table.correction * (1 - 1 / found.ratio.median) / saved)
        if self._least(table) > self.target.cost:
            return False
        self.table = table
        state["round"] += 1
        return True

    def _again(self, genome: Genome, place: int) -> Genome:
        rng = random.Random(self._seed + place)
        if self.portable:
            widths, gone = self._read(genome)
            return self._portable_filled(widths, gone, rng)
        return self.filled(genome, rng)


def measured(dense: nn.Module, small: nn.Module, inputs: Mapping[str, Any], pairs: int = TIMED) -> Ratio:
    """Prefill of dense against the cut model, interleaved."""

    def run(model: nn.Module) -> Any:
        return lambda: timing.generation(model, inputs, steps=0)

    return timing.time_stages(run(dense), run(small), repeats=pairs, warmup=2)["prefill"]


def save(search: Search, found: Found, data: str) -> Path:
    """The cut model as a checkpoint in `out/model`, with its card."""
    small = found.model
    facts = {
        "base model": search.loaded.name,
        "method": "sparing search: evolution over levels of sub-layers (after EvoPress, arXiv 2410.14649)",
        "target": str(search.target),
        "measured": "–" if found.ratio is None else f"{found.ratio.median:.3f}× prefill",
        "calibration data": data,
        "parameters before": f"{sum(p.numel() for p in search.model.parameters()):,}",
    }
    small.sparing_origin = {"method": "search", "fields": {"target": str(search.target)}}  # type: ignore[assignment]
    folder = search.out / "model"  # of this search, as all in `out` is
    return save_pretrained(small, folder, processor=_processor(search.loaded), card=facts, overwrite=True)


def _processor(loaded: Loaded) -> Any:
    """What goes with the model; None where it brought nothing, for which no search is thrown away."""
    try:
        return loaded.processor if loaded.sees else loaded.tokenizer
    except Error:
        return None

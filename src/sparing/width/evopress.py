"""EvoPress: evolve the level of every unit under one budget, judged by what the whole model then says."""

from __future__ import annotations

import json
import logging
import os
import random
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparing.engine.banks import Bank, load_levels_
from sparing.engine.elastic import Elastic, units
from sparing.engine.fitness import Fidelity
from sparing.engine.surgery import LayerCut, Plan, SurgeryMethod
from sparing.engine.view import View
from sparing.grid.compress import sparsity_levels
from sparing.grid.files import read_json
from sparing.grid.method import (
    BudgetError,
    Card,
    Error,
    Method,
    Shape,
    choice,
    flag,
    get,
    integer,
    number,
    numbers,
    register,
)
from sparing.grid.search import Breed, Evolution, Genome, Stage, best_of, distinct, switched

#: generations (None: by what is removed), offspring, survivors and tokens of each stage, as released
PUBLISHED: dict[str, tuple[int | None, int, tuple[int, ...], tuple[int, ...]]] = {
    "depth": (None, 32, (2, 1), (2048, 32768)),
    "sparsity": (400, 64, (8, 2, 1), (2048, 16384, 65536)),
    "bits": (150, 128, (16, 4, 1), (2048, 16384, 131072)),
}
WIDTHS = (2, 3, 4, 5, 6)  # bits of a weight that banks hold; one apart, so that a switch keeps their sum
_POINTS = 64  # random points, no two alike, of which the best is the start
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitting:
    """What `EvoPress.fit` takes beside model and data.

    Attributes:
        bank: folder of the level bank of sparsity and bits; made if missing. None takes a temporary one.
        checkpoint: folder for the state after each generation; found there, the search goes on, one with other fields
            (but generations) is refused.
        progress: show a bar.
    """

    bank: str | Path | None = None
    checkpoint: str | Path | None = None
    progress: bool = True


@register(
    "evopress",
    Card(
        "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search",
        year=2024,
        arxiv="2410.14649",
        axis="width",
        kind="surgery",
        phase="static",
        needs="calibration",
        requires=("mlp",),
        fits_budget=True,
        summary="evolves which sub-layers go (or sparsity, or bits, of each matrix) at one budget, by divergence",
    ),
)
@dataclass(frozen=True)
class EvoPress(SurgeryMethod):
    """A (1 + lambda) search over levels of units at a fixed budget; fitness is the divergence of the whole model.

    Units and levels:

    - depth: attention and MLP of each of L layers, there or gone; exactly k = int(amount L) of each kind go. A removed
      sub-layer adds nothing to the residual.
    - sparsity: every matrix of the decoder layers from a bank of SparseGPT levels around `amount`; one level is the
      same number of weights for all, so raising one and lowering another keeps the total exactly.
    - bits: every matrix at 2, 3, 4, 5 or 6 bits (GPTQ, groups of 128); matrices exchange bits within their size, and
      each size has its turn in proportion to its matrices.

    A generation: lambda children by the level-switch mutation, m = min(U{1,2,3}, U{1,2,3}) times one unit up and one of
    the same kind down; stages of selection on growing minibatches, the same for all candidates; the parent joins the
    last, re-scored. Depth and fractional bits start from the best of 64 random points, no two alike (of all there are,
    in a space of fewer; a log line says so), sparsity and whole bits from the uniform level.

    Departures: children equal to each other or to the parent are redrawn (the released sparsity script keeps them); a
    fitness that is not a finite number loses, and is refused where all are such; a starting point of fractional bits
    lowers a matrix by one bit at most. Matrices are linear layers: stacked experts stay dense in sparsity and bits.

    What it saves: depth removes work. Zeros and dequantised weights are executed like any other by dense kernels, on
    CPU and GPU: sparsity and bits save storage, not time.

    State: `attention` and `mlp`, uint8 (L,), 1 where the sub-layer stays; or `weight.NAME`, the matrices at the levels
    found, and `levels`, int64, in the order of their names. A fit holds for its `amount`.

    Args:
        levels: depth | sparsity | bits.
        amount: share of sub-layers, or of weights, that goes; for bits the mean bits a weight.
        blocks: depth only: whole layers go.
        generations, offspring, survivors, tokens: none takes the published ones; depth int(k (L - k) / 1.5)
            generations.
        measure: kl | perplexity.
        top_k: KL over the dense model's likeliest tokens only; none takes all.
        search: evolve, or random: as many random points, through the same stages, as a control.
        seed: of everything drawn.
    """

    levels: str = choice("depth", ("depth", "sparsity", "bits"), "what the levels are", source="§4")
    amount: float = number(0.25, "share that goes, or mean bits", low=0)
    blocks: bool = flag(False, "whole layers go", source="code")
    generations: int | None = integer(None, "generations", low=0, optional=True, source="code")
    offspring: int | None = integer(None, "children a generation", low=1, optional=True, source="code")
    survivors: tuple[int, ...] | None = numbers(None, "left after each stage", whole=True, low=1, optional=True)
    tokens: tuple[int, ...] | None = numbers(None, "evaluated on in each stage", whole=True, low=1, optional=True)
    measure: str = choice("kl", ("kl", "perplexity"), "fitness", source="code")
    top_k: int | None = integer(None, "likeliest tokens that KL looks at", low=1, optional=True, source="code")
    search: str = choice("evolve", ("evolve", "random"), "evolution, or its control")
    seed: int = integer(0, "of everything drawn")

    def check(self) -> None:
        if self.levels == "bits" and not WIDTHS[0] <= self.amount <= WIDTHS[-1]:
            raise Error(f"evopress: amount = {self.amount:g}: bits must be in [{WIDTHS[0]}, {WIDTHS[-1]}]")
        if self.levels != "bits" and self.amount >= 1:
            raise Error(f"evopress: amount = {self.amount:g}: must be below 1, it is the share that goes")
        if self.blocks and self.levels != "depth":
            raise Error(f"evopress: blocks = true: only levels = depth have blocks, not {self.levels}")
        if len(self.survivors or ()) != len(self.tokens or ()):
            raise Error(f"evopress: survivors = {self.survivors}, tokens = {self.tokens}: must have one entry a stage")

    def at(self, keep: float, shape: Shape) -> Self:
        """Depth and sparsity: `keep` stays. Bits: of 16."""
        amount = round(16 * keep if self.levels == "bits" else 1 - keep, 12)
        if self.state and amount != self.amount:
            raise BudgetError(f"keep = {keep:g}: this evopress was fitted with amount = {self.amount:g}; fit it again")
        if self.levels == "bits" and not WIDTHS[0] <= amount <= WIDTHS[-1]:
            raise BudgetError(f"keep = {keep:g}: is {amount:g} of 16 bits, evopress has {WIDTHS[0]} to {WIDTHS[-1]}")
        return self.replace(amount=amount)

    def control(self, kind: str, shape: Shape, seed: int = 0) -> Method:
        """Depth: as many sub-layers of each kind by lot, or evenly spread. Sparsity and bits: none stands by itself."""
        if self.levels != "depth" or kind not in self.card.controls:
            raise Error(f"control = {kind!r}: evopress has random and uniform for levels = depth, not {self.levels}")
        left = shape.layers - int(self.amount * shape.layers + 1e-9)
        values = {"attention": left, "mlp": left, "blocks": self.blocks}
        return get(f"{kind}-sublayers")(**values, **({"seed": seed} if kind == "random" else {}))

    def fit(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> Self:
        """Search on calibration text.

        Args:
            model: switched between candidates while it runs, and left bit for bit as it was.
            batches: rows are sequences; at least as many tokens as the last stage asks for.
            options: of `Fitting`.
        """
        data, how = list(batches), Fitting(**options)
        if self.levels == "depth":
            return self._fit_depth(model, data, how)
        with tempfile.TemporaryDirectory() as scratch:
            return self._fit_bank(model, data, how.bank or scratch, how)

    def plan(self, model: nn.Module) -> Plan:
        layers = View(model).layers
        if self.levels != "depth":
            return Plan(tuple(LayerCut() for _ in layers))  # the weights come with the state
        kept = [self.state[site].tolist() for site in ("attention", "mlp")]
        if {len(k) for k in kept} != {len(layers)}:
            raise Error(f"evopress: was fitted on another model; it knows {len(kept[0])} layers, not {len(layers)}")
        return Plan(tuple(LayerCut(attention=bool(a), mlp=bool(m)) if a or m else None for a, m in zip(*kept)))

    # ---- depth

    def _fit_depth(self, model: nn.Module, data: list[Any], how: Fitting) -> Self:
        layers = View(model).layers
        for layer in layers:
            if layer.attention is None:
                what = f"layer {layer.index} ({type(layer.module).__name__})"
                raise Error(f"evopress: levels = depth: {what} has no attention module that was found")
        L = len(layers)
        gone = int(self.amount * L + 1e-9)
        elastic = Elastic(model, units(model, ["depth"]))
        sites = [unit.site == "attention" for unit in elastic.units]
        groups = [[i for i, a in enumerate(sites) if a], [i for i, a in enumerate(sites) if not a]]

        def drawn(rng: random.Random) -> Genome:
            lots = [set(rng.sample(range(L), gone)) for _ in groups]
            if self.blocks:
                lots[1] = lots[0]
            out = set(lots[0]), set(lots[1])
            return tuple(int(unit.layer not in out[0 if a else 1]) for unit, a in zip(elastic.units, sites))

        def mutated(parents: list[Genome], rng: random.Random) -> Genome:
            if not self.blocks:
                return switched(parents[0], groups, 0, 1, rng)
            blocks = switched([parents[0][i] for i in groups[0]], [range(L)], 0, 1, rng)
            return tuple(blocks[unit.layer] for unit in elastic.units)

        with elastic:
            fitness = self._fitness(model, data, elastic.set, elastic.dense)
            elastic.empty_layers_are_none(fitness.sample.to(next(model.parameters()).device))
            generations = int(gone * (L - gone) / 1.5) if self.generations is None else self.generations
            start = self._best_of(drawn, fitness) if gone else elastic.dense
            found = self._evolved(start, mutated, drawn, fitness, generations, how)
        kept = [torch.tensor([found[i] for i in group], dtype=torch.uint8) for group in groups]
        return self.with_state({"attention": kept[0], "mlp": kept[1]})

    # ---- sparsity and bits

    def _fit_bank(self, model: nn.Module, data: list[Any], folder: str | Path, how: Fitting) -> Self:
        sparse = self.levels == "sparsity"
        steps = sparsity_levels(self.amount, 8, int(View(model).config.hidden_size)) if sparse else WIDTHS
        solver = "sparsegpt" if sparse else "gptq"
        bank = Bank.build(model, data, folder, steps, solver=solver, progress=how.progress)
        names = list(bank.names)
        sizes = [bank.size(name) for name in names]
        groups = [list(range(len(names)))] if sparse else _alike(sizes)
        have = [bank.levels(name) for name in names]  # a small matrix has fewer levels of sparsity
        low = [levels[0] if sparse else 0 for levels in have]
        high = [levels[-1] if sparse else len(WIDTHS) - 1 for levels in have]
        target = 0 if sparse else self.amount

        def drawn(rng: random.Random) -> Genome:
            genome = self._uniform(names, sizes, rng)
            for _ in range(len(names)):
                genome = switched(genome, groups, low, high, rng)
            return genome

        def mutated(parents: list[Genome], rng: random.Random) -> Genome:
            return switched(parents[0], groups, low, high, rng)

        own = dict(model.named_parameters())
        dense = {name: own[name].data for name in names}
        loaded: dict[str, int] = {}

        def switch(genome: Genome) -> None:
            if genome == ():  # the dense model
                for name in loaded:
                    own[name].data = dense[name]
                loaded.clear()
            else:
                wanted = {n: level if sparse else WIDTHS[level] for n, level in zip(names, genome)}
                load_levels_(model, bank, wanted, loaded)

        try:
            with torch.no_grad():
                fitness = self._fitness(model, data, switch, ())
                whole = sparse or target in WIDTHS
                first = self._uniform(names, sizes, random.Random(self.seed))
                start = first if whole else self._best_of(lambda rng: self._uniform(names, sizes, rng), fitness)
                generations = self.generations if self.generations is not None else PUBLISHED[self.levels][0] or 0
                found = self._evolved(start, mutated, drawn, fitness, generations, how)
        finally:
            with torch.no_grad():
                switch(())
        level = [step if sparse else WIDTHS[step] for step in found]
        state = {f"weight.{name}": bank.load(name, step) for name, step in zip(names, level)}
        return self.with_state({**state, "levels": torch.tensor(level)})

    def _uniform(self, names: list[str], sizes: list[int], rng: random.Random) -> Genome:
        """One level for all; for fractional bits random matrices go down from the next higher one to the budget."""
        if self.levels == "sparsity":
            return (0,) * len(names)
        high = next(i for i, bits in enumerate(WIDTHS) if bits >= self.amount)
        genome, total = [high] * len(names), WIDTHS[high] * sum(sizes)
        for i in rng.sample(range(len(names)), len(names)):
            if total <= self.amount * sum(sizes) or genome[i] == 0:
                break
            total -= (WIDTHS[high] - WIDTHS[high - 1]) * sizes[i]
            genome[i] -= 1
        return tuple(genome)

    # ---- the search

    @property
    def _stages(self) -> list[Stage]:
        _, _, survivors, tokens = PUBLISHED[self.levels]
        return [Stage(c, t) for c, t in zip(self.survivors or survivors, self.tokens or tokens, strict=True)]

    def _fitness(self, model: nn.Module, data: list[Any], switch: Any, dense: Genome) -> Fidelity:
        dearest = max(stage.effort for stage in self._stages)
        return Fidelity(model, data, switch, dense, measure=self.measure, top_k=self.top_k, dearest=dearest)

    def _best_of(self, drawn: Any, fitness: Fidelity) -> Genome:
        rng = random.Random(self.seed)
        points = distinct(drawn, _POINTS, rng)
        if len(points) < _POINTS:
            _LOG.warning("evopress: starts from the best of all %d points there are, not of %d", len(points), _POINTS)
        return best_of(points, fitness(points, self._stages[0].effort, rng.getrandbits(32)))

    def _evolved(
        self,
        start: Genome,
        mutated: Breed,
        drawn: Any,
        fitness: Fidelity,
        generations: int,
        how: Fitting,
    ) -> Genome:
        search = Evolution(
            [start],
            mutated if self.search == "evolve" else lambda parents, rng: drawn(rng),
            fitness,
            offspring=self.offspring or PUBLISHED[self.levels][1],
            stages=self._stages,
            seed=self.seed,
        )
        file = None if how.checkpoint is None else Path(how.checkpoint) / "evopress.json"
        asked = json.loads(json.dumps({**self.fields(), "generations": None, "units": len(start)}))
        if file is not None and file.is_file():
            state = read_json(file)
            was = state.get("asked", {})
            for key, now in asked.items():
                if was.get(key) != now:
                    raise Error(f"checkpoint = '{file.parent}': of another search: {key} {was.get(key)}, now {now}")
            search.restore(state)
        bar = tqdm(total=generations, initial=search.generation, desc="evopress", disable=not how.progress, unit="gen")

        def each() -> None:
            bar.update()
            bar.set_postfix(best=f"{search.values[0]:.4f}")
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.with_suffix(".new").write_text(json.dumps({"asked": asked, **search.state()}))
                os.replace(file.with_suffix(".new"), file)

        with bar:
            return search.run(generations, each)


def _alike(sizes: list[int]) -> list[list[int]]:
    """Matrices of equal size; only they may exchange bits."""
    return [[i for i, size in enumerate(sizes) if size == one] for one in sorted(set(sizes))]

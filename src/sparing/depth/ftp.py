"""FTP: a tiny router sends each prompt token through a layer or around it; a search shares skips among layers."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparing.engine.attach import attach
from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.train import Batch, Objective, Training, student, train
from sparing.engine.view import View, evaluating
from sparing.grid.budget import spaced
from sparing.grid.gates import excess_loss, mean_over, straight_through
from sparing.grid.method import BudgetError, Card, Error, Method, Shape, choice, integer, numbers, register, share
from sparing.grid.score import divergence
from sparing.grid.search import Evolution, Genome, Stage, crossed, to_mean
from sparing.grid.select import ranks, top_k

FACTORS, WIDTH = 4, 64  # of the router
MOVE = 0.05  # of a layer's sparsity, in one mutation


@register(
    "ftp",
    Card(
        "FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing",
        year=2024,
        arxiv="2412.11494",
        axis="depth",
        kind="stream",
        phase="both",
        needs="training",
        summary="a router of four cheap numbers skips layers for single prompt tokens; a search spreads the skips",
        controls=("random", "static", "uniform"),
        requires=("scores",),
        fits_budget=True,
    ),
)
@dataclass(frozen=True)
class FTP(StreamMethod):
    """Of n prompt tokens about (1 - s_l) n run layer l; the others pass it unchanged and leave no keys or values there.

    s is the mean of s_l over layers: the share of pairs of prompt token and layer that is skipped.

    1. Factors of token i before layer l: i / (n - 1); log(1 + n a_i), a_i being the attention it receives; the rank of
       a_i, 1 for the largest and 0 for the smallest; s_l. a is the mean over heads and over the last `queries` prompt
       tokens of the coming layer's attention, all prompt tokens being keys.
    2. Learned router: z = W2 relu(W1 x + b1) + b2, one for all layers, z = (skip, keep). `count` = budget keeps the
       ceil((1 - s_l) n) tokens of largest z_keep - z_skip; `count` = router keeps those with z_keep > z_skip.
       Static router: the first token, then the last ones: 0, n-1, n-2, …, as many.
    3. Where s_l = 0 nothing is asked, and all run.
    4. A generated token runs the layers with s_l < threshold and no other.

    `fit` finds s_l by a genetic search with the static router, trains the learned one (see `fit`), and searches again
    with it, from the best of the first search.

    The budget is the prompt's: `keep` = 1 - s. What generated tokens spend follows from rule 4, often all layers. The
    control `uniform` gives them as many as the searched profile does, evenly spaced; by the rule, all or none.

    Departures. Published (and `count` = router) the router decides how many run. Nothing then ties that number to s:
    its sparsity loss forgives skipping too much, and the second search, which sees quality alone, prefers profiles at
    which too little is skipped. With the exact count the budget asked is the budget spent. The four factors are
    published, their scales are ours; so is the attention's source, the last queries of the coming layer: the layer
    before has no keys of tokens that skipped it. Of rule 4 a strict variant is mentioned but not defined; threshold = 1
    lets every generated token run everything.

    Cost: one key projection of the prompt a layer and `queries` rows of attention, 384 multiplications a token, a sort;
    nothing for the static router, and nothing in decoding.

    State: sparsity, float64 (L,); router.0.weight (64, 4), router.0.bias (64,), router.2.weight (2, 64), router.2.bias
    (2,), float32, with the learned router. It holds for the s that it was fitted at.

    Args:
        s: mean share of prompt tokens that a layer skips, <= s_max.
        s_max: most that one layer skips; below 1 the first token always runs under the static router.
        router: learned | static.
        profile: searched | uniform (s_l = s everywhere: the control).
        count: budget | router, see 2.
        threshold: see 4.
        queries: prompt tokens whose attention is read.
        lot: seed; as many tokens of each sequence as the router keeps, drawn by lot in each layer (the control).
        population, generations, elites, calibration: of the search: candidates of a generation, generations, candidates
            that stay; sequences that one is judged on (whole batches).
        seed: of the search.
        lambdas: weights of the guide, the sparsity loss and the distillation.

    >>> keeps = static(torch.ones(1, 5, dtype=torch.bool), 0.4)
    >>> keeps.tolist()
    [[True, False, False, True, True]]
    """

    whole_prompt: ClassVar[bool] = True

    s: float = share(0.3, "mean share of prompt tokens skipped a layer", source="22-40 % in the results")
    s_max: float = share(0.9, "most that one layer skips")
    router: str = choice("learned", ("learned", "static"), "who chooses the tokens")
    profile: str = choice("searched", ("searched", "uniform"), "s_l of the layers")
    count: str = choice("budget", ("budget", "router"), "who says how many run")
    threshold: float = share(0.5, "generated tokens skip layers of this sparsity and more", source="reviews")
    queries: int = integer(16, "last prompt tokens whose attention is read", low=1)
    lot: int | None = integer(None, "seed, to draw the tokens by lot", optional=True)
    population: int = integer(32, "candidates of a generation", low=2)
    generations: int = integer(20, "of each search")
    elites: int = integer(4, "candidates that stay in the next generation", low=1)
    calibration: int = integer(4, "sequences that a candidate is judged on", low=1)
    seed: int = integer(0, "of the search")
    lambdas: tuple[float, ...] = numbers((1.0, 1.0, 1.0), "weights of guide, sparsity and distillation losses")

    def check(self) -> None:
        if len(self.lambdas) != 3:
            raise Error(f"ftp: lambdas = {self.lambdas}: must be three, of guide, sparsity and distillation")
        if self.s > self.s_max:
            raise Error(f"ftp: s = {self.s:g}: must be at most s_max = {self.s_max:g}")
        if self.elites >= self.population:
            raise Error(f"ftp: elites = {self.elites}: must be less than population = {self.population}")

    def at(self, keep: float, shape: Shape) -> Self:
        s = round(1 - keep, 12)
        if s > self.s_max:
            raise BudgetError(f"keep = {keep:g}: ftp keeps at least {1 - self.s_max:g} of the tokens (s_max)")
        if self.state and abs(s - self.s) > 1e-6:
            raise BudgetError(f"keep = {keep:g}: this ftp was fitted at keep = {1 - self.s:g}; fit another at {keep:g}")
        return self.replace(s=s)

    def control(self, kind: str, shape: Shape, seed: int = 0) -> Method:
        own = {"random": ("lot", seed), "static": ("router", "static"), "uniform": ("profile", "uniform")}
        return self.replace(**dict([own[kind]])) if kind in own else super().control(kind, shape, seed)

    @property
    def ready(self) -> bool:
        return bool(self.state) or (self.router == "static" and self.profile == "uniform")

    def sparsity(self, L: int) -> tuple[float, ...]:
        """s_l of L layers."""
        if self.profile == "uniform":
            return (self.s,) * L
        found = self._searched
        if len(found) != L:
            raise Error(f"method = 'ftp': was fitted on another model: sparsity has {len(found)} layers, not {L}")
        return found

    @functools.cached_property
    def _searched(self) -> tuple[float, ...]:
        return tuple(self.state["sparsity"].tolist())

    def decodes(self, layer: int, L: int) -> bool:
        """Whether generated tokens run a layer, of L."""
        if self.profile == "uniform" and self.state:
            return layer in self._even
        return self.sparsity(L)[layer] < self.threshold

    @functools.cached_property
    def _even(self) -> tuple[int, ...]:
        run = tuple(layer for layer, s in enumerate(self._searched) if s < self.threshold)
        return spaced(len(self._searched), len(run)) if len(run) > 1 else run

    def before_layer(self, stream: Stream, layer: int) -> None:
        s = self.sparsity(stream.layers)[layer]
        if not self.decodes(layer, stream.layers):
            stream.bypass(stream.generated, free=True)
        if s > 0 and stream.phase == "prefill":
            stream.bypass(~(self.keeps(stream, s) | stream.generated))  # padding leaves too

    def keeps(self, stream: Stream, s: float) -> Tensor:
        """Prompt tokens that run the coming layer, bool (B, N)."""
        prompt_BN = stream.prompt
        if self.router == "static":
            keep_BN = static(prompt_BN, s)
        else:
            z_BN2 = route(self.state, factors(received(stream, self.queries), prompt_BN, s))
            gain_BN = (z_BN2[..., 1] - z_BN2[..., 0]).masked_fill(~prompt_BN, -torch.inf)
            keep_BN = gain_BN > 0 if self.count == "router" else top_k(gain_BN, kept(prompt_BN, s)[:, 0]) & prompt_BN
        return keep_BN if self.lot is None else drawn(prompt_BN, keep_BN.sum(1), self.lot * 1009 + stream.layer)

    def fit(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> Self:
        """Search, train the router, search again. A resumed training repeats the first search, with the same result.

        The tokens before the first label are the prompt, labelled ones count as generated; without labels all is
        prompt. A profile is judged by KL(dense || routed) at the tokens that predict a label (without labels: at all).

        Losses of the router, on hard decisions with straight-through gradients: the cross entropy with the static
        router's choice, its weight falling to 0 over the first half; mean_l max(0, s_l - skipped_l)^2; the KL above.
        Decisions are not drawn (Gumbel noise was tried): a router that skipped 0.3 of the tokens while noise decided
        skipped 0.1 of them without.

        Args:
            model: the model the method will run on; left unchanged.
            batches: keyword arguments of its forward, with labels or without; kept in memory.
            options: of `Training`. The learning rate is 1e-2 by default.
        """
        data, how = list(batches), Training(**options)
        if not data:
            raise Error("batches: the training data is empty")
        fresh, rng = self.with_state({}), random.Random(self.seed)
        even = (self.s,) * len(View(model))
        if self.s == 0:
            return fresh._carrying(even)
        lots = [to_mean([rng.random() for _ in even], self.s, self.s_max) for _ in range(self.population - 1)]
        plain = fresh.replace(profile="searched", lot=None)
        best = plain.replace(router="static").searched(model, data, [even, *lots], how.progress)
        if self.router == "static":
            return fresh._carrying(best)
        learned = train(_Routing(model, plain._carrying(best)), data, how, lr=1e-2, name="fit ftp")
        best = plain.with_state(learned).searched(model, data, [best], how.progress)
        return fresh.with_state(learned)._carrying(best)

    @torch.no_grad()
    def searched(self, model: nn.Module, data: list[Batch], start: list[Genome], progress: bool) -> Genome:
        """The best s_l that a genetic search finds for the router of this method."""
        place = next(model.parameters()).device
        before = [0, *accumulate(len(batch["input_ids"]) for batch in data)]
        judged = [{k: v.to(place) for k, v in b.items()} for b, n in zip(data, before) if n < self.calibration]

        @functools.cache
        def gap(sparsity: Genome) -> float:
            method = self._carrying(sparsity)
            found = [divergence(dense, answers(model, batch, method)) for dense, batch in zip(wanted, judged)]
            return torch.cat(found).mean().item()

        with evaluating(model), tqdm(total=self.generations, desc="fit ftp: search", disable=not progress) as bar:
            wanted = [answers(model, batch) for batch in judged]
            search = Evolution(
                start,
                self.child,
                lambda candidates, effort, draw: [gap(c) for c in candidates],
                offspring=self.population - self.elites,
                stages=[Stage(max(self.elites, self.population // 4))],
                elites=self.elites,
                seed=self.seed,
            )
            return search.run(self.generations, bar.update)

    def _carrying(self, sparsity: Genome) -> Self:
        return self.with_state(self.state | {"sparsity": torch.tensor(sparsity, dtype=torch.float64)})

    def child(self, parents: list[Genome], rng: random.Random) -> Genome:
        """Two parents crossed and brought back to mean s, then a part of one layer's sparsity moved to another."""
        child = list(to_mean(crossed(rng.choice(parents), rng.choice(parents), rng), self.s, self.s_max))
        a, b = rng.sample(range(len(child)), 2) if len(child) > 1 else (0, 0)
        part = min(MOVE, child[a], self.s_max - child[b])
        child[a] -= part
        child[b] += part
        return tuple(child)


# --------------------------------------------------------------------------- routers


def kept(prompt_BN: Tensor, s: float) -> Tensor:
    """Tokens of each sequence that run at sparsity s, ceil((1 - s) n), long (B, 1)."""
    return torch.tensor([[math.ceil((1 - s) * n - 1e-9)] for n in prompt_BN.sum(1).tolist()], device=prompt_BN.device)


def static(prompt_BN: Tensor, s: float) -> Tensor:
    """The first token of each sequence and the last ones, as many as run at sparsity s; bool (B, N)."""
    count_B1, n_B1 = kept(prompt_BN, s), prompt_BN.sum(1, keepdim=True)
    place_BN = prompt_BN.cumsum(1) - 1
    return prompt_BN & (count_B1 > 0) & ((place_BN == 0) | (place_BN > n_B1 - count_B1))


def drawn(prompt_BN: Tensor, count_B: Tensor, seed: int) -> Tensor:
    """So many tokens of each sequence by lot; what a token draws depends on its place in its sequence alone."""
    lots = torch.rand(prompt_BN.shape[1], generator=torch.Generator().manual_seed(seed)).to(prompt_BN.device)
    score_BN = lots[(prompt_BN.cumsum(1) - 1).clamp(min=0)]
    return top_k(score_BN.masked_fill(~prompt_BN, -torch.inf), count_B) & prompt_BN


def received(stream: Stream, queries: int) -> Tensor:
    """a, float32 (B, N): attention from the last prompt tokens in the coming layer, mean over heads and queries."""
    prompt_BN = stream.prompt
    asking_BN = prompt_BN & (prompt_BN.cumsum(1) > prompt_BN.sum(1, keepdim=True) - queries)
    rows_BHQN, _ = stream.attention_rows(asking_BN)
    return rows_BHQN.mean(1).sum(1) / asking_BN.sum(1, keepdim=True).clamp(min=1)


def factors(a_BN: Tensor, prompt_BN: Tensor, s: float) -> Tensor:
    """x, float32 (B, N, 4): place, attention, its rank, and the layer's sparsity; rows outside the prompt are void."""
    n_B1 = prompt_BN.sum(1, keepdim=True)
    place_BN = (prompt_BN.cumsum(1) - 1) / (n_B1 - 1).clamp(min=1)
    rank_BN = ranks(a_BN.masked_fill(~prompt_BN, -torch.inf)) / (n_B1 - 1).clamp(min=1)
    return torch.stack([place_BN, (n_B1 * a_BN).log1p(), 1 - rank_BN, torch.full_like(a_BN, s)], -1)


def route(state: Mapping[str, Tensor], x_BN4: Tensor) -> Tensor:
    """z, float32 (B, N, 2): logits of skip and keep."""
    w1, b1, w2, b2 = (state[f"router.{i}.{kind}"].to(x_BN4.device) for i in (0, 2) for kind in ("weight", "bias"))
    return F.linear(F.relu(F.linear(x_BN4, w1, b1)), w2, b2)


# --------------------------------------------------------------------------- training


def answers(model: nn.Module, batch: Batch, *methods: Method) -> Tensor:
    """Logits (R, V) at the tokens that predict a label, of the dense model or with a method; without labels at all."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    labels_BT, prompt_BT = batch.get("labels"), None
    if labels_BT is None:
        asked_BT = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    else:
        prompt_BT = (labels_BT != -100).cumsum(1) == 0
        asked_BT = F.pad(labels_BT[:, 1:] != -100, (0, 1))
    with attach(model, *methods, prompt=prompt_BT, warn=False) as run:
        run.keeps_trace = False
        return model(**inputs, use_cache=False).logits[asked_BT]


@dataclass(frozen=True)
class _Learning(FTP):
    """FTP while its router trains: every token runs, blended by a decision that lets gradients through.

    Attributes:
        noted: layer -> s_l, the share that it skipped, and the guide's loss, of every layer that was routed.
    """

    noted: dict[int, tuple[float, Tensor, Tensor]] = field(default_factory=dict)

    def before_layer(self, stream: Stream, layer: int) -> None:
        s = self.sparsity(stream.layers)[layer]
        if s == 0:
            return
        prompt_BN = stream.prompt
        z_BN2 = route(self.state, factors(received(stream, self.queries), prompt_BN, s))
        soft_BN = z_BN2.softmax(-1)[..., 1]
        keep_BN = straight_through(soft_BN > 0.5, soft_BN)
        wrong_BN = F.cross_entropy(z_BN2.movedim(-1, 1), static(prompt_BN, s).long(), reduction="none")
        self.noted[layer] = (s, 1 - mean_over(keep_BN, prompt_BN), mean_over(wrong_BN, prompt_BN))
        others = float(s < self.threshold)  # generated tokens; padding is nobody's key
        stream.blend(torch.where(prompt_BN, keep_BN, others), hide=True)


class _Routing(Objective):
    """The router's three losses; the model is frozen."""

    def __init__(self, model: nn.Module, method: FTP) -> None:
        super().__init__(student(model).eval())
        layers = (nn.Linear(FACTORS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
        self.router = nn.Sequential(*layers).to(next(model.parameters()).device)
        self._method = method

    def forward(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            dense = answers(self.model, batch)
        method = _Learning(**self._method.fields())
        state = {f"router.{name}": weight for name, weight in self.router.named_parameters()}
        routed = answers(self.model, batch, method.with_state(self._method.state | state))
        s, skipped, wrong = zip(*method.noted.values())
        skipped_L = torch.stack(skipped)
        guide = max(0.0, 1 - 2 * self.share) * torch.stack(wrong).mean()
        sparse, distil = excess_loss(skipped_L.new_tensor(s), skipped_L), divergence(dense, routed).mean()
        self.shown = {"KL": distil.item(), "skipped": skipped_L.mean().item()}
        return torch.stack([guide, sparse, distil]) @ guide.new_tensor(self._method.lambdas)

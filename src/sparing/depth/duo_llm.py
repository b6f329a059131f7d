"""Duo-LLM: each token runs a big or a small FFN in each layer, whichever the layer's router picks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparing.engine.attach import attach
from sparing.engine.gating import mlp_activity
from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.train import Batch, Objective, Training, labelled, student, train
from sparing.engine.view import LayerView, View, evaluating
from sparing.grid.budget import spaced
from sparing.grid.gates import budget_loss
from sparing.grid.method import BudgetError, Card, Error, Method, Shape, choice, flag, integer, number, register, share

# Shape letters: B batch, N rows, D hidden, n small neurons, C choices (0 big, 1 small, 2 skip), L layers.

LEVELS = 5  # shares of big at which the margins are watched after training
PERIOD = 8192  # tokens after which the draw of the random router repeats

Forward = Callable[[Tensor], Tensor]


@register(
    "duo-llm",
    Card(
        "Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models",
        year=2024,
        arxiv="2410.10846",
        axis="depth",
        kind="stream",
        phase="both",
        needs="training",
        summary="every token runs a big or a small FFN in each layer, as a linear router says",
        requires=("neurons",),
    ),
)
@dataclass(frozen=True)
class DuoLlm(StreamMethod):
    """y = x + FFN_c(norm x), with c picked for each token and layer, in the prompt as in what is generated.

    The big FFN is the layer's own, the small one has 1 / factor of its neurons and no biases, skip adds nothing.
    Attention runs for every token. x is what the FFN gets, behind its norm.

    Fit:

    1. The small FFN begins as the neurons of the big one with the largest mean |activation| ||down column||.
    2. Mixtures: c drawn for each token and layer, big with probability p; LM loss.
    3. Routers, all else frozen: P = softmax(tau W_l x), y = x + sum_c P_c FFN_c; tau rises from 1 linearly;
       L = LM + beta (mean P_big - rho)^2, the mean over all tokens and layers. W starts at 0, an even mixture.
    4. Margins: W_big x - max of the others, over calibration tokens routed hard, at five shares of big.

    Run: big where the margin exceeds the quantile that leaves the share rho (router learned), or 0 (argmax, the
    published rule, which spends what it spends); else the largest of the others. The threshold is one for all layers,
    as the budget is; it lets a fitted method run at any rho. At rho = 1 no router runs and the model is the dense one.
    Rows are gathered by choice: what is not run costs nothing. A router costs C D multiplications a row, the small FFN
    1 / factor of the MLP.

    Departures. The paper trains from scratch; here the big FFN begins, and by default stays, as it is, so that rho = 1
    is the user's own model; train_big = True trains everything but embeddings along, as published. beta, for
    which no published value was seen, must outweigh what the LM loss gains by more big: after a short training of
    lab:lm at rho = 0.5 argmax ran big in 74 % of the cells with beta = 1, in 51 % with 10. Skip is of the FFN alone: a
    router that also skipped attention would have to read another state than the paper's.

    Controls: `random` draws as many big layers for each token by lot, `uniform` gives every token the same evenly
    spaced ones; both with the same FFNs. Where rho L is no whole number, tokens take turns, so that the mean holds.
    Lots depend on the token's distance to the first generated one, so right padding needs `run.prompt`.

    State: small.gate.{l} (n, D; missing in an MLP without gate), small.up.{l} (n, D), small.down.{l} (D, n), router.{l}
    (C, D), margins (5, Q), row i the quantiles at the share i / 4 of big; weight.NAME where train_big.

    Args:
        rho: share of (token, layer) that runs big.
        p: probability of big in step 2; None is 1 / C. The others share the rest.
        factor: of the neurons of big and small; n is rounded to a multiple of 8 from 8 on.
        skip: third choice, no FFN. A budget then counts it as small: it spends at most what was asked.
        train_big: step 2 trains the model's weights too.
        beta: weight of the budget loss.
        tau: temperature that step 3 ends with.
        router: learned | argmax | random | even.
        seed: of the random router.

    >>> lab = Shape(layers=12, heads=8, groups=4, head_dim=32, hidden=192, neurons=512)
    >>> round(DuoLlm().at(0.75, lab).rho, 6), DuoLlm().at(1, lab).rho
    (0.6, 1.0)
    """

    rho: float = share(0.5, "share of token-layers that run the big FFN", source="k / L")
    p: float | None = share(None, "probability of big in random routing", optional=True, source="stage 1")
    factor: int = integer(16, "neurons of big over those of small", low=2, source="10240 / 640")
    skip: bool = flag(False, "third choice: no FFN", source="abstract")
    train_big: bool = flag(False, "random routing trains the model too")
    beta: float = number(10.0, "weight of the budget loss", low=0)
    tau: float = number(10.0, "temperature at the end of router training", low=0)
    router: str = choice("learned", ("learned", "argmax", "random", "even"), "who picks")
    seed: int = integer(0, "of the random router")

    # ---- budget

    def at(self, keep: float, shape: Shape) -> Self:
        """`keep` of the layers' work: attention, and rho of the MLPs beside 1 - rho of the small ones."""
        matrices = 2 if self.state and "small.gate.0" not in self.state else 3
        mlp, attention = matrices * shape.neurons, 2 * (shape.heads + shape.groups) * shape.head_dim
        saves = mlp / (mlp + attention) * (1 - _neurons(shape.neurons, self.factor) / shape.neurons)
        if 1 - keep > saves + 1e-9:
            raise BudgetError(f"keep = {keep:g}: duo-llm runs attention and the small FFNs, at least {1 - saves:.3g}")
        return self.replace(rho=max(0.0, 1 - (1 - keep) / saves))

    def control(self, kind: str, shape: Shape, seed: int = 0) -> Method:
        if kind not in self.card.controls:
            return super().control(kind, shape, seed)  # refuses it
        return self.replace(router="random" if kind == "random" else "even", seed=seed)

    @functools.cached_property
    def threshold(self) -> float:
        """Margin above which a row runs big."""
        if self.router == "argmax":
            return 0.0
        margins = self.state["margins"].double()
        place = self.rho * (LEVELS - 1)
        low = min(int(place), LEVELS - 2)
        near = margins[low].lerp(margins[low + 1], place - low)
        return math.inf if self.rho == 0 else float(torch.quantile(near, 1 - self.rho))

    # ---- run

    def before_layer(self, stream: Stream, layer: int) -> None:
        """Every row runs every layer; what it runs there is decided at the FFN."""

    def feed_forward(self, stream: Stream, layer: LayerView, x_BND: Tensor, forward: Forward) -> Tensor:
        if self.rho == 1 and self.router != "argmax":
            return forward(x_BND)
        choice_BN = self.choose(stream, layer.index, x_BND)
        out_BND, ran = torch.zeros_like(x_BND), 0.0
        for c, (ffn, cost) in enumerate(zip(self.ffns(), (1.0, self._ratio(layer), 0.0))):
            rows_BN = choice_BN == c
            out_BND = out_BND.index_put((rows_BN,), ffn(layer, x_BND[rows_BN][None], forward)[0].to(x_BND.dtype))
            ran += cost * float(rows_BN.float().mean())
        stream.mlp_share(ran)
        return out_BND

    def choose(self, stream: Stream, layer: int, x_BND: Tensor) -> Tensor:
        """What each row runs, long (B, N)."""
        if self.router in ("random", "even"):
            return (~self._by_rule(stream.step, layer, stream.layers)).long()
        margin_BN, other_BN = self.margin(layer, x_BND)
        return torch.where(margin_BN > self.threshold, 0, other_BN)

    def margin(self, layer: int, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        """By how much the router prefers big, (B, N), and the best of the other choices, long (B, N)."""
        z_BNC = F.linear(x_BND, self.state[f"router.{layer}"].to(x_BND))
        other = z_BNC[..., 1:].max(-1)
        return z_BNC[..., 0] - other.values, 1 + other.indices

    def _by_rule(self, step_BN: Tensor, layer: int, L: int) -> Tensor:
        """Big or not, bool (B, N): evenly spaced layers, or as many by lot."""
        done, now = ((self.rho * L * at + 0.5 + 1e-6).floor().long() for at in (step_BN.double(), step_BN.double() + 1))
        count_BN = now - done  # rho L on average over tokens
        if self.router == "even":
            return _even(L).to(step_BN.device)[count_BN, layer]
        lots_BNL = _lots(self.seed, L).to(step_BN.device)[step_BN % PERIOD]
        return (lots_BNL < lots_BNL[..., layer : layer + 1]).sum(-1) < count_BN

    # ---- FFNs

    def ffns(self) -> tuple[Callable[[LayerView, Tensor, Forward], Tensor], ...]:
        """The choices, each (layer, x_BND, forward of the layer's own MLP) -> (B, N, D)."""
        found = (lambda layer, x, forward: forward(x), lambda layer, x, forward: self.small(layer, x))
        return (*found, lambda layer, x, forward: torch.zeros_like(x)) if self.skip else found

    def small(self, layer: LayerView, x_BND: Tensor) -> Tensor:
        """The small FFN."""
        gate, up, down = (self.state.get(f"small.{part}.{layer.index}") for part in ("gate", "up", "down"))
        assert up is not None and down is not None
        mlp: Any = layer.mlp
        act = getattr(mlp, "act_fn", None) or mlp.activation_fn
        h_BNn = F.linear(x_BND, up.to(x_BND))
        h_BNn = act(h_BNn) if gate is None else act(F.linear(x_BND, gate.to(x_BND))) * h_BNn
        return F.linear(h_BNn, down.to(x_BND))

    def _ratio(self, layer: LayerView) -> float:
        return len(self.state[f"small.up.{layer.index}"]) / layer.neurons

    # ---- fit

    def fit(self, model: nn.Module, batches: Iterable[Batch], **options: Any) -> Self:
        """Train small FFNs (with train_big the model too) under random routes, then routers; read the margins.

        Args:
            model: left unchanged.
            batches: with input_ids and labels. Eight of them, evenly spaced, also give the start of the small FFNs and
                the margins: how much big a text asks for varies, so they should not be of one kind.
            options: of `Training`; epochs are those of each of the two trainings. Learning rates by default 1e-3 for
                mixtures (1e-4 with train_big) and 1e-2 for routers.
        """
        lacks = View(model).lacks(self.card.requires)
        if lacks is not None:
            raise Error(f"method = {self.name!r}: cannot work on {type(model).__name__}: {lacks}")
        data, how = labelled(batches), Training(**options)
        some = data[:: math.ceil(len(data) / 8)]
        first = _start(model, some, self.factor)
        fixed = ("embed_tokens", "vision_tower", ".visual.")
        mixing = _Mixing(student(model, lambda name: self.train_big and not any(f in name for f in fixed)), self, first)
        learned = train(mixing, data, how, lr=1e-4 if self.train_big else 1e-3, name=f"fit {self.name} mixtures")
        state = {k.replace("model.", "weight.", 1) if k.startswith("model.") else k: v for k, v in learned.items()}
        routing = _Routing(mixing.model.requires_grad_(False), self, state)
        state |= train(routing, data, how, lr=1e-2, name=f"fit {self.name} routers")
        state["margins"] = _margins(model, self.with_state(state), some)
        return self.with_state(state)


# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class _Drawn(DuoLlm):
    """Step 2: choices by lot, from torch's global generator, as dropout draws."""

    def choose(self, stream: Stream, layer: int, x_BND: Tensor) -> Tensor:
        C = 2 + self.skip
        p = 1 / C if self.p is None else self.p
        edges = torch.tensor([p + i * (1 - p) / (C - 1) for i in range(C - 1)], device=x_BND.device)
        return torch.bucketize(torch.rand(x_BND.shape[:2], device=x_BND.device), edges, right=True)


@dataclass(frozen=True)
class _Soft(DuoLlm):
    """Step 3: all choices, weighed; what each layer gave big is noted."""

    noted: dict[int, Tensor] = field(default_factory=dict)

    def feed_forward(self, stream: Stream, layer: LayerView, x_BND: Tensor, forward: Forward) -> Tensor:
        P_BNC = (self.tau * F.linear(x_BND, self.state[f"router.{layer.index}"].to(x_BND))).softmax(-1)
        self.noted[layer.index] = P_BNC[..., 0]
        parts = [P_BNC[..., c, None] * ffn(layer, x_BND, forward) for c, ffn in enumerate(self.ffns())]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class _Watched(DuoLlm):
    """Step 4: big above a given margin; all margins are noted."""

    threshold: float = -math.inf
    noted: dict[int, Tensor] = field(default_factory=dict)

    def margin(self, layer: int, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        found = super().margin(layer, x_BND)
        self.noted[layer] = found[0]
        return found


class _Mixing(Objective):
    """LM loss under random routes; small FFNs train, and what of the model has a gradient."""

    def __init__(self, model: nn.Module, method: DuoLlm, first: Mapping[str, list[Tensor]]) -> None:
        super().__init__(model)
        self.small = nn.ModuleDict({part: nn.ParameterList(weights) for part, weights in first.items()})
        self.method = _Drawn(**method.replace(rho=0.5).fields())

    def forward(self, batch: Batch) -> Tensor:
        return _lm_loss(self.model, self.method.with_state(dict(self.small.named_parameters("small"))), batch)


class _Routing(Objective):
    """LM loss of the soft mixture, and the budget loss; routers train."""

    def __init__(self, model: nn.Module, method: DuoLlm, state: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        zeros_CD = state["small.up.0"].new_zeros(2 + method.skip, state["small.up.0"].shape[1])
        self.router = nn.ParameterList(zeros_CD.clone() for _ in View(model).layers)
        self.method, self.state = method, {k: v for k, v in state.items() if not k.startswith("weight.")}

    def forward(self, batch: Batch) -> Tensor:
        tau = 1 + (self.method.tau - 1) * self.share
        routers = dict(self.router.named_parameters("router"))
        soft = _Soft(**self.method.replace(tau=tau).fields()).with_state({**self.state, **routers})
        loss = _lm_loss(self.model, soft, batch)
        P_BNL = torch.stack(list(soft.noted.values()), -1)
        self.shown = {"big": float(P_BNL.detach().mean())}
        return loss + self.method.beta * budget_loss(P_BNL, self.method.rho, batch.get("attention_mask"))


def _lm_loss(model: Any, method: Method, batch: Batch) -> Tensor:
    with attach(model, method, warn=False) as run:
        run.keeps_trace = False
        return model(**batch, use_cache=False).loss


def _start(model: nn.Module, data: Sequence[Batch], factor: int) -> dict[str, list[Tensor]]:
    """gate, up, down of each layer's small FFN: the neurons with the largest mean |activation| ||down column||."""
    layers = View(model).layers
    fires = [torch.zeros(layer.neurons) for layer in layers]
    for batch in data:
        for total_N, (_, fires_RN) in zip(fires, mlp_activity(model, batch), strict=True):
            total_N += fires_RN.float().abs().mean(0).cpu()
    found: dict[str, list[Tensor]] = {"gate": [], "up": [], "down": []}
    for layer, mean_N in zip(layers, fires, strict=True):
        down, fused = layer.projection("down_proj").weight.detach(), layer.fused_gate_up
        score_N = mean_N.to(down.device) * down.float().norm(dim=0)
        best = score_N.topk(_neurons(layer.neurons, factor)).indices.sort().values
        for i, part in enumerate(("gate", "up")):
            if fused is not None:
                found[part].append(fused.weight.detach().chunk(2)[i][best])
            elif hasattr(layer.mlp, f"{part}_proj"):
                found[part].append(layer.projection(f"{part}_proj").weight.detach()[best])
        found["down"].append(down[:, best])
    return {part: weights for part, weights in found.items() if weights}


@torch.no_grad()
def _margins(model: Any, method: DuoLlm, data: Sequence[Batch]) -> Tensor:
    """Quantiles of the margins (5, Q): tokens run all big, then each lower share by what was seen at the one above."""
    places = np.linspace(0, 1, 1025)
    device = next(model.parameters()).device
    rows: list[Tensor] = []
    for level in range(LEVELS):
        big = 1 - level / (LEVELS - 1)
        cut = -math.inf if big == 1 else float(torch.quantile(rows[-1], 1 - big))
        fields = {**method.fields(), "rho": 0.5, "router": "learned"}
        watched = _Watched(**fields, threshold=cut).with_state(method.state)
        seen: list[Tensor] = []
        with evaluating(model), attach(model, watched, warn=False) as run:
            run.keeps_trace = False
            for batch in data:
                inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
                model(**inputs, use_cache=False)
                real_BN = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
                seen += [margin_BN[real_BN].cpu() for margin_BN in watched.noted.values()]
        rows.append(torch.from_numpy(np.quantile(torch.cat(seen).double().numpy(), places)))
    return torch.stack(rows[::-1]).float()


# --------------------------------------------------------------------------- small things


def _neurons(big: int, factor: int) -> int:
    """Neurons of the small FFN: a multiple of 8 where that leaves 8 or more, else as many as there are, at least 1."""
    few = big // factor
    return max(1, few) if few < 8 else (few + 4) // 8 * 8


@functools.lru_cache(maxsize=8)
def _even(L: int) -> Tensor:
    """Row k: k of L layers at even spacing, the first among them, and the last from two on; bool (L + 1, L)."""
    big = torch.zeros(L + 1, L, dtype=torch.bool)
    for k in range(1, L + 1):
        big[k, list(spaced(L, k) if k > 1 else (0,))] = True
    return big


@functools.lru_cache(maxsize=8)
def _lots(seed: int, L: int) -> Tensor:
    return torch.rand(PERIOD, L, generator=torch.Generator().manual_seed(seed))

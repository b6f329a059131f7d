"""Fire Together Wire Together: a small gate before each layer predicts what will fire, and only that is computed.

Two forms of one idea: filters of a convolutional network for each image, as published (`labels`, `Gate`, `gate_loss`,
`flops`, `train_gates` on a `GatedCNN`), and MLP neurons of a decoder for each generated token (the method).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparing.engine.gating import GatedCNN, flops, gathered_mlp, mlp_activity, relabelled
from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.train import Batch, Objective, Training, student, train
from sparing.engine.units import calibrate
from sparing.engine.view import LayerView, View
from sparing.grid.method import BudgetError, Card, Error, Shape, integer, register, share
from sparing.grid.select import ranks

SLACK = 1e-5  # of the released code: on a share of the mass, and on an activation that counts as dead
QUANTILES = 257  # of the logits of a layer, in the state


# --------------------------------------------------------------------------- labels


def labels(a_BC: Tensor, r: float, keep_one: bool = True) -> Tensor:
    """What fired: the largest set of the strongest channels whose share of the activation mass is at most r.

    q_c = a_c / sum_c a_c; r < 1 keeps ranks t with q_(1) + … + q_(t) <= r + 1e-5, r = 1 all ranks; either keeps only
    q_c > 1e-5 (released code: r = 1 alone, and then more may fire just below r = 1). Of equal activations the lower
    index counts as stronger. Without any activation nothing fires.

    Args:
        a_BC: >= 0, of each channel: max |O| over its places (filters), |act(gate) up| (neurons).
        r: share of the mass, in (0, 1].
        keep_one: the strongest channel fires also where its mass alone exceeds r (released code: then none does).

    Returns:
        bool (B, C).

    >>> labels(torch.tensor([[4.0, 3, 2, 1]]), 0.9).int().tolist(), labels(torch.tensor([[9.0, 1]]), 0.85).tolist()
    ([[1, 1, 1, 0]], [[True, False]])
    """
    if not 0 < r <= 1:
        raise Error(f"r = {r!r}: must be a number in (0, 1]")
    a_BC = a_BC.detach().float()
    q_BC = a_BC / a_BC.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if r == 1:
        return q_BC > SLACK
    sorted_BC, order_BC = q_BC.sort(dim=-1, descending=True, stable=True)
    fires_BC = sorted_BC.cumsum(-1) - r <= SLACK
    if keep_one:
        fires_BC[..., 0] = True
    return torch.zeros_like(fires_BC).scatter(-1, order_BC, fires_BC) & (q_BC > SLACK)


def uniform_labels(a_BC: Tensor, ratio: float) -> Tensor:
    """The variant with a fixed count: all but the floor(ratio C) weakest and those with a_c <= 1e-5.

    Args:
        a_BC: as in `labels`.
        ratio: share dropped, at most 1; below 0 everything fires.

    >>> uniform_labels(torch.tensor([[4.0, 0, 2, 1]]), 0.3).int().tolist()
    [[1, 0, 1, 1]]
    """
    if ratio > 1:
        raise Error(f"ratio = {ratio!r}: must be a number <= 1")
    if ratio < 0:
        return torch.ones_like(a_BC, dtype=torch.bool)
    kept = a_BC.shape[-1] - math.floor(ratio * a_BC.shape[-1])
    return (ranks(a_BC.detach()) < kept) & (a_BC > SLACK)


# --------------------------------------------------------------------------- convolutions, as published


class Gate(nn.Module):
    """Which of K filters will fire, from the input of their convolution: z = W softmax(pool(I)) + b; z > 0 says yes.

    Costs C side^2 K multiply-adds an image, side^2 / (K_h K_w H' W') of the convolution.

    Args:
        channels, filters: C of the input, K of the convolution.
        pool: max over the places (published) | avg (released code).
        side: of the grid that places are pooled to; 1 is a vector of C channels.
        softmax: over all that was pooled, before the product (caption and code; the figure draws it behind).
    """

    def __init__(self, channels: int, filters: int, pool: str = "max", side: int = 1, softmax: bool = True) -> None:
        super().__init__()
        if pool not in ("max", "avg"):
            raise Error(f"pool = {pool!r}: must be max | avg")
        if side < 1:
            raise Error(f"side = {side!r}: must be a whole number >= 1")
        self.pool = nn.AdaptiveMaxPool2d(side) if pool == "max" else nn.AdaptiveAvgPool2d(side)
        self.softmax = softmax
        self.linear = nn.Linear(channels * side**2, filters)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        e_BC = self.pool(x_BCHW).flatten(1)
        return self.linear(e_BC.softmax(-1) if self.softmax else e_BC)


def curve(model: GatedCNN, x_BCHW: Tensor, rs: Iterable[float]) -> dict[float, float]:
    """r -> FLOPs of an image, from one dense pass over images: how to choose r before training."""
    _, dense = model.dense(x_BCHW)
    return {r: flops(model, relabelled(dense, functools.partial(labels, r=r))) for r in rs}


# --------------------------------------------------------------------------- MLP neurons of a decoder


@register(
    "fire-together-wire-together",
    Card(
        "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction",
        year=2022,
        arxiv="2110.08232",
        axis="width",
        kind="stream",
        phase="decode",
        needs="training",
        summary="a low-rank gate predicts which MLP neurons a generated token will fire; only those are computed",
        requires=("neurons",),
    ),
)
@dataclass(frozen=True)
class FireTogetherWireTogether(StreamMethod):
    """Of each layer's MLP a generated token computes only the neurons that a gate expects to fire; the prompt runs all.

    x is what the MLP reads, D wide, behind its norm; N neurons a layer.

    1. Label of a token: a_n = |act(gate_n x) up_n x|, g = labels(a, r), on dense activations.
    2. Gate: z = U V x + b, V (rank, D), U (N, rank). Trained by BCE(z, g) alone on the frozen model (decoupled).
    3. Neuron n is computed where z_n > t, else it counts as 0. t = 0 as published; with `neurons`, the one t for all
       layers above which that share of the logits lay over the calibration data, on the mean over layers. Gates that
       are unsure fire less than their labels do at t = 0, so a budget is the better way.

    Departures. A token has no places, so nothing is pooled. No softmax over the channels: made for activations >= 0, it
    hides what is negative in a hidden state, and gates learn half as much (benchmarks/fire_together.py). A full gate
    would cost a third of a gated MLP; one of rank D / 16 costs (D + N) / 48 N of it. The joint variant, which trains
    the backbone too, exists for convolutions only (`GatedConv`).

    What is saved. One token at a time (cached decoding, batch 1) computes its own neurons; a batch computes the union
    of its tokens' masks, which grows towards everything; a prompt saves nothing and stays dense. Gate and up
    projection are gathered, `down_proj` is not, see `gathered_mlp`: a share s of the neurons costs (2 s + 1) / 3 of a
    gated MLP and the gate. Gathering copies rows: expect a gain in time only well below s = 1/2, on wide models.

    Budget: `at` counts the block parameters that a generated token runs, gates and the whole of down_proj
    among them. The controls are static cuts of the MLPs that run as many parameters, layer by layer, compensated; they
    hold for the prompt too.

    State: `gate.i.down`, `gate.i.up`, `gate.i.bias`; `gate.i.quantiles` (257,) of the logits, rising; and the channel
    statistics of `calibrate`, with which the controls are compensated. `r` and `rank` take effect in `fit`.

    Args:
        r: share of a token's activation mass that labels keep.
        neurons: mean share of neurons computed; none: z > 0. 1 is the dense model.
        rank: of the gates; none is D // 16.

    >>> FireTogetherWireTogether().at(0.75, Shape(4, heads=8, groups=8, head_dim=8, hidden=64, neurons=192)).neurons
    0.4166666666666667
    """

    r: float = share(0.8, "activation mass that labels keep", zero=False, source="code")
    neurons: float | None = share(None, "mean share of neurons computed; none: z > 0", zero=False, optional=True)
    rank: int | None = integer(None, "rank of the gates; none: D // 16", low=1, optional=True)

    def at(self, keep: float, shape: Shape) -> Self:
        """Sets `neurons`. A gated MLP and equal layers are assumed."""
        if keep >= 1:
            return self.replace(neurons=1.0)
        attention, gate = self._costs(shape)
        fixed, whole = attention + gate + shape.neurons, attention + 3 * shape.neurons
        if keep * whole <= fixed:
            raise BudgetError(
                f"keep = {keep:g}: {self.name} runs all of attention, down_proj and its gates, {fixed / whole:.3g} of "
                "the parameters"
            )
        return self.replace(neurons=(keep * whole - fixed) / (2 * shape.neurons))

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        N, gate = shape.neurons, self._costs(shape)[1]
        shares = [float((self._quantiles[i] > self._offset).float().mean()) for i in range(shape.layers)]
        runs = [N if self.neurons == 1 else min(N, round((N * (2 * s + 1) + gate) / 3)) for s in shares]
        return {"neurons": tuple(runs)}

    def _costs(self, shape: Shape) -> tuple[float, float]:
        """Parameters of a layer's attention and gate, relative to one row of width D."""
        heads = 2 * shape.heads + 2 * shape.groups
        return heads * shape.head_dim, _rank(self.rank, shape.hidden) * (1 + shape.neurons / shape.hidden)

    # ---- the verb

    def before_layer(self, stream: Stream, layer: int) -> None:
        """Every token runs every layer."""

    def feed_forward(
        self, stream: Stream, layer: LayerView, x_BND: Tensor, forward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        generated = stream.generated
        if generated is False or self.neurons == 1:
            return forward(x_BND)
        if generated is True:
            out_BND, ran = self._fired(layer, x_BND)
            stream.mlp_share(ran)
            return out_BND
        out_BND = torch.empty_like(x_BND)
        out_BND[~generated] = forward(x_BND[~generated][None])[0]
        out_BND[generated], ran = self._fired(layer, x_BND[generated])
        stream.mlp_share(1 - (1 - ran) * float(generated.float().mean()))
        return out_BND

    def _fired(self, layer: LayerView, x_RD: Tensor) -> tuple[Tensor, float]:
        """What the neurons that fire give, and the share of the MLP that this ran, the gate counted in."""
        out_RD, ran = gathered_mlp(layer, x_RD, self.fires(layer.index, x_RD))
        whole = sum(p.numel() for p in layer.mlp.parameters()) if layer.mlp is not None else 1
        return out_RD, ran + sum(part.numel() for part in self._gate(layer.index, x_RD)) / whole

    @torch.no_grad()
    def fires(self, layer: int, x_RD: Tensor) -> Tensor:
        """Which neurons the gate of a layer wants for each token, bool (…, N)."""
        return logits(x_RD, *self._gate(layer, x_RD)) > self._offset

    def _gate(self, layer: int, like: Tensor) -> tuple[Tensor, ...]:
        """The gate on the model's device and in its number type, moved once."""
        key = (layer, like.device, like.dtype)
        if key not in self._gates:
            self._gates[key] = tuple(self.state[f"gate.{layer}.{part}"].to(like) for part in ("down", "up", "bias"))
        return self._gates[key]

    @functools.cached_property
    def _gates(self) -> dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, ...]]:
        return {}

    @functools.cached_property
    def _quantiles(self) -> list[Tensor]:
        if not self.ready:
            raise Error(f"{self.name}: needs training first: method = method.fit(model, batches)")
        layers = sum(name.endswith(".quantiles") for name in self.state)
        return [self.state[f"gate.{i}.quantiles"] for i in range(layers)]

    @functools.cached_property
    def _offset(self) -> float:
        """t."""
        return 0.0 if self.neurons is None else float(torch.cat(self._quantiles).quantile(1 - self.neurons))

    # ---- training

    def fit(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> Self:
        """Train the gates on the frozen model, by labels from its own dense activations.

        Passes over the batches: one for the controls' statistics, one for how often each neuron fires (the biases start
        at its log-odds), two of training (AdamW, peak rate 1e-2), one for the quantiles.

        Args:
            model: left unchanged.
            batches: where they have labels, the labelled tokens train the gates, else all that are not padding.
            options: of `sparing.engine.train.Training`: epochs, lr, checkpoint, progress …
        """
        data = list(batches)
        state = calibrate(model, data)
        wiring = _Wiring(model, data, self.r, self.rank)
        learned = train(wiring, data, Training(**{"epochs": 2, **options}), lr=1e-2, name=f"fit {self.name}")
        state |= {name.replace("gates.", "gate."): tensor.float().cpu() for name, tensor in learned.items()}
        for i, table in enumerate(wiring.quantiles(data)):
            state[f"gate.{i}.quantiles"] = table
        return self.with_state(state)


def logits(x_RD: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """z of every neuron, (…, N)."""
    return F.linear(F.linear(x_RD, down), up, bias)


def _rank(rank: int | None, hidden: int) -> int:
    return max(1, hidden // 16) if rank is None else rank


class _TokenGate(nn.Module):
    """Starts as the static mask: what fires often has a high logit for every token."""

    def __init__(self, hidden: int, rank: int, often_N: Tensor, lot: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, hidden, generator=lot) / hidden**0.5)
        self.up = nn.Parameter(torch.zeros(len(often_N), rank))
        self.bias = nn.Parameter(often_N.logit(eps=1e-3))

    def forward(self, x_RD: Tensor) -> Tensor:
        return logits(x_RD.float(), self.down, self.up, self.bias)


class _Wiring(Objective):
    """BCE of all gates against the labels of the frozen model's activations; mean over tokens, neurons and layers."""

    def __init__(self, model: nn.Module, data: Sequence[Batch], r: float, rank: int | None) -> None:
        super().__init__(student(model))
        self.label = functools.partial(labels, r=r)
        often: list[Any] = [0.0] * len(View(model))
        tokens = 0
        for batch in data:
            seen = mlp_activity(self.model, batch)
            if not len(seen[0][0]):
                raise Error("batches: one has no token to learn from: all labels are -100, or everything is padding")
            tokens += len(seen[0][0])
            often = [n + self.label(a_RN.abs()).sum(0).float() for n, (_, a_RN) in zip(often, seen)]
        hidden, lot = seen[0][0].shape[-1], torch.Generator().manual_seed(0)
        gates = [_TokenGate(hidden, _rank(rank, hidden), n.cpu() / tokens, lot) for n in often]
        self.gates = nn.ModuleList(gates).to(seen[0][0].device)

    def forward(self, batch: Batch) -> Tensor:
        pairs = zip(self.gates, mlp_activity(self.model, batch), strict=True)
        losses = [
            F.binary_cross_entropy_with_logits(gate(x_RD), self.label(a_RN.abs()).float())
            for gate, (x_RD, a_RN) in pairs
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def quantiles(self, data: Sequence[Batch]) -> list[Tensor]:
        """Quantiles of each layer's logits, (257,) rising, from a few thousand of them a batch."""
        lot = torch.Generator().manual_seed(0)
        drawn: list[list[Tensor]] = [[] for _ in self.gates]
        for batch in data:
            for found, gate, (x_RD, _) in zip(drawn, self.gates, mlp_activity(self.model, batch), strict=True):
                z = gate(x_RD).flatten().cpu()
                found.append(z[torch.randint(len(z), (4096,), generator=lot)])
        return [torch.cat(found).quantile(torch.linspace(0, 1, QUANTILES)) for found in drawn]

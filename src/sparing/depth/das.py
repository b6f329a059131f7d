"""DAS: a bandit learns, while adapters train, which layers the task does without; small adapters take their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.train import Batch, Objective, Training, labelled, student, train
from sparing.engine.view import LayerView, View, evaluating
from sparing.grid.method import BudgetError, Card, Error, Method, Shape, choice, integer, number, register

_VALIDATION = 8  # every eighth batch judges, the others train


@register(
    "das",
    Card(
        "Parameter and Computation Efficient Transfer Learning for Vision-Language Pre-trained Models",
        year=2023,
        arxiv="2309.01479",
        axis="depth",
        kind="stream",
        phase="both",
        needs="training",
        requires=("mlp",),
        controls=("random",),
        fits_budget=True,
        tunes=True,
        summary="a bandit finds n layers that the task does without; an adapter stands in for each, others get two",
    ),
)
@dataclass(frozen=True)
class DAS(StreamMethod):
    """n of L layers are replaced by adapters; which, a bandit finds while all adapters train. The backbone is frozen.

    - Adapter: a(x) = Up(ReLU(Down(x))), Down (r, D), Up (D, r), with biases.
    - Skipped layer i: A_i(x) = x + s a_i(LN(x)), LN without scale and shift; no attention, no MLP, no keys.
    - Kept layer: each sub-layer F gets a parallel adapter on what it reads, F(x) + a(x).

    Search: gates g in R^L start at 0, p_i = sigmoid(g_i). Every training step draws n distinct layers without
    replacement with weights p, and takes a gradient step on the adapters. In the `epochs` behind the first, `updates`
    times in each, T_v distinct sets S_k are drawn and judged without gradient on the same `judged` held-out sequences:

        r_k = exp(-l_k),  b = mean_k r_k,  g_i += eta (r_k - b) p_i (1 - p_i)  for every k and i in S_k

    p fixed during the update. In the end S* = the n largest g, and the adapters train anew with S* fixed.

    Departures from the released code:

    - Updates are counted an epoch, as the LaVIN variant does (150), and not one in so many steps (10 in METER and ViLT,
      3 in LLaVA). Where an epoch has less steps, several updates follow a step: an update moves a gate by some
      thousandths, and the six of a search of 84 steps are a coin toss.
    - An update is judged on one sequence, not on a batch of the size that trains, so that hundreds of them cost less
      than the training. Always in evaluation mode, as LaVIN has it.
    - eta is 1, as the METER code has it in effect (LLaVA has 0.1, LaVIN 0.05).
    - All models get the adapters of METER, weights N(0, 0.02), so that an untrained stand-in is nearly the identity.
      The LLaMA variants put the adapters of kept layers before the sub-layers. A skipped layer of LaVIN is
      x + a(RMSNorm(x)), Up = 0 at the start: exactly the identity then. One of LLaVA is x + z + a(z) with
      z = RMSNorm(x), which never is.
    - Bottlenecks are METER's shares of D, 288 and 96 of 768. Its LN learns a scale and shift. Task heads are the
      model's own and stay frozen.

    Control `random`: layers by lot, their adapters trained just as long; three different lots, or as many as `fit` is
    told to train. They spare the first layer and the last, without which a model fails whatever else it keeps.

    Cost of the search: (epochs - 1) updates T_v forward passes of `judged` sequences, beside its training.

    State: `skip`, int64 (n,); `gates`, (L,); `skip.i.*` and `attention.i.*`, `mlp.i.*` with down, down_bias, up,
    up_bias; and the same under `random0.`, `random1.`, … for the control.

    Args:
        n: layers replaced.
        T_v: sets judged in an update.
        updates: of the gates, in each epoch but the first.
        judged: held-out sequences that an update is judged on; whole batches where a tensor has no row a sequence.
        eta: step of the gates.
        epochs: of the search, the first without updates.
        bottleneck: r of a skipped layer's adapter; none takes 3/8 of D.
        adapter: r of a kept sub-layer's; none takes D/8.
        s: scale of a skipped layer's adapter.
        choose: learned, or random: the control.
        seed: which of the control's lots.
    """

    n: int = integer(4, "layers replaced", low=0, source="code")
    T_v: int = integer(3, "sets judged in an update", low=2, source="code: das_step")
    updates: int = integer(150, "updates of the gates an epoch", low=1, source="code, LaVIN")
    judged: int = integer(1, "held-out sequences that an update is judged on", low=1)
    eta: float = number(1.0, "step of the gates", low=0, source="code, METER")
    epochs: int = integer(3, "of the search, the first without updates", low=2, source="code")
    bottleneck: int | None = integer(None, "rank of a skipped layer's adapter", low=1, optional=True, source="code")
    adapter: int | None = integer(None, "rank of a kept sub-layer's adapter", low=1, optional=True, source="code")
    s: float = number(1.0, "scale of a skipped layer's adapter", source="code")
    choose: str = choice("learned", ("learned", "random"), "whose layers")
    seed: int = integer(0, "which lot of the control")

    # ---- budget

    def at(self, keep: float, shape: Shape) -> Self:
        n = shape.layers - round(keep * shape.layers)
        if self.state and n != len(self.state["skip"]):
            there = 1 - len(self.state["skip"]) / shape.layers
            raise BudgetError(f"keep = {keep:g}: this das was fitted at {there:.3g}; fit it anew")
        if n >= shape.layers:
            raise BudgetError(f"keep = {keep:g}: das keeps at least 1 of {shape.layers} layers")
        return self.replace(n=n)

    def control(self, kind: str, shape: Shape, seed: int = 0) -> Method:
        if kind != "random":
            raise Error(f"control = {kind!r}: das has random")
        return self.replace(choose="random", seed=seed)

    @property
    def draws(self) -> int:
        return len({name.partition(".")[0] for name in self.state if name.startswith("random")})

    # ---- running

    @property
    def _prefix(self) -> str:
        if self.choose == "learned":
            return ""
        if not self.draws:
            raise Error("das: choose = 'random': the fit trained no lots (rivals = 0); fit with rivals >= 1")
        return f"random{self.seed % self.draws}."

    def before_layer(self, stream: Stream, layer: int) -> None:
        if layer in self._skipped:
            stream.replace(lambda x: self._stand_in(x, layer))

    def attend(self, stream: Stream, layer: LayerView, x_BND: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        return forward(x_BND) + self._adapted(x_BND, f"attention.{layer.index}")

    def feed_forward(
        self, stream: Stream, layer: LayerView, x_BND: Tensor, forward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return forward(x_BND) + self._adapted(x_BND, f"mlp.{layer.index}")

    @property
    def _skipped(self) -> Sequence[int]:
        return self.state[f"{self._prefix}skip"].tolist()

    def _stand_in(self, x_BND: Tensor, layer: int) -> Tensor:
        return x_BND + self.s * self._adapted(F.layer_norm(x_BND, x_BND.shape[-1:]), f"skip.{layer}")

    def _adapted(self, x: Tensor, name: str) -> Tensor:
        """Up(ReLU(Down(x)))."""
        parts = [self.state[f"{self._prefix}{name}.{part}"].to(x) for part in _PARTS]
        return F.linear(F.relu(F.linear(x, *parts[:2])), *parts[2:])

    # ---- training

    def fit(self, model: nn.Module, batches: Iterable[Batch], *, rivals: int = 3, **options: Any) -> Self:
        """Search, then train the adapters anew for what was found, and for the control's lots.

        Args:
            model: left unchanged.
            batches: with input_ids and labels; every eighth (at least one) judges, the others train. A single one
                does both.
            rivals: lots of the control to train, all different; less where there are not so many.
            options: of `sparing.engine.train.Training`, for each of the trainings; lr is 1e-3 by default.
        """
        how, data = Training(**options), labelled(batches)
        L, D = len(View(model)), int(View(model).config.hidden_size)
        if not self.n < L:
            raise Error(f"das: n = {self.n}: must be below the model's {L} layers")
        if self.T_v > math.comb(L, self.n) and self.n:
            raise Error(f"das: T_v = {self.T_v}: there are only {math.comb(L, self.n)} sets of {self.n} of {L} layers")
        judging = data[::_VALIDATION] if len(data) > 1 else data
        training = [batch for i, batch in enumerate(data) if i % _VALIDATION] or data
        state: dict[str, Tensor] = {"gates": torch.zeros(L), "skip": torch.zeros(0, dtype=torch.long)}
        if self.n:
            searched = _Search(student(model), self, L, D, judging)
            found = train(searched, training, how, lr=1e-3, name="das search", epochs=self.epochs)
            state = {"gates": found["gates"], "skip": most(found["gates"], self.n)}
        state |= self._trained(model, training, how, state["skip"], D, "")
        for lot, skip in enumerate(lots(L, self.n, rivals, self.seed * 1009)):
            own = {"skip": skip, **self._trained(model, training, how, skip, D, f" random {lot}")}
            state |= {f"random{lot}.{name}": tensor for name, tensor in own.items()}
        return self.with_state(state)

    def _trained(
        self, model: nn.Module, data: Sequence[Batch], how: Training, skip: Tensor, D: int, what: str
    ) -> dict[str, Tensor]:
        """Adapters trained from scratch with this set fixed."""
        objective = _Fixed(student(model), self, len(View(model)), D, skip)
        learned = train(objective, data, how, lr=1e-3, name=f"das{what}")
        wanted = [f"skip.{i}." for i in skip.tolist()]
        wanted += [f"{s}.{i}." for s in ("attention", "mlp") for i in range(len(View(model))) if i not in skip.tolist()]
        return {name: tensor for name, tensor in _named(learned) if name.startswith(tuple(wanted))}


_PARTS = ("down", "down_bias", "up", "up_bias")


def most(gates_L: Tensor, n: int) -> Tensor:
    """The n layers with the largest gates, rising; of equals the first."""
    return gates_L.sort(descending=True, stable=True).indices[:n].sort().values


def lots(L: int, n: int, count: int, seed: int = 0) -> list[Tensor]:
    """`count` different sets of n of L layers by lot, each rising, or all there are.

    The first layer and the last are in them only where the others are too few.
    """
    there = math.comb(L - 2, n) if n <= L - 2 else 1
    found: dict[tuple[int, ...], Tensor] = {}
    while len(found) < min(count, there):
        order = 1 + torch.randperm(max(L - 2, 0), generator=torch.Generator().manual_seed(seed))
        one = torch.cat([order, torch.tensor([L - 1, 0][: L - len(order)])])[:n].sort().values
        found.setdefault(tuple(one.tolist()), one)
        seed += 1
    return list(found.values())


def draw(gates_L: Tensor, n: int) -> Tensor:
    """n distinct layers, one after the other with weights sigmoid(g) among those left."""
    return torch.multinomial(gates_L.sigmoid(), n) if n else torch.zeros(0, dtype=torch.long)


def distinct(gates_L: Tensor, n: int, count: int) -> list[Tensor]:
    """`count` different sets of n layers."""
    found: dict[tuple[int, ...], Tensor] = {}
    while len(found) < count:
        one = draw(gates_L, n).sort().values
        found.setdefault(tuple(one.tolist()), one)
    return list(found.values())


def updated(gates_L: Tensor, sets: Sequence[Tensor], losses: Sequence[float], eta: float = 1.0) -> Tensor:
    """Gates after one update: those of layers in better sets than average rise. A loss that is no number earns nothing.

    >>> g = updated(torch.zeros(3), [torch.tensor([i]) for i in range(3)], [1.0, 2.0, 3.0])
    >>> [round(x, 6) for x in g.tolist()]
    [0.045886, -0.01225, -0.033637]
    """
    p = gates_L.double().sigmoid()
    reward = torch.tensor(losses, dtype=torch.float64).neg().exp().nan_to_num(0.0)
    step = torch.zeros_like(p)
    for chosen, gain in zip(sets, reward - reward.mean(), strict=True):
        step[chosen] += eta * gain * (p * (1 - p))[chosen]
    return (gates_L.double() + step).to(gates_L)


def parts(batch: Batch, count: int) -> list[Batch]:
    """The batch in parts of `count` rows that predict something, or whole where a tensor has no row a sequence."""
    rows = batch["input_ids"].shape[:1]
    if any(tensor.shape[:1] != rows for tensor in batch.values()):
        return [batch]
    found = [{k: v[at : at + count] for k, v in batch.items()} for at in range(0, rows[0], count)]
    return [part for part in found if bool((part["labels"][:, 1:] != -100).any())]


def _named(learned: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(k.removeprefix("adapters.").replace("/", "."), v) for k, v in learned.items() if k.startswith("adapters.")]


class _Adapters(Objective):
    """All adapters of a model, as parameters beside it."""

    def __init__(self, model: nn.Module, method: DAS, L: int, D: int) -> None:
        super().__init__(model)
        self.method = method
        ranks = {"skip": method.bottleneck or max(1, 3 * D // 8), "attention": method.adapter or max(1, D // 8)}
        ranks["mlp"] = ranks["attention"]
        self.adapters = nn.ParameterDict()
        like = next(model.parameters())
        for site, rank in ranks.items():
            for i in range(L):
                shapes = {"down": (rank, D), "down_bias": (rank,), "up": (D, rank), "up_bias": (D,)}
                for part, size in shapes.items():
                    start = torch.zeros(size) if part.endswith("bias") else torch.randn(size) * 0.02
                    self.adapters[f"{site}/{i}/{part}"] = nn.Parameter(start.to(like.device))

    def loss(self, batch: Batch, skip: Tensor) -> Tensor:
        """The task's own loss with these layers replaced."""
        from sparing.engine.attach import attach

        live = {name: tensor for name, tensor in _named({f"adapters.{k}": v for k, v in self.adapters.items()})}
        with attach(
            self.model, self.method.replace(choose="learned").with_state({**live, "skip": skip}), warn=False
        ) as run:
            run.keeps_trace = False
            return self.model(**batch, use_cache=False).loss


class _Fixed(_Adapters):
    def __init__(self, model: nn.Module, method: DAS, L: int, D: int, skip: Tensor) -> None:
        super().__init__(model, method, L, D)
        self._skip = skip

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(batch, self._skip)


class _Search(_Adapters):
    """Adapters that train under sets drawn by the gates, and the gates."""

    gates: Tensor
    made: Tensor

    def __init__(self, model: nn.Module, method: DAS, L: int, D: int, judging: Sequence[Batch]) -> None:
        super().__init__(model, method, L, D)
        self.register_buffer("gates", torch.zeros(L))
        self.register_buffer("made", torch.zeros((), dtype=torch.long))  # updates so far
        self._judging = [part for batch in judging for part in parts(batch, method.judged)]
        if not self._judging:
            raise Error("batches: no sequence of those that judge (every eighth batch) has a label")

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(batch, draw(self.gates, self.method.n))

    def after_step(self, step: int) -> None:
        due = round(self.method.updates * (self.share * self.method.epochs - 1))
        while self.made < due:
            self.update()
        self.shown = {"spread": float(self.gates.max() - self.gates.min())}

    @torch.no_grad()
    def update(self) -> None:
        """Judge T_v sets on the sequences whose turn it is, and move the gates."""
        held = self._judging[int(self.made) % len(self._judging)]
        batch = {k: v.to(self.gates.device) for k, v in held.items()}
        sets = distinct(self.gates, self.method.n, self.method.T_v)
        with evaluating(self.model):
            losses = [self.loss(batch, chosen).item() for chosen in sets]
        self.gates.copy_(updated(self.gates, sets, losses, self.method.eta))
        self.made += 1

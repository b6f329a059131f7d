"""FiRST: routers read the prompt and decide, once for each sequence, which layers its generated tokens skip."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sparing.engine.attach import attach
from sparing.engine.lora import adapt
from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.train import Batch, Objective, Training, labelled, student, train
from sparing.engine.view import View
from sparing.grid.gates import excess_loss
from sparing.grid.method import BudgetError, Card, Error, Method, Shape, choice, integer, number, register, share


@register(
    "first",
    Card(
        "FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction",
        year=2024,
        arxiv="2410.12513",
        axis="depth",
        kind="stream",
        phase="decode",
        needs="training",
        summary="the prompt votes once which layers all its generated tokens skip; LoRA repairs what that breaks",
        controls=("random", "uniform", "static"),
        fits_budget=True,
        requires=("lora",),
    ),
)
@dataclass(frozen=True)
class First(StreamMethod):
    """The prompt runs all L layers and votes; generated tokens of its sequence run the layers K that it kept.

    h_t (D,) is the state of prompt token t of T as it enters layer l, L the number of layers, w_l (D,) and c_l learned.

    1. p_t^l = sigmoid(w_l . h_t / |h_t| + c_l): token t uses layer l. Padding and generated tokens have no vote.
    2. v^l = share of the prompt's tokens with p_t^l > 0.5.
    3. K = {l: v^l >= 0.5}; with R the R layers of the highest v^l, ties to the higher mean_t p_t^l, then to the lower
       layer. The first and the last layer are always in K (and count in R).
    4. Generated tokens run K and pass the other layers unchanged, which leave no keys. K never changes, so every layer
       that runs finds the keys of all tokens before it; a dropped layer's prompt cache is given back. Sequences of a
       batch keep sets of their own: the batch runs a layer that any of them kept, exactly, so unlike sets save less.

    A sequence without a prompt has no vote against any layer: every v^l is 1.

    `router` = static is the control without adaptivity: K is fixed by the mean of p over the prompts that were trained
    on (the R highest, or those >= 0.5).

    Training (`fit`), the model frozen throughout:

    - Routers: with p^l = mean_t p_t^l of its prompt, a generated row leaves layer l as h + p^l (F_l(h) - h), so that
      dL/dp^l reads F_l(h) - h; L = CE + lam mean_l p^l + alpha max(0, mean_l p^l - rho)^2, the means over all L layers,
      p = 1 in the first and the last. Start: w = 0, c = 2.
    - LoRA with CE under the hard decision of steps 1-4, the routers frozen but reading the adapted states; left out
      where rank = 0. Merged into the weights while the method is attached, prompt and generated tokens alike.

    The routers serve every budget. The LoRA is trained for one, that of R, so `at` refuses another one after `fit`.
    Where R = L nothing is skipped and nothing to repair: no LoRA is trained, and the model is its own.

    Departures. Code and formulas are not public; the two trainings, the LoRA and the two weights of the loss are. Soft
    execution with the prompt's mean, the prompt at full depth, is the relaxation of what decoding does, instead of
    each token with a p of its own. Dividing by |h| makes one learning rate serve all layers and widths: a step of Adam
    moves a logit by at most lr sqrt(D), and by lr times the sum of |h_d|, which grows with D and with the depth, else.

    Cost of the decision: D multiplications a prompt token and layer, none while decoding.

    State: router.weight (L, D), router.bias (L,), router.mean (L,) of p over the training prompts; the LoRA as in
    `sparing.engine.lora`. The controls carry it too: random and uniform layers run with the same LoRA. What LoRA alone
    gives is the method `lora-depth`.

    Args:
        R: layers kept for generated tokens, 2 to L; none is the majority vote, whose budget is each prompt's own.
        router: learned | static.
        lam: weight of the use of layers.
        alpha: weight of a use above rho; 0 leaves it out.
        rho: target share of layers used; none is R / L, and 0.75 without R (about a quarter is skipped as published).
        rank, lora_alpha: of LoRA on queries and values.
        router_lr: peak learning rate of the routers; the option lr of `fit` is that of the LoRA, 1e-4 by default.

    >>> First().at(0.75, Shape(layers=12, heads=8, groups=4, head_dim=8, hidden=64, neurons=96)).R
    9
    """

    R: int | None = integer(None, "layers kept for generated tokens, none: majority vote", low=2, optional=True)
    router: str = choice("learned", ("learned", "static"), "each prompt decides, or the mean over training prompts")
    lam: float = number(0.01, "weight of the use of layers in the loss", low=0, source="reviews")
    alpha: float = number(1.0, "weight of a use above rho in the loss", low=0)
    rho: float | None = share(None, "target share of layers used, none: R / L or 0.75", optional=True)
    rank: int = integer(8, "rank of LoRA, 0: no LoRA")
    lora_alpha: float = number(16.0, "LoRA is scaled by lora_alpha / rank", low=0)
    router_lr: float = number(0.05, "peak learning rate of the routers", low=0)

    def at(self, keep: float, shape: Shape) -> Self:
        L = shape.layers
        R = round(keep * L)
        if R < 2:
            raise BudgetError(f"keep = {keep:g}: first keeps at least 2 of {L} layers, {2 / L:.3g}")
        if "lora.scale" in self.state and R != self.R:
            was = "the majority vote (R = none)" if self.R is None else f"R = {self.R}, {self.R / L:.3g}"
            raise BudgetError(f"keep = {keep:g}: the LoRA of this first was trained for {was}; fit again for R = {R}")
        return self.replace(R=R)

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        if self.R is None:
            raise Error("first: R = None: a majority vote spends what the prompt asks for; controls need a fixed R")
        return {"R": self.R}

    def control(self, kind: str, shape: Shape, seed: int = 0) -> Method:
        if kind == "static":
            return self.replace(router="static", **self.mirrored(shape))
        return super().control(kind, shape, seed)

    def read_prompt(self, stream: Stream, layer: int) -> None:
        """Votes add up over the parts of a prompt that comes in several; who decides last has all of them."""
        if self.router == "static":
            mean = self.state["router.mean"][layer].to(stream.hidden.device)
            vote_B, mean_B = mean.expand(2, stream.batch)
        else:
            p_BN = use(stream.hidden, self.state["router.weight"][layer], self.state["router.bias"][layer])
            sums: dict[int, Tensor] = stream.memory.setdefault("first.sums", {})
            sums[layer] = sums.get(layer, 0) + ballots(p_BN, stream.prompt)
            vote_B, mean_B = counted(sums[layer])
        if layer == 0:
            stream.memory["first.votes"] = []
        votes: list[Tensor] = stream.memory["first.votes"]
        votes.append(torch.stack([vote_B, mean_B]))
        if layer == stream.layers - 1:
            vote_BL, mean_BL = torch.stack(votes, -1)
            drop_BL = ~decide(vote_BL, mean_BL, self.R)
            every, some = drop_BL.all(0).tolist(), drop_BL.any(0).tolist()  # once, so that decoding asks no tensor
            stream.memory["first.drops"] = [every[i] or (drop_BL[:, i] if some[i] else False) for i in range(layer + 1)]

    def before_layer(self, stream: Stream, layer: int) -> None:
        if stream.generated is False:
            return
        if "first.drops" not in stream.memory:
            raise Error("KV cache: first decides while the prompt runs, and it was not attached then")
        drop: bool | Tensor = stream.memory["first.drops"][layer]  # of all sequences, or (B,) of each
        if isinstance(drop, Tensor):
            drop = drop[:, None].expand(stream.hidden.shape[:2])
        if drop is not False:
            stream.bypass(stream.generated & drop, free=True)

    def fit(self, model: nn.Module, batches: Iterable[Batch], **options: Any) -> Self:
        """Train the routers, then the LoRA; what stands before the first label of a sample (-100) is its prompt.

        Args:
            model: left unchanged; copies train.
            batches: with input_ids and labels; kept in memory.
            options: of `sparing.engine.train.Training`, for both trainings; lr is the LoRA's alone.

        Raises:
            Error: no batches, one without labels, or PEFT is missing (rank = 0 does without).
        """
        how, data = Training(**options), labelled(batches)
        routers = _Routers(model, self)
        train(routers, data, dataclasses.replace(how, lr=None), lr=self.router_lr, name="fit first routers")
        fitted = self.with_state(routers.state(data))
        if self.rank and len(View(model)) != self.R:
            rank, alpha = self.rank, self.lora_alpha
            lora = adapt(model, fitted, batches=data, how=how, rank=rank, alpha=alpha, name="fit first lora")
            fitted = self.with_state({**fitted.state, **lora})
        return fitted


def use(hidden_BND: Tensor, weight_D: Tensor, bias: Tensor) -> Tensor:
    """p (B, N) float32: how probably each row uses the layer that it is about to enter."""
    unit_BND = nn.functional.normalize(hidden_BND.float(), dim=-1)
    return torch.sigmoid(unit_BND @ weight_D.to(unit_BND) + bias.to(unit_BND))


def ballots(p_BN: Tensor, prompt_BN: Tensor) -> Tensor:
    """Of the prompt's rows their number, those against, and the sum of 1 - p; (3, B)."""
    return torch.stack([prompt_BN.sum(1), ((p_BN <= 0.5) & prompt_BN).sum(1), ((1 - p_BN) * prompt_BN).sum(1)])


def counted(sums_3B: Tensor) -> tuple[Tensor, Tensor]:
    """v (B,) and mean p (B,) of ballots, counted from those against, so that no prompt is no objection."""
    rows_B, against_B, doubt_B = sums_3B
    return 1 - against_B / rows_B.clamp(min=1), 1 - doubt_B / rows_B.clamp(min=1)


def tally(p_BN: Tensor, prompt_BN: Tensor) -> tuple[Tensor, Tensor]:
    """v (B,) and mean p (B,) over the prompt's rows."""
    return counted(ballots(p_BN, prompt_BN))


def decide(vote_BL: Tensor, mean_BL: Tensor, R: int | None) -> Tensor:
    """K of each sequence, bool (B, L): the majority, or the R layers of most votes; both ends always in.

    >>> decide(torch.tensor([[0.0, 0.4, 1.0, 0.5, 0.2, 0.0]]), torch.full((1, 6), 0.5), None).int().tolist()
    [[1, 0, 1, 1, 0, 1]]
    """
    L = vote_BL.shape[1]
    ends_L = torch.zeros(L, dtype=torch.bool, device=vote_BL.device)
    ends_L[[0, -1]] = True
    if R is None:
        return (vote_BL >= 0.5) | ends_L
    if R > L:
        raise Error(f"first: R = {R}: the model has {L} layers")
    vote_BL = vote_BL.masked_fill(ends_L, torch.inf)
    order_BL = mean_BL.argsort(dim=1, descending=True, stable=True)  # the lesser key first, then the greater one
    order_BL = order_BL.gather(1, vote_BL.gather(1, order_BL).argsort(dim=1, descending=True, stable=True))
    return torch.zeros_like(vote_BL, dtype=torch.bool).scatter(1, order_BL[:, :R], True)


class _Routers(Objective):
    """The training of the routers: w (L, D) and c (L,), beside the frozen model."""

    def __init__(self, model: nn.Module, method: First) -> None:
        super().__init__(student(model))
        shape, device = View(model).shape, next(model.parameters()).device
        self.weight = nn.Parameter(torch.zeros(shape.layers, shape.hidden, device=device))
        self.bias = nn.Parameter(torch.full((shape.layers,), 2.0, device=device))
        self._lam, self._alpha = method.lam, method.alpha
        self._rho = method.rho if method.rho is not None else (method.R / shape.layers if method.R else 0.75)

    def forward(self, batch: Batch) -> Tensor:
        loss, mean_LB = self.soft(batch)
        mean = mean_LB.mean()
        self.shown = {"use": mean.item()}
        return loss + self._lam * mean + self._alpha * excess_loss(mean, self._rho)

    def soft(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """CE of a soft pass, and mean p of each layer and prompt, (L, B)."""
        soft = _Soft(self.weight, self.bias, {})
        prompt_BT = (batch["labels"] != -100).cumsum(1) == 0
        with attach(self.model, soft, prompt=prompt_BT, warn=False) as run:
            run.keeps_trace = False
            loss = self.model(**batch, use_cache=False).loss
        return loss, torch.stack([*soft.mean_B.values()])

    @torch.no_grad()
    def state(self, data: list[Batch]) -> dict[str, Tensor]:
        """What was learned, with the mean over all prompts."""
        mean_LB = torch.cat([self.soft({k: v.to(self.bias.device) for k, v in b.items()})[1] for b in data], 1)
        return {
            "router.weight": self.weight.detach(),
            "router.bias": self.bias.detach(),
            "router.mean": mean_LB.mean(1),
        }


@dataclass(frozen=True)
class _Soft(StreamMethod):
    """Generated rows take as much of each layer as their prompt uses it; notes how much that is."""

    card: ClassVar[Card] = Card("FiRST: soft execution", year=2024, axis="depth", kind="stream", phase="prefill")

    weight_LD: Tensor
    bias_L: Tensor
    mean_B: dict[int, Tensor]

    def before_layer(self, stream: Stream, layer: int) -> None:
        mean_B = torch.ones(stream.batch, device=self.bias_L.device)
        if 0 < layer < stream.layers - 1:
            p_BN = use(stream.hidden.detach(), self.weight_LD[layer], self.bias_L[layer])
            _, mean_B = tally(p_BN, stream.prompt)
            stream.blend(torch.where(torch.as_tensor(stream.generated), mean_B[:, None], 1.0))
        self.mean_B[layer] = mean_B

"""HiDrop: visual tokens join late, are thinned front-loaded in the middle layers, and leave early."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from sparing.engine.attach import Run, attach
from sparing.engine.overlap import deferred_vision
from sparing.engine.probe import VisualProbe, probe
from sparing.engine.schedule import follow
from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.train import finetune
from sparing.engine.view import View
from sparing.grid.method import BudgetError, Card, Error, Shape, flag, integer, number, numbers, register
from sparing.grid.score import cosine
from sparing.grid.select import soft_top_k, straight_through


@register(
    "hidrop",
    Card(
        "HiDrop: Hierarchical Vision Token Reduction in MLLMs via Late Injection, Concave Pyramid Pruning, and Early "
        "Exit",
        year=2026,
        arxiv="2602.23699",
        axis="tokens",
        kind="stream",
        phase="prefill",
        summary="late injection, concave pyramid of kept tokens by differentiable top-k, early exit",
        controls=("random", "uniform", "oracle"),
        trains=True,
        visual=True,
    ),
)
@dataclass(frozen=True)
class HiDrop(StreamMethod):
    """Visual tokens live in a window of layers only. Layers are 1-based here, as in the paper.

    1. *Late injection.* Layers 1 .. inject-1 run on text; the projector's outputs join at layer `inject`, unchanged.
    2. *Concave pyramid.* After layer filters[i] keep keeps[i] of `of` visual tokens (scaled to the image's own number).
    3. *Selection.* c = attention that visual tokens get from the last instruction token (training: from every token
       before an answer span, averaged) in the next layer, computed from detached hidden states by that layer's norm,
       q/k projections and position embedding; softmax over the full row, mean over heads. Differentiable top-k:
       c'_i = (1/N) sum_j 1[c_i >= c_j], m_i = sigmoid(lambda (c'_i - (1 - k/N))), keep m_i > 1/2.
    4. *Early exit.* After layer `exit` no visual token is left. (The paper says "after layer 25", the released code
       removes them on entry to it; the published budgets add up with the code, so exit = 24.)
    5. *Persistent positions.* Position ids of the full sequence in every layer; `compact` is the paper's ablation.
    6. *Parallel decoupling.* On CUDA the vision tower runs on a side stream beside the text-only layers. (Caching K/V
       across layers, as the paper words it, makes sense within a layer only; overlap is what can be had.)

    Departures: the released top-k returns indices only, so no gradient reaches the scores; here the values that
    attention reads from kept tokens are multiplied by 1 + (m - stop(m)) in the layers behind the filter, which trains
    the projections that select (`grid.select.soft_top_k` says how m gets a gradient to c; `Stream.weigh_visual` why not
    the states). Of tied scores exactly k survive, the earlier tokens. On a model with fewer layers than the published
    `exit` those of inject, filters and exit that are as published are scaled to its depth, those that were set stay.
    Published results are after training with the schedule (`fit`).

    Cost of a decision: a key projection of the alive rows and one row of attention a filter; main attention untouched.

    Args:
        inject: first layer with visual tokens.
        filters: layers after which tokens are thinned, rising, from inject-1 (thinned before they join) to exit-1.
        keeps: visual tokens kept after each filter, falling, of `of`.
        of: visual tokens that `keeps` counts on.
        exit: last layer with visual tokens.
        sharpness: lambda of the soft top-k; none = N.
        compact: renumber positions without gaps after each cut instead of keeping the original ones.
        overlap: run the vision tower beside the text-only layers on CUDA.

    >>> round(576 * sum(HiDrop().shares(Shape(32, 32, 32, 128, 4096, 11008))))
    2048
    """

    inject: int = integer(9, "first layer with visual tokens", low=1, source="§3.2")
    filters: tuple[int, ...] = numbers(
        (10, 14, 16, 18), "layers after which tokens are thinned", whole=True, source="§3.3"
    )
    keeps: tuple[int, ...] = numbers((215, 10, 5, 1), "tokens kept after each filter", whole=True, low=1, source="code")
    of: int = integer(576, "visual tokens that keeps counts on", low=1, source="code")
    exit: int = integer(24, "last layer with visual tokens", low=1, source="code")
    sharpness: float | None = number(None, "lambda of the soft top-k; none = N", low=0, optional=True)
    compact: bool = flag(False, "renumber positions after each cut")
    overlap: bool = flag(True, "vision tower beside the text-only layers on CUDA")

    def check(self) -> None:
        if len(self.keeps) != len(self.filters):
            raise Error(f"hidrop: keeps = {self.keeps}: needs one count for each of filters = {self.filters}")
        if list(self.filters) != sorted(set(self.filters)):
            raise Error(f"hidrop: filters = {self.filters}: must rise")
        if list(self.keeps) != sorted(self.keeps, reverse=True) or (self.keeps and self.keeps[0] > self.of):
            raise Error(f"hidrop: keeps = {self.keeps}: must fall from at most of = {self.of}")
        if self.exit < self.inject or (
            self.filters and not self.inject - 1 <= self.filters[0] <= self.filters[-1] < self.exit
        ):
            raise Error(
                f"hidrop: inject = {self.inject}, filters = {self.filters}, exit = {self.exit}: must satisfy "
                "inject - 1 <= filters < exit and inject <= exit"
            )

    # ---- schedule

    def scaled(self, layers: int) -> Self:
        """The same method on a model of so many layers.

        Where the model is shallower than the published `exit`, the layers that are as published are scaled to its
        depth. Layers that were set are the model's own: they stay, and the scaled ones make room for them.

        Raises:
            Error: a layer that was set lies beyond the model's, or all of them do not fit.
        """
        if self.exit <= layers:
            return self
        if self.exit != HiDrop.exit:
            raise Error(f"hidrop: exit = {self.exit}: must be at most {layers}, the layers of the model")
        ratio = layers / 32
        inject, filters, published = self.inject, list(self.filters), self.filters == HiDrop.filters
        if inject == HiDrop.inject:
            inject = max(1, round((inject - 1) * ratio) + 1)
        room = inject + len(filters) if published else max([inject, *(f + 1 for f in filters)])
        last = min(layers, max(room, round(self.exit * ratio)))
        if published:
            filters = []
            for f in self.filters:
                filters.append(min(max(round(f * ratio), inject, filters[-1] + 1 if filters else 0), last - 1))
        if inject > last or len(set(filters)) < len(filters) or max(filters, default=0) >= last:
            raise Error(
                f"hidrop: inject = {self.inject}, filters = {self.filters}: do not fit a model of {layers} layers; set "
                "inject, filters, exit"
            )
        return self.replace(inject=inject, filters=tuple(filters), exit=last)

    def shares(self, shape: Shape) -> tuple[float, ...]:
        return self._shares(shape.layers)

    def _shares(self, layers: int) -> tuple[float, ...]:
        m = self.scaled(layers)
        out = []
        for layer in range(1, layers + 1):
            passed = [k for f, k in zip(m.filters, m.keeps) if f < layer]
            inside = m.inject <= layer <= m.exit
            out.append((passed[-1] / m.of if passed else 1.0) if inside else 0.0)
        return tuple(out)

    def at(self, keep: float, shape: Shape) -> Self:
        """Keeps the layers, and raises the published shares to one power so that their mean is `keep`."""
        m = self.scaled(shape.layers)
        of = shape.visual or m.of
        base = [k / m.of for k in m.keeps]
        if keep >= 1:
            return m.replace(inject=1, filters=(), keeps=(), exit=shape.layers)

        def spends(power: float) -> float:
            trial = m.replace(keeps=tuple(max(1, round(b**power * of)) for b in base), of=of)
            return sum(trial.shares(shape)) / shape.layers

        low, high = 0.0, 64.0
        if not spends(high) <= keep + 0.5 / shape.layers / of or keep > spends(low) + 1e-9:
            raise BudgetError(
                f"keep = {keep:g}: hidrop with inject = {m.inject}, filters = {m.filters}, exit = {m.exit} spends "
                f"{spends(high):.3g} to {spends(low):.3g}; move inject, filters or exit"
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if spends(middle) > keep else (low, middle)
        return m.replace(keeps=tuple(max(1, round(b**high * of)) for b in base), of=of)

    # ---- the verb

    def before_layer(self, stream: Stream, layer: int) -> None:
        follow(stream, layer, self._shares(stream.layers), self._select)
        if self.compact and not stream.whole:
            stream.compact()

    def _select(self, stream: Stream, count_B: Tensor) -> Tensor:
        score_BV = stream.received()
        if torch.is_grad_enabled():
            score_BV = torch.where(
                score_BV.isinf(), score_BV, score_BV.clamp(min=1e-20).log()
            )  # the same ranks; attention itself is too skewed to scale
        keep_BV, mask_BV = soft_top_k(score_BV, count_B, self.sharpness)
        if mask_BV.requires_grad:
            stream.weigh_visual(straight_through(mask_BV))
        return keep_BV

    def deferred_vision(self, run: Run) -> contextlib.AbstractContextManager[None]:
        """Overlap of vision tower and text-only layers while attached."""
        late = self._shares(len(run.view))[0] == 0
        return deferred_vision(run) if self.overlap and late else contextlib.nullcontext()

    # ---- choice of layers, and training

    def choose(
        self,
        model: torch.nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        keep: float | None = None,
        n: int = 1,
        K: int = 64,
    ) -> tuple[Self, dict[str, list[float]]]:
        """Choose inject, filters and exit for a model from an analysis of it running dense.

        - inject: the layer behind the first local minimum of S_intra(l) = mean_i cos(h_i^l, h_i^(l+1)), i visual; 1
          where joining there changes more than 10 % of the dense model's answers, because then its shallow layers are
          not passive and there is nothing to inject late [our rule].
        - exit: the shallowest layer behind which dropping all visual tokens changes at most 1 % of the answers.
        - filters: local maxima of ILVAS(l, l+n, K) between them, the highest ones, at most as many as the method has.
          Where the first comes too late for the budget, one more stands before it, so early that the layers before it
          cost at most half the budget [our rule].

        Args:
            batches: calibration inputs with visual tokens, each sample with the same number.
            keep: mean share of visual-token-layers that the schedule shall meet, as in `at`; none leaves the counts.
            n, K: layer distance and number of most attended tokens of ILVAS.

        Returns:
            The method with its layers (and counts) set, and the curves: "intra" (L-1), "ilvas" (L-n), and the agreement
            with dense answers when visual tokens join at, or leave after, each layer: "inject" (L), "exit" (L).
        """
        data = list(batches)
        seen: VisualProbe = probe(model, data)
        L = len(seen.hidden)
        curves = {
            "intra": [float(cosine(seen.hidden[i], seen.hidden[i + 1]).mean()) for i in range(L - 1)],
            "ilvas": [float(ilvas(seen.attention[i], seen.attention[i + n], K).mean()) for i in range(L - n)],
            "inject": [self._agreement(model, data, layer, L) for layer in range(1, L + 1)],
            "exit": [self._agreement(model, data, 1, layer) for layer in range(1, L + 1)],
        }
        exit = next(i + 1 for i in range(L) if min(curves["exit"][i:]) >= 0.99)
        low = _peaks([-x for x in curves["intra"][1:]])  # S_intra(l) stands at index l
        inject = low[0] + 1 if low and curves["inject"][low[0]] >= 0.9 else 1
        exit = max(exit, inject + 1)
        high = [layer for layer in _peaks(curves["ilvas"]) if inject <= layer < exit]
        best = sorted(sorted(high, key=lambda layer: -curves["ilvas"][layer - 1])[: max(1, len(self.filters))])
        first = inject if keep is None else inject - 1 + int(keep * L / 2)
        if not best or (keep is not None and best[0] > first):
            best = [min(first, exit - 1), *[layer for layer in best if layer > first]][: max(1, len(self.filters))]
        keeps = (*self.keeps, *self.keeps[-1:] * len(best))[: len(best)]
        chosen = self.replace(inject=inject, filters=tuple(best), keeps=keeps, exit=exit)
        return (chosen if keep is None else chosen.at(keep, View(model).shape)), curves

    def _agreement(self, model: torch.nn.Module, data: list[Mapping[str, Tensor]], inject: int, exit: int) -> float:
        trial = self.replace(inject=inject, filters=(), keeps=(), exit=exit)
        same = total = 0
        with torch.inference_mode():
            for batch in data:
                inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
                answers = model(**inputs).logits[:, -1].argmax(-1)
                with attach(model, trial, warn=False):
                    same += int((model(**inputs).logits[:, -1].argmax(-1) == answers).sum())
                total += answers.numel()
        return same / total

    def fit(self, model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> Self:
        """Train language model and projector with the schedule on; next-token loss on the labels, vision tower frozen.

        Args:
            model: left unchanged.
            batches: with pixel_values, input_ids, labels.
            options: epochs, lr, … of `sparing.engine.train.finetune`.
        """
        return self.with_state(finetune(model, self.with_state({}), batches, **options))


def _peaks(curve: list[float]) -> list[int]:
    """1-based places of the interior local maxima of a curve."""
    return [i + 1 for i in range(1, len(curve) - 1) if curve[i - 1] <= curve[i] >= curve[i + 1]]


def ilvas(before_BHV: Tensor, after_BHV: Tensor, K: int) -> Tensor:
    """Inter-layer visual attention similarity of two layers, (B,).

    (1/K) sum over the K visual tokens most attended in the first layer of the cosine between their per-head attention
    vectors in the two layers.

    Args:
        before_BHV, after_BHV: attention from the asking token to V visual tokens, a head.
        K: tokens compared, clipped to V.

    >>> a = torch.tensor([[[0.4, 0.3, 0.05], [0.1, 0.3, 0.1]]]); b = torch.tensor([[[0.2, 0.3, 0.1], [0.2, 0.3, 0.0]]])
    >>> round(float(ilvas(a, b, 2)), 4)
    0.9287
    """
    top = before_BHV.mean(1).topk(min(K, before_BHV.shape[-1]), dim=-1).indices
    pick = top[:, None].expand(-1, before_BHV.shape[1], -1)
    return cosine(before_BHV.gather(-1, pick).transpose(1, 2), after_BHV.gather(-1, pick).transpose(1, 2)).mean(-1)

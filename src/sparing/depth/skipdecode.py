"""SkipDecode: the later a token is generated, the fewer layers it runs; the middle ones leave first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparing.engine.schedule import ScheduledLayers
from sparing.engine.train import finetune, labelled
from sparing.grid.method import BudgetError, Card, Error, Method, Shape, choice, integer, register


@register(
    "skipdecode",
    Card(
        "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference",
        year=2023,
        arxiv="2307.02628",
        axis="depth",
        kind="stream",
        phase="decode",
        summary="prompt at full depth, generated tokens through ever fewer layers, lower and middle ones leave first",
        controls=("random", "uniform", "constant", "termination"),
        trains=True,
        fits_budget=True,
    ),
)
@dataclass(frozen=True)
class SkipDecode(ScheduledLayers):
    """Generated token t (0-based, in each row its own) of L layers runs the b_t layers of A_t.

    1. b_t = floor(e_max - (e_max - e_min) min(t, T_ref) / T_ref + 1/2), and at least w + 1.
    2. A_t = {0, …, w-1} and {L - (b_t - w), …, L-1}, in order; a layer outside is the identity.
    3. b never rises, so A_t holds A_{t+1}: a layer that runs finds the keys of all tokens before it, and one that has
       left never returns; its cache is freed at once.

    `drop = top` terminates instead, for ablation: A_t = {0, …, b_t - 1}.

    Budget: over T_ref generated tokens. `at` wants a whole number of layers R = round(keep L) on average, so that
    controls of constant depth can spend the same, and takes e_max : e_min = 2 : 1 as far as w + 1 and L allow; of these
    pairs the one whose mean over t < T_ref is nearest to R, of equals the larger. Shorter outputs save less than asked,
    longer ones more.

    Controls: `constant` runs R layers throughout, chosen as here; `termination` is `drop = top` on the same schedule;
    `random` and `uniform` run R fixed layers. A schedule that rises has no control, because layers would miss keys.

    Decisions cost nothing; every sample runs the same layers, whatever the others are. The published results are after
    fine-tuning (`fit`); without it the method runs but is not what the paper reports.

    Departures: rounding, the bound w + 1 and the stay at e_min after T_ref are not given in the paper. Nor are numbers:
    e_max and e_min of a twofold speed-up, 16 and 8 of 24 layers; T_ref (published: the median output of the task) is
    512, as many tokens as the task `ppl` scores at once; w (published: a small number) is max(2, L // 12), because the
    first layer that leaves is layer w, and real models cannot lose layer 1: a pretrained one of 30 layers loses 137 %
    at keep = 0.9 with w = 1, 16 % with w = 2, as much as random layers.

    Args:
        e_max: layers of the first generated token; none is twice e_min (at most L), or two thirds of L.
        e_min: layers from token T_ref on; none is half of e_max, or a third of L.
        T_ref: reference length of the output, in tokens.
        w: warm-up layers at the bottom, which always run; none is max(2, L // 12), at most L - 1.
        drop: middle (as published) | top.

    >>> SkipDecode().layer_set(24)
    (0, 1, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
    >>> SkipDecode(e_max=8, e_min=4, T_ref=8, w=1).layer_set(24, t=8)
    (0, 21, 22, 23)
    """

    e_max: int | None = integer(None, "layers at the first token, none for 2/3", low=1, optional=True)
    e_min: int | None = integer(None, "layers from T_ref on, none for 1/3", low=1, optional=True)
    T_ref: int = integer(512, "reference length of the output", low=1, source="reviews: median of the task")
    w: int | None = integer(None, "bottom layers that always run, none for max(2, L // 12)", low=0, optional=True)
    drop: str = choice("middle", ("middle", "top"), "which layers leave")

    def check(self) -> None:
        if self.e_max is not None and self.e_min is not None and self.e_min > self.e_max:
            raise Error(f"skipdecode: e_min = {self.e_min}: must be <= e_max = {self.e_max}")

    # ---- schedule

    def ends(self, L: int) -> tuple[int, int]:
        """(e_max, e_min) in a model of L layers."""
        e_max, e_min = self.e_max, self.e_min
        for name, value, least in (("e_max", e_max, 0), ("e_min", e_min, 0), ("w", self.w, 1)):
            if value is not None and value + least > L:
                raise Error(f"skipdecode: {name} = {value}: must be <= {L - least}, the model has {L} layers")
        if e_max is None:
            return _pair(L, self.warm(L), L) if e_min is None else (min(2 * e_min, L), e_min)
        return e_max, max(1, e_max // 2) if e_min is None else e_min

    def warm(self, L: int) -> int:
        """w in a model of L layers."""
        return min(max(2, L // 12), L - 1) if self.w is None else self.w

    def budget(self, t: int, L: int) -> int:
        """b_t."""
        e_max, e_min = self.ends(L)
        t = min(t, self.T_ref)
        b = (self.T_ref * (2 * e_max + 1) - 2 * t * (e_max - e_min)) // (2 * self.T_ref)
        return max(b, self.warm(L) + 1)

    def layer_set(self, L: int, t: int = 0) -> tuple[int, ...]:
        """A_t, rising."""
        b, w = self.budget(t, L), self.warm(L)
        return tuple(range(b)) if self.drop == "top" else (*range(w), *range(L - b + w, L))

    def lasts(self, layer: int, L: int) -> float:
        (e_max, e_min), w = self.ends(L), self.warm(L)
        needed = layer + 1 if self.drop == "top" else L - layer + w  # it runs while b_t is at least this
        if needed <= max(e_min, w + 1) or (layer < w and self.drop == "middle"):
            return math.inf
        if needed > e_max:
            return 0
        return self.T_ref * (2 * (e_max - needed) + 1) // (2 * (e_max - e_min)) + 1

    def mean(self, L: int) -> float:
        """Layers a token runs on average, over T_ref tokens."""
        return sum(min(self.lasts(layer, L), self.T_ref) for layer in range(L)) / self.T_ref

    @property
    def horizon(self) -> int:
        return self.T_ref

    # ---- budget

    def at(self, keep: float, shape: Shape) -> Self:
        L, R = shape.layers, round(keep * shape.layers)
        w = self.warm(L)
        if self.state:
            if self._whole(L) != R:
                raise BudgetError(f"keep = {keep:g}: skipdecode was fitted at {self._whole(L) / L:.3g}; fit it anew")
            return self
        if not w < R <= L:
            raise BudgetError(
                f"keep = {keep:g}: skipdecode runs at least w + 1 = {w + 1} of {L} layers, {(w + 1) / L:.3g}"
            )
        pairs = [_pair(total, w, L) for total in range(2 * L, 2 * w + 1, -1)]
        tried = [self.replace(e_max=e_max, e_min=e_min) for e_max, e_min in pairs]
        return min(tried, key=lambda method: abs(method.mean(L) - R))

    def control(self, kind: str, shape: Shape, seed: int = 0) -> Method:
        if kind == "termination":
            return self.replace(drop="top")
        if kind == "constant":
            R = self._whole(shape.layers)
            return self.replace(e_max=R, e_min=R)
        return super().control(kind, shape, seed)

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        return {"R": self._whole(shape.layers)}

    def _whole(self, L: int) -> int:
        return math.floor(self.mean(L) + 0.5)

    # ---- training

    def fit(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> Self:
        """Fine-tune with this schedule: the prompt at full depth, the response by A_t, loss on the response.

        One pass in parallel: a position that does not run a layer leaves no keys there, and none behind it would look
        for them. All weights but the input embedding train.

        All T_ref steps train. Where no response is that long (pieces of a text, of which the second half is labelled),
        the samples take the parts of the schedule in turn: for a later part the end of the prompt runs as if it were
        generated, so that what is labelled stands at those steps, as far as one token of prompt is left.

        Args:
            model: the dense model; left unchanged.
            batches: with input_ids and labels; -100 before the response.
            options: of `sparing.engine.train.Training`; lr is 2e-5 by default.
        """
        dense, data = self.with_state({}), labelled(batches)
        split = [{**b, "prompt": prompt} for b, prompt in zip(data, _prompts(data, self.T_ref), strict=True)]
        return self.with_state(finetune(model, dense, split, **options))


def _pair(total: int, w: int, L: int) -> tuple[int, int]:
    """(e_max, e_min) with this sum, as near to 2 : 1 as w + 1 <= e_min and e_max <= L allow."""
    e_max = max(min(math.floor(2 * total / 3 + 0.5), L, total - (w + 1)), math.ceil(total / 2))
    return e_max, total - e_max


def _prompts(data: Sequence[Mapping[str, Tensor]], T_ref: int) -> list[Tensor]:
    """Prompt tokens of every row, long (B,) a batch, such that labels stand at all steps below T_ref.

    Columns count, padding on the left among them. As long as one response has T_ref tokens, every prompt ends where the
    labels begin. Else row i ends (i mod n) times the longest response earlier, n such lengths being T_ref or more.
    """
    said = [batch["labels"] != -100 for batch in data]
    ends = [(mask_BT.cumsum(1) == 0).sum(1) for mask_BT in said]
    lasts = [mask_BT.shape[1] - (mask_BT.flip(1).cumsum(1) == 0).sum(1) for mask_BT in said]
    longest = max(1, *(int((last_B - end_B).max()) for last_B, end_B in zip(lasts, ends, strict=True)))
    parts = math.ceil(T_ref / longest)
    found, row = [], 0
    for batch, end_B in zip(data, ends, strict=True):
        real_BT = batch.get("attention_mask", torch.ones_like(batch["labels"]))
        start_B = (real_BT.cumsum(1) == 0).sum(1)
        earlier_B = (row + torch.arange(len(end_B), device=end_B.device)) % parts * longest
        found.append(torch.maximum(end_B - earlier_B, torch.minimum(start_B + 1, end_B)))
        row += len(end_B)
    return found

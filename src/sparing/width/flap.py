"""FLAP: cut the KV groups and neurons whose output hardly varies over calibration data, and put their mean back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparing.engine.surgery import Plan
from sparing.engine.units import calibrate, keep_units, unit_scores
from sparing.engine.widths import WidthMethod, counted, reaches, rounded, unit_cost
from sparing.grid.method import BudgetError, Card, Error, Shape, choice, flag, integer, register, share
from sparing.grid.select import top_k


@register(
    "flap",
    Card(
        "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        year=2023,
        arxiv="2312.11983",
        axis="width",
        kind="surgery",
        phase="static",
        needs="calibration",
        summary="cuts heads and neurons that hardly vary, one budget over all layers; their mean stays as a bias",
    ),
)
@dataclass(frozen=True)
class Flap(WidthMethod):
    """Remove the fraction p of the parameters of all layers: KV groups with their query heads, and MLP neurons.

    X is what o_proj or down_proj reads, W its weight, j an input channel, n one of N calibration sequences.

    1. S_j = 1/(N-1) sum_n ||X_nj: - mean_j||^2 ||W_:j||^2 (WIFV); mean_j over sequences and tokens, the square summed
       over tokens. IFV leaves the weight out; WIFN = mean_i |W_ij| ||X_j||. All on dense activations.
    2. S^_j = (S_j - mean) / std inside each module; a group's score is the mean over the channels of its query heads,
       a neuron's is its S^_j.
    3. All units of all layers in one order, each with the parameters that leave with it: relative to a neuron of a
       gated MLP a group of G query heads costs (2 + 2G) d_h / 3. Kept is score > tau, tau being the score for which the
       cost kept is nearest to (1 - p) of the total.
    4. b = W ((1 - M) mean) becomes the bias of o_proj and down_proj, M the mask of kept channels.

    Step 3 is structure AL-AM. UL-UM keeps the share 1 - p of every module; AL-MM and UL-MM keep `heads` groups a layer
    (on average over all layers, or in each), and neurons fill the budget over all layers, or equally in each. With one
    kind of `units` UL-UM keeps the same share of it in every layer.

    Rounding: the cost kept is within half a unit of (1 - p) of the total (AL-AM, AL-MM), half a unit a module (UL-UM,
    UL-MM). Then widths become multiples of `multiple`, or all or none of a layer's neurons: the adaptive structures
    round so that the total moves by at most multiple / 2 neurons, the uniform ones round each layer to its nearest. A
    layer may lose all its groups or all its neurons; its bias stays. Of equal scores attention comes before MLPs, then
    the earlier unit. Kept sets are nested as p grows where multiple = 1.

    Departures: tau counts what is kept, so one unit more stays than in the released code, whose cumulative cost
    includes the unit at tau that it then drops; p = 0 thus keeps everything. The variance is exact (released: the old
    mean aliases the new one and the first sample is lost). KV groups are cut whole (released: no GQA). S_j^2 for
    attention, in the released code but not in the paper, is `square_attention`. -MM counts of neurons are rounded, not
    truncated.

    Cost: one dense forward over the calibration data (published: 2,048 windows of 128 tokens), five vectors a module.

    State: see `calibrate` of the surgery engine; p, metric and structure can change without a new fit.

    Args:
        units: both (published) | neurons | groups; what is not cut stays whole, and is no part of step 3's order.
        p: fraction of the parameters of the layers' matrices removed, whatever is cut.
        metric: WIFV | IFV | WIFN.
        structure: AL-AM | UL-UM | UL-MM | AL-MM.
        heads: KV groups kept a layer; for the -MM structures, and only there.
        square_attention: square S of attention once more.
        compensate: step 4.
        multiple: neurons of a layer are rounded to it; 1 as published, unaligned widths lose speed.

    >>> Flap(p=0.2).at(0.7, Shape(layers=4, heads=8, groups=4, head_dim=8, hidden=64, neurons=96)).p
    0.3
    """

    p: float = share(0.2, "fraction of block parameters removed", source="code")
    metric: str = choice("WIFV", ("WIFV", "IFV", "WIFN"), "how channels are scored", source="overview figure")
    structure: str = choice("AL-AM", ("AL-AM", "UL-UM", "UL-MM", "AL-MM"), "how the budget is shared", source="code")
    heads: int | None = integer(None, "KV groups kept a layer, -MM structures only", optional=True, source="code")
    square_attention: bool = flag(False, "square the attention score once more", source="code")
    compensate: bool = flag(True, "put the mean of what is cut back as a bias", source="overview figure")
    multiple: int = integer(16, "neurons a layer are rounded to it", low=1)

    def check(self) -> None:
        if self.structure.endswith("MM") and self.units != "both":
            raise Error(
                f"flap: units = {self.units}: must be both, as structure {self.structure} sets the number of groups "
                "itself; take AL-AM or UL-UM"
            )
        if self.structure.endswith("MM") != (self.heads is not None):
            raise Error(
                f"flap: heads = {self.heads}: structure {self.structure} "
                + (
                    "needs the number of KV groups kept a layer"
                    if self.heads is None
                    else "sets heads itself; leave it"
                )
            )

    def at(self, keep: float, shape: Shape) -> Self:
        group, neuron = unit_cost(self, shape)
        reaches(self.name, keep, self.units, shape.groups * group, shape.neurons * neuron)
        return self.replace(p=round(1 - keep, 12))

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        groups, neurons = self.kept()
        of_groups, of_neurons = ([int(keep.sum()) for keep in part] for part in (groups, neurons))
        return counted(self.units, of_groups, of_neurons, self.compensate)

    def fit(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> Self:
        """Record what the channels of every o_proj and down_proj do over calibration data, in one dense pass.

        Args:
            model: left unchanged.
            batches: a row is one of the N sequences; padding (attention_mask 0) does not count.
        """
        return self.with_state(calibrate(model, batches))

    def plan(self, model: nn.Module) -> Plan:
        return keep_units(model, *self.kept(), self.state if self.compensate else None)

    def portable(self) -> Self:
        return self.replace(structure="UL-UM", heads=None, compensate=False)

    def kept(self) -> tuple[list[Tensor], list[Tensor]]:
        """Kept groups and kept neurons of each layer, bool (units,); from state alone."""
        if not self.state:
            raise Error("flap: needs calibration first: method = method.fit(model, batches)")
        layers = range(sum(name.startswith("mlp.unit.") for name in self.state))
        heads = [self.scores("attention", i) for i in layers]
        neurons = [self.scores("mlp", i) for i in layers]
        head_cost = [int(self.state[f"attention.unit.{i}"][1]) for i in layers]
        neuron_cost = [int(self.state[f"mlp.unit.{i}"][1]) for i in layers]
        of_heads, of_neurons = [len(s) for s in heads], [len(s) for s in neurons]
        sizes = of_neurons
        attention = sum(k * c for k, c in zip(of_heads, head_cost))
        mlp = sum(k * c for k, c in zip(of_neurons, neuron_cost))
        reaches(self.name, 1 - self.p, self.units, attention, mlp)
        whole = {"both": 0, "neurons": attention, "groups": mlp}[self.units]
        left = (1 - self.p) * (attention + mlp) - whole
        kept = left / max(attention + mlp - whole, 1)

        if self.structure == "AL-AM":
            if self.units == "both":
                counts = _fill(heads + neurons, head_cost + neuron_cost, left)
                of_heads, of_neurons = counts[: len(heads)], counts[len(heads) :]
            elif self.units == "neurons":
                of_neurons = _fill(neurons, neuron_cost, left)
            else:
                of_heads = _fill(heads, head_cost, left)
        elif self.structure == "UL-UM":
            if self.units != "neurons":
                of_heads = [math.floor(kept * k + 0.5) for k in of_heads]
            if self.units != "groups":
                of_neurons = [math.floor(kept * k + 0.5) for k in of_neurons]
        else:
            assert self.heads is not None
            of_heads = [self.heads] * len(heads)
            if self.structure == "AL-MM":
                of_heads = _fill(heads, [1] * len(heads), self.heads * len(heads))
            left -= sum(k * c for k, c in zip(of_heads, head_cost))
            each = left / sum(neuron_cost)
            self._reachable(heads, neurons, left / max(neuron_cost))
            of_neurons = [math.floor(each + 0.5)] * len(neurons)
            if self.structure == "AL-MM":
                of_neurons = _fill(neurons, neuron_cost, left)

        if self.structure.startswith("AL"):
            of_neurons = _aligned(of_neurons, sizes, self.multiple)
        else:
            of_neurons = [rounded(k, size, self.multiple) for k, size in zip(of_neurons, sizes)]
        return _best(heads, of_heads), _best(neurons, of_neurons)

    def scores(self, site: str, layer: int) -> Tensor:
        """S^ of the groups or neurons of a layer, float64 (units,)."""
        power = 2 if site == "attention" and self.square_attention else 1
        return unit_scores(self.state, site, layer, metric=self.metric, power=power)

    def _reachable(self, heads: list[Tensor], neurons: list[Tensor], wanted: float) -> None:
        most, there = min(map(len, heads)), sum(map(len, neurons))
        if self.heads is not None and self.heads > most:
            raise BudgetError(f"flap: heads = {self.heads}: a layer has {most} KV groups")
        if not -0.5 <= wanted <= there + 0.5:
            raise BudgetError(
                f"flap: p = {self.p:g} with heads = {self.heads}: would keep {wanted:.0f} of {there} neurons; "
                f"{'lower' if wanted < 0 else 'raise'} heads"
            )


def _fill(scores: list[Tensor], costs: list[int], budget: float) -> list[int]:
    """Units kept of each module: the best over all modules, as many as bring the cost nearest to `budget`."""
    score = torch.cat(scores)
    size = torch.tensor([len(s) for s in scores])
    order = score.sort(descending=True, stable=True).indices
    spent = torch.tensor(costs).repeat_interleave(size)[order].cumsum(0).double()
    spent = torch.cat([spent.new_zeros(1), spent])
    count = int((spent - budget).abs().argmin())
    owner = torch.arange(len(scores)).repeat_interleave(size)
    return torch.bincount(owner[order[:count]], minlength=len(scores)).tolist()


def _aligned(counts: list[int], sizes: list[int], multiple: int) -> list[int]:
    """Counts as multiples (or whole layers) with nearly the same total: the largest remainders are rounded up."""
    low = [k if k == size else k - k % multiple for k, size in zip(counts, sizes)]
    step = [min(multiple, size - k) for k, size in zip(low, sizes)]
    missing = sum(counts) - sum(low)
    order = sorted((i for i, s in enumerate(step) if s), key=lambda i: ((low[i] - counts[i]) / step[i], i))
    for i in order:
        if 2 * missing >= step[i]:
            low[i] += step[i]
            missing -= step[i]
    return low


def _best(scores: list[Tensor], counts: list[int]) -> list[Tensor]:
    return [top_k(score[None], k)[0] for score, k in zip(scores, counts)]

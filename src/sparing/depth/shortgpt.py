"""ShortGPT: remove the layers whose output is most like their input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from sparing.engine.influence import similarities
from sparing.engine.surgery import LayerCut, Plan, SurgeryMethod
from sparing.engine.view import View
from sparing.grid.method import BudgetError, Card, Error, Shape, integer, register
from sparing.grid.select import top_k


@register(
    "shortgpt",
    Card(
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        year=2024,
        arxiv="2403.03853",
        axis="depth",
        kind="surgery",
        phase="static",
        needs="calibration",
        summary="removes the layers that turn the residual stream least, for prompt and generated tokens alike",
    ),
)
@dataclass(frozen=True)
class ShortGPT(SurgeryMethod):
    """Keep the R of L layers with the largest block influence; the others leave the model.

    h_{l,t} is the residual stream of token t entering layer l, h_{l+1,t} leaving it; h_{L,t} is behind the final norm.

    1. BI_l = 1 - E_t [h_{l,t} . h_{l+1,t} / (||h_{l,t}|| ||h_{l+1,t}||)], over all tokens of the calibration data, all
       layers in one dense pass.
    2. The L - R layers with the smallest BI are removed at once; BI is not taken anew in between. Of equal ones the
       earlier stay.

    What is left is an ordinary model of R layers. Its controls skip as many layers for every token, the prompt too.

    The final norm counts as part of the last layer, as in the released code: it takes transformers' `hidden_states`,
    whose last entry is normed. The paper does not say so, but it is what protects the last layer, whose own BI before
    the norm may be the smallest of all.

    Departures: each token counts once (released: a sum over windows of prompts, their padding too).

    Cost: one dense forward over the calibration data (published: PG19), one cosine a token and layer.

    State: influence, float32 (L,), BI of each layer. R can change without a new fit.

    Args:
        R: layers kept, >= 2; none keeps three quarters, rounded (published: about that many).

    >>> ShortGPT().at(0.75, Shape(layers=32, heads=8, groups=4, head_dim=8, hidden=64, neurons=96)).R
    24
    """

    R: int | None = integer(None, "layers kept, none for three quarters", low=2, optional=True)

    def at(self, keep: float, shape: Shape) -> Self:
        R = round(keep * shape.layers)
        if R < 2:
            raise BudgetError(f"keep = {keep:g}: shortgpt keeps at least 2 of {shape.layers} layers")
        return self.replace(R=R)

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        return {"R": self._count(shape.layers), "prompt": True}

    def fit(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: object) -> Self:
        """Record the influence of every layer over calibration data, in one dense pass.

        Args:
            model: left unchanged.
            batches: keyword arguments of the model's forward; padding does not count.
        """
        return self.with_state({"influence": (1 - similarities(model, batches)).float()})

    def plan(self, model: nn.Module) -> Plan:
        return Plan(tuple(LayerCut() if kept else None for kept in self.kept(len(View(model))).tolist()))

    def kept(self, L: int) -> Tensor:
        """Which of L layers stay, bool (L,); from state alone."""
        if not self.state:
            raise Error("shortgpt: needs calibration first: method = method.fit(model, batches)")
        influence_L = self.state["influence"]
        if influence_L.shape != (L,):
            found = len(influence_L) if influence_L.ndim == 1 else tuple(influence_L.shape)
            raise Error(f"method = 'shortgpt': was fitted on another model: influence has {found} layers, not {L}")
        return top_k(influence_L[None], self._count(L))[0]

    def _count(self, L: int) -> int:
        R = max(2, round(0.75 * L)) if self.R is None else self.R
        if R > L:
            raise Error(f"shortgpt: R = {R}: the model has {L} layers")
        return R

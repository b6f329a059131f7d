"""EASY-EP: keep the experts of a mixture that contribute most on a few demonstrations of a domain, remove the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparing.engine.experts import KeepExperts
from sparing.engine.view import LayerView
from sparing.grid.method import Card, register


@register(
    "easy-ep",
    Card(
        "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations",
        year=2025,
        arxiv="2504.06792",
        axis="experts",
        kind="surgery",
        phase="static",
        saves="memory",
        needs="calibration",
        summary="keeps the experts whose gated output changes the tokens of a domain most, removes the rest",
        controls=("random", "frequency", "gate"),
    ),
)
@dataclass(frozen=True)
class EasyEp(KeepExperts):
    """Keep M experts a layer by output-aware importance times token contribution, from 25 demonstrations.

    h_t is the residual stream entering the sub-layer, g_{i,t} the gate of expert i as the layer uses it (after
    normalisation and scaling), e_{i,t} its un-gated output, for the experts that token t visits.

    1. Demonstrations: prompts of the domain with the model's own continuation (sampled).
    2. c_{i,t} = g_{i,t} ||e_{i,t}||: an upper bound of what the expert adds.
    3. s_t = 1 - cos(h_t, h_t + sum_i g_{i,t} e_{i,t}): how far the routed output turns the token; shared experts are
       left out, negative values (rounding) count as 0.
    4. I_i = sum_t s_t c_{i,t} over all tokens of all demonstrations; not divided by visits, so rare experts score low.
    5. Keep the M largest of each layer; of equal ones the first.
    6. Several domains: each domain's row is divided by its sum, then their mean decides.

    Attached it is a mask: the router cannot see the others, all weights stay. `sparing.prune` removes weights and
    router rows and numbers the rest anew; both give the same outputs. The router's own top-k and normalisation run over
    the survivors. Nothing is trained, a token visits as many experts as before: it saves memory, not FLOPs.

    Group-limited routers score their groups by survivors. A plan that leaves a choosable set of groups without enough
    experts is refused; removal needs as many survivors in every group (`even`), a mask does not.

    Departures: demonstrations are the first 25 rows of the data, the released code takes the 25 longest. Scores are
    added up in float64.

    Cost: one dense pass over the demonstrations in which every visit is computed twice (for its norm).

    State: see `KeepExperts`; M and even can change without a new fit.

    Args:
        M: experts kept a layer; none keeps half.
        even: keep M / groups of each group of a group-limited router.
        samples: demonstrations a domain.
        calibration: own-output | as-given, what follows the prompts.

    >>> from sparing import Shape
    >>> EasyEp().at(0.25, Shape(layers=4, heads=8, groups=4, head_dim=8, hidden=64, neurons=0, experts=64, top_k=8)).M
    16
    """

    def importance(self, layers: Sequence[LayerView]) -> Tensor:
        return self.mixed("score")

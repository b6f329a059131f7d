"""Budgets of this library's methods on the tiny models, where `at` cannot spread them over six layers.

Others are here because other settings than the defaults are worth a check.
"""

from __future__ import annotations

from sparing.testing.models import LAYERS, VISUAL

BUDGETS: dict[str, dict[str, str]] = {
    "fastv": {"full": "fastv:R=0", "mid": "fastv:K=2,R=0.3", "cut": "fastv:K=2,R=0.6"},
    "hidrop": {
        "full": f"hidrop:inject=1,filters=,keeps=,exit={LAYERS}",
        "mid": f"hidrop:inject=2,filters=3,keeps=7,of={VISUAL},exit={LAYERS}",
        "cut": f"hidrop:inject=2,filters=3/4,keeps=7/3,of={VISUAL},exit=5",
    },
    "random-tokens": {"cut": "random-tokens:schedule=1/1/0.5/0.5/0.2/0"},
    "uniform-tokens": {"cut": "uniform-tokens:schedule=0/0/1/0.5/0.5/0.2"},
    "random-depth": {"cut": "random-depth:R=3,seed=4"},
    "uniform-depth": {"cut": "uniform-depth:R=3,part=top"},
    "flap": {"full": "flap:p=0", "mid": "flap:p=0.2,multiple=8", "cut": "flap:p=0.4,multiple=8"},
    "random-width": {"cut": "random-width:groups=1/2/1/2/1/1,neurons=16/24/48/8/16/32"},
}
for name in ("easy-ep", "frequency-experts", "gate-experts", "random-experts"):
    # its router takes three experts of one of two groups of six
    BUDGETS[f"{name} deepseek-v3"] = {"mid": f"{name}:M=10,even=true", "cut": f"{name}:M=6,even=true"}

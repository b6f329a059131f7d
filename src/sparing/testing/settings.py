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
BUDGETS["fire-together-wire-together"] = {  # attention and half of the MLP always run
    "full": "fire-together-wire-together:neurons=1",
    "mid": "fire-together-wire-together:neurons=0.6",
    "cut": "fire-together-wire-together:neurons=0.3",
}
_SHORT = "generations=2,offspring=4,survivors=2/1,tokens=24/48"
BUDGETS["evopress"] = {"fit": f"evopress:{_SHORT}"}
for name in ("easy-ep", "frequency-experts", "gate-experts", "random-experts"):
    # its router takes three experts of one of two groups of six
    BUDGETS[f"{name} deepseek-v3"] = {"mid": f"{name}:M=10,even=true", "cut": f"{name}:M=6,even=true"}

BUDGETS["das"] = {"fit": "das:updates=2"}  # of hundreds, each judged on held-out data
BUDGETS["skipdecode"] = {  # so short a reference length that layers leave within the few tokens that are generated
    "mid": "skipdecode:e_max=5,e_min=4,T_ref=3",
    "cut": "skipdecode:e_max=5,e_min=2,T_ref=3",
}
# a batch runs the layers that any of its sequences keeps: at R = 3 two may keep four
BUDGETS["first"] = {"mid": "first:R=5,router=static"}
for name in ("qwen3", "gemma3"):  # its attention, which every token runs, is more than half of a layer
    BUDGETS[f"duo-llm {name}"] = {"cut": "duo-llm:rho=0.1"}
BUDGETS["random-ffn"] = {"mid": "random-ffn:skip=0.3,W=1", "cut": "random-ffn:skip=0/0.9/0.6/0.7/1/0.8,W=1"}
_MEDIANS = {  # of the cosines before and after an FFN: of the tokens some hit, some do not
    "llama": 0.96, "qwen2": 0.965, "qwen3": 0.984, "gemma3": 0.9, "mistral": 0.96, "phi3": 0.972, "gpt-neox": 0.85,
    "falcon": 0.82, "gptj": 0.844, "gpt2": 0.91, "phi": 0.86, "olmo2": 0.909, "cohere2": 0.967,
    "deepseek-v2": 0.978, "gpt-oss": 0.94,
    "qwen3-moe": 0.997, "olmoe": 0.998, "mixtral": 0.987, "deepseek-v3": 0.92, "llava": 0.95, "qwen2.5-vl": 0.955,
}  # fmt: skip
for name, theta in _MEDIANS.items():
    BUDGETS[f"ffn-skipllm {name}"] = {
        "full": "ffn-skipllm:theta=2",
        "mid": f"ffn-skipllm:theta={theta},k=1,W=1,s=3,e=5",
        "cut": f"ffn-skipllm:theta={theta},k=2,W=1,s=0,e=5",
    }
_FTP = "population=6,generations=2,elites=2,queries=1"  # sixteen queries of nine tokens would cost what is saved
BUDGETS["ftp"] = {"fit": f"ftp:{_FTP}"}
for name in (
    "gemma3",
    "phi3",
    "gpt-oss",
):  # the search makes the last layer too sparse for generated tokens, so nothing trains it
    BUDGETS[f"ftp {name}"] = BUDGETS["ftp"] | {"cut": f"ftp:s=0.5,threshold=1,{_FTP}"}
# its keys are a seventh of a layer, which is what it costs to read the attention
BUDGETS["ftp opt"] = BUDGETS["ftp"] | {"mid": f"ftp:s=0.35,{_FTP}"}

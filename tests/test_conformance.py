"""Every registered method on every architecture: the conformance suite, case by case."""

from __future__ import annotations

import pytest

import sparing
from sparing.testing import Case, cases
from sparing.testing.models import ARCHITECTURES, DENSE, MOE, TEXT, VISION

CASES = cases()

# The usual run has every case on the architectures that differ most in structure, of the checks that hang on the engine
# more than on the model (what a method leaves behind, refuses, draws, holds in memory) on three of them. On the others
# each method meets a third of the checks of what it computes, another third on the next architecture, so that every
# pair of method and architecture and of check and architecture is run. `make test-slow` runs all that is left out.
COMPUTES = (
    *("full-budget", "effect", "budget-order", "batch", "left-padding", "cache-greedy", "cut-equals-mask"),
    *("save-load", "nested-parameters"),
)
VARIED = {"llama", "gemma3", "gpt-neox", "deepseek-v3", "qwen2.5-vl"}
MANNERS = {"llama", "deepseek-v3", "qwen2.5-vl"}
METHODS = list(sparing.methods())


def _usual(case: Case) -> bool:
    name, architecture = case.check.name, case.architecture
    if name == "refusal" or architecture in MANNERS:
        return True
    if name not in COMPUTES or architecture in VARIED:
        return name in COMPUTES
    turn = METHODS.index(case.method.name) + list(ARCHITECTURES).index(architecture)
    return (COMPUTES.index(name) + turn) % 3 == 0


def _marked(case: Case) -> object:
    return pytest.param(case, id=str(case), marks=() if _usual(case) else pytest.mark.slow)


@pytest.mark.parametrize("case", map(_marked, CASES))
def test_conforms(case: Case) -> None:
    case.run()


def test_every_method_meets_every_architecture() -> None:
    assert {(c.method.name, c.architecture) for c in CASES} == {
        (m, a) for m in sparing.methods() for a in ARCHITECTURES
    }


def test_a_method_is_refused_only_where_it_has_nothing_to_work_on() -> None:
    """Written out, so that a model whose parts are no longer found does not pass for one without them."""
    whole = {"gpt-neox", "opt", "falcon", "gptj", "bloom", "gpt2", "phi"}  # fused head by head, plain MLPs
    divisible = {*DENSE, *VISION} - whole
    works = {
        "tokens": set(VISION),
        "depth": set(ARCHITECTURES),
        "width": divisible - {"olmo2"},  # which norms all heads together
        "experts": set(MOE),
    }
    has = {  # parts that a Card may require
        "mlp": set(ARCHITECTURES) - {"opt", "bloom"},
        "neurons": divisible,
        "scores": set(ARCHITECTURES) - {"gpt-neox", "falcon", "gptj", "bloom", "gpt2", "deepseek-v2", "deepseek-v3"},
        "lora": set(ARCHITECTURES) - {"gpt2"},
    }
    for name, method in sparing.methods().items():
        mine = [c for c in CASES if c.method is method]
        refused = {c.architecture for c in mine if c.check.name == "refusal"}
        parts = method.card.requires
        able = set.intersection(*(has[part] for part in parts)) if parts else works[method.card.axis]
        assert refused == set(ARCHITECTURES) - able, name
        assert all((c.reason is not None) == (c.architecture in refused) for c in mine)
    assert {*TEXT, *VISION} == set(ARCHITECTURES)

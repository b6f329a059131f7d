"""Every registered method on every architecture: the conformance suite, case by case."""

from __future__ import annotations

import pytest

import sparing
from sparing.testing import Case, cases
from sparing.testing.models import ARCHITECTURES, DENSE, MOE, TEXT, VISION

CASES = cases()

# Checks of what a method computes run on every architecture. Those of its manners (what it leaves behind, refuses,
# draws, holds in memory) hang on the engine more than on the model: every run has them on the five that differ most in
# structure, and `make test-slow` on the others.
EVERYWHERE = {
    *("full-budget", "effect", "budget-order", "batch", "left-padding", "cache-greedy", "cut-equals-mask"),
    *("save-load", "refusal", "nested-parameters"),
}
VARIED = {"llama", "gemma3", "gpt-neox", "deepseek-v3", "qwen2.5-vl"}


def _marked(case: Case) -> object:
    usual = case.check.name in EVERYWHERE or case.architecture in VARIED
    return pytest.param(case, id=str(case), marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize("case", map(_marked, CASES))
def test_conforms(case: Case) -> None:
    case.run()


def test_every_method_meets_every_architecture() -> None:
    assert {(c.method.name, c.architecture) for c in CASES} == {
        (m, a) for m in sparing.methods() for a in ARCHITECTURES
    }


def test_a_method_is_refused_only_where_it_has_nothing_to_work_on() -> None:
    """Written out, so that a model whose parts are no longer found does not pass for one without them."""
    works = {
        "tokens": set(VISION),
        "depth": set(ARCHITECTURES),
        "width": {*DENSE, *VISION} - {"gpt-neox", "opt"},
        "experts": set(MOE),
    }
    has = {  # parts that a Card may require
        "mlp": set(ARCHITECTURES) - {"opt"},
        "neurons": {*DENSE, *VISION} - {"gpt-neox", "opt"},
        "scores": set(ARCHITECTURES) - {"gpt-neox", "deepseek-v3"},
    }
    for name, method in sparing.methods().items():
        mine = [c for c in CASES if c.method is method]
        refused = {c.architecture for c in mine if c.check.name == "refusal"}
        parts = method.card.requires
        able = set.intersection(*(has[part] for part in parts)) if parts else works[method.card.axis]
        assert refused == set(ARCHITECTURES) - able, name
        assert all((c.reason is not None) == (c.architecture in refused) for c in mine)
    assert {*TEXT, *VISION} == set(ARCHITECTURES)

"""Controls that keep attentions and MLPs by lot, or evenly spread."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

import sparing
from sparing.depth.sublayers import RandomSublayers, Sublayers, UniformSublayers
from sparing.engine.surgery import Plan, prune
from sparing.engine.view import shape
from sparing.grid.method import BudgetError, Error
from sparing.testing.models import LAYERS, build
from sparing.width.evopress import EvoPress


@pytest.fixture(scope="module")
def model():
    return build("llama")


def kept(plan: Plan) -> tuple[set[int], set[int]]:
    """Layers whose attention, and whose MLP, stays; a layer has neither just where it goes whole."""
    assert all(cut is None or cut.attention or cut.mlp for cut in plan.layers)
    sites = ("attention", "mlp")
    a, m = ({i for i, cut in enumerate(plan.layers) if cut is not None and getattr(cut, s)} for s in sites)
    return a, m


@pytest.mark.parametrize(("attention", "mlp"), [(0, 4), (2, 5), (5, 2), (6, 6), (3, 0), (1, 1)])
def test_as_many_stay_as_asked(model, attention, mlp):
    for kind in (RandomSublayers, UniformSublayers):
        a, m = kept(kind(attention=attention, mlp=mlp).plan(model))
        assert (len(a), len(m)) == (attention, mlp)


def test_the_evenly_spread_by_hand(model):
    assert kept(UniformSublayers(attention=3, mlp=4).plan(model)) == ({0, 2, 5}, {0, 2, 3, 5})
    assert kept(UniformSublayers(attention=2, mlp=1).plan(model)) == ({0, 5}, {0})


def test_lots_are_fair_and_the_two_kinds_apart(model):
    seen, pairs = Counter(), Counter()
    for seed in range(600):
        a, m = kept(RandomSublayers(attention=2, mlp=4, seed=seed).plan(model))
        seen.update(("attention", i) for i in a)
        seen.update(("mlp", i) for i in m)
        pairs[len(a & m)] += 1
    for i in range(LAYERS):
        assert seen["attention", i] / 600 == pytest.approx(1 / 3, abs=0.07)
        assert seen["mlp", i] / 600 == pytest.approx(2 / 3, abs=0.07)
    # of two attentions 0, 1 or 2 stand beside one of the four MLPs: 1, 8 and 6 of 15 choices
    assert [pairs[n] / 600 for n in range(3)] == pytest.approx([1 / 15, 8 / 15, 6 / 15], abs=0.07)


def test_a_seed_is_one_draw(model):
    draws = [[kept(RandomSublayers(attention=3, mlp=3, seed=s).plan(model)) for s in range(8)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len({(frozenset(a), frozenset(m)) for a, m in draws[0]}) > 4


@pytest.mark.parametrize("kind", [RandomSublayers, UniformSublayers])
def test_blocks_go_whole(model, kind):
    for count in range(1, LAYERS + 1):
        a, m = kept(kind(attention=count, mlp=count, blocks=True).plan(model))
        assert a == m and len(a) == count
    assert prune(model, kind(attention=2, mlp=2, blocks=True)).config.num_hidden_layers == 2


@pytest.mark.parametrize(("keep", "left"), [(1.0, 6), (0.75, 5), (0.67, 5), (2 / 3, 4), (0.5, 3), (0.17, 2), (0.05, 1)])
def test_what_a_budget_leaves_is_what_it_leaves_to_evopress(model, keep, left):
    """6 - int((1 - keep) 6) of each kind: what goes is rounded down, as in the method that it is a control of."""
    sizes = shape(model)
    for kind in ("random", "uniform"):
        own = sparing.get(f"{kind}-sublayers")().at(keep, sizes)
        assert (own.attention, own.mlp) == (left, left)
        control = EvoPress().at(keep, sizes).control(kind, sizes, seed=3)
        assert (control.attention, control.mlp, control.blocks) == (left, left, False)
        assert control.fields().get("seed", 3) == 3
        assert EvoPress(blocks=True).control(kind, sizes).blocks


def test_refusals(model):
    for kind in (RandomSublayers, UniformSublayers):
        for name in ("attention", "mlp"):
            with pytest.raises(Error, match=rf"{kind.name}: {name} = 7: the model has 6 layers"):
                kind(**{name: 7}).plan(model)
        with pytest.raises(BudgetError, match=r"keep = 0: .* keeps at least one of 6 layers"):
            kind().at(0.0, dataclasses.replace(shape(model)))
        with pytest.raises(Error, match="no layer is left"):
            prune(model, kind(attention=0, mlp=0))
    with pytest.raises(Error, match="Sublayers defines no chosen"):
        Sublayers.chosen(RandomSublayers(), 6, 2, 0)


def test_what_stays_computes_as_before(model):
    """Nothing gone: the same logits bit for bit; something gone: others."""
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        dense = model(ids).logits
        for kind in (RandomSublayers, UniformSublayers):
            assert torch.equal(prune(model, kind(attention=6, mlp=6))(ids).logits, dense)
            for fields in ({"attention": 5, "mlp": 6}, {"attention": 6, "mlp": 5}):
                assert not torch.allclose(prune(model, kind(**fields))(ids).logits, dense, atol=1e-2)

"""EvoPress: the card's oracles, and references by brute force and dynamic programming."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch

import sparing
from sparing.engine.banks import Bank
from sparing.engine.elastic import Elastic, units
from sparing.engine.fitness import Fidelity
from sparing.engine.surgery import prune
from sparing.grid.method import BudgetError, Error
from sparing.grid.score import divergence
from sparing.grid.search import Evolution, Stage, moves, switched
from sparing.testing.models import build, prompt
from sparing.width.evopress import EvoPress

SHORT = {"generations": 4, "offspring": 6, "survivors": (2, 1), "tokens": (40, 120)}


def _data(length=24, rows=5):
    return [prompt("llama", (length,) * rows, side="none", seed=s) for s in (1, 2)]


@pytest.mark.parametrize("seed", range(4))
def test_oracle_1_every_offspring_keeps_the_budget(seed):
    rng = random.Random(seed)
    genome = tuple(rng.randint(-8, 8) for _ in range(14))
    groups = [list(range(9)), list(range(9, 14))]
    sums = [sum(genome[i] for i in g) for g in groups]
    for _ in range(300):
        genome = switched(genome, groups, -8, 8, rng)
        assert [sum(genome[i] for i in g) for g in groups] == sums
        assert all(-8 <= level <= 8 for level in genome)


def test_oracle_2_the_linear_toy():
    errors = (4, 1, 3, 2)
    cost = lambda cs, effort, draw: [sum(e for e, gone in zip(errors, c) if gone) for c in cs]  # noqa: E731
    swaps = {tuple(int(i in (set((0, 1)) - {a}) | {b}) for i in range(4)) for a, b in itertools.product((0, 1), (2, 3))}
    values = {tuple(i for i in range(4) if s[i]): cost([s], 0, 0)[0] for s in swaps}
    assert values == {(1, 2): 4, (1, 3): 3, (0, 2): 7, (0, 3): 6}
    breed = lambda parents, rng: switched(parents[0], [range(4)], 0, 1, rng)  # noqa: E731
    search = Evolution([(1, 1, 0, 0)], breed, cost, offspring=5, stages=[Stage(1)], seed=0)
    search.step()  # six valid points but the parent: a generation of five holds them all
    assert search.best == (0, 1, 0, 1)


def test_oracle_3_the_best_never_worsens_without_noise():
    table = {}
    rng = random.Random(5)
    fitness = lambda cs, e, d: [table.setdefault(c, rng.random()) for c in cs]  # noqa: E731
    breed = lambda parents, r: switched(parents[0], [range(12)], 0, 1, r)  # noqa: E731
    search = Evolution([(1,) * 6 + (0,) * 6], breed, fitness, offspring=8, stages=[Stage(2), Stage(1)])
    search.run(20)
    assert all(b <= a for a, b in itertools.pairwise(search.history))


def test_oracle_4_mutations_have_their_frequencies():
    rng = random.Random(1)
    seen = Counter(moves(rng) for _ in range(60_000))
    assert [seen[m] / 60_000 for m in (1, 2, 3)] == pytest.approx([5 / 9, 3 / 9, 1 / 9], abs=0.01)
    assert sum(m * n for m, n in seen.items()) / 60_000 == pytest.approx(14 / 9, abs=0.01)


def test_oracle_5_divergence_by_hand():
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    assert divergence(p, q).item() == pytest.approx(0.085123, abs=1e-6)
    assert divergence(q, p).item() == pytest.approx(0.092033, abs=1e-6)
    assert divergence(p, p).item() == 0


def test_oracle_6_one_minibatch_a_stage_and_the_same_seed_the_same_way():
    method, model = EvoPress(amount=0.34, **SHORT), build("llama")
    a, b = (method.fit(model, _data(), progress=False) for _ in range(2))
    assert all(torch.equal(a.state[k], b.state[k]) for k in a.state)
    elastic = Elastic(model, units(model, ["depth"]))
    seen = []
    with elastic:
        fitness = Fidelity(model, _data(), elastic.set, elastic.dense)
        inner = fitness._logits
        fitness._logits = lambda rows: seen.append(rows.clone()) or inner(rows)
        worse = [tuple(int(i != j) for i in range(12)) for j in range(3)]
        fitness(worse, 50, 9)
    assert len({tuple(map(tuple, rows.tolist())) for rows in seen}) * 4 == len(seen)  # dense and three candidates


@pytest.mark.parametrize("levels", ["depth", "sparsity"])
def test_oracle_7_nothing_dropped_is_the_dense_model(levels):
    model, batch = build("llama"), prompt("llama", (7, 5))
    with torch.no_grad():
        dense = model(**batch).logits
    if levels == "depth":
        method = EvoPress(amount=0.0, **SHORT).fit(model, _data(), progress=False)
        with sparing.attach(model, method), torch.no_grad():
            assert torch.equal(model(**batch).logits, dense)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense)


def test_oracle_8_divergence_in_chunks():
    p, q = torch.randn(2, 37, 9), torch.randn(2, 37, 9)
    torch.testing.assert_close(divergence(p, q, chunk=5), divergence(p, q))


def test_oracle_9_beats_the_sum_of_errors_where_two_drops_cancel():
    """Dropping units 4 and 5 together undoes what dropping either does: a sum of single errors cannot see it."""
    single = (1.0, 1.1, 1.2, 1.3, 3.0, 3.0)

    def error(gone):
        return 0.1 if gone == {4, 5} else sum(single[i] for i in gone)

    def dynamic_programming(n, k):  # best sum of single errors with exactly k dropped
        best = {(0, 0): (0.0, frozenset())}
        for i in range(n):
            for j in range(k + 1):
                options = [(best[i, j][0], best[i, j][1])] if (i, j) in best else []
                if (i, j - 1) in best:
                    options.append((best[i, j - 1][0] + single[i], best[i, j - 1][1] | {i}))
                if options:
                    best[i + 1, j] = min(options, key=lambda o: o[0])
        return set(best[n, k][1])

    by_sum = dynamic_programming(6, 2)
    assert by_sum == {0, 1} and error(by_sum) == pytest.approx(2.1)
    fitness = lambda cs, e, d: [error({i for i, g in enumerate(c) if g}) for c in cs]  # noqa: E731
    breed = lambda parents, rng: switched(parents[0], [range(6)], 0, 1, rng)  # noqa: E731
    found = [
        Evolution([(1, 1, 0, 0, 0, 0)], breed, fitness, offspring=8, stages=[Stage(1)], seed=s).run(12)
        for s in range(5)
    ]
    assert all(error({i for i, g in enumerate(c) if g}) < error(by_sum) for c in found)


# --------------------------------------------------------------------------- on a model


def test_depth_finds_the_best_of_all_choices_on_a_small_model():
    model = build("llama")
    method = EvoPress(amount=0.2, generations=12, offspring=12, survivors=(4, 1), tokens=(240, 240))
    fitted = method.fit(model, _data(), progress=False)
    elastic = Elastic(model, units(model, ["depth"]))
    every = [tuple(int(i != a and i != b) for i in range(12)) for a in range(0, 12, 2) for b in range(1, 12, 2)]
    with elastic:
        values = Fidelity(model, _data(), elastic.set, elastic.dense)(every, 240, 0)
    best = every[min(range(36), key=values.__getitem__)]
    found = torch.stack([fitted.state["attention"], fitted.state["mlp"]], 1).flatten().tolist()
    assert tuple(found) == best


def test_blocks_go_whole_and_the_cut_model_is_shorter():
    model = build("llama")
    fitted = EvoPress(amount=0.5, blocks=True, **SHORT).fit(model, _data(), progress=False)
    assert torch.equal(fitted.state["attention"], fitted.state["mlp"]) and int(fitted.state["mlp"].sum()) == 3
    assert prune(model, fitted).config.num_hidden_layers == 3


def test_random_search_is_a_control_with_as_many_evaluations():
    evolve, lot = (
        EvoPress(amount=0.34, search=s, **SHORT).fit(build("llama"), _data(), progress=False)
        for s in ("evolve", "random")
    )
    assert int(lot.state["mlp"].sum()) == int(evolve.state["mlp"].sum()) == 4


@pytest.mark.parametrize(("levels", "amount"), [("sparsity", 0.5), ("bits", 3.0), ("bits", 3.5)])
def test_sparsity_and_bits_hold_their_budget_and_restore_the_model(levels, amount, tmp_path):
    model, batch = build("llama"), prompt("llama", (7, 5))
    with torch.no_grad():
        dense = model(**batch).logits
    method = EvoPress(levels=levels, amount=amount, **SHORT)
    fitted = method.fit(model, _data(), bank=tmp_path / "bank", progress=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense)
    bank = Bank.open(tmp_path / "bank")
    sizes = torch.tensor([bank.size(name) for name in bank.names])
    level = fitted.state["levels"]
    if levels == "sparsity":
        assert int(level.sum()) == 0
        zeros = sum(int((fitted.state[f"weight.{name}"] == 0).sum()) for name in bank.names)
        assert zeros / int(sizes.sum()) == pytest.approx(amount, abs=2e-3)
    else:
        mean = float((level * sizes).sum() / sizes.sum())
        assert amount - 0.1 <= mean <= amount
    small = prune(model, fitted)
    with sparing.attach(model, fitted), torch.no_grad():
        torch.testing.assert_close(small(**batch).logits, model(**batch).logits)
    fitted.save(tmp_path / "method")
    again = sparing.load(tmp_path / "method")
    assert all(torch.equal(again.state[k], v) for k, v in fitted.state.items())


def test_an_interrupted_search_ends_where_an_undisturbed_one_ends(tmp_path):
    model, method = build("llama"), EvoPress(amount=0.34, **SHORT)
    whole = method.fit(model, _data(), progress=False)
    method.replace(generations=2).fit(model, _data(), checkpoint=tmp_path, progress=False)
    resumed = method.fit(model, _data(), checkpoint=tmp_path, progress=False)
    assert all(torch.equal(resumed.state[k], v) for k, v in whole.state.items())


def test_errors_name_what_is_wrong():
    with pytest.raises(Error, match=r"amount = 1\.5: must be below 1"):
        EvoPress(amount=1.5)
    with pytest.raises(Error, match=r"amount = 9: bits must be in \[2, 8\]"):
        EvoPress(levels="bits", amount=9)
    with pytest.raises(Error, match=r"survivors = None, tokens = .*one entry a stage"):
        EvoPress(tokens=(5, 6))
    with pytest.raises(Error, match="has 240 tokens, the search evaluates on 32,768"):
        EvoPress().fit(build("llama"), _data(), progress=False)
    fitted = EvoPress(amount=0.34, **SHORT).fit(build("llama"), _data(), progress=False)
    with pytest.raises(BudgetError, match=r"keep = 0\.5: this evopress was fitted with amount = 0\.34"):
        fitted.at(0.5, sparing.shape(build("llama")))

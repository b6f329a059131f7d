"""Discrete search: budgets, elitism, resumption; reference optima by brute force."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import pytest

from sparing.grid.method import Error
from sparing.grid.search import Evolution, Stage, best_of, crossed, distinct, moves, switched, to_mean


def _additive(errors):
    return lambda candidates, effort, draw: [sum(e * g for e, g in zip(errors, c)) for c in candidates]


def _swap(n):
    return lambda parents, rng: switched(parents[0], [range(n)], 0, 1, rng)


def test_a_linear_problem_ends_at_the_smallest_errors():
    for seed in range(5):
        rng = random.Random(seed)
        errors = [rng.random() for _ in range(10)]
        start = tuple([1] * 4 + [0] * 6)
        search = Evolution([start], _swap(10), _additive(errors), offspring=24, stages=[Stage(1)], seed=seed)
        found = search.run(20)
        assert {i for i, gone in enumerate(found) if gone} == set(sorted(range(10), key=errors.__getitem__)[:4])


def test_the_best_never_worsens_and_histories_repeat():
    def rugged(candidates, effort, draw):
        return [hash(("x", c)) % 1000 / 7 for c in candidates]

    runs = []
    for _ in range(2):
        search = Evolution([(1,) * 5 + (0,) * 5], _swap(10), rugged, offspring=6, stages=[Stage(3), Stage(1)], seed=3)
        search.run(15)
        runs.append(search.history)
        assert all(b <= a for a, b in itertools.pairwise(search.history))
    assert runs[0] == runs[1]


def test_a_resumed_search_goes_the_same_way():
    errors = [random.Random(1).random() for _ in range(12)]
    make = lambda: Evolution(  # noqa: E731
        [(1,) * 6 + (0,) * 6], _swap(12), _additive(errors), offspring=3, stages=[Stage(1)], seed=7
    )
    whole = make()
    whole.run(12)
    first = make()
    first.run(5)
    second = make()
    second.restore(json.loads(json.dumps(first.state())))
    second.run(12)
    assert (second.parents, second.history) == (whole.parents, whole.history)


def test_all_candidates_of_a_stage_see_one_minibatch_and_stages_weed_out():
    seen = []

    def fitness(candidates, effort, draw):
        seen.append((len(candidates), effort, draw))
        return [sum(i * g for i, g in enumerate(c)) for c in candidates]

    Evolution([(1, 1, 0, 0, 0, 0)], _swap(6), fitness, offspring=5, stages=[Stage(2, 10), Stage(1, 99)]).run(3)
    assert [s[:2] for s in seen] == [(5, 10), (3, 99)] * 3
    assert len({s[2] for s in seen}) == 6


def test_not_a_number_loses():
    fitness = lambda cs, e, d: [float("nan") if c[0] else 1.0 for c in cs]  # noqa: E731
    search = Evolution([(1, 0)], _swap(2), fitness, offspring=1, stages=[Stage(1)])
    assert search.run(1) == (0, 1)


def test_a_parent_survives_children_that_are_all_not_a_number():
    fitness = lambda cs, e, d: [2.0 if c == (1, 0, 0) else float("nan") for c in cs]  # noqa: E731
    search = Evolution([(1, 0, 0)], _swap(3), fitness, offspring=2, stages=[Stage(2), Stage(1)])
    assert search.run(4) == (1, 0, 0) and search.history == [2.0] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nothing_finite_is_refused(value):
    search = Evolution([(1, 0)], _swap(2), lambda cs, e, d: [value] * len(cs), offspring=1, stages=[Stage(1)])
    with pytest.raises(Error, match="fitness: not a finite number for any of 2 candidates"):
        search.step()
    assert search.parents == [(1, 0)] and search.generation == 0
    with pytest.raises(Error, match="any of 3 candidates"):
        best_of([(0,), (1,), (2,)], [value] * 3)


def test_the_best_is_the_lowest_finite_value_wherever_it_stands():
    nan, inf = float("nan"), float("inf")
    for values in itertools.permutations([nan, 3.0, -inf, 2.0, inf]):
        assert best_of([(i,) for i in range(5)], values) == (values.index(2.0),)
    assert best_of([(0,), (1,), (2,)], [5.0, 1.0, 1.0]) == (1,)


def test_distinct_points_are_as_many_as_asked_or_all_there_are():
    rng = random.Random(0)
    seldom = lambda r: (r.randrange(64) if r.random() < 0.15 else 0,)  # noqa: E731  # over 1,000 draws in vain in all
    assert [len(set(distinct(seldom, n, rng))) for n in (1, 32, 64)] == [1, 32, 64]
    assert sorted(distinct(lambda r: (r.randrange(9),), 64, rng)) == [(i,) for i in range(9)]


def test_population_and_elites_as_a_genetic_algorithm():
    target = (3, 1, 4, 1, 5)
    fitness = lambda cs, e, d: [sum(abs(a - b) for a, b in zip(c, target)) for c in cs]  # noqa: E731

    def breed(parents, rng):
        child = list(crossed(*rng.choices(parents, k=2), rng))
        child[rng.randrange(5)] += rng.choice((-1, 1))
        return tuple(child)

    search = Evolution([(0,) * 5, (5,) * 5], breed, fitness, offspring=32, stages=[Stage(32)], elites=4)
    assert search.run(25) == target
    assert len(search.parents) == 32


def test_switches_keep_the_sum_and_the_limits():
    rng = random.Random(0)
    for _ in range(500):
        genome = tuple(rng.randint(-3, 3) for _ in range(9))
        new = switched(genome, [range(4), range(4, 9)], -3, 3, rng)
        assert sum(new[:4]) == sum(genome[:4]) and sum(new[4:]) == sum(genome[4:])
        assert all(-3 <= level <= 3 for level in new)


def test_groups_have_their_turn_in_proportion_to_their_units():
    rng, single = random.Random(0), Counter()
    for _ in range(8000):
        new = switched((0,) * 10, [range(2), range(2, 10)], -9, 9, rng)
        moved = [i for i, level in enumerate(new) if level]
        if len(moved) == 2 and max(new) == 1:  # one switch
            single[moved[0] < 2] += 1
    assert single[True] / single.total() == pytest.approx(0.2, abs=0.02)


def test_mutation_counts_have_their_frequencies():
    rng = random.Random(0)
    seen = Counter(moves(rng) for _ in range(90_000))
    for count, share in ((1, 5 / 9), (2, 3 / 9), (3, 1 / 9)):
        assert seen[count] / 90_000 == pytest.approx(share, abs=0.005)
    assert sum(k * v for k, v in seen.items()) / 90_000 == pytest.approx(14 / 9, abs=0.01)


def test_to_mean_holds_the_mean_and_the_limits():
    rng = random.Random(0)
    for _ in range(300):
        values = [rng.uniform(-0.3, 1.4) for _ in range(rng.randint(1, 12))]
        high, mean = rng.choice([0.5, 0.9, 1.0]), rng.uniform(0, 0.5)
        out = to_mean(values, mean, high)
        assert sum(out) / len(out) == pytest.approx(mean, abs=1e-9)
        assert all(-1e-12 <= v <= high for v in out)
    with pytest.raises(Error, match=r"mean = 0\.8: must be in \[0, 0\.5\]"):
        to_mean([0.1], 0.8, 0.5)


def test_wrong_arguments_are_named():
    with pytest.raises(Error, match="stages = "):
        Evolution([(0,)], _swap(1), _additive([1]), offspring=1, stages=[Stage(1), Stage(2)])
    with pytest.raises(Error, match="offspring = 0"):
        Evolution([(0,)], _swap(1), _additive([1]), offspring=0, stages=[Stage(1)])

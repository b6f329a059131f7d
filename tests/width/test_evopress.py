"""EvoPress: the card's oracles, and references by brute force and dynamic programming."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as hf

import sparing
from sparing.engine.banks import Bank
from sparing.engine.elastic import Elastic, units
from sparing.engine.fitness import Fidelity
from sparing.engine.surgery import prune
from sparing.grid.method import BudgetError, Error
from sparing.grid.score import divergence
from sparing.grid.search import Evolution, Stage, moves, switched
from sparing.testing.models import _SIZES, build, prompt
from sparing.width import evopress
from sparing.width.evopress import PUBLISHED, WIDTHS, EvoPress

SHORT = {"generations": 4, "offspring": 6, "survivors": (2, 1), "tokens": (40, 120)}


def _data(length=24, rows=5):
    return [prompt("llama", (length,) * rows, side="none", seed=s) for s in (1, 2)]


class Recorder(Evolution):
    """Notes what a search was asked to do, and stays at its start."""

    asked: dict[str, Any]

    def __init__(self, start, breed, fitness, **options):
        super().__init__(start, breed, fitness, **options)
        Recorder.asked = {"start": start[0], "breed": breed, "fitness": fitness, **options}

    def run(self, generations, each=lambda: None):
        Recorder.asked["generations"] = generations
        return self.best


@pytest.fixture
def asked(monkeypatch):
    """Of a fit: what its search was asked to do; the search itself does not run."""
    monkeypatch.setattr(evopress, "Evolution", Recorder)

    def fit(model=None, bank=None, data=None, **fields):
        method = EvoPress(**{**SHORT, **fields})
        method.fit(model or build("llama"), data or _data(), bank=bank, progress=False)
        return Recorder.asked

    return fit


class _Even:
    """A fitness to which all candidates are alike."""

    def __init__(self, dearest):
        self.dearest, self.sample = dearest, torch.ones(1, 3, dtype=torch.long)

    def __call__(self, candidates, effort, draw):
        return [1.0] * len(candidates)


@pytest.fixture
def even(monkeypatch):
    """Nothing is evaluated."""
    monkeypatch.setattr(evopress, "Fidelity", lambda *_, dearest, **__: _Even(dearest))


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    """Folders of the two kinds of banks of the tiny Llama, made by the first fit that needs them."""
    return {levels: tmp_path_factory.mktemp(levels) / "bank" for levels in ("sparsity", "bits")}


def _loss(model, method, ids, top_k=None):
    """KL of the dense model to the one with a fitted method, mean over positions, in float64 and by the formula."""
    with torch.no_grad():
        dense = model(ids).logits.double()
        with sparing.attach(model, method):
            there = model(ids).logits.double()
    if top_k is not None:
        best = dense.topk(top_k).indices
        dense, there = dense.gather(-1, best), there.gather(-1, best)
    p, q = dense.log_softmax(-1), there.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


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
    """Depth: nothing goes. Sparsity: at half of zeros nothing goes of a model that has six tenths of them already."""
    model, batch = build("llama"), prompt("llama", (7, 5))
    if levels == "sparsity":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "layers" in name and p.ndim == 2:
                    p[p.abs() <= p.abs().flatten().kthvalue(int(0.6 * p.numel())).values] = 0
    with torch.no_grad():
        dense = model(**batch).logits
    less = {"depth": 0.0, "sparsity": 0.5}
    more = {"depth": 0.5, "sparsity": 0.8}
    for amount, same in ((less[levels], True), (more[levels], False)):
        method = EvoPress(levels=levels, amount=amount, **{**SHORT, "generations": 0})
        fitted = method.fit(model, _data(), progress=False)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, dense)
            with sparing.attach(model, fitted):
                assert torch.equal(model(**batch).logits, dense) == same
            assert torch.equal(prune(model, fitted)(**batch).logits, dense) == same


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
        Evolution([(1, 1, 0, 0, 0, 0)], breed, fitness, offspring=8, stages=[Stage(1)], seed=s).run(40)
        for s in range(5)
    ]
    assert all(error({i for i, g in enumerate(c) if g}) < error(by_sum) for c in found)


# --------------------------------------------------------------------------- settings as published


def test_the_published_table():
    assert PUBLISHED == {
        "depth": (None, 32, (2, 1), (2048, 32768)),
        "sparsity": (400, 64, (8, 2, 1), (2048, 16384, 65536)),
        "bits": (150, 128, (16, 4, 1), (2048, 16384, 131072)),
    }
    assert WIDTHS == (2, 3, 4, 5, 6)


@pytest.mark.parametrize("levels", PUBLISHED)
def test_the_published_settings_are_the_defaults(levels, asked, banks, even):
    short = {"amount": {"depth": 0.34, "sparsity": 0.5, "bits": 3.5}[levels], **dict.fromkeys(SHORT)}
    search = asked(levels=levels, bank=banks.get(levels), **short)
    generations, offspring, survivors, tokens = PUBLISHED[levels]
    assert search["generations"] == (generations or 5)
    assert search["offspring"] == offspring
    assert search["stages"] == [Stage(c, t) for c, t in zip(survivors, tokens, strict=True)]
    assert search["fitness"].dearest == tokens[-1]


@pytest.mark.parametrize(("gone", "generations"), [(0, 0), (1, 3), (2, 5), (3, 6), (4, 5), (5, 3)])
def test_depth_runs_for_two_thirds_of_k_times_what_is_left(gone, generations, asked, even):
    """int(k (L - k) / 1.5) of L = 6, and k = int(amount L)."""
    assert asked(amount=gone / 6 + 0.15, generations=None)["generations"] == generations


# --------------------------------------------------------------------------- where it starts


def _whole(**fields):
    """Every judgement on all 240 tokens, so that values can be computed by hand."""
    return EvoPress(**{**SHORT, "survivors": (1,), "tokens": (240,), **fields})


def test_depth_starts_from_the_best_of_all_points_where_there_are_fewer_than_64(caplog):
    model = build("llama")
    with caplog.at_level(logging.WARNING):
        start = _whole(amount=0.17, generations=0).fit(model, _data(), progress=False)
    assert "the best of all 36 points there are, not of 64" in caplog.text
    ids = torch.cat([batch["input_ids"] for batch in _data()])
    losses = {}
    for a, m in itertools.product(range(6), repeat=2):
        kept = [torch.tensor([int(i != j) for i in range(6)], dtype=torch.uint8) for j in (a, m)]
        losses[a, m] = _loss(model, EvoPress(amount=0.17).with_state({"attention": kept[0], "mlp": kept[1]}), ids)
    found = tuple(int((start.state[site] == 0).nonzero()) for site in ("attention", "mlp"))
    assert found == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize(
    ("fields", "count"),
    [({"amount": 0.34}, 64), ({"amount": 0.34, "blocks": True}, 15), ({"levels": "bits", "amount": 3.5}, 64)],
)
def test_starts_are_64_and_no_two_alike(fields, count, asked, banks, monkeypatch):
    seen = []

    def noted(self, candidates, effort, draw):
        seen.append((effort, list(candidates)))
        return [float(i == 5) for i in range(len(candidates), 0, -1)]

    monkeypatch.setattr(Fidelity, "__call__", noted)
    search = asked(bank=banks.get(fields.get("levels")), **fields)
    [(effort, points)] = seen
    assert len(points) == len(set(points)) == count
    assert effort == SHORT["tokens"][0]
    assert search["start"] == points[0]


def test_a_starting_point_that_is_not_a_number_never_wins(asked, monkeypatch):
    def sick(self, candidates, effort, draw):
        seen.extend(candidates)
        return [math.nan if i % 2 == 0 else 9.0 - (i == 7) for i in range(len(candidates))]

    seen = []
    monkeypatch.setattr(Fidelity, "__call__", sick)
    assert asked(amount=0.34)["start"] == seen[7]


@pytest.mark.parametrize("amount", [0.34, 0.0])
def test_a_model_without_finite_logits_is_refused(amount):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(Error, match=r"fitness: not a finite number for any of \d+ candidates; does the model itself"):
        EvoPress(amount=amount, **SHORT).fit(model, _data(), progress=False)


@pytest.mark.parametrize(("levels", "amount"), [("sparsity", 0.5), ("bits", 3.0)])
def test_sparsity_and_whole_bits_start_from_the_uniform_level(levels, amount, asked, banks, even):
    level = {"sparsity": 0, "bits": WIDTHS.index(3)}[levels]
    assert set(asked(levels=levels, amount=amount, bank=banks[levels])["start"]) == {level}


# --------------------------------------------------------------------------- children and fitness


@pytest.mark.parametrize("search", ["evolve", "random"])
@pytest.mark.parametrize(
    "fields",
    [
        {"amount": 0.34},
        {"amount": 0.34, "blocks": True},
        {"levels": "sparsity", "amount": 0.5},
        {"levels": "bits", "amount": 3.0},
        {"levels": "bits", "amount": 5.5},
    ],
    ids=str,
)
def test_oracle_1_children_of_children_keep_the_budget(fields, search, asked, banks, even):
    levels = fields.get("levels", "depth")
    made = asked(bank=banks.get(levels), search=search, **fields)
    rng, child, names = random.Random(2), made["start"], ()
    if levels != "depth":
        bank = Bank.open(banks[levels])
        names, sizes = bank.names, [bank.size(name) for name in bank.names]

    def spent(genome):
        if levels == "depth":
            assert not fields.get("blocks") or genome[::2] == genome[1::2]
            return sum(genome[::2]), sum(genome[1::2])
        if levels == "sparsity":
            assert all(level in bank.levels(name) for name, level in zip(names, genome, strict=True))
            return sum(genome)
        return sum(WIDTHS[level] * size for level, size in zip(genome, sizes, strict=True))

    first, seen = spent(child), {child}
    for _ in range(300):
        child = made["breed"]([child], rng)
        seen.add(child)
        if search == "evolve" or levels != "bits" or fields["amount"] in WIDTHS:
            assert spent(child) == first
        else:  # a random start of fractional bits is within one matrix of the budget
            assert 5.5 * sum(sizes) - max(sizes) < spent(child) <= 5.5 * sum(sizes)
    assert len(seen) > (14 if fields.get("blocks") else 100)  # of whole layers there are 15 choices


def test_sizes_exchange_bits_in_proportion_to_their_matrices(asked, banks, even):
    made = asked(levels="bits", amount=3.0, bank=banks["bits"])
    bank = Bank.open(banks["bits"])
    sizes = [bank.size(name) for name in bank.names]
    assert Counter(sizes) == {1024: 12, 512: 12, 1536: 18}  # q, o; k, v; gate, up, down
    rng, turns = random.Random(0), Counter()
    for _ in range(4000):
        child = made["breed"]([made["start"]], rng)
        moved = [size for size, a, b in zip(sizes, child, made["start"]) if a != b]
        if len(moved) == 2:
            assert moved[0] == moved[1]
            turns[moved[0]] += 1
    assert [turns[size] / turns.total() for size in (1024, 512, 1536)] == pytest.approx([2 / 7, 2 / 7, 3 / 7], abs=0.03)


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"measure": "perplexity"}], ids=str)
def test_fitness_is_what_the_fields_say(fields, tmp_path):
    """The value that the last generation notes is the one computed by hand for what was found."""
    model = build("llama")
    method = _whole(amount=0.34, generations=1, **fields)
    fitted = method.fit(model, _data(), checkpoint=tmp_path, progress=False)
    [value] = json.loads((tmp_path / "evopress.json").read_text())["values"]
    ids = torch.cat([batch["input_ids"] for batch in _data()])
    if "measure" in fields:
        with sparing.attach(model, fitted), torch.no_grad():
            expected = model(ids, labels=ids).loss.exp().item()
    else:
        expected = _loss(model, fitted, ids, fields.get("top_k"))
    assert value == pytest.approx(expected, rel=1e-3)


def test_the_seed_is_that_of_the_search(asked, even):
    assert asked(amount=0.34, seed=7)["seed"] == 7


def test_seeds_differ():
    model, found = build("llama"), set()
    for seed in range(4):
        method = EvoPress(amount=0.34, seed=seed, **{**SHORT, "generations": 0, "tokens": (10, 10)})
        fitted = method.fit(model, _data(), progress=False)
        found.add(tuple(torch.stack([fitted.state["attention"], fitted.state["mlp"]]).flatten().tolist()))
    assert len(found) > 1


# --------------------------------------------------------------------------- on a model


def _gpt_oss():
    torch.manual_seed(0)
    config = hf.GptOssConfig(
        **{**_SIZES, "max_position_embeddings": 4096 * 32}, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=8,
    )  # fmt: skip
    model = hf.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # sinks and biases are not zero
            p.mul_(4) if p.ndim >= 2 else p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(("levels", "amount"), [("depth", 0.5), ("sparsity", 0.5), ("bits", 3.0)])
def test_gpt_oss_with_its_sinks_biases_and_experts_that_give_back_two_things(levels, amount):
    model, batch = _gpt_oss(), prompt("llama", (7, 5, 6))
    with torch.no_grad():
        dense = model(**batch).logits
    data = [prompt("llama", (24, 24), side="none", seed=s) for s in range(3)]
    method = EvoPress(levels=levels, amount=amount, **{**SHORT, "generations": 1, "tokens": (40, 48)})
    fitted = method.fit(model, data, progress=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense)
        small = prune(model, fitted)
        with sparing.attach(model, fitted):
            there = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(small(**batch).logits[real], there[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(there[real], dense[real], atol=1e-2)


def test_layers_without_an_attention_that_was_found_are_refused_by_name():
    model = build("llama")
    model.model.layers[3].attend = model.model.layers[3].self_attn
    del model.model.layers[3].self_attn
    with pytest.raises(Error, match=r"levels = depth: layer 3 \(LlamaDecoderLayer\) has no attention module"):
        EvoPress(**SHORT).fit(model, _data(), progress=False)


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


def test_random_search_judges_as_many_points_none_of_which_is_a_child(asked, even):
    parents = [(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0), (0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)]
    evolve, lot = (asked(amount=0.34, search=s) for s in ("evolve", "random"))
    assert all(evolve[what] == lot[what] for what in ("start", "offspring", "stages", "seed", "generations"))
    children = [[made["breed"]([parent], random.Random(3)) for parent in parents] for made in (evolve, lot)]
    assert children[0][0] != children[0][1] and children[1][0] == children[1][1]


def test_controls_remove_as_many_sub_layers():
    sizes = sparing.shape(build("llama"))
    for amount, left in ((0.0, 6), (0.34, 4), (0.49, 4), (0.5, 3)):  # 6 - int(6 amount)
        for kind in ("random", "uniform"):
            control = EvoPress(amount=amount, blocks=amount > 0.4).control(kind, sizes, seed=5)
            assert (control.attention, control.mlp, control.blocks) == (left, left, amount > 0.4)
            assert control.fields().get("seed", 5) == 5
    with pytest.raises(Error, match="evopress has random and uniform for levels = depth, not bits"):
        EvoPress(levels="bits", amount=3.0).control("uniform", sizes)


@pytest.mark.parametrize(("levels", "amount"), [("sparsity", 0.5), ("bits", 3.0), ("bits", 3.5)])
def test_sparsity_and_bits_hold_their_budget_and_restore_the_model(levels, amount, tmp_path, banks):
    model, batch = build("llama"), prompt("llama", (7, 5))
    with torch.no_grad():
        dense = model(**batch).logits
    method = EvoPress(levels=levels, amount=amount, **SHORT)
    fitted = method.fit(model, _data(), bank=banks[levels], progress=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense)
    bank = Bank.open(banks[levels])
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
    history = json.loads((tmp_path / "evopress.json").read_text())["history"]
    assert len(history) == 4
    for change, said in (({"amount": 0.5}, "amount 0.34, now 0.5"), ({"blocks": True}, "blocks False, now True")):
        with pytest.raises(Error, match=rf"checkpoint = '.*': of another search: {said}"):
            method.replace(**change).fit(model, _data(), checkpoint=tmp_path, progress=False)


def test_errors_name_what_is_wrong():
    with pytest.raises(Error, match=r"amount = 1\.5: must be below 1"):
        EvoPress(amount=1.5)
    with pytest.raises(Error, match=r"amount = 9: bits must be in \[2, 6\]"):
        EvoPress(levels="bits", amount=9)
    with pytest.raises(Error, match=r"survivors = None, tokens = .*one entry a stage"):
        EvoPress(tokens=(5, 6))
    with pytest.raises(Error, match="has 240 tokens, the search evaluates on 32,768"):
        EvoPress().fit(build("llama"), _data(), progress=False)
    fitted = EvoPress(amount=0.34, **SHORT).fit(build("llama"), _data(), progress=False)
    with pytest.raises(BudgetError, match=r"keep = 0\.5: this evopress was fitted with amount = 0\.34"):
        fitted.at(0.5, sparing.shape(build("llama")))

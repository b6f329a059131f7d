"""DAS: the card's oracles."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import nn

import sparing
from sparing.depth.das import DAS, _Search, distinct, draw, lots, most, updated
from sparing.engine.train import student
from sparing.engine.view import View
from sparing.grid.method import BudgetError, Error
from sparing.testing.models import build, prompt


def _data(count=4, rows=3, length=12):
    out = []
    for seed in range(count):
        batch = prompt("llama", (length,) * rows, side="none", seed=seed)
        labels = batch["input_ids"].clone()
        labels[:, : length // 2] = -100
        out.append({**batch, "labels": labels})
    return out


def _fit(method, **options):
    torch.manual_seed(0)
    return method.fit(build("llama"), _data(), progress=False, **options)


def test_oracle_1_worked_update():
    gates = updated(torch.zeros(3), [torch.tensor([i]) for i in range(3)], [1.0, 2.0, 3.0])
    assert gates.tolist() == pytest.approx([0.045886, -0.012250, -0.033637], abs=1e-6)
    assert gates.sort(descending=True).indices.tolist() == [0, 1, 2]


def test_oracle_2_equal_losses_leave_the_gates():
    start = torch.tensor([0.3, -0.2, 0.1, 0.7])
    sets = [torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([0, 3])]
    assert torch.equal(updated(start, sets, [2.5, 2.5, 2.5]), start)


def test_oracle_3_a_shift_keeps_the_set_and_changes_p():
    gates = torch.tensor([0.3, -0.2, 0.9, 0.7, -1.0])
    assert torch.equal(most(gates, 2), most(gates + 3, 2))
    assert most(gates, 2).tolist() == [2, 3]
    torch.manual_seed(0)
    low, high = (Counter(int(draw(g, 1)) for _ in range(4000)) for g in (gates, gates + 3))
    assert low[4] / 4000 == pytest.approx(float(gates.sigmoid()[4] / gates.sigmoid().sum()), abs=0.02)
    assert high[4] - low[4] > 150  # sigmoids of large gates are nearly equal


def test_oracle_4_distinct_sets_of_exactly_n():
    torch.manual_seed(0)
    for n, count in ((1, 3), (3, 5), (5, 6)):
        sets = distinct(torch.randn(6), n, count)
        assert len({tuple(s.tolist()) for s in sets}) == count
        assert all(len(set(s.tolist())) == n for s in sets)
    with pytest.raises(Error, match="T_v = 7: there are only 6 sets of 1 of 6 layers"):
        DAS(n=1, T_v=7).fit(build("llama"), _data(), progress=False)


def test_oracle_5_nothing_skipped_is_the_adapter_tuned_model():
    fitted = _fit(DAS(n=0))
    assert torch.equal(fitted.state["gates"], torch.zeros(6)) and len(fitted.state["skip"]) == 0
    model, batch = build("llama"), prompt("llama", (7, 5))
    by_hand = build("llama")
    for layer in View(by_hand).layers:  # the same adapters as modules around the sub-layers
        for site, module in (("attention", layer.attention), ("mlp", layer.mlp)):
            parts = [fitted.state[f"{site}.{layer.index}.{p}"] for p in ("down", "down_bias", "up", "up_bias")]

            def around(m, args, kwargs, out, parts=parts):
                x = args[0] if args else kwargs["hidden_states"]
                extra = (x @ parts[0].T + parts[1]).relu() @ parts[2].T + parts[3]
                return (out[0] + extra, *out[1:]) if isinstance(out, tuple) else out + extra

            module.register_forward_hook(around, with_kwargs=True)
    with torch.no_grad():
        expected = by_hand(**batch).logits
        with sparing.attach(model, fitted) as run:
            torch.testing.assert_close(model(**batch).logits, expected)
    assert run.trace.share("depth") == 1


def test_oracle_6_zero_up_makes_a_skipped_block_the_identity():
    fitted = _fit(DAS(n=2))
    state = {k: torch.zeros_like(v) if ".up" in k else v for k, v in fitted.state.items()}
    method, model, batch = fitted.with_state(state), build("llama"), prompt("llama", (7, 5))
    shorter = build("llama")
    kept = [i for i in range(6) if i not in state["skip"].tolist()]
    shorter.model.layers = nn.ModuleList(shorter.model.layers[i] for i in kept)
    with torch.no_grad(), sparing.attach(model, method):
        got = model(**batch, use_cache=False).logits
        torch.testing.assert_close(got, shorter(**batch, use_cache=False).logits)


def test_oracle_7_no_gradient_reaches_gates_or_backbone():
    torch.manual_seed(0)
    model = student(build("llama"))
    search = _Search(model, DAS(n=2), 6, 32, _data(1), 0)
    search(_data(1)[0]).backward()
    assert not search.gates.requires_grad and search.gates.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in search.adapters.parameters())
    before = search.gates.clone()
    search.after_step(9)
    assert not torch.equal(search.gates, before)  # they move by what is judged instead


def test_oracle_8_layers_that_do_nothing_are_found_more_often_than_by_chance():
    """Of six layers two are no-ops; chance is 1 in 15."""
    hits = 0
    for seed, pair in enumerate(list(itertools.combinations(range(6), 2))[::3]):
        model = build("llama")
        with torch.no_grad():
            for i in pair:
                model.model.layers[i].self_attn.o_proj.weight.zero_()
                model.model.layers[i].mlp.down_proj.weight.zero_()
            data = [prompt("llama", (10,) * 4, side="none", seed=s) for s in range(6)]
            for batch in data:  # the task is to say what the model says, so that a missing layer costs
                batch["labels"] = model(**batch).logits.argmax(-1).roll(1, 1)
        torch.manual_seed(seed)
        method = DAS(n=2, m=1, T_v=3, epochs=12, eta=1.0)
        fitted = method.fit(model, data, rivals=0, lr=1e-6, progress=False)
        hits += tuple(fitted.state["skip"].tolist()) == pair
    assert hits >= 3  # of five; by chance one third of a hit


def test_skipped_layers_write_no_keys():
    fitted, model = _fit(DAS(n=2)), build("llama")
    with torch.no_grad(), sparing.attach(model, fitted):
        cache = model(**prompt("llama", (7, 5))).past_key_values
    for i, layer in enumerate(cache.layers):
        assert bool(getattr(layer, "is_initialized", False)) == (i not in fitted.state["skip"].tolist())


def test_the_control_has_layers_by_lot_and_adapters_of_its_own():
    fitted = _fit(DAS(n=2), rivals=2)
    control = fitted.control("random", sparing.shape(build("llama")), seed=1)
    model, batch = build("llama"), prompt("llama", (7, 5))
    seen = []
    for method in (fitted, control):
        with torch.no_grad(), sparing.attach(model, method) as run:
            seen.append(model(**batch).logits)
        assert run.trace.share("depth") == pytest.approx(4 / 6)
    assert not torch.equal(*seen)
    assert torch.equal(control.state["random1.skip"], fitted.state["random1.skip"])
    assert (fitted.draws, DAS(n=2).draws) == (2, 0)


def test_lots_spare_both_ends_as_long_as_they_can():
    drawn = [lots(6, 2, torch.Generator().manual_seed(seed)).tolist() for seed in range(40)]
    assert {i for lot in drawn for i in lot} == {1, 2, 3, 4} and len({tuple(lot) for lot in drawn}) == 6
    assert [lots(6, n, torch.Generator()).tolist() for n in (0, 4, 5)] == [[], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert lots(1, 1, torch.Generator()).tolist() == [0]


def test_budgets():
    shape = sparing.shape(build("llama"))
    assert DAS().at(0.5, shape).n == 3
    with pytest.raises(BudgetError, match=r"keep = 0\.05: das keeps at least 1 of 6 layers"):
        DAS().at(0.05, shape)
    fitted = _fit(DAS(n=2))
    assert fitted.at(2 / 3, shape).n == 2
    with pytest.raises(BudgetError, match=r"keep = 0\.5: this das was fitted at 0\.667"):
        fitted.at(0.5, shape)


def test_an_interrupted_fit_ends_where_an_undisturbed_one_ends(tmp_path):
    whole = _fit(DAS(n=2, m=1))

    class Stop(Exception):
        pass

    steps = []
    original = _Search.after_step

    def stopping(self, step):
        original(self, step)
        steps.append(step)
        if len(steps) == 5:
            raise Stop

    _Search.after_step = stopping
    try:
        with pytest.raises(Stop):
            _fit(DAS(n=2, m=1), checkpoint=tmp_path, every=0)
    finally:
        _Search.after_step = original
    torch.manual_seed(123)  # the checkpoint brings the generator back
    again = DAS(n=2, m=1).fit(build("llama"), _data(), checkpoint=tmp_path, progress=False)
    assert torch.equal(again.state["skip"], whole.state["skip"])
    assert torch.equal(again.state["gates"], whole.state["gates"])

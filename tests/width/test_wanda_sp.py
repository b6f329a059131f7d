"""Wanda-sp: its score worked by hand and against loops over units, then counts, cuts and refusals."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import sparing
from sparing.engine.surgery import LayerCut, Plan, SurgeryMethod, cut
from sparing.engine.units import compensation
from sparing.engine.view import View
from sparing.grid.method import BudgetError
from sparing.testing.models import build, prompt
from sparing.width.wanda_sp import WandaSp
from tests.width.test_controls import counts, kept
from tests.width.test_flap import GROUPS, HEAD_DIM, LAYERS, D, N, W, X, batches, block_parameters, wide

PORTIONS = (0.0, 0.03, 0.2, 0.35, 0.5, 0.8, 0.97, 1.0)


@functools.cache
def fitted() -> WandaSp:
    return WandaSp(multiple=1).fit(wide(), batches())


def small_example() -> tuple[Any, dict[str, Tensor]]:
    """A layer that reads channels as in FLAP's card: 3 neurons, and 3 groups of one head of one channel."""
    state = {}
    for site in ("attention", "mlp"):
        state[f"{site}.weight1.0"] = W.abs().mean(0)
        state[f"{site}.norm.0"] = X.norm(dim=0)
    layer = View(build("llama")).layers[0]
    return layer, state


def test_oracle_1_worked_score() -> None:
    layer, state = small_example()
    state["attention.weight1.0"] = torch.tensor([0.5, 1.5, 1.0, 2.0])  # two groups of two channels
    state["attention.norm.0"] = torch.tensor([44.0**0.5, 4.0, 30.0**0.5, 1.0])
    groups, neurons = WandaSp().with_state(state).scores(layer)
    torch.testing.assert_close(neurons, torch.tensor([3.31662, 6.0, 5.47723]))
    torch.testing.assert_close(groups, torch.tensor([9.31662, 7.47723]))


def test_oracle_2_score_is_weight_times_input_summed_over_the_unit() -> None:
    """Inputs gathered whole, |W_ij| ||X_j|| written out for every weight, units taken apart in a loop."""
    seen: dict[str, list[Tensor]] = {"o_proj": [], "down_proj": []}
    mask = torch.tensor(True)
    layer = View(wide()).layers[3]
    handles = [
        layer.projection(name).register_forward_pre_hook(lambda m, a, x=x: x.append(a[0][mask]))
        for name, x in seen.items()
    ]
    with torch.no_grad():
        for batch in batches():
            mask = batch["attention_mask"].bool()
            wide()(**batch)
    for handle in handles:
        handle.remove()
    scores = fitted().scores(layer)
    for name, width, found in (("o_proj", 2 * HEAD_DIM, scores[0]), ("down_proj", 1, scores[1])):
        weight, x = layer.projection(name).weight.detach(), torch.cat(seen[name])
        each = weight.abs() * x.square().sum(0).sqrt()
        want = [each[:, i : i + width].sum() / D for i in range(0, weight.shape[1], width)]
        torch.testing.assert_close(found, torch.stack(want), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_oracle_3_the_best_stay_in_every_layer(p: float) -> None:
    method = fitted().replace(p=p)
    masks = kept(method, wide())
    for layer in View(wide()).layers:
        for mask, score in zip(masks[2 * layer.index : 2 * layer.index + 2], method.scores(layer), strict=True):
            assert score[mask].min() > score[~mask].max()


@pytest.mark.parametrize("p", PORTIONS)
def test_oracle_4_equal_widths_on_budget(p: float) -> None:
    small = sparing.prune(wide(), fitted().replace(p=p))
    assert len(set(counts(small))) == 1
    assert abs(block_parameters(small) - (1 - p) * block_parameters(wide())) <= LAYERS * 3 * D / 2
    aligned = sparing.prune(wide(), fitted().replace(p=p, multiple=16))
    groups, neurons = counts(aligned)[0]
    assert len(set(counts(aligned))) == 1 and groups == counts(small)[0][0]
    assert neurons % 16 == 0 or neurons == N
    assert abs(neurons - counts(small)[0][1]) <= 8 or neurons == 16


def test_oracle_5_nothing_removed_is_dense() -> None:
    model, batch = wide(), prompt("qwen3", (6, 9))
    method = fitted().replace(p=0.0, multiple=16, compensate=True)
    assert method.plan(model) == Plan((LayerCut(),) * LAYERS)
    with torch.no_grad():
        assert torch.equal(sparing.prune(model, method)(**batch).logits, model(**batch).logits)


def test_oracle_6_fewer_units_are_a_subset_of_more() -> None:
    more = None
    for p in PORTIONS:
        less = kept(fitted().replace(p=p), wide())
        if more is not None:
            for a, b in zip(more, less, strict=True):
                assert bool((a >= b).all()) if a.sum() >= b.sum() else bool((a <= b).all())
        more = less


def test_oracle_7_scale_of_one_module_changes_nothing() -> None:
    state = dict(fitted().state)
    for name in ("attention.norm.1", "mlp.weight1.3"):
        state[name] = state[name] * 7.3
    other = fitted().with_state(state)
    assert all(torch.equal(a, b) for a, b in zip(kept(other, wide()), kept(fitted(), wide()), strict=True))
    model = copy.deepcopy(wide())
    with torch.no_grad():
        View(model).layers[-1].projection("down_proj").weight.mul_(5)
    again = WandaSp(multiple=1).fit(model, batches())
    assert torch.equal(kept(again, model)[-1], kept(fitted(), wide())[-1])


def test_oracle_8_no_bias_unless_asked_for() -> None:
    plain = sparing.prune(wide(), fitted())
    assert not any(name.endswith("bias") for name, _ in plain.named_parameters())
    masks = kept(fitted(), wide())
    plan = fitted().replace(compensate=True).plan(wide())
    for layer, part in zip(View(wide()).layers, plan.layers, strict=True):
        assert part is not None and part.mlp_bias is not None
        mean = fitted().state[f"mlp.mean.{layer.index}"]
        want = compensation(layer.projection("down_proj").weight, mean, masks[2 * layer.index + 1])
        torch.testing.assert_close(part.mlp_bias, want)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2.5-vl"])
def test_oracle_9_masked_equals_sliced(name: str) -> None:
    model, batch = build(name), prompt(name, (7, 5))
    method = WandaSp(p=0.5).fit(model, [prompt(name, (9, 9, 6, 8))])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        with sparing.attach(model, method):
            want = model(**batch).logits[real]
        torch.testing.assert_close(sparing.prune(model, method)(**batch).logits[real], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_oracle_10_a_cut_loads_in_plain_transformers(name: str, tmp_path: Path) -> None:
    model, batch = build(name), prompt(name, (7, 5))
    small: Any = sparing.prune(model, WandaSp(p=0.5).fit(model, [prompt(name, (9, 9, 6, 8))]))
    assert counts(small)[0] == (1, 32)
    small.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, small(**batch).logits)


def test_oracle_11_statistics_do_not_depend_on_batching() -> None:
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches() for i in range(4)]
    again = WandaSp(multiple=1).fit(wide(), rows)
    for layer in View(wide()).layers:
        for one, two in zip(again.scores(layer), fitted().scores(layer), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("compensate", [False, True])
def test_oracle_12_controls_spend_the_same(p: float, compensate: bool) -> None:
    method, shape = fitted().replace(p=p, compensate=compensate), sparing.shape(wide())
    sizes = counts(sparing.prune(wide(), method))
    for kind in ("random", "uniform"):
        control = method.control(kind, shape, 3)
        assert isinstance(control, SurgeryMethod)
        assert counts(sparing.prune(wide(), control)) == sizes
        assert control.fields()["compensate"] is compensate
        assert any(not torch.equal(a, b) for a, b in zip(kept(control, wide()), kept(method, wide()), strict=True))


def test_wrong_use_is_refused() -> None:
    with pytest.raises(sparing.Error, match="needs calibration first"):
        sparing.attach(wide(), WandaSp())
    with pytest.raises(sparing.Error, match="needs calibration first"):
        WandaSp().plan(wide())
    with pytest.raises(sparing.Error, match="fitted on another model"):
        sparing.prune(build("llama"), fitted())
    with pytest.raises(sparing.Error, match=r"cannot cut OlmoeForCausalLM: layer 0 .* experts in place of an MLP"):
        WandaSp().fit(build("olmoe"), [prompt("olmoe")])
    one = LayerCut(torch.arange(2), torch.arange(90))
    unalike = cut(wide(), Plan((*[LayerCut()] * (LAYERS - 1), one)))
    with pytest.raises(sparing.Error, match=rf"layer 4 has 2 KV groups and 90 neurons .*\({GROUPS} and {N}\)"):
        sparing.prune(unalike, WandaSp().fit(unalike, batches()))


def test_a_cut_model_can_be_fitted_and_cut_again() -> None:
    model = sparing.prune(wide(), fitted().replace(p=0.4))
    again = sparing.prune(model, WandaSp(p=0.5, multiple=1).fit(model, batches()))
    assert abs(block_parameters(again) / block_parameters(model) - 0.5) < 0.01


# --------------------------------------------------------------------------- one kind of unit alone


@pytest.mark.parametrize(("units", "p"), [("neurons", 0.1), ("neurons", 0.6), ("groups", 0.08), ("groups", 0.25)])
def test_one_kind_alone_spends_the_whole_budget(units: str, p: float) -> None:
    method, place = fitted().replace(units=units, p=p), 1 if units == "neurons" else 0
    masks = kept(method, wide())
    assert all(bool(mask.all()) for mask in masks[1 - place :: 2])
    unit = 3 * D if units == "neurons" else 6 * HEAD_DIM * D
    small = sparing.prune(wide(), method)
    assert abs(block_parameters(small) - (1 - p) * block_parameters(wide())) <= LAYERS * unit / 2
    for layer in View(wide()).layers:
        score, mask = method.scores(layer)[place], masks[2 * layer.index + place]
        assert score[mask].min() > score[~mask].max()


@pytest.mark.parametrize(("units", "least"), [("neurons", 0.325), ("groups", 0.676)])
def test_what_one_kind_alone_cannot_reach_is_refused(units: str, least: float) -> None:
    shape = sparing.shape(wide())
    words = rf"wanda-sp: keep = 0\.2: units = {units} leaves all .*, at least {least} of the layers' parameters"
    for method in (WandaSp(units=units), fitted().replace(units=units)):
        with pytest.raises(BudgetError, match=words):
            method.at(0.2, shape)
        assert method.at(least, shape).p == round(1 - least, 12)
    with pytest.raises(BudgetError, match=words):
        fitted().replace(units=units, p=0.8).plan(wide())


@pytest.mark.parametrize("kind", ["random", "uniform"])
@pytest.mark.parametrize(("units", "p"), [("neurons", 0.4), ("groups", 0.2)])
def test_controls_cut_the_same_units(kind: str, units: str, p: float) -> None:
    method = fitted().replace(p=p, units=units, compensate=True)
    control: Any = method.control(kind, sparing.shape(wide()), 2)
    assert control.units == units and control.compensate is True
    assert counts(sparing.prune(wide(), control)) == counts(sparing.prune(wide(), method)) != [(GROUPS, N)] * LAYERS
    cut_of = {name for name, _ in sparing.prune(wide(), control).named_parameters() if name.endswith("proj.bias")}
    assert {name.split(".")[-2] for name in cut_of} == {"down_proj" if units == "neurons" else "o_proj"}

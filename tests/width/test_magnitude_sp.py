"""Magnitude-sp: norms of units against loops over single rows and columns, then counts, cuts and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import sparing
from sparing.engine.surgery import LayerCut, Plan, SurgeryMethod, cut
from sparing.engine.view import LayerView, View
from sparing.grid.method import BudgetError
from sparing.testing.models import build, prompt
from sparing.width.magnitude_sp import MagnitudeSp
from tests.width.test_controls import counts, kept
from tests.width.test_flap import GROUPS, HEAD_DIM, LAYERS, D, N, block_parameters, wide

PORTIONS = (0.0, 0.03, 0.2, 0.35, 0.5, 0.8, 0.97, 1.0)


def written_out(layer: LayerView, of: str) -> tuple[list[Tensor], list[Tensor]]:
    """All weights of each group and of each neuron, one flat vector a unit, row by row; for separate projections."""
    d, per = layer.head_dim, layer.heads // layer.groups
    w = {n: layer.projection(f"{n}_proj").weight.detach() for n in ("q", "k", "v", "o", "gate", "up", "down")}
    groups, neurons = [], []
    for g in range(layer.groups):
        rows = []
        for head in range(g * per, (g + 1) * per):
            for channel in range(head * d, (head + 1) * d):
                rows += [w["o"][:, channel], *([w["q"][channel]] if of == "unit" else [])]
        for channel in range(g * d, (g + 1) * d):
            rows += [w["k"][channel], w["v"][channel]] if of == "unit" else []
        groups.append(torch.cat(rows))
    for n in range(layer.neurons):
        neurons.append(torch.cat([w["down"][:, n], *([w["gate"][n], w["up"][n]] if of == "unit" else [])]))
    return groups, neurons


@pytest.mark.parametrize("of", ["unit", "output"])
@pytest.mark.parametrize(("norm", "order"), [("L1", 1), ("L2", 2)])
def test_oracle_1_norm_of_all_weights_of_a_unit(of: str, norm: str, order: int) -> None:
    layer = View(wide()).layers[2]
    found = MagnitudeSp(norm=norm, of=of).scores(layer)
    for score, units in zip(found, written_out(layer, of), strict=True):
        want = torch.stack([unit.double().norm(order) for unit in units])
        torch.testing.assert_close(score.double(), want, rtol=1e-5, atol=0)


def test_oracle_2_worked_example_where_the_norms_disagree() -> None:
    """Neuron 0 has one weight of 3, neuron 1 two of 2, in different matrices: L2 3 > 2.83, L1 3 < 4. The rest is 0."""
    model = build("llama")
    layer = View(model).layers[1]
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer.projection(name).weight.zero_()
        layer.projection("up_proj").weight[0, 5] = -3
        layer.projection("gate_proj").weight[1, 7] = 2
        layer.projection("down_proj").weight[9, 1] = -2
    one, two = (MagnitudeSp(norm=norm).scores(layer)[1] for norm in ("L1", "L2"))
    torch.testing.assert_close(one[:3], torch.tensor([3.0, 4, 0]))
    torch.testing.assert_close(two[:3], torch.tensor([3.0, 8**0.5, 0]))
    torch.testing.assert_close(MagnitudeSp(of="output").scores(layer)[1][:3], torch.tensor([0.0, 2, 0]))


def test_oracle_3_fused_projections_score_as_separate_ones() -> None:
    """Phi-3's fused rows, taken apart into a Llama of the same sizes."""
    fused, apart = build("phi3"), build("llama")
    for a, b in zip(View(fused).layers, View(apart).layers, strict=True):
        assert a.fused_qkv is not None and a.fused_gate_up is not None
        rows = dict(zip("qkv", a.fused_qkv.weight.detach().split([32, 16, 16]), strict=True))
        gate, up = a.fused_gate_up.weight.detach().split([48, 48])
        rows |= {"gate": gate, "up": up}
        rows |= {n: a.projection(f"{n}_proj").weight.detach() for n in ("o", "down")}
        for name, weight in rows.items():
            b.projection(f"{name}_proj").weight.data = weight
        for one, two in zip(MagnitudeSp().scores(a), MagnitudeSp().scores(b), strict=True):
            torch.testing.assert_close(one, two)
    assert all(torch.equal(a, b) for a, b in zip(kept(MagnitudeSp(), fused), kept(MagnitudeSp(), apart), strict=True))


def test_oracle_4_what_stays_follows_the_units_when_they_change_places() -> None:
    model, other = wide(), copy.deepcopy(wide())
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    for layer in View(other).layers:
        for name in ("gate_proj", "up_proj"):
            layer.projection(name).weight.data = layer.projection(name).weight.data[order]
        layer.projection("down_proj").weight.data = layer.projection("down_proj").weight.data[:, order]
    method = MagnitudeSp(p=0.4, multiple=1)
    for here, there in zip(kept(method, model)[1::2], kept(method, other)[1::2], strict=True):
        assert torch.equal(here[order], there)


@pytest.mark.parametrize("of", ["unit", "output"])
def test_oracle_5_the_best_stay_in_every_layer(of: str) -> None:
    method = MagnitudeSp(p=0.45, of=of)
    masks = kept(method, wide())
    for layer in View(wide()).layers:
        for mask, score in zip(masks[2 * layer.index : 2 * layer.index + 2], method.scores(layer), strict=True):
            assert 0 < int(mask.sum()) < len(mask) and score[mask].min() > score[~mask].max()


@pytest.mark.parametrize("p", PORTIONS)
def test_oracle_6_equal_widths_on_budget(p: float) -> None:
    small = sparing.prune(wide(), MagnitudeSp(p=p, multiple=1))
    assert len(set(counts(small))) == 1
    assert abs(block_parameters(small) - (1 - p) * block_parameters(wide())) <= LAYERS * 3 * D / 2
    groups, neurons = counts(sparing.prune(wide(), MagnitudeSp(p=p)))[0]
    assert groups == counts(small)[0][0] and (neurons % 16 == 0 or neurons == N)
    assert not any(name.endswith("bias") for name, _ in small.named_parameters())


def test_oracle_7_nothing_removed_is_dense() -> None:
    model, batch = wide(), prompt("qwen3", (6, 9))
    assert MagnitudeSp(p=0.0).plan(model) == Plan((LayerCut(),) * LAYERS)
    with torch.no_grad():
        assert torch.equal(sparing.prune(model, MagnitudeSp(p=0.0))(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", ["llama", "phi3", "llava"])
def test_oracle_8_masked_equals_sliced(name: str) -> None:
    model, batch, method = build(name), prompt(name, (7, 5)), MagnitudeSp(p=0.5)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        with sparing.attach(model, method):
            want = model(**batch).logits[real]
        torch.testing.assert_close(sparing.prune(model, method)(**batch).logits[real], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_oracle_9_a_cut_loads_in_plain_transformers(name: str, tmp_path: Path) -> None:
    model, batch = build(name), prompt(name, (7, 5))
    small: Any = sparing.prune(model, MagnitudeSp(p=0.5))
    small.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, small(**batch).logits)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_oracle_10_controls_spend_the_same_without_data(p: float) -> None:
    method, shape = MagnitudeSp(p=p), sparing.shape(wide())
    assert method.ready
    sizes = counts(sparing.prune(wide(), method))
    for kind in ("random", "uniform"):
        control = method.control(kind, shape, 3)
        assert isinstance(control, SurgeryMethod) and control.ready
        assert counts(sparing.prune(wide(), control)) == sizes


def test_number_types_do_not_decide() -> None:
    """Scores of a bfloat16 model are taken in float32, of exactly its weights."""
    model = copy.deepcopy(wide()).bfloat16()
    layer = View(model).layers[0]
    for one, two in zip(MagnitudeSp().scores(layer), MagnitudeSp().scores(View(model.float()).layers[0]), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, two)
    assert len(one) == N and one.unique().numel() > N // 2 and HEAD_DIM * GROUPS == D


def test_defaults_are_those_of_the_baseline() -> None:
    assert MagnitudeSp().fields() == {"units": "both", "p": 0.2, "multiple": 16, "norm": "L2", "of": "unit"}


@pytest.mark.parametrize("name", ["olmoe", "gpt-neox", "opt"])
def test_models_without_units_are_refused(name: str) -> None:
    with pytest.raises(sparing.Error, match=r"'magnitude-sp': cannot cut \w+: layer 0 .*(told apart|has experts)"):
        sparing.prune(build(name), MagnitudeSp())


def test_layers_that_differ_are_refused() -> None:
    unalike = cut(wide(), Plan((*[LayerCut()] * 3, LayerCut(torch.arange(3)), LayerCut())))
    with pytest.raises(sparing.Error, match=rf"layer 3 has 3 KV groups and {N} neurons .*as many as the others"):
        sparing.prune(unalike, MagnitudeSp())


# --------------------------------------------------------------------------- one kind of unit alone


@pytest.mark.parametrize("p", [0.0, 0.1, 0.33, 0.5, 0.67])
def test_neurons_alone_spend_the_whole_budget(p: float) -> None:
    method = MagnitudeSp(p=p, multiple=1, units="neurons")
    masks = kept(method, wide())
    assert all(bool(mask.all()) for mask in masks[::2])
    small = sparing.prune(wide(), method)
    assert abs(block_parameters(small) - (1 - p) * block_parameters(wide())) <= LAYERS * 3 * D / 2
    for layer in View(wide()).layers:
        score, mask = method.scores(layer)[1], masks[2 * layer.index + 1]
        assert mask.all() or score[mask].min() > score[~mask].max()
    aligned = counts(sparing.prune(wide(), method.replace(multiple=16)))[0]
    assert aligned[0] == GROUPS and (aligned[1] % 16 == 0 or aligned[1] == N)


@pytest.mark.parametrize(("p", "groups"), [(0.0, 4), (0.07, 3), (0.13, 2), (0.2, 2), (0.22, 1), (0.32, 0)])
def test_groups_alone_come_nearest_to_the_budget(p: float, groups: int) -> None:
    """A group is 0.0811 of a layer: 3 leave 0.2432 removed."""
    method = MagnitudeSp(p=p, units="groups")
    assert counts(sparing.prune(wide(), method)) == [(groups, N)] * LAYERS
    for layer, mask in zip(View(wide()).layers, kept(method, wide())[::2], strict=True):
        score = method.scores(layer)[0]
        assert mask.all() or not mask.any() or score[mask].min() > score[~mask].max()


@pytest.mark.parametrize(("units", "least"), [("neurons", 0.325), ("groups", 0.676)])
def test_what_one_kind_alone_cannot_reach_is_refused(units: str, least: float) -> None:
    method, shape = MagnitudeSp(units=units), sparing.shape(wide())
    words = rf"magnitude-sp: keep = 0\.25: units = {units} leaves all .*, at least {least} of the layers' parameters"
    with pytest.raises(BudgetError, match=words):
        method.at(0.25, shape)
    with pytest.raises(BudgetError, match=words):
        sparing.prune(wide(), method.replace(p=0.75))
    assert method.at(least, shape).p == round(1 - least, 12)


@pytest.mark.parametrize("kind", ["random", "uniform"])
@pytest.mark.parametrize(("units", "p"), [("neurons", 0.4), ("groups", 0.2)])
def test_controls_cut_the_same_units(kind: str, units: str, p: float) -> None:
    method = MagnitudeSp(p=p, units=units)
    control: Any = method.control(kind, sparing.shape(wide()), 2)
    assert control.units == units
    assert counts(sparing.prune(wide(), control)) == counts(sparing.prune(wide(), method)) != [(GROUPS, N)] * LAYERS

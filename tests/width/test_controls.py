"""The width controls: the counts of the method they stand against, other units, the same compensation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import sparing
from sparing.engine.surgery import SurgeryMethod, masked
from sparing.engine.units import compensation
from sparing.engine.view import View
from sparing.engine.widths import WidthControl
from sparing.grid.method import BudgetError, Method
from sparing.testing.models import _SIZES, build, prompt
from tests.width.test_flap import GROUPS, LAYERS, N, batches, block_parameters, fitted, wide

SHAPE = sparing.Shape(layers=LAYERS, heads=8, groups=GROUPS, head_dim=12, hidden=48, neurons=N)
UNIT = 3 * 48  # parameters of a neuron


def control(kind: str, p: float = 0.4, seed: int = 0, **fields: Any) -> WidthControl:
    found = fitted().replace(p=p, **fields).control(kind, SHAPE, seed)
    assert isinstance(found, WidthControl)
    return found


def counts(model: Any) -> list[tuple[int, int]]:
    return [(layer.groups, layer.neurons) for layer in View(model).layers]


def kept(method: Method, model: Any) -> list[Tensor]:
    """Masks of kept groups and neurons of every layer."""
    assert isinstance(method, SurgeryMethod)
    out = []
    for layer, cut in zip(View(model).layers, method.plan(model).layers, strict=True):
        assert cut is not None
        for index, size in ((cut.groups, layer.groups), (cut.neurons, layer.neurons)):
            mask = torch.ones(size, dtype=torch.bool) if index is None else torch.zeros(size, dtype=torch.bool)
            mask[slice(None) if index is None else index] = True
            out.append(mask)
    return out


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_random_has_the_counts_of_the_method_and_other_units(p: float) -> None:
    flap, model = fitted().replace(p=p), wide()
    draws = [control("random", p, seed) for seed in (0, 1)]
    assert draws[0].fields() == flap.mirrored(SHAPE) | {"seed": 0}
    sizes = counts(sparing.prune(model, flap))
    assert all(counts(sparing.prune(model, draw)) == sizes for draw in draws)
    masks = [kept(method, model) for method in (flap, *draws)]
    for one in range(3):
        for other in range(one):
            assert any(not torch.equal(a, b) for a, b in zip(masks[one], masks[other], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(masks[1], kept(control("random", p, 0), model), strict=True))


def test_random_draws_fewer_out_of_more_and_anew_in_every_module() -> None:
    model = wide()
    method = sparing.parse("random-width:groups=2,neurons=100,compensate=false")
    more, less = kept(method, model), kept(method.replace(groups=(1,), neurons=(40,)), model)
    assert all(bool((a >= b).all()) for a, b in zip(more, less, strict=True))
    neurons = more[1::2]
    assert len({tuple(mask.tolist()) for mask in neurons}) == LAYERS
    assert all(int(mask.sum()) == 100 for mask in neurons)
    often = sum(mask.float() for seed in range(60) for mask in kept(method.replace(seed=seed), model)[1::2])
    assert abs(float(often.mean()) - 150) < 1e-3 and float(often.max()) < 200 and float(often.min()) > 100


def test_every_module_under_every_seed_has_a_draw_of_its_own() -> None:
    """As many groups as neurons, so that their draws could be the same."""
    sizes = _SIZES | {"num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 16}
    model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, head_dim=2))
    method = sparing.parse("random-width:groups=8,neurons=8,compensate=false")
    seen = [tuple(mask.tolist()) for seed in range(4) for mask in kept(method.replace(seed=seed), model)]
    assert len(set(seen)) == len(seen) == 4 * 2 * 6


def test_uniform_makes_up_for_the_rounding_of_groups_with_neurons() -> None:
    """3.2 groups a layer are 3, and 0.2 of a group 4.8 neurons; 3.8 are 4, and 4.8 neurons less."""
    method = sparing.parse("uniform-width:groups=4/3/3/3/3,neurons=100,compensate=false")
    assert counts(sparing.prune(wide(), method)) == [(3, 105)] * LAYERS
    assert counts(sparing.prune(wide(), method.replace(groups=(3, 4, 4, 4, 4)))) == [(4, 95)] * LAYERS


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.8, 0.95])
def test_uniform_has_the_same_width_in_every_layer_and_the_same_total(p: float) -> None:
    model, method = wide(), control("uniform", p, compensate=False)
    small, flap = sparing.prune(model, method), sparing.prune(model, fitted().replace(p=p, compensate=False))
    assert len(set(counts(small))) == 1
    assert abs(block_parameters(small) - block_parameters(flap)) <= LAYERS * UNIT / 2
    mask = kept(method, model)[1]
    gaps = mask.nonzero().flatten().diff()
    assert int(gaps.max() - gaps.min()) <= 1
    assert method.fields() == fitted().replace(p=p, compensate=False).mirrored(SHAPE)


@pytest.mark.parametrize("kind", ["random", "uniform"])
def test_compensation_is_that_of_the_method(kind: str) -> None:
    model, method = wide(), control(kind)
    cut = method.plan(model).layers[2]
    assert cut is not None and cut.neurons is not None and cut.groups is not None
    weight = View(model).layers[2].projection("down_proj").weight
    mask = torch.zeros(N, dtype=torch.bool)
    mask[cut.neurons] = True
    assert cut.mlp_bias is not None
    torch.testing.assert_close(cut.mlp_bias, compensation(weight, fitted().state["mlp.mean.2"], mask))
    assert cut.attention_bias is not None
    plain = control(kind, compensate=False)
    assert plain.compensate is False
    assert all(part is not None and part.mlp_bias is None for part in plain.plan(model).layers)
    own = type(method)(**method.fields()).fit(model, batches())
    torch.testing.assert_close(own.plan(model).layers[2].mlp_bias, cut.mlp_bias)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["random", "uniform"])
def test_masked_equals_sliced(kind: str) -> None:
    model, batch = wide(), prompt("qwen3", (6, 9))
    method, real = control(kind, 0.6), batch["attention_mask"].bool()
    with torch.no_grad(), masked(model, method.plan(model)):
        want = model(**batch).logits[real]
    with torch.no_grad():
        torch.testing.assert_close(sparing.prune(model, method)(**batch).logits[real], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["random-width", "uniform-width"])
@pytest.mark.parametrize("keep", [1.0, 0.77, 0.5, 0.2, 0.05, 0.0])
def test_at_spends_the_share_in_equal_layers(name: str, keep: float) -> None:
    model = wide()
    for method in (sparing.parse(f"{name}:compensate=false"), sparing.parse(name).with_state(fitted().state)):
        method = method.at(keep, sparing.shape(model)).replace(compensate=False)
        small = sparing.prune(model, method)
        assert len(set(counts(small))) == 1
        assert abs(block_parameters(small) - keep * block_parameters(model)) <= LAYERS * UNIT / 2
        assert counts(small)[0][0] >= (1 if keep > 0.2 else 0)


def test_at_knows_the_cost_of_an_ungated_mlp_from_its_state() -> None:
    sizes = _SIZES | {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model = hf.NemotronForCausalLM(hf.NemotronConfig(**sizes)).eval()
    state = sparing.parse("flap").fit(model, [prompt("llama")]).state
    assert state["attention.unit.0"].tolist() == [8, 4 * 8 * 32] and state["mlp.unit.0"].tolist() == [1, 2 * 32]
    method = sparing.parse("random-width").with_state(state).at(0.4, sparing.shape(model)).replace(compensate=False)
    small = sparing.prune(model, method)
    assert abs(block_parameters(small) - 0.4 * block_parameters(model)) <= 3 * 32


def test_left_out_fields_keep_all_and_one_number_holds_for_all_layers() -> None:
    model, batch = wide(), prompt("qwen3", (6, 9))
    everything = sparing.parse("uniform-width:compensate=false")
    with torch.no_grad():
        assert torch.equal(sparing.prune(model, everything)(**batch).logits, model(**batch).logits)
    half = sparing.parse("random-width:groups=1/2/3/4/0,compensate=false")
    assert counts(sparing.prune(model, half)) == [(1, N), (2, N), (3, N), (4, N), (0, N)]


@pytest.mark.parametrize("name", ["random-width", "uniform-width"])
def test_wrong_use_is_refused(name: str) -> None:
    model = wide()
    method = sparing.parse(f"{name}:groups=2,neurons=30")
    assert not method.ready and sparing.parse(f"{name}:compensate=false").ready
    with pytest.raises(sparing.Error, match=f"{name}.*needs calibration first"):
        sparing.prune(model, method)
    with pytest.raises(sparing.Error, match=rf"{name}: groups = \(5,\): .* at most 4, 4, 4, 4, 4"):
        sparing.prune(model, method.replace(groups=(5,), compensate=False))
    with pytest.raises(
        sparing.Error, match=rf"{name}: neurons = \(3, 4\): must be one count, or one for each of the 5"
    ):
        sparing.prune(model, method.replace(neurons=(3, 4), compensate=False))
    with pytest.raises(sparing.Error, match="fitted on another model"):
        sparing.prune(build("llama"), sparing.parse(f"{name}:groups=1,neurons=8").with_state(fitted().state))


# --------------------------------------------------------------------------- one kind of unit alone


@pytest.mark.parametrize("name", ["random-width", "uniform-width"])
@pytest.mark.parametrize(("units", "keep", "want"), [("neurons", 0.5, (4, 52)), ("groups", 0.8, (2, N))])
def test_at_cuts_one_kind_alone(name: str, units: str, keep: float, want: tuple[int, int]) -> None:
    """In neurons: a group 24, a layer 296. Half is 148 = 96 + 52; 0.8 of it 236.8, the nearest 248 = 2 x 24 + 200."""
    for method in (sparing.parse(f"{name}:compensate=false"), sparing.parse(name).with_state(fitted().state)):
        found: Any = method.replace(units=units).at(keep, sparing.shape(wide()))
        assert (found.groups, found.neurons) == ((None, want[1:]) if units == "neurons" else (want[:1], None))
        assert found.units == units
        assert counts(sparing.prune(wide(), found)) == [want] * LAYERS
    with pytest.raises(BudgetError, match=rf"{name}: keep = 0\.3: units = {units} leaves all"):
        method.replace(units=units).at(0.3, sparing.shape(wide()))


def test_uniform_shares_groups_out_one_more_in_layers_at_even_spacing() -> None:
    """13 groups in 5 layers are 2 each and 3 over, of which no neuron can make up."""
    method = sparing.parse("uniform-width:units=groups,groups=4/4/4/1/0,compensate=false")
    assert counts(sparing.prune(wide(), method)) == [(3, N), (2, N), (3, N), (2, N), (3, N)]
    mask = kept(method, wide())[0]
    assert mask.nonzero().flatten().tolist() == [0, 2, 3]
    method = sparing.parse("uniform-width:units=neurons,neurons=200/100/50/10/4,compensate=false")
    assert counts(sparing.prune(wide(), method)) == [(GROUPS, 73)] * LAYERS


@pytest.mark.parametrize("name", ["random-width", "uniform-width"])
def test_counts_of_units_that_are_not_cut_are_refused(name: str) -> None:
    with pytest.raises(sparing.Error, match=rf"{name}: groups = \(2,\): must be none, as units = neurons"):
        sparing.parse(f"{name}:units=neurons,groups=2")
    with pytest.raises(sparing.Error, match=rf"{name}: neurons = \(2,\): must be none, as units = groups"):
        sparing.parse(f"{name}:units=groups,neurons=2")
    with pytest.raises(sparing.Error, match=rf"{name}: units = 'heads': must be both \| neurons \| groups"):
        sparing.parse(f"{name}:units=heads")

"""FLAP: the card's oracles by number, then budgets, structures and refusals."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import sparing
from sparing.engine.surgery import LayerCut, Plan, cut, masked
from sparing.engine.units import Moments, compensation, fluctuation, statistics
from sparing.engine.view import View
from sparing.grid.method import BudgetError, Shape
from sparing.grid.score import standardise
from sparing.testing.models import build, prompt
from sparing.width.flap import Flap, _aligned, _fill

# The card's small example: four one-token samples, three channels.
X = torch.tensor([[1.0, 2, 0], [3, 2, 1], [5, 2, 5], [3, 2, 2]])
W = torch.tensor([[1.0, 2, 1], [0, 1, -1]])
LAYERS, D, N, GROUPS, HEADS, HEAD_DIM = 5, 48, 200, 4, 8, 12
STRUCTURES = [("AL-AM", None), ("UL-UM", None), ("UL-MM", 2), ("AL-MM", 3)]


@functools.cache
def wide() -> Any:
    """5 layers, 4 KV groups of 2 query heads, heads wider than D / H, 200 neurons: not a multiple of 16."""
    torch.manual_seed(1)
    config = hf.Qwen3Config(
        vocab_size=120, hidden_size=D, intermediate_size=N, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=HEAD_DIM, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = hf.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:  # unequal rows, so that units differ
                weight.mul_(4 * torch.rand(len(weight), 1) ** 2 + 0.2)
    return model


def batches() -> list[dict[str, Tensor]]:
    return [prompt("qwen3", (9, 12, 7, 12), seed=s) for s in (5, 6)]


@functools.cache
def fitted() -> Flap:
    return Flap(multiple=1).fit(wide(), batches())


def block_parameters(model: Any) -> int:
    """Matrices of the layers, without norms and biases."""
    return sum(weight.numel() for weight in View(model).stack.parameters() if weight.ndim == 2)


def small_example() -> dict[str, Tensor]:
    moments = Moments()
    moments.add(X, samples=4)
    return statistics(moments, W)


def test_1_small_example() -> None:
    found = small_example()
    torch.testing.assert_close(found["mean"], torch.tensor([3.0, 2, 2]))
    torch.testing.assert_close(found["var"], torch.tensor([8 / 3, 0, 14 / 3]))
    torch.testing.assert_close(found["weight2"], torch.tensor([1.0, 5, 2]))
    torch.testing.assert_close(found["weight1"], torch.tensor([0.5, 1.5, 1]))
    torch.testing.assert_close(found["norm"], torch.tensor([44.0, 16, 30]).sqrt())
    mean = found.pop("mean")
    score = fluctuation("WIFV", **found)
    torch.testing.assert_close(score, torch.tensor([8 / 3, 0, 28 / 3]))
    torch.testing.assert_close(standardise(score), torch.tensor([-0.27735, -0.83205, 1.10940]), rtol=0, atol=1e-5)
    assert torch.equal(fluctuation("IFV", **found), found["var"])
    torch.testing.assert_close(fluctuation("WIFN", **found), found["weight1"] * X.norm(dim=0))
    assert mean.dtype == torch.float32


def test_1_samples_are_sequences_and_tokens_are_summed() -> None:
    """Two sequences of two tokens: the same squares, divided by 2 - 1."""
    moments = Moments()
    moments.add(X, samples=2)
    torch.testing.assert_close(statistics(moments, W)["var"], torch.tensor([8.0, 0, 14]))
    one = Moments()
    one.add(X, samples=1)
    with pytest.raises(sparing.Error, match="at least 2"):
        statistics(one, W)


def test_2_compensation() -> None:
    mean = small_example()["mean"]
    keep = torch.tensor([True, False, True])
    b = compensation(W, mean, keep)
    torch.testing.assert_close(b, torch.tensor([4.0, 2]))
    torch.testing.assert_close((X * keep) @ W.T + b, X @ W.T)
    torch.testing.assert_close(compensation(W, mean, torch.tensor([False, False, True])), torch.tensor([7.0, 2]))


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_3_error_of_one_pruned_channel_is_its_score(channel: int) -> None:
    found = small_example()
    keep = torch.arange(3) != channel
    error = X @ W.T - ((X * keep) @ W.T + compensation(W, found["mean"], keep))
    mean = found.pop("mean")
    torch.testing.assert_close((error**2).sum() / 3, fluctuation("WIFV", **found)[channel])
    assert mean.shape == (3,)


def test_3_several_channels_only_when_uncorrelated() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        moments = Moments()
        moments.add(x, samples=4)
        found = statistics(moments, W)
        error = (x[:, [0, 2]] - found.pop("mean")[[0, 2]]) @ W[:, [0, 2]].T
        return (error**2).sum() / 3, fluctuation("WIFV", **found)[[0, 2]].sum()

    sign = torch.tensor([[1.0, 1, 1], [1, 1, -1], [-1, 1, 1], [-1, 1, -1]])
    torch.testing.assert_close(*both(sign * 3 + 7))
    together, apart = both(X)
    assert abs(together - apart) > 0.1


@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_4_mean_output_on_calibration_data_is_preserved(site: str) -> None:
    """In a real model: the last layer alone is cut, so its input is the dense one."""
    model, method = wide(), fitted().replace(p=0.8)
    last = method.plan(model).layers[-1]
    assert last is not None and last.groups is not None and last.neurons is not None
    part = LayerCut(groups=last.groups, attention_bias=last.attention_bias)
    if site == "mlp":
        part = LayerCut(neurons=last.neurons, mlp_bias=last.mlp_bias)
    plan = Plan((*[LayerCut()] * (LAYERS - 1), part))
    site_module = View(model).layers[-1].projection("o_proj" if site == "attention" else "down_proj")

    def outputs() -> Tensor:
        seen: list[Tensor] = []
        handle = site_module.register_forward_hook(lambda m, a, out: seen.append(out[mask]))
        with torch.no_grad():
            for batch in batches():
                mask = batch["attention_mask"].bool()
                model(**batch)
        handle.remove()
        return torch.cat(seen)

    dense = outputs()
    with masked(model, plan):
        # registered after the mask's own hooks, so it sees the compensated output
        error = outputs() - dense
    size = error.abs().mean()
    assert size > 0.1 * dense.abs().mean()
    torch.testing.assert_close(error.mean(0), torch.zeros(D), rtol=0, atol=1e-5 * float(size))
    with masked(model, Plan((*[LayerCut()] * (LAYERS - 1), LayerCut(part.groups, part.neurons)))):
        assert (outputs() - dense).mean(0).abs().max() > 0.01 * size  # without the bias it is not


def test_5_scale_of_a_module_changes_nothing() -> None:
    def scaled(factor: float, powers: dict[str, int]) -> Flap:
        state = dict(fitted().state)
        for site, layer in (("attention", 1), ("mlp", 3)):
            for key, power in powers.items():
                state[f"{site}.{key}.{layer}"] = state[f"{site}.{key}.{layer}"] * factor**power
        return fitted().with_state(state)

    for metric in ("WIFV", "IFV", "WIFN"):
        dense = fitted().replace(metric=metric)
        for powers in ({"mean": 1, "var": 2, "norm": 1}, {"weight1": 1, "weight2": 2}):  # X, W times c
            other = scaled(3.7, powers).replace(metric=metric)
            torch.testing.assert_close(other.scores("attention", 1), dense.scores("attention", 1))
            torch.testing.assert_close(other.scores("mlp", 3), dense.scores("mlp", 3))
            for one, two in zip(other.kept(), dense.kept(), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_5_scale_of_a_weight_in_a_real_model() -> None:
    model = copy.deepcopy(wide())
    with torch.no_grad():
        View(model).layers[-1].projection("down_proj").weight.mul_(5)
    again = Flap(multiple=1).fit(model, batches())
    torch.testing.assert_close(again.scores("mlp", 4), fitted().scores("mlp", 4), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(again.state["mlp.weight2.4"], fitted().state["mlp.weight2.4"])


def test_6_nothing_removed_keeps_everything() -> None:
    model, batch = wide(), prompt("qwen3", (6, 9))
    for structure, heads in STRUCTURES:
        method = fitted().replace(p=0.0, structure=structure, heads=heads and GROUPS, multiple=16)
        groups, neurons = method.kept()
        assert all(bool(keep.all()) for keep in groups + neurons)
        assert method.plan(model) == Plan((LayerCut(),) * LAYERS)
    with torch.no_grad():
        assert torch.equal(sparing.prune(model, method)(**batch).logits, model(**batch).logits)


PORTIONS = (0.0, 0.03, 0.11, 0.2, 0.35, 0.5, 0.61, 0.8, 0.97, 1.0)


@pytest.mark.parametrize("p", PORTIONS)
def test_6_kept_cost_within_one_unit(p: float) -> None:
    method, total = fitted().replace(p=p, compensate=False), block_parameters(wide())
    group = (2 * 2 + 2) * HEAD_DIM * D
    kept = block_parameters(sparing.prune(wide(), method))
    assert abs(kept - (1 - p) * total) <= group / 2
    # alignment to 16 moves the total by at most 8 neurons more; the adaptive split of heads and neurons by half a unit
    for multiple, structure, heads in ((16, "AL-AM", None), (1, "AL-MM", 2), (16, "AL-MM", 2)):
        method = method.replace(multiple=multiple, structure=structure, heads=heads)
        if structure == "AL-MM" and not 0.11 < p < 0.8:
            continue
        kept = block_parameters(sparing.prune(wide(), method))
        assert abs(kept - (1 - p) * total) <= group / 2 + multiple / 2 * 3 * D
        assert all(int(k.sum()) % multiple == 0 or bool(k.all()) for k in method.kept()[1])


def test_6_kept_sets_are_nested() -> None:
    for metric in ("WIFV", "WIFN"):
        more = None
        for p in PORTIONS:
            less = [keep for part in fitted().replace(p=p, metric=metric).kept() for keep in part]
            if more is not None:
                assert all(bool((a >= b).all()) for a, b in zip(more, less, strict=True))
                assert sum(int(k.sum()) for k in less) < sum(int(k.sum()) for k in more)
            more = less


@pytest.mark.parametrize("name", ["llama", "gemma3", "llava", "qwen2.5-vl"])
@pytest.mark.parametrize("p", [0.3, 0.7])
def test_7_masked_equals_sliced(name: str, p: float) -> None:
    model, batch = build(name), prompt(name, (7, 5))
    method = Flap(p=p, multiple=8).fit(model, [prompt(name, (9, 9, 6, 8), seed=s) for s in (5, 6)])
    small = sparing.prune(model, method)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        dense = model(**batch).logits
        with sparing.attach(model, method):
            want = model(**batch).logits
            text = model.generate(**batch, max_new_tokens=4, do_sample=False, suppress_tokens=[117, 118, 119])
        assert torch.equal(model(**batch).logits, dense)
        torch.testing.assert_close(small(**batch).logits[real], want[real], rtol=1e-4, atol=1e-4)
        assert torch.equal(
            small.generate(**batch, max_new_tokens=4, do_sample=False, suppress_tokens=[117, 118, 119]), text
        )
    assert abs(block_parameters(small) / block_parameters(model) - (1 - p)) < 0.06


def test_8_statistics_do_not_depend_on_batching() -> None:
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches() for i in range(4)]
    again = Flap().fit(wide(), rows)
    assert again.state.keys() == fitted().state.keys() and len(again.state) == LAYERS * 2 * 6
    for key, value in fitted().state.items():
        torch.testing.assert_close(again.state[key], value, rtol=1e-4, atol=1e-6)
    assert {v.dtype for k, v in again.state.items() if "unit" not in k} == {torch.float32}


def test_8_streaming_equals_two_passes_in_the_model() -> None:
    seen: list[Tensor] = []
    mask = torch.tensor(True)
    handle = View(wide()).layers[3].projection("o_proj").register_forward_pre_hook(lambda m, a: seen.append(a[0][mask]))
    with torch.no_grad():
        for batch in batches():
            mask = batch["attention_mask"].bool()
            wide()(**batch)
    handle.remove()
    x, sequences = torch.cat(seen), 8
    torch.testing.assert_close(fitted().state["attention.mean.3"], x.mean(0), rtol=1e-4, atol=1e-6)
    variance = x.var(0) * (len(x) - 1) / (sequences - 1)
    torch.testing.assert_close(fitted().state["attention.var.3"], variance, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(fitted().state["attention.norm.3"], x.norm(dim=0), rtol=1e-4, atol=1e-6)


def test_9_a_layer_losing_everything_gives_its_bias() -> None:
    model, batch = wide(), prompt("qwen3", (6, 9))
    small = sparing.prune(model, fitted().replace(p=1.0))
    assert block_parameters(small) == 0
    layer = View(small).layers[2]
    with torch.no_grad():
        out = layer.mlp(torch.randn(2, 3, D))  # type: ignore[misc]
        expected = View(model).layers[2].projection("down_proj").weight @ fitted().state["mlp.mean.2"]
        torch.testing.assert_close(out, expected.expand(2, 3, D), rtol=1e-4, atol=1e-6)
        logits = small(**batch).logits
        with masked(model, fitted().replace(p=1.0).plan(model)):
            real = batch["attention_mask"].bool()
            torch.testing.assert_close(logits[real], model(**batch).logits[real], rtol=1e-4, atol=1e-5)
    assert small.generate(**batch, max_new_tokens=3, do_sample=False).shape == (2, 12)


# --------------------------------------------------------------------------- beyond the card


def test_group_score_is_the_mean_over_its_query_heads() -> None:
    state = fitted().state
    score = standardise((state["attention.var.0"] * state["attention.weight2.0"]).double())
    want = [score[g * 2 * HEAD_DIM : (g + 1) * 2 * HEAD_DIM].mean() for g in range(GROUPS)]
    torch.testing.assert_close(fitted().scores("attention", 0), torch.stack(want))
    squared = fitted().replace(square_attention=True)
    square = standardise((state["attention.var.0"] * state["attention.weight2.0"]).double() ** 2)
    torch.testing.assert_close(squared.scores("attention", 0), square.reshape(GROUPS, -1).mean(-1))
    assert torch.equal(squared.scores("mlp", 0), fitted().scores("mlp", 0))


def test_channels_are_scored_by_the_metric() -> None:
    var, norm, weight = (fitted().state[f"mlp.{key}.2"].double() for key in ("var", "norm", "weight1"))
    for metric, score in (("IFV", var), ("WIFN", weight * norm)):
        torch.testing.assert_close(fitted().replace(metric=metric).scores("mlp", 2), standardise(score))


def test_unit_costs_are_those_of_the_card() -> None:
    group, neuron = (int(fitted().state[f"{site}.unit.0"][1]) for site in ("attention", "mlp"))
    assert group / neuron == (2 + 2 * 2) * HEAD_DIM / 3
    assert GROUPS * group + N * neuron == block_parameters(wide()) / LAYERS


def test_hand_made_global_order() -> None:
    """Two layers of two groups (4 parameters) and four neurons (1): scores are chosen, the budget falls by hand."""
    state: dict[str, Tensor] = {}
    for i, (heads, neurons) in enumerate((([4.0, 0.0], [9.0, 5.0, 1.0, 1.0]), ([2.0, 1.0], [8.0, 8.0, 0.0, 8.0]))):
        for site, values, unit in (("attention", heads, 4), ("mlp", neurons, 1)):
            for key in ("mean", "norm", "weight1", "weight2"):
                state[f"{site}.{key}.{i}"] = torch.ones(len(values))
            state[f"{site}.var.{i}"] = torch.tensor(values)
            state[f"{site}.unit.{i}"] = torch.tensor([1, unit])
    # z: groups ±0.7071 in both; neurons of layer 0 (1.306, 0.261, -0.783, -0.783), of layer 1 (0.5, 0.5, -1.5, 0.5)
    # order: n00 | g00 g10 | n10 n11 n13 n01 | g01 g11 | n02 n03 | n12; cost 1 | 5 9 | 10 11 12 13 | 17 21 | 22 23 | 24
    found = {}
    for kept in (0, 1, 2, 3, 4, 11, 14, 15.5, 22.6, 24):
        groups, neurons = Flap(p=1 - kept / 24, multiple=1).with_state(state).kept()
        found[kept] = [g.int().tolist() for g in groups], [n.int().tolist() for n in neurons]
    none, all_of = [0, 0], [1, 1]
    assert found[0] == ([none, none], [[0] * 4, [0] * 4])
    assert found[1] == found[2] == ([none, none], [[1, 0, 0, 0], [0] * 4])
    assert found[4] == ([[1, 0], none], [[1, 0, 0, 0], [0] * 4])
    assert found[11] == ([[1, 0], [1, 0]], [[1, 0, 0, 0], [1, 1, 0, 0]])
    assert found[14] == ([[1, 0], [1, 0]], [[1, 1, 0, 0], [1, 1, 0, 1]])
    assert found[15.5] == ([all_of, [1, 0]], [[1, 1, 0, 0], [1, 1, 0, 1]])
    assert found[22.6] == ([all_of, all_of], [[1, 1, 1, 1], [1, 1, 0, 1]])
    assert found[24] == ([all_of, all_of], [[1] * 4, [1] * 4])


@pytest.mark.parametrize("multiple", [1, 16])
def test_structures_share_the_budget_as_named(multiple: int) -> None:
    shape, counts = sparing.shape(wide()), {}
    for structure, heads in STRUCTURES:
        method = fitted().replace(p=0.3, structure=structure, heads=heads, multiple=multiple)
        counts[structure] = method.mirrored(shape)
        counts[structure].pop("compensate")
        assert counts[structure].pop("units") == "both"
    assert counts["UL-UM"] == {"groups": (3,) * LAYERS, "neurons": (140 if multiple == 1 else 144,) * LAYERS}
    left = round((0.7 * (GROUPS * 24 + N)) - 2 * 24)
    assert counts["UL-MM"] == {"groups": (2,) * LAYERS, "neurons": (left if multiple == 1 else 160,) * LAYERS}
    assert sum(counts["AL-MM"]["groups"]) == 3 * LAYERS and len(set(counts["AL-MM"]["groups"])) > 1
    assert len(set(counts["AL-AM"]["neurons"])) > 1
    if multiple == 1:
        left = 0.7 * LAYERS * (GROUPS * 24 + N) - 3 * LAYERS * 24
        assert abs(sum(counts["AL-MM"]["neurons"]) - left) <= 0.5


def test_costs_beyond_float32_are_counted_to_the_last_parameter() -> None:
    assert _fill([torch.tensor([5.0]), torch.tensor([4.0, 3, 2, 1])], [2**27, 1], 2**27 + 2.0) == [1, 2]


def test_alignment_keeps_the_total() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        sizes = torch.randint(1, 100, (6,), generator=generator).tolist()
        counts = [int(torch.randint(0, size + 1, (), generator=generator)) for size in sizes]
        found = _aligned(counts, sizes, 16)
        assert abs(sum(found) - sum(counts)) <= 8
        assert all(k % 16 == 0 or k == size for k, size in zip(found, sizes, strict=True))
        assert all(abs(k - was) < 16 and k <= size for k, was, size in zip(found, counts, sizes, strict=True))
    assert _aligned([3, 50, 7], [60, 60, 60], 1) == [3, 50, 7]


def test_budgets_are_set_by_the_share_kept() -> None:
    shape = Shape(layers=4, heads=8, groups=4, head_dim=8, hidden=64, neurons=96)
    assert Flap().at(0.7, shape).p == 0.3 and Flap().at(1.0, shape).p == 0.0
    assert fitted().at(0.4, sparing.shape(wide())).state is not None
    with pytest.raises(BudgetError, match=r"heads = 4: would keep .*lower heads"):
        fitted().replace(p=0.9, structure="UL-MM", heads=4).kept()
    with pytest.raises(BudgetError, match=r"heads = 0: would keep .*raise heads"):
        fitted().replace(p=0.1, structure="AL-MM", heads=0).kept()
    with pytest.raises(BudgetError, match="heads = 5: a layer has 4 KV groups"):
        fitted().replace(p=0.5, structure="AL-MM", heads=5).kept()


def test_wrong_use_is_refused() -> None:
    with pytest.raises(sparing.Error, match=r"flap: heads = None: structure UL-MM needs the number of KV groups"):
        Flap(structure="UL-MM")
    with pytest.raises(sparing.Error, match=r"flap: heads = 3: structure AL-AM sets heads itself"):
        Flap(heads=3)
    with pytest.raises(sparing.Error, match="needs calibration first"):
        Flap().mirrored(Shape(4, 8, 4, 8, 64, 96))
    with pytest.raises(sparing.Error, match="needs calibration first"):
        sparing.attach(wide(), Flap())
    with pytest.raises(sparing.Error, match="fitted on another model"):
        sparing.prune(build("llama"), fitted())
    with pytest.raises(sparing.Error, match="fitted on another model"):
        sparing.prune(cut(wide(), Plan((LayerCut(torch.arange(2)),) * LAYERS)), fitted())


def test_without_compensation_no_bias_appears() -> None:
    plain = sparing.prune(wide(), fitted().replace(compensate=False))
    assert not any(name.endswith("bias") for name, _ in plain.named_parameters())
    biased = sparing.prune(wide(), fitted())
    assert any(name.endswith("down_proj.bias") for name, _ in biased.named_parameters())


def test_a_cut_model_can_be_fitted_and_cut_again() -> None:
    model = sparing.prune(wide(), fitted().replace(p=0.9))
    groups, neurons = fitted().replace(p=0.9).kept()
    assert min(int(keep.sum()) for keep in groups) == 0  # a layer without heads is in it
    again = Flap(p=0.5, multiple=1).fit(model, batches())
    smaller = sparing.prune(model, again)
    assert abs(block_parameters(smaller) / block_parameters(model) - 0.5) < 0.15
    assert len(neurons) == LAYERS


# --------------------------------------------------------------------------- one kind of unit alone

NEURON, GROUP = 3 * D, 6 * HEAD_DIM * D  # parameters that leave with one


@pytest.mark.parametrize("structure", ["AL-AM", "UL-UM"])
@pytest.mark.parametrize(
    ("units", "unit", "portions"),
    [("neurons", NEURON, (0.0, 0.1, 0.35, 0.5, 0.67)), ("groups", GROUP, (0.0, 0.05, 0.13, 0.22, 0.32))],
)
def test_one_kind_alone_spends_the_whole_budget(structure: str, units: str, unit: int, portions: Any) -> None:
    """The attentions are 0.324 of the layers' parameters, the MLPs 0.676."""
    model, method = wide(), fitted().replace(units=units, structure=structure, compensate=False)
    total, more = block_parameters(model), None
    for p in portions:
        groups, neurons = method.replace(p=p).kept()
        cut_of, whole = (neurons, groups) if units == "neurons" else (groups, neurons)
        assert all(bool(keep.all()) for keep in whole)
        small = sparing.prune(model, method.replace(p=p))
        slack = unit / 2 if structure == "AL-AM" else LAYERS * unit / 2
        assert abs(block_parameters(small) - (1 - p) * total) <= slack
        if structure == "UL-UM":
            assert len({int(keep.sum()) for keep in cut_of}) == 1
        else:  # the best over all layers
            scores = [method.scores("mlp" if units == "neurons" else "attention", i) for i in range(LAYERS)]
            stays = torch.cat([s[keep] for s, keep in zip(scores, cut_of, strict=True)])
            goes = torch.cat([s[~keep] for s, keep in zip(scores, cut_of, strict=True)])
            assert 0 in (len(stays), len(goes)) or stays.min() >= goes.max()
        if more is not None:
            assert all(bool((a >= b).all()) for a, b in zip(more, cut_of, strict=True))
            assert sum(int(k.sum()) for k in cut_of) < sum(int(k.sum()) for k in more)
        more = cut_of


def test_one_kind_alone_is_aligned_and_compensated_as_both_are() -> None:
    model, method = wide(), fitted().replace(units="neurons", p=0.3, multiple=16)
    counts = [int(keep.sum()) for keep in method.kept()[1]]
    assert all(k % 16 == 0 or k == N for k in counts)
    assert abs(sum(counts) - (0.7 * (GROUPS * 24 + N) - GROUPS * 24) * LAYERS) <= 8 + 0.5
    for part in method.plan(model).layers:
        assert part is not None and part.groups is None and part.attention_bias is None
        assert (part.mlp_bias is None) == (part.neurons is None)
    assert method.portable().fields()["units"] == "neurons"


@pytest.mark.parametrize(("units", "least", "whole"), [("neurons", 0.325, "KV groups"), ("groups", 0.676, "neurons")])
def test_what_one_kind_alone_cannot_reach_is_refused(units: str, least: float, whole: str) -> None:
    """24 of 74 ninths are attention: 0.3243 and 0.6757, rounded up to what can really be kept."""
    shape = sparing.shape(wide())
    words = rf"flap: keep = 0\.3: units = {units} leaves all {whole}, at least {least} of the layers' parameters"
    for method in (Flap(units=units), fitted().replace(units=units)):
        with pytest.raises(BudgetError, match=words):
            method.at(0.3, shape)
        assert method.at(least, shape).p == round(1 - least, 12)
    with pytest.raises(BudgetError, match=words):
        fitted().replace(units=units, p=0.7).kept()
    exact = fitted().at(96 * 3 / (96 * 3 + 600), shape).replace(units="neurons", compensate=False)
    assert counted(sparing.prune(wide(), exact)) == [(GROUPS, 0)] * LAYERS  # to the last neuron
    with pytest.raises(sparing.Error, match=r"flap: units = neurons: must be both, as structure UL-MM"):
        Flap(units="neurons", structure="UL-MM", heads=3)


def counted(model: Any) -> list[tuple[int, int]]:
    return [(layer.groups, layer.neurons) for layer in View(model).layers]


@pytest.mark.parametrize("kind", ["random", "uniform"])
@pytest.mark.parametrize(("units", "p"), [("neurons", 0.4), ("groups", 0.21)])
def test_controls_cut_the_same_units(kind: str, units: str, p: float) -> None:
    method = fitted().replace(units=units, p=p)
    control: Any = method.control(kind, sparing.shape(wide()), seed=3)
    assert control.compensate is True
    assert method.replace(compensate=False).control(kind, sparing.shape(wide())).fields()["compensate"] is False
    assert control.units == units and control.fields()["groups" if units == "neurons" else "neurons"] is None
    mine, its = counted(sparing.prune(wide(), method)), counted(sparing.prune(wide(), control))
    whole = 0 if units == "neurons" else 1
    assert {pair[whole] for pair in mine + its} == {GROUPS if units == "neurons" else N}
    spent, kept = (sum(pair[1 - whole] for pair in found) for found in (mine, its))
    assert spent == kept if units == "groups" or kind == "random" else abs(spent - kept) <= LAYERS / 2
    assert (mine == its) == (kind == "random")  # uniform shares it out evenly, FLAP does not


def test_calibration_is_that_of_the_model_it_is_given() -> None:
    """Fitting leaves fields as they are, also where one kind is cut."""
    method = Flap(units="groups", metric="IFV").fit(wide(), batches())
    assert method.fields() == Flap(units="groups", metric="IFV").fields()
    assert method.state.keys() == fitted().state.keys()

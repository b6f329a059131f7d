"""Switched sub-layers compute what the really cut checkpoint computes, and leave nothing behind."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch

from sparing.engine.elastic import Elastic, units
from sparing.engine.experts import expert_statistics
from sparing.engine.fitness import Fidelity
from sparing.engine.surgery import cut
from sparing.engine.units import calibrate
from sparing.grid.method import Error
from sparing.grid.score import divergence
from sparing.testing.models import build, prompt

AXES = {
    "llama": ("depth", "width"),
    "qwen2": ("depth", "width"),
    "phi3": ("depth", "width"),
    "gemma3": ("depth", "width"),
    "gpt-neox": ("depth",),
    "opt": ("depth",),
    "qwen3-moe": ("depth", "experts"),
    "deepseek-v3": ("depth", "experts"),
}


def _elastic(name, compensate=True, **options):
    model, axes = build(name), AXES[name]
    data = [prompt(name, (9, 9, 9), side="none", seed=s) for s in (3, 4)]
    state = calibrate(model, data) if "width" in axes else None
    experts = expert_statistics(model, data)["score"] if "experts" in axes else None
    found = units(model, axes, multiple=8, steps=4)
    return model, Elastic(model, found, state=state, experts=experts, compensate=compensate, **options)


@pytest.mark.parametrize("name", AXES)
def test_a_candidate_computes_what_its_checkpoint_computes(name):
    model, elastic = _elastic(name)
    dense = copy.deepcopy(model)
    batch = prompt(name, (7, 5))
    with torch.no_grad():
        before = model(**batch).logits
    rng = random.Random(1)
    for _ in range(3):
        genome = tuple(rng.randrange(len(u.levels)) for u in elastic.units)
        with elastic, torch.no_grad():
            elastic.set(genome)
            live = model(**batch, use_cache=False).logits
        plan = elastic.plan(genome)
        with torch.no_grad():
            small = cut(dense, plan)(**batch, use_cache=False).logits
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(live[real], small[real], rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, before)
    assert all(
        a is b
        for a, b in zip(
            elastic._own,
            (getattr(elastic.view.layers[u.layer].module, n) for u, n in zip(elastic.units, elastic._names)),
        )
    )


def test_a_switch_touches_only_what_changes():
    _model, elastic = _elastic("llama")
    layers = elastic.view.layers
    before = [(v.module.self_attn, v.module.mlp) for v in layers]
    genome = list(elastic.dense)
    genome[3] = 1  # the MLP of layer 1
    with elastic:
        elastic.set(tuple(genome))
        assert elastic.switched == 1
        assert [v.module.self_attn for v in layers] == [a for a, _ in before]
        assert [v.module.mlp is m for v, (_, m) in zip(layers, before)] == [True, False, True, True, True, True]
        elastic.set(tuple(genome))
        assert elastic.switched == 1


def test_a_cut_that_is_refused_half_way_leaves_nothing_behind(monkeypatch):
    _model, elastic = _elastic("llama")
    own = [(v.module.self_attn, v.module.mlp) for v in elastic.view.layers]
    cut_one = Elastic._cut

    def fails(self, index, level):
        if index == 7:
            raise Error("no")
        return cut_one(self, index, level)

    monkeypatch.setattr(Elastic, "_cut", fails)
    with pytest.raises(Error, match="no"), elastic:
        elastic.set((0,) * 12)
    assert [(v.module.self_attn, v.module.mlp) for v in elastic.view.layers] == own and elastic.switched > 6


@pytest.mark.parametrize("name", AXES)
def test_layers_without_sub_layers_add_nothing(name):
    model = build(name)
    batch = prompt(name, (7, 5))
    elastic = Elastic(model, units(model, ["depth"]))
    if elastic.view.layers[0].mlp is None:  # OPT has no module around its MLP
        with pytest.raises(Error, match=r"layer 0 \(OPTDecoderLayer\) does more than add"):
            elastic.empty_layers_are_none(batch["input_ids"])
        return
    elastic.empty_layers_are_none(batch["input_ids"])
    assert elastic.genome == elastic.dense and elastic.switched > 0
    layer = model.get_decoder().layers[4]
    scale = layer.register_forward_hook(lambda m, a, out: (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out)
    with pytest.raises(Error, match=rf"layer 4 \({type(layer).__name__}\) does more than add"):
        elastic.empty_layers_are_none(batch["input_ids"])
    scale.remove()
    assert elastic.genome == elastic.dense and not model.training


def test_narrower_widths_are_subsets_and_nothing_cut_is_the_dense_model():
    _model, elastic = _elastic("llama")
    for index, unit in enumerate(elastic.units):
        if unit.site == "mlp":
            kept = [set(elastic.part(index, level).neurons.tolist()) for level in range(1, len(unit.levels) - 1)]
            assert all(a < b for a, b in itertools.pairwise(kept))
            assert [len(k) for k in kept] == list(unit.levels[1:-1])
    assert all(part == elastic.part(0, elastic.dense[0]) for part in elastic.plan(elastic.dense).layers)


def test_little_room_forgets_old_modules_but_not_what_they_compute():
    model, elastic = _elastic("llama", room=1)
    other = _elastic("llama")[1]
    rng = random.Random(0)
    batch = prompt("llama", (7, 5))
    with elastic, torch.no_grad():
        for _ in range(4):
            genome = tuple(rng.randrange(len(u.levels)) for u in elastic.units)
            elastic.set(genome)
            here = model(**batch).logits
            with other:
                other.set(genome)
                assert torch.equal(other.model(**batch).logits, here)
        assert len(elastic._built) == 1


def test_axes_that_a_model_lacks_are_refused():
    with pytest.raises(Error, match="axes = 'experts': LlamaForCausalLM has none"):
        units(build("llama"), ["experts"])
    with pytest.raises(Error, match="axes = 'width': Qwen3MoeForCausalLM cannot be cut in width: layer 0"):
        units(build("qwen3-moe"), ["width"])
    with pytest.raises(Error, match="axes = 'heads': must be among depth, width, experts"):
        units(build("llama"), ["heads"])


def test_fitness_of_the_dense_model_is_zero_and_others_are_computed_by_hand():
    model, elastic = _elastic("llama")
    data = [prompt("llama", (12, 12, 12), side="none", seed=8)]
    with elastic:
        fitness = Fidelity(model, data, elastic.set, elastic.dense, dearest=36)
        worse = tuple(max(0, level - 1) for level in elastic.dense)
        zero, value = fitness([elastic.dense, worse], 36, 1)
        assert zero == 0 and fitness.evaluated == 72
        ids = data[0]["input_ids"]
        with torch.no_grad():
            dense = model(ids).logits.double().log_softmax(-1)
            elastic.set(worse)
            there = model(ids).logits.double().log_softmax(-1)
        expected = (dense.exp() * (dense - there)).sum(-1).mean()
        assert value == pytest.approx(expected.item(), rel=1e-4)
        assert fitness([worse], 20, 5) == fitness([worse], 20, 5) != fitness([worse], 20, 6)
        with pytest.raises(Error, match="has 36 tokens, a stage asks for 37"):
            fitness([worse], 37, 0)
    with pytest.raises(Error, match="has 36 tokens, the search evaluates on 50"):
        Fidelity(model, data, elastic.set, elastic.dense, dearest=50)


def test_perplexity_is_that_of_the_models_own_loss():
    model, elastic = _elastic("llama")
    data = [prompt("llama", (12, 12), side="none", seed=8)]
    with elastic, torch.no_grad():
        fitness = Fidelity(model, data, elastic.set, elastic.dense, measure="perplexity")
        ids = data[0]["input_ids"]
        assert fitness([elastic.dense], 0, 0)[0] == pytest.approx(model(ids, labels=ids).loss.exp().item(), rel=1e-4)


def test_divergence_in_chunks_and_over_the_likeliest():
    p, q = torch.randn(3, 50, 11), torch.randn(3, 50, 11)
    whole = divergence(p, q)
    torch.testing.assert_close(divergence(p, q, chunk=7), whole)
    torch.testing.assert_close(divergence(p, q, top_k=11), whole)
    assert torch.equal(divergence(p, p), torch.zeros(3, 50))
    top = p.topk(4).indices
    a, b = p.gather(-1, top).softmax(-1), q.gather(-1, top).softmax(-1)
    torch.testing.assert_close(divergence(p, q, top_k=4), (a * (a / b).log()).sum(-1), rtol=1e-4, atol=1e-5)

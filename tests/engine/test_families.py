"""Cuts of families whose modules are named, ordered or counted otherwise: right, or refused before any work."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sparing
from sparing.bench import costs
from sparing.engine.checkpoint import save_pretrained
from sparing.engine.elastic import Elastic, units
from sparing.engine.surgery import LayerCut, Plan, cut, irremovable, masked
from sparing.engine.view import View
from sparing.testing.models import _SIZES, LAYERS, build, prompt

hf: Any = transformers
_OWN: dict[str, Any] = {"vocab_size": 120, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # beside those of `build`
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {
            "hidden_size": 32,
            "num_layers": LAYERS,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 3]],
            **_OWN,
        },
    ),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64, **_OWN}),
    "one-layer": ("LlamaForCausalLM", {**_SIZES, "num_hidden_layers": 1}),
}
WIDTHS = ("flap", "wanda-sp", "magnitude-sp", "random-width:groups=1", "uniform-width:groups=1")


@functools.cache
def tiny(name: str) -> Any:
    """A random model, its matrices large enough that cuts show."""
    if name not in FAMILIES:
        return build(name)
    torch.manual_seed(1)
    kind, sizes = FAMILIES[name]
    model = getattr(hf, kind)(getattr(hf, kind).config_class(**sizes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.mul_(4)
    return model.eval()


def few(*kept: int) -> torch.Tensor:
    return torch.tensor(kept, dtype=torch.long)


def agree(model: Any, plan: Plan, folder: Path) -> Any:
    """The cut model: what the mask computes, cached generation what uncached gives, the same after loading."""
    batch = prompt("llama", (7, 5))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        with masked(model, plan):
            want = model(**batch).logits[real]
        small: Any = cut(model, plan)
        got = small(**batch).logits
        torch.testing.assert_close(got[real], want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(want, model(**batch).logits[real], atol=1e-3)
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        cached, again = (small.generate(**batch, **options, use_cache=use) for use in (True, False))
        assert torch.equal(cached, again)
        loaded = sparing.from_pretrained(save_pretrained(small, folder))
        torch.testing.assert_close(loaded(**batch).logits, got, rtol=1e-5, atol=1e-6)
    return small


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "one-layer"])
def test_layers_go(name: str, tmp_path: Path) -> None:
    """The first too: where the others keep their old places in the cache, nobody counts the past."""
    small = agree(tiny(name), Plan((None, LayerCut(), None, LayerCut(), LayerCut(), None)), tmp_path)
    assert len(View(small)) == small.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["gpt2", "gpt-neo", "gptj", "olmo2", "bloom", "mpt"])  # the last two add the residual
def test_sub_layers_go(name: str, tmp_path: Path) -> None:
    plan = [LayerCut(attention=False), LayerCut(mlp=False), None, LayerCut(), LayerCut(attention=False), LayerCut()]
    agree(tiny(name), Plan(tuple(plan)), tmp_path)


def test_sub_layers_that_were_not_found_cannot_go() -> None:
    layer = View(build("llama")).layers[3]
    assert irremovable(layer, "attention") is None and irremovable(layer, "mlp") is None
    for site in ("attention", "mlp"):
        words = f"layer 3 (LlamaDecoderLayer): its {site} cannot be removed alone: no module of its own was found"
        assert irremovable(replace(layer, **{site: None}), site) == words  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["gptj", "one-layer"])
def test_groups_go(name: str, tmp_path: Path) -> None:
    """By raw plans also where methods refuse, because neurons are not found beside them."""
    L = len(View(tiny(name)))
    agree(tiny(name), Plan((LayerCut(few(1)), *[LayerCut()] * (L - 1))), tmp_path)


@pytest.mark.parametrize("spec", WIDTHS)
@pytest.mark.parametrize("name", ["gpt2", "gpt-neo", "gptj", "falcon", "bloom", "mpt"])
def test_width_methods_refuse_what_does_not_fall_apart(name: str, spec: str) -> None:
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    said = rf"method = '{spec.split(':')[0]}': cannot cut {type(model).__name__}: layer 0"
    words = rf"{said} \(\w+\) has no (KV groups|neurons) that can be told apart"
    acts: list[Any] = [sparing.prune, sparing.attach]
    for units_ in ("both", "neurons", "groups"):
        method = sparing.parse(spec.split(":")[0]).replace(units=units_)
        if method.card.needs != "nothing":
            acts = [lambda model, method: method.fit(model, [prompt("llama", (9, 9), side="none")])]
        for act in acts:
            with pytest.raises(sparing.Error, match=words):
                act(model, method)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("spec", WIDTHS)
def test_a_norm_over_all_heads_is_refused_at_once_and_neurons_alone_are_cut(spec: str, tmp_path: Path) -> None:
    model, name = tiny("olmo2"), spec.split(":")[0]
    data = [prompt("llama", (9, 9), side="none", seed=s) for s in (5, 6)]
    words = rf"'{name}': cannot cut Olmo2ForCausalLM: layer 0: Olmo2Attention.q_norm.weight .* units = neurons leaves"
    for units_ in ("both", "groups"):
        method: Any = sparing.parse(name).replace(units=units_)
        with pytest.raises(sparing.Error, match=words):
            method.fit(model, data) if method.card.needs != "nothing" else sparing.prune(model, method)
    method = sparing.parse(name).replace(units="neurons")
    if method.card.needs != "nothing":
        method = method.fit(model, data)
    small = agree(model, method.at(0.7, sparing.shape(model)).plan(model), tmp_path)
    assert all(layer.groups == 2 and layer.neurons < 48 for layer in View(small).layers)


def test_a_search_leaves_heads_whole_that_do_not_fall_apart() -> None:
    found = units(tiny("olmo2"), ("depth", "width"), multiple=8)
    assert {unit.levels for unit in found if unit.site == "attention"} == {(0, 2)}
    assert all(len(unit.levels) > 3 for unit in found if unit.site == "mlp")
    assert {unit.levels for unit in units(build("llama"), ("width",)) if unit.site == "attention"} == {(1, 2)}


@pytest.mark.parametrize("kind", ["params", "flops"])
def test_transposed_matrices_count(kind: str) -> None:
    """GPT-2's Conv1D as linear layers of the same sizes: attention 4 D^2, MLP 8 D^2."""
    model = tiny("gpt2")
    assert costs.weights(model) == sum(p.numel() for p in model.transformer.h.parameters())
    found = units(model, ("depth",))
    inputs = {"input_ids": prompt("llama", (7, 7))["input_ids"]}
    table = costs.profile(Elastic(model, found), inputs, kind, progress=False)
    attention, mlp = (table.levels[i][-1] for i in (0, 1))
    assert [unit.site for unit in found[:2]] == ["attention", "mlp"]
    D, total = 32, sum(p.numel() for p in model.transformer.h.parameters())
    if kind == "params":
        assert attention == pytest.approx((4 * D * D + 4 * D) / total)
        assert mlp == pytest.approx((8 * D * D + 5 * D) / total)
    else:
        assert 0.5 < attention / mlp < 0.6  # a half, and the products of queries and keys
        assert 6 * (attention + mlp) + table.rest == pytest.approx(1)


@pytest.mark.parametrize("spec", ["flap:p=0.5", "wanda-sp:p=0.5", "magnitude-sp:p=0.5", "flap:p=0.4,units=neurons"])
def test_one_layer_is_cut(spec: str, tmp_path: Path) -> None:
    model, method = tiny("one-layer"), sparing.parse(spec)
    if method.card.needs != "nothing":
        method = method.fit(model, [prompt("llama", (9, 9), side="none", seed=s) for s in (5, 6)])
    small = sparing.prune(model, method)
    batch = prompt("llama", (7, 5))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        with sparing.attach(model, method):
            want = model(**batch).logits[real]
        torch.testing.assert_close(small(**batch).logits[real], want, rtol=1e-4, atol=1e-5)
        again = sparing.from_pretrained(save_pretrained(small, tmp_path))
        torch.testing.assert_close(again(**batch).logits, small(**batch).logits, rtol=1e-5, atol=1e-6)


def test_one_layer_cannot_go() -> None:
    model = tiny("one-layer")
    fitted = sparing.parse("shortgpt").fit(model, [prompt("llama", (9, 9), side="none")])
    with pytest.raises(sparing.Error, match=r"shortgpt: .*1 layer"):
        sparing.prune(model, fitted)
    with pytest.raises(sparing.Error, match="no layer is left"):
        cut(model, Plan((None,)))

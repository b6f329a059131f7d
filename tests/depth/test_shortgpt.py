"""ShortGPT: block influence, which layers leave, what is left, and controls that are static cuts as well."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

import sparing
from sparing.depth.shortgpt import ShortGPT
from sparing.engine.surgery import LayerCut, Plan, cut
from sparing.engine.view import View
from sparing.grid.method import BudgetError, Method, Shape
from sparing.testing.models import LAYERS, build, prompt

SHAPE = Shape(LAYERS, 4, 2, 8, 32, 48)


def calibration(name: str = "llama") -> list[dict[str, torch.Tensor]]:
    return [prompt(name, (9, 4, 7), seed=seed) for seed in (5, 6)]


@functools.cache
def fitted(name: str = "llama") -> ShortGPT:
    return ShortGPT().fit(build(name), calibration(name))


def given(*influence: float, R: int | None = None) -> ShortGPT:
    return ShortGPT(R=R).with_state({"influence": torch.tensor(influence)})


def layers(method: ShortGPT, L: int = LAYERS) -> list[int]:
    return method.kept(L).nonzero().flatten().tolist()


def test_oracle_1_influence_is_one_minus_the_mean_cosine() -> None:
    """Token by token, from the hidden states that transformers gives out: the last one is behind the final norm."""
    model: Any = build("llama")
    model.model.norm.weight.data = torch.linspace(0.2, 3, 32)
    total, tokens = torch.zeros(LAYERS), 0
    for batch in calibration():
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states
        for row, column in batch["attention_mask"].nonzero().tolist():
            for layer in range(LAYERS):
                a, b = hidden[layer][row, column], hidden[layer + 1][row, column]
                total[layer] += 1 - a @ b / (a.norm() * b.norm())
            tokens += 1
    influence = ShortGPT().fit(model, calibration()).state["influence"]
    assert influence.dtype == torch.float32 and influence.shape == (LAYERS,)
    torch.testing.assert_close(influence, total / tokens, rtol=1e-4, atol=1e-5)


def test_the_final_norm_protects_a_last_layer_that_does_little() -> None:
    """As the released code has it. Before the norm the last layer would be the first to leave."""
    model: Any = build("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[-1].get_submodule(name).weight.data.zero_()
    removed = ShortGPT(R=LAYERS - 1).fit(model, calibration())
    assert LAYERS - 1 not in layers(removed)  # a norm that does not turn protects nothing
    model.model.norm.weight.data = torch.linspace(-1, 1, 32)
    assert LAYERS - 1 in layers(ShortGPT(R=2).fit(model, calibration()))


def test_oracle_2_a_layer_that_does_nothing_goes_first_and_is_not_missed() -> None:
    model: Any = build("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[3].get_submodule(name).weight.data.zero_()
    method = ShortGPT(R=LAYERS - 1).fit(model, calibration())
    assert abs(float(method.state["influence"][3])) < 1e-6
    assert layers(method) == [0, 1, 2, 4, 5]
    batch = prompt("llama")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(sparing.prune(model, method)(**batch).logits[real], model(**batch).logits[real])


def test_oracle_3_the_least_influential_leave_at_once() -> None:
    method = given(0.9, 0.2, 0.1, 0.3, 0.05, 0.4)
    assert [layers(method.replace(R=R)) for R in (6, 5, 4, 3, 2)] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 5],
        [0, 1, 3, 5],
        [0, 3, 5],
        [0, 5],
    ]
    assert given(0.2, 0.2, 0.3, 0.2, R=3).kept(4).tolist() == [True, True, True, False]  # of equal ones the earlier


def test_oracle_4_the_cut_runs_the_kept_layers_one_after_the_other() -> None:
    model: Any = build("llama")
    method = fitted().replace(R=3)
    small = sparing.prune(model, method)
    assert len(View(small)) == 3 and small.config.num_hidden_layers == 3  # type: ignore[union-attr]
    ids = prompt("llama", (8,))["input_ids"]
    decoder = model.model
    with torch.no_grad():
        hidden = decoder.embed_tokens(ids)
        rope = decoder.rotary_emb(hidden, position_ids=torch.arange(8)[None])
        causal = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
        for place in layers(method):
            hidden = decoder.layers[place](hidden, attention_mask=causal, position_embeddings=rope)
        want = model.lm_head(decoder.norm(hidden))
        torch.testing.assert_close(small(ids).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "phi3", "olmoe", "deepseek-v3", "qwen2.5-vl", "opt"])
def test_oracle_5_masked_equals_cut(name: str) -> None:
    model, batch = build(name), prompt(name, (7, 5))
    method = fitted(name).replace(R=3)
    small = sparing.prune(model, method)
    real = batch["attention_mask"].bool()
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [117, 118, 119]}
    with torch.no_grad():
        with sparing.attach(model, method):
            want, text = model(**batch).logits[real], model.generate(**batch, **options)
        torch.testing.assert_close(small(**batch).logits[real], want, rtol=1e-4, atol=1e-4)
        assert torch.equal(small.generate(**batch, **options), text)  # type: ignore[operator]


def test_oracle_6_all_layers_kept_is_dense() -> None:
    model, batch, method = build("llama"), prompt("llama"), fitted().at(1.0, SHAPE)
    assert method.R == LAYERS and method.plan(model) == Plan((LayerCut(),) * LAYERS)
    with torch.no_grad():
        assert torch.equal(sparing.prune(model, method)(**batch).logits, model(**batch).logits)


def test_oracle_7_kept_sets_are_nested() -> None:
    sets = [set(layers(fitted().replace(R=R))) for R in range(2, LAYERS + 1)]
    assert [len(one) for one in sets] == list(range(2, LAYERS + 1))
    assert all(less < more for less, more in itertools.pairwise(sets))


def test_oracle_8_padding_and_batching_do_not_count() -> None:
    rows = [
        {k: v[i : i + 1, batch["attention_mask"][i].bool()] for k, v in batch.items()}
        for batch in calibration()
        for i in range(3)
    ]
    again = ShortGPT().fit(build("llama"), rows)
    torch.testing.assert_close(again.state["influence"], fitted().state["influence"], rtol=0, atol=1e-5)


def static(control: Method) -> Plan:
    kept = control.layer_set(LAYERS)  # type: ignore[attr-defined]
    return Plan(tuple(LayerCut() if place in kept else None for place in range(LAYERS)))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2.5-vl"])
@pytest.mark.parametrize("kind", ["random", "uniform"])
def test_oracle_9_controls_are_static_cuts_of_as_many_layers(name: str, kind: str) -> None:
    """A control skips layers on the live model: prompt and answer alike it gives what a cut of them gives."""
    model, batch = build(name), prompt(name, (7, 5))
    control = fitted(name).replace(R=3).control(kind, SHAPE, seed=2)
    assert control.fields()["R"] == 3 and control.fields()["prompt"] is True
    small: Any = cut(model, static(control))
    real = batch["attention_mask"].bool()
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [117, 118, 119]}
    with torch.no_grad():
        with sparing.attach(model, control) as run:
            logits, text = model(**batch).logits[real], model.generate(**batch, **options)
        torch.testing.assert_close(logits, small(**batch).logits[real], rtol=2e-4, atol=2e-4)
        assert torch.equal(text, small.generate(**batch, **options))
    assert run.trace.share("depth") == 0.5  # of the prompt and of what was generated
    assert not torch.allclose(logits, model(**batch).logits[real], atol=1e-2)


def test_a_control_of_a_decode_method_leaves_the_prompt_alone() -> None:
    control = sparing.parse("unified-layer-skipping:S=2").control("random", SHAPE)
    assert control.fields()["prompt"] is False
    model, batch = build("llama"), prompt("llama")
    with torch.no_grad():
        dense = model(**batch).logits
        with sparing.attach(model, control):
            assert torch.equal(model(**batch).logits, dense)


def test_budgets() -> None:
    method = fitted()
    assert [method.at(keep, SHAPE).R for keep in (1.0, 0.8, 0.75, 0.5, 0.34)] == [6, 5, 4, 3, 2]
    assert len(layers(method)) == round(0.75 * LAYERS)  # the default
    assert int(given(*torch.rand(32).tolist()).kept(32).sum()) == 24
    with pytest.raises(BudgetError, match=r"keep = 0.2: shortgpt keeps at least 2 of 6 layers"):
        method.at(0.2, SHAPE)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(sparing.Error, match="needs calibration first"):
        sparing.attach(build("llama"), ShortGPT())
    with pytest.raises(sparing.Error, match="needs calibration first"):
        ShortGPT().plan(build("llama"))
    with pytest.raises(sparing.Error, match="shortgpt: R = 7: the model has 6 layers"):
        fitted().replace(R=7).plan(build("llama"))
    with pytest.raises(sparing.Error, match="fitted on another model: influence has 4 layers, not 6"):
        sparing.prune(build("llama"), given(0.1, 0.2, 0.3, 0.4))
    with pytest.raises(sparing.Error, match="R = 1: must be a whole number >= 2 or none"):
        ShortGPT(R=1)
    with pytest.raises(sparing.Error, match="calibration data is empty"):
        ShortGPT().fit(build("llama"), [])

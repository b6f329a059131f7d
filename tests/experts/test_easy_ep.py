"""EASY-EP: the oracles of its card, by number, and its controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparing
from sparing.engine.checkpoint import save_pretrained
from sparing.engine.experts import Visits, contributions, demonstrations, expert_statistics, observe_experts
from sparing.engine.surgery import masked
from sparing.engine.view import View
from sparing.experts.easy_ep import EasyEp
from sparing.testing.models import EXPERTS, LAYERS, MOE, TOP_K, build, prompt

NAMES = ("qwen3-moe", "olmoe", "mixtral", "deepseek-v3")


def texts(name: str, seed: int = 5, rows: int = 4) -> list[dict[str, Tensor]]:
    return [prompt(name, (9,) * rows, side="none", seed=seed + i) for i in range(2)]


def fitted(name: str, **fields: Any) -> EasyEp:
    return EasyEp(calibration="as-given", **fields).fit(build(name), texts(name))


def kept(method: EasyEp, model: Any) -> list[set[int]]:
    cuts = method.plan(model).layers
    return [set(range(EXPERTS)) if c is None or c.experts is None else set(c.experts.tolist()) for c in cuts]


def test_1_all_experts_are_bitwise_dense() -> None:
    model, batch = build("qwen3-moe"), prompt("qwen3-moe")
    method = fitted("qwen3-moe", M=EXPERTS)
    with torch.no_grad():
        dense = model(**batch).logits
        with sparing.attach(model, method):
            assert torch.equal(model(**batch).logits, dense)
        assert torch.equal(sparing.prune(model, method)(**batch).logits, dense)


@pytest.mark.parametrize("name", NAMES)
def test_2_mask_equals_removal(name: str) -> None:
    model, batch = build(name), prompt(name)
    method = fitted(name, M=6, even=True)
    with torch.no_grad(), sparing.attach(model, method):
        live = model(**batch).logits
        long = model.generate(**batch, max_new_tokens=4, do_sample=False)
    small = sparing.prune(model, method)
    with torch.no_grad():
        torch.testing.assert_close(small(**batch).logits, live, rtol=1e-5, atol=1e-5)
        assert torch.equal(small.generate(**batch, max_new_tokens=4, do_sample=False), long)


def test_3_worked_example() -> None:
    h, g = np.array([3.0, 4.0]), np.array([0.6, 0.4])
    e = np.array([[4.0, -3.0], [1.2, 1.6]])
    visits = Visits(
        hidden=torch.tensor(h[None]),
        index=torch.tensor([[0, 1]]),
        gate=torch.tensor(g[None]),
        norm=torch.tensor(np.linalg.norm(e, axis=1)[None]).float(),
        routed=torch.tensor((g[:, None] * e).sum(0)[None]),
    )
    assert visits.norm.tolist() == [[5.0, 2.0]]
    np.testing.assert_allclose(contributions(visits)[0].numpy(), [0.335347, 0.089426], atol=1e-6)


def test_4_a_token_that_is_only_lengthened_contributes_nothing() -> None:
    hidden = torch.randn(3, 8)
    visits = Visits(hidden, torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2), torch.ones(3, 2), 0.7 * hidden)
    assert contributions(visits).abs().max() < 1e-6
    turned = Visits(hidden, visits.index, visits.gate, visits.norm, -0.7 * hidden.flip(-1))
    assert contributions(turned).min() > 1e-3


def test_5_gates_are_those_of_the_forward_pass() -> None:
    """After normalisation and scaling: what the experts module was called with; a factor moves s_t, not c's order."""
    model = build("deepseek-v3")
    factor = View(model).layers[2].experts.router.routed_scaling_factor  # type: ignore[union-attr]
    found: dict[int, Visits] = {}
    observe_experts(model, texts("deepseek-v3")[:1], found.__setitem__)
    seen = found[2]
    torch.testing.assert_close(seen.gate.sum(1), torch.full((len(seen.gate),), float(factor)))
    more = Visits(seen.hidden, seen.index, 3 * seen.gate, seen.norm, 3 * seen.routed)
    order = (seen.gate * seen.norm).argsort(1)
    assert torch.equal(order, (more.gate * more.norm).argsort(1))
    assert not torch.allclose(contributions(more), 3 * contributions(seen))


def test_observed_norms_and_outputs_are_those_of_the_experts() -> None:
    model, batch = build("qwen3-moe"), prompt("qwen3-moe", (7, 4))
    layer = View(model).layers[3]
    assert layer.experts is not None and layer.mlp_norm is not None
    module: Any = layer.experts.module
    for norm in (v.mlp_norm for v in View(model).layers):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)  # type: ignore[union-attr, arg-type]
    streams: list[Tensor] = []
    hook = layer.mlp_norm.register_forward_pre_hook(lambda m, args: streams.append(args[0].detach()))
    found: dict[int, Visits] = {}
    observe_experts(model, [batch], found.__setitem__)
    hook.remove()
    seen = found[3]
    assert len(seen.hidden) == 11  # padding is left out
    assert torch.equal(seen.hidden, streams[0][batch["attention_mask"].bool()])  # the stream itself, before its norm
    with torch.no_grad():
        x = layer.mlp_norm(seen.hidden)
        assert not torch.allclose(x, seen.hidden, atol=0.1)
        for row, slot in ((0, 0), (6, 2), (10, 1)):
            e = int(seen.index[row, slot])
            gate, up = (module.gate_up_proj[e] @ x[row]).chunk(2)
            out = module.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
            torch.testing.assert_close(out.norm(), seen.norm[row, slot])
        torch.testing.assert_close(layer.mlp(x[None])[0], seen.routed, rtol=1e-5, atol=1e-6)  # type: ignore[misc]


def test_score_by_hand() -> None:
    """I_i = sum_t s_t g_{i,t} ||e_{i,t}|| of one layer, from the weights of the model and nothing of ours."""
    model, batch = build("mixtral"), prompt("mixtral", (9, 6))
    block: Any = model.model.layers[2]
    torch.nn.init.uniform_(block.post_attention_layernorm.weight, 0.5, 2.0)
    held: dict[str, Tensor] = {}
    hook = block.post_attention_layernorm.register_forward_pre_hook(lambda m, args: held.update(h=args[0].detach()))
    with torch.no_grad():
        model(**batch)
        hook.remove()
        h = held["h"][batch["attention_mask"].bool()]
        x = block.post_attention_layernorm(h)
        probability = (x @ block.mlp.gate.weight.T).softmax(-1)
        gates, chosen = probability.topk(TOP_K)
        gates = gates / gates.sum(-1, keepdim=True)
        score = torch.zeros(EXPERTS, dtype=torch.double)
        for t in range(len(h)):
            outputs = []
            for e in chosen[t].tolist():
                gate, up = (block.mlp.experts.gate_up_proj[e] @ x[t]).chunk(2)
                outputs.append(block.mlp.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
            after = h[t] + sum(g * out for g, out in zip(gates[t], outputs))
            turned = 1 - float(h[t] @ after / h[t].norm() / after.norm())
            for e, g, out in zip(chosen[t].tolist(), gates[t].tolist(), outputs):
                score[e] += turned * g * float(out.norm())
    torch.testing.assert_close(expert_statistics(model, [batch])["score"][2], score, rtol=1e-4, atol=1e-6)


def test_6_scores_add_over_samples_in_any_order() -> None:
    model = build("olmoe")
    a, b = texts("olmoe", 5), texts("olmoe", 50)
    parts = [expert_statistics(model, data) for data in (a, b)]
    for together in (expert_statistics(model, [*a, *b]), expert_statistics(model, [*b, *a])):
        for key, value in together.items():
            torch.testing.assert_close(value, parts[0][key] + parts[1][key])


def test_7_mixed_score_does_not_see_the_scale_of_a_domain() -> None:
    model = build("qwen3-moe")
    method = EasyEp(calibration="as-given", M=4).fit(model, {"a": texts("qwen3-moe", 5), "b": texts("qwen3-moe", 80)})
    scaled = {k: v * (1000.0 if k.startswith("a.") else 1.0) for k, v in method.state.items()}
    assert kept(method, model) == kept(method.with_state(scaled), model)
    alone = [EasyEp(calibration="as-given", M=4).fit(model, texts("qwen3-moe", s)).mixed("score") for s in (5, 80)]
    torch.testing.assert_close(method.mixed("score"), (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3"])
def test_8_fewer_experts_are_a_subset(name: str) -> None:
    model, method = build(name), fitted(name)
    more = kept(method.replace(M=8, even=name == "deepseek-v3"), model)
    less = kept(method.replace(M=6, even=name == "deepseek-v3"), model)
    assert all(b <= a for a, b in zip(more, less, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_9_no_token_receives_a_removed_expert_and_gates_keep_their_total(name: str) -> None:
    model, batch = build(name), prompt(name, (9, 6))
    method = fitted(name, M=6, even=True)
    allowed = kept(method, model)

    def calls() -> dict[int, tuple[Tensor, Tensor]]:
        out: dict[int, tuple[Tensor, Tensor]] = {}
        handles = [
            v.experts.module.register_forward_pre_hook(lambda m, a, i=v.index: out.__setitem__(i, (a[1], a[2])))
            for v in View(model).layers
            if v.experts
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        return out

    dense = calls()
    with sparing.attach(model, method):
        cut = calls()
    for layer, (index, gate) in cut.items():
        assert set(index.flatten().tolist()) <= allowed[layer]
        assert all(len(set(row)) == TOP_K for row in index.tolist())
        if name != "olmoe":  # its gates are not normalised: survivors share out the whole softmax
            torch.testing.assert_close(gate.sum(1), dense[layer][1].sum(1))


def test_own_output_is_sampled_from_the_prompt_and_repeatable() -> None:
    model = build("qwen3-moe")
    seen: list[Tensor] = []
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda m, a, k: seen.append(a[0].shape), with_kwargs=True)
    )
    data = [
        {**batch, "labels": batch["input_ids"].clone().index_fill(1, torch.arange(4), -100)}
        for batch in texts("qwen3-moe")
    ]
    first = EasyEp(samples=6).fit(model, data)
    handle.remove()
    again = EasyEp(samples=6).fit(model, data)
    given = EasyEp(samples=6, calibration="as-given").fit(model, data)
    assert all(torch.equal(first.state[k], again.state[k]) for k in first.state)
    assert not torch.equal(first.state["text.score"], given.state["text.score"])
    assert first.state["text.count"].sum(1).tolist() == [6 * 9 * TOP_K] * LAYERS  # 6 demonstrations of 9 tokens
    assert [s[1] for s in seen].count(4) == 2  # two prompts of 4 tokens were read, then continued


def test_own_output_is_drawn_and_not_the_likeliest() -> None:
    """At temperature 1 from the whole distribution: the surprise of what is drawn is the entropy on average."""
    model = build("qwen3-moe")
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    row, rows = prompt("qwen3-moe", (5,), side="none", seed=9)["input_ids"], 2000
    with torch.no_grad():
        share = model(row[:, :4]).logits[0, -1].softmax(-1)
    labels = torch.where(torch.arange(5) == 4, row, -100).expand(rows, -1)
    data = [{"input_ids": row.expand(rows, -1), "attention_mask": torch.ones_like(labels), "labels": labels}]
    (shown,) = demonstrations(model, data, rows, own=True)
    ids = shown["input_ids"]
    assert ids.shape == (rows, 5) and torch.equal(ids[:, :4], row[:, :4].expand(rows, -1))
    entropy = float(-(share * share.log()).sum())
    assert 1 < entropy < 4.5  # neither certain nor flat, so a temperature would be seen
    assert float(-share[ids[:, 4]].log().mean()) == pytest.approx(entropy, abs=0.1)
    (again,) = demonstrations(model, data, rows, own=True)
    (other,) = demonstrations(model, data, rows, own=True, seed=1)
    assert torch.equal(again["input_ids"], ids) and not torch.equal(other["input_ids"], ids)
    (given,) = demonstrations(model, data, 3, own=False)
    assert torch.equal(given["input_ids"], row.expand(3, -1))


def test_own_output_ends_where_the_model_ends_it() -> None:
    """The end of text is watched, what comes after it is padding."""
    model = build("qwen3-moe")
    row = prompt("qwen3-moe", (9,), side="none", seed=9)["input_ids"]
    labels = torch.where(torch.arange(9) >= 4, row, -100).expand(40, -1)
    data = [{"input_ids": row.expand(40, -1), "attention_mask": torch.ones_like(labels), "labels": labels}]
    ends = list(range(2, 120, 2))
    model.generation_config.eos_token_id = ends
    (shown,) = demonstrations(model, data, 40, own=True)
    for ids, mask in zip(shown["input_ids"].tolist(), shown["attention_mask"].tolist(), strict=True):
        first = next((i for i in range(4, len(ids)) if ids[i] in ends), len(ids) - 1)
        assert mask == [1] * (first + 1) + [0] * (len(ids) - first - 1)
    assert 0 < float(shown["attention_mask"].float().mean()) < 1


def test_importance_is_the_score_and_the_card_says_what_it_costs() -> None:
    model = build("qwen3-moe")
    tables = {name: torch.rand(LAYERS, EXPERTS, dtype=torch.double) for name in ("score", "count", "gate")}
    method = EasyEp(M=4).with_state({f"text.{name}": table for name, table in tables.items()})
    expected = [set(row.topk(4).indices.tolist()) for row in tables["score"]]
    assert kept(method, model) == expected
    card = EasyEp.card
    assert (card.axis, card.kind, card.phase, card.saves, card.needs) == (
        "experts",
        "surgery",
        "static",
        "memory",
        "calibration",
    )
    assert card.controls == ("random", "frequency", "gate") and not card.is_control and EasyEp.name == "easy-ep"


def test_controls_keep_as_many_and_others() -> None:
    model = build("qwen3-moe")
    method, shape = fitted("qwen3-moe", M=4), sparing.shape(model)
    count = method.state["text.count"]
    frequency = method.control("frequency", shape)
    for layer, chosen in enumerate(kept(frequency, model)):  # type: ignore[arg-type]
        assert count[layer][list(chosen)].min() >= count[layer][[e for e in range(EXPERTS) if e not in chosen]].max()
    sets = [kept(method.control(k, shape, seed), model) for k, seed in (("gate", 0), ("random", 0), ("random", 1))]  # type: ignore[arg-type]
    assert all(len(s) == 4 for chosen in sets for s in chosen)
    assert sets[1] != sets[2] != sets[0]


def test_at_and_refusals() -> None:
    shape = sparing.shape(build("mixtral"))
    assert (shape.experts, shape.top_k) == (EXPERTS, TOP_K)
    assert EasyEp().at(0.5, shape).M == 6
    with pytest.raises(sparing.BudgetError, match="at least the 3 experts"):
        EasyEp().at(0.2, shape)
    with pytest.raises(sparing.Error, match="M = 13: a layer has 12"):
        fitted("mixtral", M=13).plan(build("mixtral"))
    with pytest.raises(sparing.Error, match="M = 5, even = true: must be a multiple of the router's 2 groups"):
        fitted("deepseek-v3", M=5, even=True).plan(build("deepseek-v3"))
    with pytest.raises(sparing.Error, match="needs calibration first"):
        EasyEp().plan(build("mixtral"))
    with pytest.raises(sparing.Error, match="no experts found"):
        EasyEp().fit(build("llama"), [prompt("llama")])
    with pytest.raises(sparing.Error, match="calibration data is empty"):
        EasyEp().fit(build("mixtral"), [])


def test_pruned_checkpoint_is_smaller_on_disk(tmp_path: Any) -> None:
    model = build("qwen3-moe")
    small = sparing.prune(model, fitted("qwen3-moe", M=4))
    for what, folder in ((model, "a"), (small, "b")):
        save_pretrained(what, tmp_path / folder)
    sizes = [sum(f.stat().st_size for f in (tmp_path / d).glob("*.safetensors")) for d in ("a", "b")]
    experts = LAYERS * EXPERTS * 3 * 24 * 32 * 4
    assert sizes[0] - sizes[1] == pytest.approx(experts * 2 / 3 + LAYERS * 8 * 32 * 4, rel=0.05)


@pytest.mark.parametrize("name", MOE)
def test_masking_leaves_no_trace(name: str) -> None:
    model, batch = build(name), prompt(name)
    method = fitted(name, M=6, even=True)
    with torch.no_grad():
        dense = model(**batch).logits
        with pytest.raises(RuntimeError), masked(model, method.plan(model)):
            raise RuntimeError
        assert torch.equal(model(**batch).logits, dense)
    assert all("forward" not in m.__dict__ for m in model.modules())

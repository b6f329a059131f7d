"""FiRST: the oracles of its card, by number, then budgets, controls and refusals."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparing
from sparing.depth.first import First, _Routers, _Soft, decide, tally
from sparing.engine.calls import cache_in
from sparing.grid.method import BudgetError, Shape
from sparing.testing.models import LAYERS, VOCAB, build, prompt, single

D = 32
SHAPE = Shape(LAYERS, 4, 2, 8, D, 48)
OPTIONS: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def routers(seed: int = 0, scale: float = 8.0, bias: float = 0.0) -> dict[str, Tensor]:
    """Routers whose votes differ between prompts and layers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "router.weight": scale * torch.randn(LAYERS, D, generator=generator),
        "router.bias": torch.full((LAYERS,), bias),
        "router.mean": torch.rand(LAYERS, generator=generator),
    }


def fixed(*p: float) -> dict[str, Tensor]:
    """Routers that say p (0 or 1) for every token of a layer."""
    p_L = torch.tensor(p)
    return {"router.weight": torch.zeros(LAYERS, D), "router.bias": 200 * p_L - 100, "router.mean": p_L}


def constant(*tokens: int, length: int = 5) -> Tensor:
    """Prompts of one token over and over: all rows of one have the same state, so they vote alike."""
    return torch.tensor(tokens)[:, None].expand(-1, length)


def votes(model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """v and mean p of one unpadded prompt (1, T), each (L,), from the dense model's states, token by token."""
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    v, mean = [], []
    for layer in range(LAYERS):
        h_TD = states[layer][0]
        logits = [float(state["router.weight"][layer] @ (h / h.norm()) + state["router.bias"][layer]) for h in h_TD]
        v.append(sum(x > 0 for x in logits) / len(logits))
        mean.append(float(torch.tensor(logits).sigmoid().mean()))
    return torch.tensor(v), torch.tensor(mean)


def expected_set(model: PreTrainedModel, ids: Tensor, method: First) -> tuple[int, ...]:
    """K of one unpadded prompt, spelled out."""
    v, mean = votes(model, ids, dict(method.state))
    inner = range(1, LAYERS - 1)
    if method.R is None:
        chosen = [i for i in inner if v[i] >= 0.5]
    else:
        chosen = sorted(inner, key=lambda i: (-float(v[i]), -float(mean[i]), i))[: method.R - 2]
    return tuple(sorted({0, LAYERS - 1, *chosen}))


def kept_sets(model: PreTrainedModel, method: First, batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """K of each sequence, as the method decided it in a prefill."""
    with torch.no_grad(), sparing.attach(model, method) as run:
        drops = vars(cache_in(model(**batch))[1])["sparing"][run.number]["first.drops"]
    rows = len(batch["input_ids"])
    drop_BL = torch.stack([torch.as_tensor(d).expand(rows) for d in drops], 1)
    return [tuple((~row).nonzero().flatten().tolist()) for row in drop_BL]


def soft_logits(model: PreTrainedModel, state: dict[str, Tensor], ids: Tensor, answer_from: int) -> Tensor:
    soft = _Soft(state["router.weight"], state["router.bias"], {})
    with sparing.attach(model, soft, prompt=answer_from, warn=False):
        return model(ids, use_cache=False).logits


# --------------------------------------------------------------------------- 1, 2: soft and hard execution


def test_oracle_1_p_one_is_the_base_model_in_decoding(llama: PreTrainedModel) -> None:
    batch, method = prompt("llama"), First().with_state(fixed(*[1.0] * LAYERS))
    with torch.no_grad():
        dense, long = llama(**batch).logits, llama.generate(**batch, max_new_tokens=4, **OPTIONS)
        with sparing.attach(llama, method, prompt=4, warn=False):
            assert torch.equal(llama(**batch).logits, dense)
        with sparing.attach(llama, method, warn=False):
            now = llama.generate(**batch, max_new_tokens=4, **OPTIONS)
    assert torch.equal(torch.stack(now.logits), torch.stack(long.logits))


def test_oracle_1_p_one_is_the_base_model_in_training(llama: PreTrainedModel) -> None:
    ids = prompt("llama", (9, 9), side="none")["input_ids"]
    with torch.no_grad():
        soft = soft_logits(llama, fixed(*[1.0] * LAYERS), ids, 4)
        # the prompt's rows and the generated ones alike; h + 1 (F(h) - h) rounds where F(h) does not
        torch.testing.assert_close(soft, llama(ids).logits, rtol=1e-5, atol=1e-5)
        half = soft_logits(llama, {**fixed(*[1.0] * LAYERS), "router.bias": torch.zeros(LAYERS)}, ids, 4)
    torch.testing.assert_close(half[:, :4], soft[:, :4], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(half[:, 4:], soft[:, 4:], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("seed", [0, 1])
def test_oracle_2_certain_routers_make_soft_and_hard_equal(llama: PreTrainedModel, seed: int) -> None:
    """Prompts of one repeated token have one state, so that p is 0 or 1 for a whole prompt, unlike in its neighbour."""
    ids = torch.cat([constant(7, 50, 90), prompt("llama", (4, 4, 4), side="none")["input_ids"]], 1)
    state = routers(seed, scale=1e6)
    method = First().with_state(state)
    sets = kept_sets(llama, method, {"input_ids": ids[:, :5]})
    assert len(set(sets)) > 1, sets
    with torch.no_grad():
        soft = soft_logits(llama, state, ids, 5)
        with sparing.attach(llama, method, prompt=5, warn=False):
            torch.testing.assert_close(llama(ids).logits, soft, **CLOSE)
        assert not torch.allclose(llama(ids).logits, soft, rtol=0.1, atol=0.1)


# --------------------------------------------------------------------------- 3: the vote

P = torch.tensor([[0.9, 0.2, 0.6], [0.8, 0.4, 0.4], [0.7, 0.45, 0.55]])  # tokens x layers


def test_oracle_3_worked_vote() -> None:
    padded = torch.cat([P, torch.full((2, 3), 0.99)])  # padding does not vote
    prompt_BN = torch.tensor([[True, True, True, False, False]])
    found = [tally(padded[None, :, layer], prompt_BN) for layer in range(3)]
    vote_BL, mean_BL = (torch.stack(x, 1) for x in zip(*found))
    torch.testing.assert_close(vote_BL, torch.tensor([[1, 0, 2 / 3]]))
    torch.testing.assert_close(mean_BL, torch.tensor([[0.8, 0.35, 0.5167]]), rtol=0, atol=1e-4)
    assert decide(vote_BL, mean_BL, None).tolist() == [[True, False, True]]
    # the same three as inner layers, between ends that nobody wants
    vote_BL, mean_BL = (torch.nn.functional.pad(x, (1, 1)) for x in (vote_BL, mean_BL))
    assert decide(vote_BL, mean_BL, None).tolist() == [[True, True, False, True, True]]
    assert decide(vote_BL, mean_BL, 3).tolist() == [[True, True, False, False, True]]
    assert decide(vote_BL, mean_BL, 2).tolist() == [[True, False, False, False, True]]


def test_oracle_3_ties_go_to_the_mean_then_to_the_lower_layer() -> None:
    vote = torch.tensor([[0.0, 0.5, 0.5, 0.5, 0.75, 0.0]]).repeat(2, 1)
    mean = torch.tensor([[0.9, 0.3, 0.6, 0.5, 0.1, 0.9], [0.9, 0.4, 0.4, 0.4, 0.1, 0.9]])
    assert [row.nonzero().flatten().tolist() for row in decide(vote, mean, 4)] == [[0, 2, 4, 5], [0, 1, 4, 5]]
    assert decide(vote, mean, None).tolist() == [[True] * 6] * 2  # a half is a majority


def test_oracle_3_the_model_s_own_votes(llama: PreTrainedModel) -> None:
    """The method's sets against votes counted token by token from the dense model's states."""
    batch = prompt("llama", (9, 4, 6), seed=3)
    for method in (First().with_state(routers(1)), First(R=4).with_state(routers(2))):
        sets = kept_sets(llama, method, batch)
        assert sets == [expected_set(llama, single("llama", batch, i)["input_ids"], method) for i in range(3)]
        assert len(set(sets)) > 1, sets
        assert method.R is None or {len(s) for s in sets} == {4}


def test_without_a_prompt_no_layer_is_voted_out() -> None:
    vote, mean = tally(torch.full((1, 3), 0.1), torch.zeros(1, 3, dtype=torch.bool))
    assert vote.tolist() == mean.tolist() == [1.0]


# --------------------------------------------------------------------------- 4: gradients


def labelled_batch(answer_from: int = 5, rows: int = 1) -> dict[str, Tensor]:
    ids = prompt("llama", (9,) * rows, side="none", seed=2)["input_ids"]
    return {"input_ids": ids, "labels": torch.where(torch.arange(9) >= answer_from, ids, -100)}


def training(method: First, model: PreTrainedModel | None = None, bias: float = 0.3) -> _Routers:
    made = _Routers(build("llama") if model is None else model, method)
    with torch.no_grad():
        made.weight.copy_(routers(4, scale=2.0)["router.weight"])
        made.bias.fill_(bias)
    return made


def test_oracle_4_the_gradient_of_p_is_what_the_layer_does(llama: PreTrainedModel) -> None:
    """d <g, h^{l+1}> / d c_l = <g, F(h) - h> mean p (1 - p); F(h) and h from passes with p = 1 and p = 0 there."""
    ids, layer = labelled_batch()["input_ids"], 2
    weight, base = torch.zeros(LAYERS, D), torch.full((LAYERS,), 0.4)

    def after(bias_L: Tensor) -> Tensor:
        seen = []
        hook = llama.model.layers[layer + 1].register_forward_pre_hook(
            lambda m, args, kw: seen.append(args[0]), with_kwargs=True
        )
        try:
            soft_logits(llama, {"router.weight": weight, "router.bias": bias_L}, ids, 5)
        finally:
            hook.remove()
        return seen[0]

    bias = base.clone().requires_grad_()
    g = torch.randn(1, 9, D)
    (g * after(bias)).sum().backward()
    with torch.no_grad():
        one, none = (after(base.index_fill(0, torch.tensor(layer), value)) for value in (100.0, -100.0))
    p = torch.sigmoid(torch.tensor(0.4))
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad[layer], (g * (one - none)).sum() * p * (1 - p), rtol=1e-4, atol=1e-4)
    assert float(bias.grad[layer].abs()) > 0.01 and float(bias.grad[layer + 1 :].abs().sum()) == 0


def test_oracle_4_a_layer_that_does_nothing_learns_nothing_from_ce() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    made = training(First(lam=0, alpha=0), model)
    made(labelled_batch()).backward()
    assert made.bias.grad is not None and made.weight.grad is not None
    inner = [1, 3, 4]
    assert float(made.bias.grad[2]) == 0 and float(made.weight.grad[2].abs().sum()) == 0
    assert bool((made.bias.grad[inner] != 0).all())
    assert float(made.bias.grad[[0, -1]].abs().sum()) == 0  # the ends are forced


def test_oracle_4_the_terms_of_use(llama: PreTrainedModel) -> None:
    """lam and alpha against their formulas, token by token; T is the prompt's length, L counts the forced ends."""
    batch, L, T = labelled_batch(), LAYERS, 5

    def gradients(**options: float) -> tuple[Tensor, Tensor]:
        made = training(First(**options))  # type: ignore[arg-type]
        made(batch).backward()
        assert made.weight.grad is not None and made.bias.grad is not None
        return made.weight.grad, made.bias.grad

    plain = gradients(lam=0, alpha=0)
    lam = [a - b for a, b in zip(gradients(lam=7.0, alpha=0), plain)]
    excess = [a - b for a, b in zip(gradients(lam=0, alpha=5.0, rho=0.25), plain)]
    none = [a - b for a, b in zip(gradients(lam=0, alpha=5.0, rho=1.0), plain)]
    with torch.no_grad():
        states = llama(batch["input_ids"][:, :T], output_hidden_states=True).hidden_states
    weight_LD = routers(4, scale=2.0)["router.weight"]
    use = [1.0, 1.0]
    want: list[tuple[int, Tensor, Tensor]] = []
    for layer in range(1, L - 1):
        unit_TD = states[layer][0] / states[layer][0].norm(dim=1, keepdim=True)
        p_T = torch.sigmoid(unit_TD @ weight_LD[layer] + 0.3)
        logit_T = p_T * (1 - p_T) / (L * T)  # d mean use / d logit of each token
        use.append(float(p_T.mean()))
        want.append((layer, (logit_T[:, None] * unit_TD).sum(0), logit_T.sum()))
    over = sum(use) / L - 0.25
    for layer, of_w, of_c in want:
        for factor, (got_w, got_c) in ((7.0, lam), (5.0 * 2 * over, excess)):
            torch.testing.assert_close(got_w[layer], factor * of_w, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(got_c[layer], factor * of_c, rtol=1e-3, atol=1e-4)
    assert all(float(x.abs().sum()) == 0 for x in none)


# --------------------------------------------------------------------------- 5, 6, 7: decisions and decoding


@pytest.mark.parametrize("R", [None, 4])
def test_oracle_5_padding_and_batch_do_not_change_a_decision(llama: PreTrainedModel, R: int | None) -> None:
    method = First(R=R).with_state(routers(1))
    alone = kept_sets(llama, method, prompt("llama", (6,), seed=8))
    for side, lengths in (("left", (6, 11)), ("right", (6, 11)), ("left", (6, 9, 3, 7)), ("none", (6, 6))):
        batch = prompt("llama", lengths, side=side, seed=9)
        first = prompt("llama", (6,), seed=8)["input_ids"][0]
        here = batch["attention_mask"][0].bool()
        batch["input_ids"][0, here] = first
        assert kept_sets(llama, method, batch)[0] == alone[0], (side, lengths)


def test_oracle_5_a_decision_lasts_as_long_as_the_sequence(llama: PreTrainedModel) -> None:
    method = First(R=3).with_state(routers(1))
    ran = []
    hooks = [
        layer.mlp.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
        for i, layer in enumerate(llama.model.layers)
    ]
    ids = prompt("llama", (7,), seed=4)["input_ids"]
    kept = expected_set(llama, ids, method)
    ran.clear()
    with torch.no_grad(), sparing.attach(llama, method) as run:
        run.checks_cache = True
        out = llama.generate(ids, max_new_tokens=6, **OPTIONS)
    for hook in hooks:
        hook.remove()
    assert ran == [*range(LAYERS), *kept * 5]
    assert run.trace.share("depth", phase="decode") == 0.5
    held = [getattr(layer, "is_initialized", True) for layer in out.past_key_values.layers]
    assert held == [i in kept for i in range(LAYERS)]  # a dropped layer gives its prompt cache back


def two_pass(model: PreTrainedModel, ids: Tensor, answer: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Written out: the prompt through all layers, new tokens through K only, on the prompt's keys."""
    decoder = model.model
    P, both = ids.shape[1], torch.cat([ids, answer], 1)
    T = both.shape[1]
    hidden = decoder.embed_tokens(both)
    rope = decoder.rotary_emb(hidden, position_ids=torch.arange(T)[None])
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    for i, layer in enumerate(decoder.layers):
        out = layer(hidden, attention_mask=mask, position_embeddings=rope)
        hidden = out if i in kept else torch.cat([out[:, :P], hidden[:, P:]], 1)
    return model.lm_head(decoder.norm(hidden))


@pytest.mark.parametrize("R", [None, 3, 5])
def test_oracle_6_cached_decoding_equals_a_recomputation(llama: PreTrainedModel, R: int | None) -> None:
    method = First(R=R).with_state(routers(1))
    batch = prompt("llama", (7, 4))
    with torch.no_grad():
        with sparing.attach(llama, method, warn=False):
            out = llama.generate(**batch, max_new_tokens=6, **OPTIONS)
        for row in range(2):
            alone = single("llama", batch, row)["input_ids"]
            kept = expected_set(llama, alone, method)
            want = two_pass(llama, alone, out.sequences[row : row + 1, 7:], kept)[0, alone.shape[1] - 1 : -1]
            torch.testing.assert_close(torch.stack(out.logits, 1)[row], want, **CLOSE)
            if len(kept) < LAYERS:
                dense = llama(torch.cat([alone, out.sequences[row : row + 1, 7:]], 1)).logits[
                    0, alone.shape[1] - 1 : -1
                ]
                assert not torch.allclose(dense, want, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("R", [None, 4])
def test_oracle_7_prompts_with_other_votes_in_one_batch(llama: PreTrainedModel, R: int | None) -> None:
    method = First(R=R).with_state(routers(1))
    batch = prompt("llama", (7, 4, 6), seed=3)
    assert len(set(kept_sets(llama, method, batch))) == 3
    with torch.no_grad(), sparing.attach(llama, method, warn=False):
        together = llama.generate(**batch, max_new_tokens=5, **OPTIONS)
        for row in range(3):
            alone = llama.generate(**single("llama", batch, row), max_new_tokens=5, **OPTIONS)
            assert torch.equal(together.sequences[row, 7:], alone.sequences[0, -5:])
            torch.testing.assert_close(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0], **CLOSE)


# --------------------------------------------------------------------------- 8, 9: training


def test_oracle_8_a_larger_lambda_never_means_more_use() -> None:
    model, data = build("llama"), [labelled_batch(rows=2)]
    uses = []
    for lam in (0.0, 0.3, 30.0):
        method = First(lam=lam, alpha=0, rank=0, router_lr=0.5)
        fitted = method.fit(model, data, epochs=30, progress=False)
        uses.append(float(fitted.state["router.mean"].mean()))
    assert uses == sorted(uses, reverse=True), uses
    assert uses[0] > uses[-1] + 0.1 and uses[-1] == pytest.approx(2 / LAYERS, abs=0.05)  # the ends are left


def test_oracle_9_a_fresh_lora_changes_nothing(llama: PreTrainedModel) -> None:
    data = [labelled_batch(rows=2)]
    plain = First(R=3, rank=0).fit(llama, data, progress=False)
    fresh = First(R=3).fit(llama, data, lr=0.0, progress=False)  # B stays where it starts
    moved = First(R=3).fit(llama, data, lr=0.1, progress=False)
    names = [k for k in fresh.state if k.endswith(".B")]
    assert len(names) == 2 * LAYERS and all(float(fresh.state[k].abs().sum()) == 0 for k in names)
    assert all(float(fresh.state[k[:-1] + "A"].abs().sum()) > 0 for k in names)
    seen = []
    with torch.no_grad():
        for method in (plain, fresh, moved):
            assert all(torch.equal(method.state[k], plain.state[k]) for k in plain.state)
            with sparing.attach(llama, method, prompt=5):
                seen.append(llama(**data[0]).logits)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2], rtol=1e-2, atol=1e-2)


def test_fit_learns_which_layer_to_drop_and_repairs() -> None:
    """One inner layer does nothing: its router alone is free to fall, and LoRA lowers the hard loss."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = [labelled_batch(rows=4)]
    method = First(R=LAYERS - 1, lam=0.3, router_lr=0.3)
    routed = method.replace(rank=0).fit(model, data, epochs=25, progress=False)
    assert kept_sets(model, routed, {"input_ids": data[0]["input_ids"][:, :5]}) == [(0, 1, 2, 4, 5)] * 4
    assert int(routed.state["router.mean"].argmin()) == 3

    method = First(R=3, router_lr=0.3)
    fitted = method.fit(model, data, epochs=25, lr=1e-2, progress=False)
    plain = fitted.with_state({k: v for k, v in fitted.state.items() if k.startswith("router.")})
    losses = []
    for one in (plain, fitted):
        with torch.no_grad(), sparing.attach(model, one, prompt=5):
            losses.append(float(model(**data[0]).loss))
    assert losses[1] < 0.8 * losses[0], losses
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters()) and all(p.requires_grad for p in model.parameters())
    assert fitted.fitted_on["layers"] == LAYERS


def test_router_targets() -> None:
    model = build("llama")
    assert _Routers(model, First(R=3))._rho == 0.5
    assert _Routers(model, First())._rho == 0.75
    assert _Routers(model, First(R=3, rho=0.2))._rho == 0.2
    made = _Routers(model, First())
    assert float(made.weight.detach().abs().sum()) == 0 and made.bias.tolist() == [2.0] * LAYERS


# --------------------------------------------------------------------------- budgets and controls


def with_lora(R: int | None) -> First:
    """Random routers and a random LoRA on one weight."""
    name = "lora.model.layers.0.self_attn.q_proj.weight"
    lora = {f"{name}.A": torch.randn(2, D), f"{name}.B": torch.randn(D, 2), "lora.scale": torch.tensor(2.0)}
    return First(R=R).with_state({**routers(1), **lora})


def test_budgets() -> None:
    assert First().at(0.5, SHAPE).R == 3 and First().at(1, SHAPE).R == LAYERS
    with pytest.raises(BudgetError, match=r"keep = 0\.2: first keeps at least 2 of 6 layers, 0\.333"):
        First().at(0.2, SHAPE)
    bare = First(R=4).with_state(routers())  # no LoRA: the routers serve every budget
    assert bare.at(0.5, SHAPE).R == 3 and bare.at(0.5, SHAPE).state
    fitted = with_lora(4)
    assert fitted.at(4 / 6, SHAPE) == fitted and fitted.at(4 / 6, SHAPE).state
    with pytest.raises(
        BudgetError, match=r"keep = 0\.5: the LoRA of this first was trained for R = 4, 0\.667; .* R = 3"
    ):
        fitted.at(0.5, SHAPE)
    with pytest.raises(BudgetError, match="trained for the majority vote"):
        with_lora(None).at(0.5, SHAPE)


def test_a_lora_acts_on_prompts_and_is_not_trained_where_nothing_is_skipped(llama: PreTrainedModel) -> None:
    batch = prompt("llama")
    with torch.no_grad():
        dense = llama(**batch).logits
        with sparing.attach(llama, with_lora(4)):  # the prompt's keys are what the generated tokens read
            assert not torch.allclose(llama(**batch).logits, dense, rtol=1e-2, atol=1e-2)
    data = [labelled_batch()]
    assert "lora.scale" in First(R=LAYERS - 1).fit(llama, data, progress=False).state
    assert "lora.scale" not in First(R=LAYERS).fit(llama, data, progress=False).state


@pytest.mark.parametrize("kind", ["random", "uniform"])
def test_controls_run_other_layers_with_the_same_lora(kind: str) -> None:
    model, method = build("llama"), with_lora(3)
    control = method.control(kind, SHAPE, seed=1)
    layers = control.layer_set(LAYERS)  # type: ignore[attr-defined]
    assert len(layers) == 3
    ids = prompt("llama", (9,))["input_ids"]
    with torch.no_grad():
        with sparing.attach(model, control, prompt=5):
            got = model(ids).logits
        A, B = (method.state[f"lora.model.layers.0.self_attn.q_proj.weight.{k}"] for k in "AB")
        model.model.layers[0].self_attn.q_proj.weight += 2 * B @ A
        torch.testing.assert_close(got, two_pass(model, ids[:, :5], ids[:, 5:], layers), **CLOSE)


def test_the_static_control_has_no_eyes_for_the_prompt(llama: PreTrainedModel) -> None:
    learned = First(R=4).with_state(routers(1))
    static = learned.control("static", SHAPE)
    assert isinstance(static, First) and static.R == 4 and static.router == "static"
    batch = prompt("llama", (7, 4, 6), seed=3)
    order = sorted(range(1, LAYERS - 1), key=lambda i: -float(learned.state["router.mean"][i]))
    want = tuple(sorted({0, LAYERS - 1, *order[:2]}))
    assert kept_sets(llama, static, batch) == [want] * 3
    majority = static.replace(R=None)
    high = {i for i in range(LAYERS) if learned.state["router.mean"][i] >= 0.5} | {0, LAYERS - 1}
    assert kept_sets(llama, majority, batch) == [tuple(sorted(high))] * 3
    assert 2 < len(high) < LAYERS


def test_the_static_mean_is_that_of_the_training_prompts(llama: PreTrainedModel) -> None:
    data = [labelled_batch(rows=2), {k: v[:1] for k, v in labelled_batch(rows=3).items()}]
    fitted = First(R=3, rank=0, router_lr=0.3).fit(llama, data, epochs=3, progress=False)
    prompts = [batch["input_ids"][i : i + 1, :5] for batch in data for i in range(len(batch["input_ids"]))]
    want = torch.stack([votes(llama, ids, dict(fitted.state))[1] for ids in prompts]).mean(0)
    want[[0, -1]] = 1
    torch.testing.assert_close(fitted.state["router.mean"], want, rtol=1e-4, atol=1e-4)


def test_a_majority_vote_has_no_control_of_equal_budget() -> None:
    for kind in ("random", "uniform", "static"):
        with pytest.raises(sparing.Error, match="R = None: a majority vote spends what the prompt asks for"):
            First().control(kind, SHAPE)
    with pytest.raises(sparing.Error, match="control = 'lora': first has random, uniform, static"):
        First().control("lora", SHAPE)


# --------------------------------------------------------------------------- refusals


def test_wrong_use_is_refused(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(2, VOCAB, (1, 5))
    with pytest.raises(sparing.Error, match="needs training first"):
        sparing.attach(llama, First())
    with pytest.raises(sparing.Error, match="R = 9: the model has 6 layers"), torch.no_grad():
        with sparing.attach(llama, First(R=9).with_state(routers())):
            llama(ids)
    with torch.no_grad():
        cache = llama(ids).past_key_values
        with sparing.attach(llama, First(R=3).with_state(routers())):
            with pytest.raises(sparing.Error, match="first decides while the prompt runs"):
                llama(ids[:, :1], past_key_values=cache)
    with pytest.raises(sparing.Error, match="training needs labels"):
        First().fit(llama, [{"input_ids": ids}])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(sparing.Error, match=r"pip install sparing\[peft\]"):
        First(R=3).fit(llama, [labelled_batch()], progress=False)

"""Duo-LLM: the oracles of its card, by number; 2, 3 and 4 belong to the route oracle, tests/engine/test_oracle.py."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import sparing
from sparing.depth.duo_llm import DuoLlm, _Drawn, _Mixing, _neurons, _Routing, _Soft, _start
from sparing.engine import oracle
from sparing.engine.stream import Stream
from sparing.engine.train import student
from sparing.engine.view import View
from sparing.grid.gates import budget_loss
from sparing.grid.method import Shape
from sparing.testing.models import LAYERS, build, prompt
from sparing.testing.suite import fitting_data

LAB = Shape(layers=12, heads=8, groups=4, head_dim=32, hidden=192, neurons=512)
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@functools.cache
def fitted(architecture: str = "llama", **fields: Any) -> DuoLlm:
    torch.manual_seed(0)
    return DuoLlm(**fields).fit(build(architecture), fitting_data(architecture), progress=False)


def run(model: Any, method: DuoLlm, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), sparing.attach(model, method, warn=False):
        return model(**batch).logits


def by_hand(model: Any, method: DuoLlm, weights: Callable[[int, Tensor], Tensor]) -> Any:
    """A copy whose MLPs compute every choice for every row and mix them: weights(layer, x_BND) -> (B, N, 2)."""
    twin = copy.deepcopy(model)
    for i, layer in enumerate(twin.model.layers):
        gate, up, down = (method.state[f"small.{part}.{i}"] for part in ("gate", "up", "down"))

        def mixed(x: Tensor, i: int = i, mlp: Any = layer.mlp, parts: Any = (gate, up, down)) -> Tensor:
            gate, up, down = parts
            big = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
            small = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
            return (torch.stack([big, small], -1) * weights(i, x)[:, :, None]).sum(-1)

        layer.mlp.forward = mixed
    return twin


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


# --------------------------------------------------------------------------- 1: routes of one kind


def test_oracle_1_all_big_is_the_model(llama: Any) -> None:
    batch = prompt("llama")
    assert torch.equal(run(llama, fitted().replace(rho=1.0), batch), logits(llama, batch))
    high = fitted().with_state({**fitted().state, "margins": torch.full((5, 1025), 1e9)})  # whatever a router says
    assert torch.equal(run(llama, high.replace(rho=1.0), batch), logits(llama, batch))


def test_oracle_1_all_big_is_the_trained_model_where_it_trained(llama: Any) -> None:
    method, batch, twin = fitted(train_big=True), prompt("llama"), copy.deepcopy(llama)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, tensor in method.state.items():
            if name.startswith("weight."):
                own[name.removeprefix("weight.")].copy_(tensor)
    found = run(llama, method.replace(rho=1.0), batch)
    assert torch.equal(found, logits(twin, batch)) and not torch.equal(found, logits(llama, batch))
    trained = {name.removeprefix("weight.") for name in method.state if name.startswith("weight.")}
    assert trained == {name for name in own if "embed_tokens" not in name}
    assert not any(name.startswith("weight.") for name in fitted().state)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_oracle_1_all_small_is_a_small_model(architecture: str) -> None:
    method, batch, model = fitted(architecture), prompt(architecture), build(architecture)
    twin: Any = copy.deepcopy(model)
    for i, layer in enumerate(twin.model.layers):
        parts = {part: method.state[f"small.{part}.{i}"] for part in ("gate", "up", "down")}
        if architecture == "phi3":
            parts = {"gate_up": torch.cat([parts["gate"], parts["up"]]), "down": parts["down"]}
        for part, weight in parts.items():
            linear = nn.Linear(*weight.shape[::-1], bias=False)
            linear.weight = nn.Parameter(weight)
            setattr(layer.mlp, f"{part}_proj", linear)
    torch.testing.assert_close(run(model, method.replace(rho=0.0), batch), logits(twin, batch), **CLOSE)


def test_rows_run_what_their_router_says(llama: Any) -> None:
    method, batch = fitted().replace(router="argmax"), prompt("llama", (9, 9))
    picked: list[float] = []

    def weights(i: int, x: Tensor) -> Tensor:
        z = x @ method.state[f"router.{i}"].T
        picked.append(float((z[..., 0] > z[..., 1]).float().mean()))
        return F.one_hot((z[..., 0] <= z[..., 1]).long(), 2).to(x)

    torch.testing.assert_close(run(llama, method, batch), logits(by_hand(llama, method, weights), batch), **CLOSE)
    assert 0 < sum(picked) / LAYERS < 1


# --------------------------------------------------------------------------- 5: the budget loss


def test_oracle_5_budget_loss_is_global() -> None:
    P = torch.tensor([[0.9, 0.1], [0.5, 0.3]], requires_grad=True)
    loss = budget_loss(P, 0.25)
    loss.backward()
    assert loss.item() == pytest.approx(0.04)
    torch.testing.assert_close(P.grad, torch.full((2, 2), 0.1))


def test_oracle_5_the_routers_loss_holds_the_mean_over_real_tokens_and_layers(llama: Any) -> None:
    batch = prompt("llama", (9, 5), side="right")
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    state = dict(fitted().state)

    def objective(**fields: Any) -> _Routing:
        found = _Routing(student(llama), DuoLlm(tau=1.0, **fields), state)
        for i, parameter in enumerate(found.router):
            parameter.data.copy_(state[f"router.{i}"] * 300)
        return found

    free, held = objective(beta=0.0), objective(beta=7.0, rho=0.2)
    seen: list[Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for layer in free.model.model.layers  # type: ignore[union-attr]
    ]
    without = free(batch).detach()
    for hook in hooks:
        hook.remove()
    P = torch.stack([(x @ (300 * state[f"router.{i}"]).T).softmax(-1)[..., 0] for i, x in enumerate(seen)]).detach()
    mean = P[:, batch["attention_mask"] == 1].mean()
    assert abs(float(mean) - 0.5) > 0.01 and abs(float(mean - P.mean())) > 1e-4  # padding would show
    assert (held(batch) - without).item() == pytest.approx(7 * (float(mean) - 0.2) ** 2, rel=1e-3)


# --------------------------------------------------------------------------- 6: temperature


def test_oracle_6_infinite_temperature_is_hard(llama: Any) -> None:
    method, batch = fitted(), prompt("llama")
    soft = _Soft(tau=1e9).with_state(method.state)
    torch.testing.assert_close(run(llama, soft, batch), run(llama, method.replace(router="argmax"), batch), **CLOSE)


def test_oracle_6_temperature_zero_is_an_even_mixture(llama: Any) -> None:
    method, batch = fitted(), prompt("llama")
    even = by_hand(llama, method, lambda i, x: x.new_full((*x.shape[:2], 2), 0.5))
    torch.testing.assert_close(run(llama, _Soft(tau=0.0).with_state(method.state), batch), logits(even, batch), **CLOSE)


def test_temperature_rises_linearly_from_one(llama: Any) -> None:
    objective = _Routing(student(llama), DuoLlm(beta=0.0), dict(fitted().state))
    for i, parameter in enumerate(objective.router):
        parameter.data.copy_(fitted().state[f"router.{i}"])
    batch = fitting_data("llama")[0]
    for share, tau in ((0.0, 1.0), (0.5, 5.5)):
        objective.share = share
        soft = _Soft(tau=tau).with_state(fitted().state)
        with torch.no_grad(), sparing.attach(llama, soft, warn=False):
            assert objective(batch).item() == pytest.approx(float(llama(**batch).loss), rel=1e-6)


# --------------------------------------------------------------------------- 7: random routing


@dataclass(frozen=True)
class _Seen(_Drawn):
    def choose(self, stream: Stream, layer: int, x_BND: Tensor) -> Tensor:
        found = super().choose(stream, layer, x_BND)
        DRAWS.append(found)
        return found


DRAWS: list[Tensor] = []


def drawn(model: Any, **fields: Any) -> Tensor:
    """Choices (L, B, N) of one pass over 32 rows of 48 tokens."""
    DRAWS.clear()
    ids = torch.randint(2, 110, (32, 48))
    run(model, _Seen(**fields).with_state(fitted().state), {"input_ids": ids})
    return torch.stack(DRAWS)


@pytest.mark.parametrize(("fields", "odds"), [({}, [1, 1]), ({"p": 0.25}, [1, 3]), ({"skip": True}, [1, 1, 1]),
                                             ({"skip": True, "p": 0.5}, [2, 1, 1])])  # fmt: skip
def test_oracle_7_draws_have_their_odds_and_are_independent(llama: Any, fields: Any, odds: list[int]) -> None:
    c = drawn(llama, **fields)
    C, expected = len(odds), torch.tensor(odds) / sum(odds)
    assert c.shape == (LAYERS, 32, 48)
    for layer in c:  # in each layer by itself
        assert chisquare(layer.flatten().bincount(minlength=C), expected * layer.numel()).pvalue > 1e-4
    neighbours = [(c[:, :, 1:], c[:, :, :-1]), (c[1:], c[:-1]), (c[:, 1:], c[:, :-1]), (c[:1], c[-1:])]
    for a, b in neighbours:  # tokens, layers, samples, first and last layer
        table = (a.flatten() * C + b.flatten()).bincount(minlength=C * C).view(C, C)
        assert chi2_contingency(table).pvalue > 1e-4
    assert not torch.equal(c, drawn(llama, **fields))


def test_oracle_7_always_big_is_standard_training(llama: Any) -> None:
    batch, method = fitting_data("llama")[0], DuoLlm(p=1.0, train_big=True)
    mixing = _Mixing(student(llama, lambda name: True), method, _start(llama, [batch], 16))
    plain: Any = student(llama, lambda name: True)
    mixing(batch).backward()
    plain(**batch).loss.backward()
    assert torch.equal(mixing(batch), plain(**batch).loss)
    for a, b in zip(mixing.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert all(p.grad is None or not p.grad.any() for p in mixing.small.parameters())


# --------------------------------------------------------------------------- 8: two equal FFNs


def test_oracle_8_equal_weights_gain_nothing(llama: Any) -> None:
    state = {}
    twin, ids = copy.deepcopy(llama).double(), torch.arange(3, 15)
    for i, layer in enumerate(twin.model.layers):
        for part in ("gate", "up", "down"):
            state[f"small.{part}.{i}"] = getattr(layer.mlp, f"{part}_proj").weight.detach()
    same = DuoLlm().with_state(state)
    loss = oracle.explore(twin, same.ffns(), ids, [2, 5, 10], progress=False).loss_NMR[:, 0]
    assert float((loss.amax(1) - loss.amin(1)).max()) < 1e-12  # products of other sizes round otherwise
    assert float(oracle.difficulty(loss, 63).max()) < 1e-12
    other = oracle.explore(llama, fitted().ffns(), ids, [2, 5, 10], progress=False).loss_NMR[:, 0]
    assert (oracle.difficulty(other, 63) > 0.01).all()


# --------------------------------------------------------------------------- 9: a toy whose best routes are known

PLAIN, FIRST, SECOND = range(0, 8), range(8, 16), range(16, 24)  # tokens; V = D = 24


def toy() -> Any:
    """Two layers without attention over one-hot states. Behind a plain token it comes again; the big FFN of the first
    (second) layer turns eight others into their partners, with two neurons each. A small FFN has one neuron in all.
    """
    config = LlamaConfig(vocab_size=24, hidden_size=24, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False)  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    peak = math.sqrt(24)  # of a one-hot state behind a norm
    half = 0.5 / float(F.silu(torch.tensor(peak)) * peak)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0 if p.ndim == 2 else 1)
        model.model.embed_tokens.weight.copy_(torch.eye(24))
        model.lm_head.weight.copy_(torch.eye(24) * 2)
        for layer, tokens in zip(model.model.layers, (FIRST, SECOND)):
            for j in range(16):
                i, to = tokens[j % 8], tokens[(j + 1) % 8]
                layer.mlp.gate_proj.weight[j, i] = layer.mlp.up_proj.weight[j, i] = 1.0
                layer.mlp.down_proj.weight[to, j], layer.mlp.down_proj.weight[i, j] = half, -half
    return model


def toy_batch(rows: int = 16, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, 24, (rows, 24), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for tokens in (FIRST, SECOND):
        inside = (ids >= tokens[0]) & (ids <= tokens[-1])
        labels = torch.where(inside, tokens[0] + (ids - tokens[0] + 1) % 8, labels)
    return {"input_ids": ids, "labels": torch.cat([torch.full((rows, 1), -100), labels[:, :-1]], 1)}


def test_oracle_9_the_router_reaches_the_oracle() -> None:
    model, data = toy(), [toy_batch(seed=i) for i in range(4)]
    # p = 1: the one neuron of a small FFN stays what it is, half of what one token needs
    method = DuoLlm(rho=1 / 3, p=1.0).fit(model, data, epochs=16, lr=0.1, progress=False)
    ids = toy_batch(1, seed=99)["input_ids"][0]
    labels = toy_batch(1, seed=99)["labels"][0, 1:]
    explored = oracle.explore(
        model, method.ffns(), ids, range(23), labels_NM=labels[:, None], progress=False,
        note=lambda layer, x: method.margin(layer.index, x)[0],
    )  # fmt: skip
    loss_NR, best_N = explored.loss_NMR[:, 0], explored.loss_NMR[:, 0].amin(1)
    route_NL = oracle.routes(2)[oracle.walk(explored.noted, 0.0)]
    needed = [[int(token not in FIRST), int(token not in SECOND)] for token in ids[:-1].tolist()]
    assert route_NL.tolist() == needed
    for router, rho in (("argmax", 1 / 3), ("learned", 0.36)):  # a little more than exactly what these tokens need
        picked = method.replace(router=router, rho=rho)
        with torch.no_grad(), sparing.attach(model, picked) as attached:
            found = model(input_ids=ids[None]).logits[0, :-1]
            model(input_ids=torch.cat([b["input_ids"] for b in data]))
        loss_N = F.cross_entropy(found, labels, reduction="none")
        assert float((loss_N - best_N).mean()) < 1e-3 < 0.5 < float((loss_NR[:, 3] - best_N).mean())
        share = attached.trace.share("depth")
        assert share == pytest.approx(2 / 3 + 1 / 3 * (rho + (1 - rho) / 16), abs=0.02)


# --------------------------------------------------------------------------- budgets and their dial


def test_keep_is_the_share_of_the_layers_work() -> None:
    m = 1536 / (1536 + 768)  # of the MLP; small: 32 of 512 neurons
    for keep in (0.4, 0.6, 0.9, 1.0):
        rho = DuoLlm().at(keep, LAB).rho
        assert 1 - m + m * (rho + (1 - rho) / 16) == pytest.approx(keep)
    with pytest.raises(sparing.BudgetError, match=r"keep = 0.37: duo-llm runs attention .* at least 0.375"):
        DuoLlm().at(0.37, LAB)


def test_the_trace_says_what_was_kept(llama: Any) -> None:
    shape, batch = sparing.shape(llama), {"input_ids": torch.randint(2, 110, (4, 48))}
    for router in ("even", "random"):
        method = fitted().replace(router=router).at(0.6, shape)
        with torch.no_grad(), sparing.attach(llama, method) as attached:
            llama(**batch)
        assert attached.trace.share("depth") == pytest.approx(0.6, abs=2e-3)


def test_neurons_of_the_small_ffn() -> None:
    assert [_neurons(n, 16) for n in (8, 48, 128, 512, 10240, 200)] == [1, 3, 8, 32, 640, 16]


def test_the_dial_spends_what_it_says_on_calibration_data(llama: Any) -> None:
    data = [{key: batch[key].repeat(1, 4) for key in ("input_ids", "labels")} for batch in fitting_data("llama")]
    method = DuoLlm(rho=0.4).fit(llama, data, epochs=4, progress=False)
    r, attention, mlp = 3 / 48, 0.4, 0.6  # neurons of small; shares of a layer
    for rho in (0.1, 0.3, 0.5, 0.66, 0.9):
        with torch.no_grad(), sparing.attach(llama, method.replace(rho=rho)) as attached:
            for batch in data:
                llama(**batch)
        spent = (attached.trace.share("depth") - attention) / mlp
        assert (spent - r) / (1 - r) == pytest.approx(rho, abs=0.02)


def test_thresholds_fall_as_the_budget_grows() -> None:
    at = [fitted().replace(rho=rho).threshold for rho in (0.0, 0.2, 0.4, 0.6, 0.8)]
    assert at[0] == math.inf and all(a > b for a, b in itertools.pairwise(at))
    assert fitted().replace(router="argmax").threshold == 0


# --------------------------------------------------------------------------- fit


def test_small_begins_as_the_most_important_neurons(llama: Any) -> None:
    data = fitting_data("llama")
    seen: list[Tensor] = []
    layer = llama.model.layers[2]
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for batch in data:
        logits(llama, batch)
    hook.remove()
    rows = [x[b["labels"] != -100].abs().mean(0) for x, b in zip(seen, data)]
    score = torch.stack(rows).mean(0) * layer.mlp.down_proj.weight.norm(dim=0)
    best = sorted(score.argsort(descending=True)[:3].tolist())
    first = _start(llama, data, 16)
    assert torch.equal(first["gate"][2], layer.mlp.gate_proj.weight[best])
    assert torch.equal(first["up"][2], layer.mlp.up_proj.weight[best])
    assert torch.equal(first["down"][2], layer.mlp.down_proj.weight[:, best])


def test_fit_learns_and_leaves_the_model_alone() -> None:
    model, data = build("llama"), fitting_data("llama")
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    short, long = (DuoLlm(rho=0.3).fit(model, data, epochs=n, lr=0.02, progress=False) for n in (1, 12))

    def loss(method: DuoLlm) -> float:
        with torch.no_grad(), sparing.attach(model, method):
            return sum(float(model(**b).loss) for b in data)

    assert loss(long) < 0.9 * loss(short)
    assert loss(long) < loss(long.replace(router="random"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_an_interrupted_fit_goes_on_as_if_nothing_had_been(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("llama"), fitting_data("llama")
    torch.manual_seed(0)
    whole = DuoLlm().fit(model, data, epochs=2, progress=False)
    torch.manual_seed(0)
    calls = []

    def breaks(self: Any, step: int) -> None:
        calls.append(step)
        if len(calls) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Routing, "after_step", breaks)
    monkeypatch.setattr(_Mixing, "after_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        DuoLlm().fit(model, data, epochs=2, progress=False, checkpoint=tmp_path, every=0)
    monkeypatch.undo()
    again = DuoLlm().fit(model, data, epochs=2, progress=False, checkpoint=tmp_path, every=0)
    for name, tensor in whole.state.items():
        torch.testing.assert_close(again.state[name], tensor)


def test_a_third_choice(llama: Any) -> None:
    method, batch = fitted(skip=True), prompt("llama", (9, 9))
    assert method.state["router.0"].shape == (3, 32)
    counts = torch.zeros(3)
    seen: list[Tensor] = []

    def picked(i: int, x: Tensor) -> Tensor:
        z = x @ method.state[f"router.{i}"].T
        counts.add_(z.argmax(-1).flatten().bincount(minlength=3))
        return F.one_hot(z.argmax(-1), 3)[..., :2].to(x)

    found = run(llama, method.replace(router="argmax"), batch)
    torch.testing.assert_close(found, logits(by_hand(llama, method, picked), batch), **CLOSE)
    assert (counts > 0).all() and not seen
    with torch.no_grad(), sparing.attach(llama, method.replace(router="argmax")) as attached:
        llama(**batch)
    share = counts / counts.sum()
    assert attached.trace.share("depth") == pytest.approx(float(0.4 + 0.6 * (share[0] + share[1] / 16)), abs=1e-6)


# --------------------------------------------------------------------------- controls


def cells(method: DuoLlm, steps: Tensor, L: int) -> Tensor:
    return torch.stack([method._by_rule(steps[None], layer, L)[0] for layer in range(L)], 1)


def test_uniform_spaces_big_layers_evenly() -> None:
    even = fitted().control("uniform", LAB)
    assert isinstance(even, DuoLlm) and even.state is not None and even.router == "even"
    steps = torch.arange(-30, 50)
    for L in (6, 12, 31):
        for k in range(L + 1):
            found = cells(even.replace(rho=k / L), steps, L)
            assert (found.sum(1) == k).all() and (found == found[0]).all()  # every token the same k layers
            at = found[0].nonzero().flatten()
            assert k < 2 or (int(at.diff().max() - at.diff().min()) <= 1 and int(at[-1]) == L - 1)
            assert k == 0 or int(at[0]) == 0
    assert cells(even.replace(rho=1 / 3), steps, 12)[0].nonzero().flatten().tolist() == [0, 4, 7, 11]
    between = cells(even.replace(rho=0.377), torch.arange(1000), 12)
    assert float(between.float().mean()) == pytest.approx(0.377, abs=1e-4)
    assert sorted(between.sum(1).unique().tolist()) == [4, 5]  # tokens take turns


def test_random_spends_the_same_by_lot() -> None:
    random = fitted().control("random", LAB, seed=3)
    assert isinstance(random, DuoLlm) and (random.router, random.seed) == ("random", 3)
    steps = torch.arange(-100, 4000)
    found = cells(random.replace(rho=0.25), steps, 12)
    assert (found.sum(1) == 3).all() and len(found.unique(dim=0)) == math.comb(12, 3)
    assert chisquare(found.sum(0)).pvalue > 1e-4  # no layer is preferred
    assert not torch.equal(found, cells(random.replace(rho=0.25, seed=4), steps, 12))
    assert float(cells(random.replace(rho=0.377), steps, 12).float().mean()) == pytest.approx(0.377, abs=2e-3)
    with pytest.raises(sparing.Error, match=r"control = 'oracle': duo-llm has random, uniform"):
        fitted().control("oracle", LAB)


@pytest.mark.parametrize("router", ["random", "even"])
def test_controls_decode_as_they_read(llama: Any, router: str) -> None:
    """Padded batches, cached decoding and one uncached pass draw the same."""
    method, batch = fitted().replace(router=router, rho=0.4), prompt("llama", (7, 4))
    with torch.no_grad(), sparing.attach(llama, method):
        out = llama.generate(
            **batch, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    for row, length in enumerate((7, 4)):
        alone = out.sequences[row : row + 1, 7 - length :]
        with torch.no_grad(), sparing.attach(llama, method, prompt=length):
            again = llama(alone, use_cache=False).logits[0, length - 1 : -1]
        torch.testing.assert_close(torch.stack(out.logits, 1)[row], again, **CLOSE)


# --------------------------------------------------------------------------- wrong use


def test_wrong_use_is_refused(llama: Any) -> None:
    with pytest.raises(sparing.Error, match="needs training first"):
        sparing.attach(llama, DuoLlm())
    with pytest.raises(sparing.Error, match="duo-llm: factor = 1: must be a whole number >= 2"):
        DuoLlm(factor=1)
    with pytest.raises(sparing.Error, match="batches: training needs labels"):
        DuoLlm().fit(llama, [prompt("llama")])
    with pytest.raises(sparing.Error, match=r"layer 0 .* has no plain MLP"):
        DuoLlm().fit(build("opt"), [prompt("opt")])
    with pytest.raises(sparing.Error, match="was fitted on another model"):
        sparing.attach(build("qwen3"), DuoLlm().with_state(fitted().state, {"layers": 3}))
    assert View(llama).lacks(DuoLlm.card.requires) is None

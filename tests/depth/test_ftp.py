"""FTP: the oracles of its card, by number, then budgets, controls and training."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparing
from sparing.depth.ftp import FTP, _Learning, _Routing, answers, factors, received, route, static
from sparing.grid.gates import excess_loss
from sparing.grid.method import Shape
from sparing.grid.score import divergence
from sparing.grid.search import Evolution, Stage, to_mean
from sparing.testing.models import LAYERS, VOCAB, build, prompt, single
from sparing.testing.suite import fitting_data

SHAPE = Shape(LAYERS, 4, 2, 8, 32, 48)
PROFILE = (0.0, 0.4, 0.55, 0.2, 0.9, 0.3)
QUICK = {"population": 6, "generations": 2, "elites": 2}


def state(sparsity: tuple[float, ...] = PROFILE, seed: int = 5) -> dict[str, Tensor]:
    """A router whose choice depends on everything that it reads."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {"router.0.weight": (64, 4), "router.0.bias": (64,), "router.2.weight": (2, 64), "router.2.bias": (2,)}
    learned = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}
    return {"sparsity": torch.tensor(sparsity, dtype=torch.float64), **learned}


def ftp(sparsity: tuple[float, ...] = PROFILE, *, seed: int = 5, **fields: Any) -> FTP:
    return FTP(s=sum(sparsity) / len(sparsity), **fields).with_state(state(sparsity, seed))


@dataclass(frozen=True)
class Spy(FTP):
    """Notes what it keeps, and the state of all rows before each layer."""

    kept: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def before_layer(self, stream: Any, layer: int) -> None:
        self.hidden[layer] = stream.hidden.clone()
        super().before_layer(stream, layer)

    def keeps(self, stream: Any, s: float) -> Tensor:
        self.kept[stream.layer] = super().keeps(stream, s)
        return self.kept[stream.layer]


def spy(method: FTP) -> Spy:
    new = Spy(**method.fields())
    return new.with_state(method.state)


def masked_layers(model: PreTrainedModel, ids_1T: Tensor, keep_LT: Tensor, positions: Tensor | None = None) -> Tensor:
    """Compute-and-mask, written out: every token runs, skipped ones are hidden as keys and their result is not used."""
    decoder: Any = model.model
    T = ids_1T.shape[1]
    hidden = decoder.embed_tokens(ids_1T)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    for layer, keep_T in zip(decoder.layers, keep_LT):
        place = torch.arange(T)[None] if positions is None else (keep_T.cumsum(0) - 1).clamp(min=0)[None]
        seen = (causal & keep_T | torch.eye(T, dtype=torch.bool))[None, None]
        rope = decoder.rotary_emb(hidden, position_ids=place)
        hidden = torch.where(keep_T[:, None], layer(hidden, attention_mask=seen, position_embeddings=rope), hidden)
    return model.lm_head(decoder.norm(hidden))


def test_oracle_1_zero_sparsity_is_dense_bit_for_bit(llama: PreTrainedModel) -> None:
    batch = prompt("llama")
    with torch.no_grad():
        dense = llama(**batch).logits
        for method in (ftp((0.0,) * LAYERS), FTP(s=0, router="static", profile="uniform")):
            with sparing.attach(llama, method) as run:
                assert torch.equal(llama(**batch).logits, dense)
            assert run.trace.share("depth") == 1
        with sparing.attach(llama, ftp(router="static")):
            assert not torch.allclose(llama(**batch).logits, dense)


@pytest.mark.parametrize("count", ["budget", "router"])
@pytest.mark.parametrize("router", ["learned", "static"])
def test_oracle_1_gathered_equals_computed_and_masked(llama: PreTrainedModel, router: str, count: str) -> None:
    ids = prompt("llama", (12,))["input_ids"]
    method = spy(ftp(router=router, count=count, queries=4))
    with torch.no_grad():
        with sparing.attach(llama, method) as run:
            got = llama(ids).logits
        every = torch.ones(12, dtype=torch.bool)
        keep = torch.stack([method.kept[i][0] if i in method.kept else every for i in range(LAYERS)])
        assert run.trace.share("depth") == pytest.approx(keep.float().mean().item()) and not keep.all()
        torch.testing.assert_close(got, masked_layers(llama, ids, keep), rtol=2e-4, atol=2e-4)


def test_oracle_2_static_order() -> None:
    rows = torch.ones(1, 5, dtype=torch.bool)
    kept = [static(rows, 1 - k / 5)[0].nonzero().flatten().tolist() for k in range(6)]
    assert kept == [[], [0], [0, 4], [0, 3, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert static(rows, 0.4).tolist() == [[True, False, False, True, True]]
    assert static(rows, 0.41).sum() == 3 and static(rows, 0.39).sum() == 4  # ceil((1 - s) n)


def test_oracle_2_padding_has_no_place() -> None:
    prompt_BN = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0]]).bool()
    assert static(prompt_BN, 0.4).int().tolist() == [
        [0, 0, 1, 0, 0, 1, 1],
        [1, 0, 0, 1, 1, 0, 0],
        [0, 1, 0, 1, 0, 0, 0],
    ]


def test_oracle_3_sparsity_loss_is_one_sided(llama: PreTrainedModel) -> None:
    achieved = torch.tensor([0.3, 0.2], requires_grad=True)
    loss = excess_loss(torch.tensor([0.5, 0.1]), achieved)
    loss.backward()
    assert loss.item() == pytest.approx(0.02)
    assert achieved.grad is not None
    assert achieved.grad[0] == pytest.approx(-0.2) and achieved.grad[1] == 0


@pytest.mark.parametrize(("bias", "loss"), [(9.0, sum(s**2 for s in PROFILE) / 5), (-9.0, 0.0)])
def test_oracle_3_in_training(llama: PreTrainedModel, bias: float, loss: float) -> None:
    """A router that keeps everything pays s_l^2 in each of the five routed layers; one that skips all pays nothing."""
    routing = _Routing(llama, ftp(lambdas=(0.0, 1.0, 0.0)))
    with torch.no_grad():
        routing.router[2].bias.copy_(torch.tensor([0.0, bias]))  # type: ignore[union-attr]
    found = routing(fitting_data("llama")[0])
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    slope = routing.router[2].bias.grad  # type: ignore[union-attr]
    assert (slope[1] > 0) == (loss > 0) and (slope.abs().sum() > 0) == (loss > 0)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("s", [0.05, 0.3, 0.6, 0.85])
def test_oracle_4_every_child_keeps_the_mean(s: float) -> None:
    rng = random.Random(3)
    method = FTP(s=s)
    parents = [to_mean([rng.random() ** 3 for _ in range(9)], s, method.s_max) for _ in range(8)]
    for _ in range(300):
        child = method.child(parents, rng)
        assert sum(child) / 9 == pytest.approx(s, abs=1e-12)
        assert min(child) >= 0 and max(child) <= method.s_max + 1e-12
        parents[rng.randrange(8)] = child


def test_oracle_4_a_mutation_moves_one_part() -> None:
    child = FTP(s=0.3).child([(0.3,) * 6], random.Random(0))
    assert sorted(round(c - 0.3, 9) for c in child) == [-0.05, 0, 0, 0, 0, 0.05]


def test_oracle_5_rank_ignores_the_scale_of_attention() -> None:
    prompt_BN = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    a_BN = torch.rand(2, 6)
    x, y = factors(a_BN, prompt_BN, 0.3), factors(7 * a_BN**3, prompt_BN, 0.3)
    assert torch.equal(x[..., 2], y[..., 2]) and not torch.equal(x[..., 1], y[..., 1])
    first = a_BN[0, 1:]
    expected = [(first < v).sum().item() / 4 for v in first]  # 1 for the largest of five, 0 for the smallest
    torch.testing.assert_close(x[0, 1:, 2], torch.tensor(expected))
    torch.testing.assert_close(x[0, 1:, 0], torch.arange(5) / 4)
    torch.testing.assert_close(x[0, 1:, 1], (1 + 5 * first).log())
    assert bool((x[..., 3] == 0.3).all())


@pytest.mark.parametrize("queries", [1, 3])
def test_oracle_5_attention_is_the_mean_over_heads_and_the_last_queries(queries: int) -> None:
    """Against the layers' own attention, in a padded batch whose second half is generated."""
    model = build("llama")
    model.set_attn_implementation("eager")
    batch, found = prompt("llama", (9, 6)), []

    class Reads(Spy):
        def keeps(self, stream: Any, s: float) -> Tensor:
            found.append(received(stream, queries))
            return stream.prompt  # nothing leaves, so that the states are the dense ones

    method = Reads(**ftp((0.5,) * LAYERS, threshold=1.0).fields())
    with torch.no_grad():
        with sparing.attach(model, method.with_state(state((0.5,) * LAYERS)), prompt=5, warn=False):
            model(**batch)
        weights = model(**batch, output_attentions=True).attentions
    assert len(found) == LAYERS
    for a_BN, w_BHTT in zip(found, weights):
        torch.testing.assert_close(a_BN[0, :5], w_BHTT[0].mean(0)[5 - queries : 5, :5].mean(0), rtol=1e-4, atol=1e-5)
        mean = w_BHTT[1].mean(0)[max(3, 5 - queries) : 5, 3:5].mean(0)  # two tokens behind three of padding
        torch.testing.assert_close(a_BN[1, 3:5], mean, rtol=1e-4, atol=1e-5)


def test_oracle_5_router_is_equivariant() -> None:
    prompt_BN, order = torch.ones(1, 7, dtype=torch.bool), torch.randperm(7)
    a_BN, learned = torch.rand(1, 7), state()
    x = factors(a_BN, prompt_BN, 0.4)
    torch.testing.assert_close(route(learned, x[:, order]), route(learned, x)[:, order])
    moved = factors(a_BN[:, order], prompt_BN, 0.4)  # attention moves, places stay
    assert torch.equal(moved[..., 1:], x[:, order, 1:]) and torch.equal(moved[..., 0], x[..., 0])


def test_oracle_6_skipped_tokens_keep_state_and_place(llama: PreTrainedModel) -> None:
    batch = prompt("llama", (12,))
    method = spy(ftp(queries=4))
    with torch.no_grad():
        with sparing.attach(llama, method):
            got = llama(**batch).logits
        for layer, kept in method.kept.items():
            if layer + 1 in method.hidden:
                before, after = method.hidden[layer], method.hidden[layer + 1]
                assert torch.equal(before[~kept], after[~kept]) and not kept.all()
                assert bool((before[kept] != after[kept]).any(-1).all())
        every = torch.ones(12, dtype=torch.bool)
        keep = torch.stack([method.kept[i][0] if i in method.kept else every for i in range(LAYERS)])
        closed_up = masked_layers(llama, batch["input_ids"], keep, positions=torch.arange(12))
        assert (got - closed_up).abs().max() > 1e-2  # rotary positions are the original ones, with gaps


@pytest.mark.parametrize("router", ["learned", "static"])
def test_oracle_7_no_future_token_enters(llama: PreTrainedModel, router: str) -> None:
    """Behind the prompt, what comes later changes neither earlier logits nor what was kept of the prompt."""
    one = prompt("llama", (14,))["input_ids"]
    two = one.clone()
    two[:, 10:] = (one[:, 10:] + 7) % (VOCAB - 10) + 2
    kept, logits = [], []
    with torch.no_grad():
        for ids in (one, two):
            method = spy(ftp(router=router, queries=3))
            with sparing.attach(llama, method, prompt=8):
                logits.append(llama(ids).logits)
            kept.append(torch.stack(list(method.kept.values())))
            assert not kept[-1][..., 8:].any()
        torch.testing.assert_close(logits[0][:, :10], logits[1][:, :10], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits[0][:, 10:], logits[1][:, 10:])
        assert torch.equal(*kept)


def test_oracle_7_a_prompt_is_read_whole(llama: PreTrainedModel) -> None:
    """Within the prompt the learned router may look ahead, and does; the static one knows the length alone."""
    one = prompt("llama", (14,))["input_ids"]
    two = one.clone()
    two[:, 10:] = (one[:, 10:] + 7) % (VOCAB - 10) + 2
    attended = {name: torch.zeros_like(tensor) for name, tensor in state().items()} | {"sparsity": state()["sparsity"]}
    attended["router.0.weight"][0, 1] = attended["router.2.weight"][1, 0] = 1.0  # keeps what attention reads most
    same = {}
    with torch.no_grad():
        for router in ("learned", "static"):
            logits = []
            for ids in (one, two):
                with sparing.attach(llama, FTP(router=router, queries=1).with_state(attended)):
                    logits.append(llama(ids).logits[:, :10])
            same[router] = torch.allclose(*logits, rtol=1e-5, atol=1e-5)
    assert same == {"learned": False, "static": True}


def test_oracle_7_decoding_follows_the_threshold(llama: PreTrainedModel) -> None:
    """Layers 2 and 4 are too sparse for generated tokens; what they held of the prompt is given back."""
    batch = prompt("llama", (9, 6))
    with torch.no_grad():
        for threshold, share in ((0.5, 4 / 6), (0.55, 4 / 6), (0.56, 5 / 6), (1.0, 1.0)):
            with sparing.attach(llama, ftp(threshold=threshold)) as run:
                llama.generate(**batch, max_new_tokens=4, do_sample=False)
            assert run.trace.share("depth", "decode") == pytest.approx(share)
        with sparing.attach(llama, ftp()):
            cache = llama(**batch).past_key_values
            mask = torch.cat([batch["attention_mask"], torch.ones(2, 1).long()], 1)
            llama(batch["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
    there = [getattr(layer, "is_initialized", True) for layer in cache.layers]
    assert there == [True, True, False, True, False, True]


@pytest.mark.parametrize("lambdas", [(1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
def test_oracle_8_only_the_router_gets_a_gradient(lambdas: tuple[float, ...]) -> None:
    model = build("llama")
    routing = _Routing(model, ftp(lambdas=lambdas))
    routing(fitting_data("llama")[0]).backward()
    assert set(routing.learned()) == {name for name in state() if name != "sparsity"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routing.router.parameters())
    assert all(p.grad is None for module in (model, routing.model) for p in module.parameters())


def test_oracle_9_the_best_never_worsens() -> None:
    goal = to_mean([0.0, 0.1, 0.5, 0.2, 0.9, 0.6, 0.3, 0.2], 0.3)
    method = FTP(s=0.3)
    search = Evolution(
        [(0.3,) * 8],
        method.child,
        lambda candidates, effort, draw: [sum((a - b) ** 2 for a, b in zip(c, goal)) for c in candidates],
        offspring=12,
        stages=[Stage(4)],
        elites=4,
    )
    search.run(25)
    assert search.history == sorted(search.history, reverse=True)
    assert search.history[-1] < 0.5 * sum((0.3 - b) ** 2 for b in goal)


def test_oracle_9_search_finds_a_better_profile(llama: PreTrainedModel) -> None:
    data = fitting_data("llama")[:1]
    method = FTP(s=0.4, router="static", population=8, generations=6, elites=2)
    found = method.fit(llama, data, progress=False)
    assert sum(found.sparsity(LAYERS)) / LAYERS == pytest.approx(0.4, abs=1e-12)
    with torch.no_grad():
        dense = answers(llama, data[0])
        gap = [divergence(dense, answers(llama, data[0], m)).mean() for m in (found, found.replace(profile="uniform"))]
    assert gap[0] < gap[1]
    assert found.sparsity(LAYERS) == method.fit(llama, data, progress=False).sparsity(LAYERS)


def test_the_second_search_starts_from_the_best_of_the_first(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, seen = FTP.searched, []

    def searched(self: FTP, model: Any, data: Any, start: Any, progress: bool) -> Any:
        found = search(self, model, data, start, progress)
        seen.append((self.router, start, found))
        return found

    monkeypatch.setattr(FTP, "searched", searched)
    fitted = FTP(s=0.4, population=4, generations=2, elites=2).fit(llama, fitting_data("llama")[:1], progress=False)
    (one, start, best), (two, again, last) = seen
    assert (one, two) == ("static", "learned")
    assert start[0] == (0.4,) * LAYERS and len(set(start)) == 4 and best != start[0]
    assert again == [best] and fitted.sparsity(LAYERS) == last


# --------------------------------------------------------------------------- training


def test_the_guide_fades_over_the_first_half(llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    routing = _Routing(llama, ftp(lambdas=(1.0, 0.0, 0.0)))
    weighed = []
    for routing.share in (0.0, 0.25, 0.5, 0.8):
        with torch.no_grad():
            weighed.append(routing(fitting_data("llama")[0]).item())
    assert weighed == pytest.approx([weighed[0], weighed[0] / 2, 0, 0]) and weighed[0] > 0.1


def test_training_pass_equals_the_real_one(llama: PreTrainedModel) -> None:
    """Blending with hard decisions gives what skipping gives, for prompt and generated tokens."""
    batch = fitting_data("llama")[0]
    method = ftp(count="router")
    learning = _Learning(**method.fields())
    with torch.no_grad():
        real = answers(llama, batch, method)
        torch.testing.assert_close(answers(llama, batch, learning.with_state(method.state)), real, rtol=2e-4, atol=2e-4)
    assert sorted(learning.noted) == [1, 2, 3, 4, 5]


def test_answers_are_those_that_predict_labels(llama: PreTrainedModel) -> None:
    batch = fitting_data("llama")[0]
    with torch.no_grad():
        logits = llama(batch["input_ids"]).logits
        assert torch.equal(answers(llama, batch), logits[:, 4:8].flatten(0, 1))
        assert torch.equal(answers(llama, {"input_ids": batch["input_ids"]}), logits.flatten(0, 1))


def test_fit_learns_the_guide(llama: PreTrainedModel) -> None:
    """Guided alone, the router comes to choose mostly what the static one chooses."""
    data = fitting_data("llama") * 8
    method = FTP(s=0.4, lambdas=(1.0, 0.0, 0.0), count="router", **QUICK)
    method = method.fit(llama, data, epochs=3, lr=3e-2, progress=False)
    assert {name: tuple(t.shape) for name, t in method.state.items()} == {n: tuple(t.shape) for n, t in state().items()}
    kept = []
    for chosen in (spy(method), spy(method.replace(router="static"))):
        with torch.no_grad(), sparing.attach(llama, chosen, prompt=5):
            llama(data[0]["input_ids"])
        kept.append(torch.stack(list(chosen.kept.values()))[..., :5])
    assert kept[1].float().mean() < 0.75
    assert (kept[0] == kept[1]).float().mean() > 0.85


def test_fit_without_labels_and_without_data(llama: PreTrainedModel) -> None:
    data = [{"input_ids": prompt("llama", (9, 9), side="none")["input_ids"]}]
    fitted = FTP(**QUICK).fit(llama, data, progress=False)
    assert fitted.sparsity(LAYERS) != (0.3,) * LAYERS
    with pytest.raises(sparing.Error, match="empty"):
        FTP().fit(llama, [])


# --------------------------------------------------------------------------- budget, controls, batches


def test_budget_is_exact(llama: PreTrainedModel) -> None:
    """ceil((1 - s_l) n) of each prompt, whoever chooses; padding does not run where tokens are chosen."""
    method = spy(ftp())
    batch = prompt("llama", (11, 6))
    for chosen in (method, method.replace(router="static"), method.replace(lot=4)):
        with torch.no_grad(), sparing.attach(llama, chosen):
            llama(**batch)
        counts = [method.kept[i].sum(1).tolist() for i in range(1, LAYERS)]
        assert counts == [[7, 4], [5, 3], [9, 5], [2, 1], [8, 5]]


def test_budget_belongs_to_the_fit() -> None:
    assert FTP().at(0.6, SHAPE).s == 0.4
    fitted = ftp((0.3,) * LAYERS)
    assert fitted.at(0.7, SHAPE) == fitted
    with pytest.raises(sparing.BudgetError, match=r"keep = 0.5: .*fitted at keep = 0.7"):
        fitted.at(0.5, SHAPE)
    with pytest.raises(sparing.BudgetError, match=r"keep = 0.05: .*at least 0.1"):
        FTP().at(0.05, SHAPE)


def test_controls(llama: PreTrainedModel) -> None:
    method = spy(ftp())
    batch = prompt("llama", (16, 9))
    masks = {}
    for name, seed in (("random", 1), ("random", 2), ("static", 0), ("uniform", 0)):
        control = method.control(name, SHAPE, seed=seed)
        with torch.no_grad(), sparing.attach(llama, control):
            llama(**batch)
        masks[name, seed] = dict(method.kept)
    assert masks["static", 0][1][0].nonzero().flatten().tolist() == [0, *range(7, 16)]
    assert [masks["uniform", 0][i].sum(1).tolist() for i in (0, 4)] == [[10, 6]] * 2  # s = 2.35 / 6 everywhere
    one, two = masks["random", 1], masks["random", 2]
    assert not torch.equal(one[1], two[1])
    assert not torch.equal(one[1][0].nonzero(), one[2][0].nonzero())
    method.control("random", SHAPE, seed=1)
    alone = spy(ftp(lot=1))
    with torch.no_grad(), sparing.attach(llama, alone):
        llama(**single("llama", batch, 1))
    assert torch.equal(alone.kept[1][0], one[1][1, -9:])  # a draw does not depend on batch mates or padding
    with pytest.raises(sparing.Error, match="control = 'lora'"):
        method.control("lora", SHAPE)


def test_the_uniform_control_runs_as_many_layers_of_a_generated_token():
    shape, profile = sparing.shape(build("llama")), (0.0, 0.9, 0.9, 0.2, 0.9, 0.1)
    method = ftp(profile, router="static")
    control = method.control("uniform", shape)
    assert [[layer for layer in range(6) if m.decodes(layer, 6)] for m in (method, control)] == [[0, 3, 5], [0, 2, 5]]
    model = build("llama")
    with torch.no_grad(), sparing.attach(model, control) as run:
        model.generate(**prompt("llama", (7, 7)), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert run.trace.share("depth", "decode") == 0.5


def test_needs_training_unless_nothing_is_learned(llama: PreTrainedModel) -> None:
    for method in (FTP(), FTP(router="static"), FTP(profile="uniform")):
        assert not method.ready
        with pytest.raises(sparing.Error, match="needs training first"):
            sparing.attach(llama, method)
    assert FTP(router="static", profile="uniform").ready


def test_mistakes(llama: PreTrainedModel) -> None:
    with pytest.raises(sparing.Error, match=r"s = 0.95: must be at most s_max = 0.9"):
        FTP(s=0.95)
    with pytest.raises(sparing.Error, match=r"elites = 6: must be less than population = 6"):
        FTP(population=6, elites=6)
    with pytest.raises(sparing.Error, match=r"lambdas = \(1.0,\): must be three"):
        FTP(lambdas=(1.0,))
    with (
        pytest.raises(sparing.Error, match="sparsity has 5 layers, not 6"),
        sparing.attach(llama, ftp(PROFILE[:5])),
    ):
        llama(torch.tensor([[3, 4, 5]]))

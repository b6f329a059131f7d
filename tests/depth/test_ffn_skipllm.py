"""FFN-SkipLLM: the oracles of its card, by number, then calibration, budgets and controls."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

import sparing
from sparing.depth.ffn_skipllm import FfnSkipLLM, _growing, _saturated
from sparing.grid.method import Shape
from sparing.grid.score import cosine
from sparing.testing.models import LAYERS, prompt, single

L, D = 12, 48
OPTIONS: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@functools.cache
def deep() -> PreTrainedModel:
    """12 layers, unlike sizes everywhere."""
    torch.manual_seed(2)
    config = hf.LlamaConfig(
        vocab_size=120, hidden_size=D, intermediate_size=40, num_hidden_layers=L, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    return model


def data(seed: int = 5) -> list[dict[str, Tensor]]:
    """Two padded batches whose last four tokens are labelled."""
    found = [prompt("llama", (12, 9, 12, 7), seed=s) for s in (seed, seed + 1)]
    return [{**b, "labels": torch.where(torch.arange(12) < 8, -100, b["input_ids"])} for b in found]


@functools.cache
def calibrated() -> FfnSkipLLM:
    return FfnSkipLLM(W=0).fit(deep(), data())


def at(**fields: Any) -> FfnSkipLLM:
    return calibrated().replace(**{"s": 0, "e": L, "W": 0, **fields})


class Watched:
    """Which FFNs run, pass by pass, and the states around them, seen from outside by hooks on the modules."""

    def __init__(self, model: Any) -> None:
        self.rows: list[list[int]] = []  # pass -> rows in each layer's FFN
        self.before: list[list[Tensor]] = []  # pass -> what each layer's FFN norm sees
        self.after: list[list[Tensor]] = []  # pass -> what each layer gives
        self.normed: list[Tensor] = []
        self._handles = [model.model.register_forward_pre_hook(self._begin)]
        for i, layer in enumerate(model.model.layers):
            self._handles += [
                layer.post_attention_layernorm.register_forward_pre_hook(
                    lambda m, args: self.before[-1].append(args[0].clone())
                ),
                layer.mlp.down_proj.register_forward_pre_hook(functools.partial(self._ran, i)),
                layer.register_forward_hook(lambda m, args, out: self.after[-1].append(out.clone())),
            ]

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.rows.append([0] * L)
        self.before.append([])
        self.after.append([])

    def _ran(self, layer: int, module: nn.Module, args: Any) -> None:
        self.rows[-1][layer] += args[0][..., 0].numel()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def generate(method: FfnSkipLLM | None, batch: dict[str, Tensor], tokens: int = 6) -> tuple[Tensor, Watched, Any]:
    """Logits (B, tokens, V), what ran, and the cache."""
    model: Any = deep()
    with torch.no_grad(), Watched(model) as watched:
        if method is None:
            out = model.generate(**batch, max_new_tokens=tokens, **OPTIONS)
        else:
            with sparing.attach(model, method, warn=False):
                out = model.generate(**batch, max_new_tokens=tokens, **OPTIONS)
    return torch.stack(out.logits, 1), watched, out.past_key_values


def by_hand(c: list[float], theta: float, k: float, s: int, e: int) -> list[int]:
    """FFNs that one token skips, as the card says it, counting down."""
    counter, skipped = 0.0, []
    for layer, value in enumerate(c):
        if layer < s or layer >= e:
            continue
        if counter > 0:
            skipped.append(layer)
            counter -= 1
        elif value >= theta:
            counter = k
    return skipped


def test_oracle_1_above_one_is_dense() -> None:
    batch = prompt("llama", (7, 5))
    dense, _, _ = generate(None, batch)
    method = at(theta=1.0001, k=None)
    logits, watched, _ = generate(method, batch)
    assert torch.equal(logits, dense)
    assert all(rows == [len(rows_in)] * L for rows, rows_in in zip(watched.rows[1:], [[0, 1]] * 5, strict=True))
    never = at(theta=float(torch.tensor(1.0)), k=None)  # tested in every layer, hit in none
    assert torch.equal(generate(never, batch)[0], dense)


def test_oracle_2_warm_up_and_prompt_are_dense() -> None:
    batch = prompt("llama", (7, 5))
    dense, _, _ = generate(None, batch)
    logits, _, _ = generate(at(theta=-1, W=9), batch)
    assert torch.equal(logits, dense)
    logits, watched, _ = generate(at(theta=-1, W=2, k=None), batch)
    assert watched.rows == [[14] * L, *[[2] * L] * 2, *[[2, *[0] * (L - 2), 2]] * 3]
    assert torch.equal(logits[:, :3], dense[:, :3]) and not torch.equal(logits[:, 3], dense[:, 3])


def test_oracle_3_worked_cosine() -> None:
    c = cosine(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.6, 4.0], [1.0, 0.2]]))
    torch.testing.assert_close(c, torch.tensor([0.996014, 0.980581]), rtol=0, atol=1e-6)


def test_oracle_3_the_cosine_that_decides_is_that_of_the_states_around_the_ffn() -> None:
    """theta just below or just above what hooks on the dense modules see, for the first token in one layer."""
    batch = {"input_ids": prompt("llama", (7,))["input_ids"]}
    _, watched, _ = generate(None, batch)
    for layer in (1, 4, 8):
        c = float(torch.cosine_similarity(watched.before[1][layer], watched.after[1][layer], dim=-1))
        for theta, skips in ((c - 1e-6, True), (c + 1e-6, False)):
            ran = generate(at(theta=theta, s=layer, e=layer + 2), batch, 3)[1].rows[1]
            assert (ran[layer + 1] == 0) == skips and sum(ran) == L - skips


def test_oracle_4_worked_control_flow() -> None:
    batch = {"input_ids": prompt("llama", (6,))["input_ids"]}
    always = {"s": 2, "e": 10, "k": 3}
    for rows in generate(at(theta=-1, **always), batch)[1].rows[1:]:
        assert [layer for layer in range(L) if not rows[layer]] == [3, 4, 5, 7, 8, 9]
    assert all(all(rows) for rows in generate(at(theta=1.0, **always), batch)[1].rows)
    assert at(theta=0.9, **always).skipped(torch.full((1, L - 1), 0.91), 2, 10)[0].nonzero().flatten().tolist() == [
        3, 4, 5, 7, 8, 9,
    ]  # fmt: skip
    assert by_hand([0.91] * L, 0.9, 3, 2, 10) == [3, 4, 5, 7, 8, 9]


def test_oracle_4_replay_is_the_card_counting_down() -> None:
    c = torch.rand(200, L - 1, generator=torch.Generator().manual_seed(1))
    for theta, k, s, e in ((0.3, 1, 0, 11), (0.6, 2, 3, 9), (0.8, 5, 1, 11), (0.5, None, 2, 10), (-1, 1, 5, 6)):
        skipped = at(theta=theta, k=k).skipped(c, s, e)
        for row in range(len(c)):
            assert skipped[row].nonzero().flatten().tolist() == by_hand(c[row].tolist(), theta, k or 99, s, e)


@pytest.mark.parametrize("theta", [-1, 0.9])
def test_oracle_5_cold_layers_always_run(theta: float) -> None:
    for seed in range(3):
        batch = prompt("llama", (7, 5, 6), seed=seed)
        rows = generate(at(theta=theta, s=3, e=8, k=None), batch)[1].rows
        assert all(r == 3 for ran in rows[1:] for r in (*ran[:4], *ran[8:]))
    assert any(r < 3 for ran in rows[1:] for r in ran[4:8])


def test_oracle_6_the_cache_is_whole() -> None:
    batch = {"input_ids": prompt("llama", (7,))["input_ids"]}
    W = 2
    _, _, dense = generate(None, batch, W + 2)
    _, watched, cache = generate(at(theta=-1, s=4, e=9, W=W), batch, W + 2)
    first = watched.rows[W + 1].index(0)
    assert first == 5
    for layer, (ours, full) in enumerate(zip(cache.layers, dense.layers, strict=True)):
        assert ours.keys.shape == full.keys.shape == (1, 2, 7 + W + 1, D // 4)
        same = torch.equal(ours.keys, full.keys) and torch.equal(ours.values, full.values)
        assert same == (layer <= first)  # its attention reads a state that no skip has touched


def test_oracle_7_skips_fall_with_theta() -> None:
    c = torch.rand(300, L - 1, generator=torch.Generator().manual_seed(3))
    for k in (1, 2, 3, 5, None):
        counts = [at(theta=theta, k=k).skipped(c, 1, L - 1).sum(1) for theta in torch.linspace(-0.1, 1, 30).tolist()]
        assert all(bool((less <= more).all()) for more, less in itertools.pairwise(counts))
        assert counts[0].sum() > counts[-1].sum() == 0


def test_oracle_7_skips_rise_with_k_for_tokens_that_stay_saturated() -> None:
    """… and to the end is the most for any token; but not for all: a longer run may pass over a hit."""
    generator = torch.Generator().manual_seed(4)
    steady = torch.rand(300, L - 1, generator=generator).cumsum(1)
    free = torch.rand(300, L - 1, generator=generator)
    runs = (1, 2, 3, 4, 6, 9, None)
    counts = [at(theta=1.0, k=k).skipped(steady, 1, L - 1).sum(1) for k in runs]
    assert all(bool((less <= more).all()) for less, more in itertools.pairwise(counts))
    counts = [at(theta=0.6, k=k).skipped(free, 1, L - 1).sum(1) for k in runs]
    assert all(bool((some <= counts[-1]).all()) for some in counts)
    c = torch.tensor([[1.0, 0, 0, 1, 0, 0]])
    assert [int(at(theta=0.5, k=k).skipped(c, 0, 6).sum()) for k in (2, 3)] == [4, 3]


def test_oracle_8_a_skipped_ffn_adds_nothing() -> None:
    _, watched, _ = generate(at(theta=-1, s=2, e=10, k=3), prompt("llama", (7, 5)))
    for before, after in zip(watched.before[1:], watched.after[1:], strict=True):
        for layer in range(L):
            assert torch.equal(before[layer], after[layer]) == (layer in (3, 4, 5, 7, 8, 9))


@pytest.mark.parametrize("k", [1, 4, None])
def test_oracle_9_a_batch_gives_what_its_rows_give(k: int | None) -> None:
    theta = float(calibrated().state["cosine"].median())
    method = at(theta=theta, k=k, W=1, s=1, e=11)
    batch = prompt("llama", (7, 5, 6, 7, 3, 4, 7, 6), seed=2)
    together, watched, _ = generate(method, batch, 8)
    assert any(0 < rows < 8 for ran in watched.rows[2:] for rows in ran)  # rows differ in what they skip
    for row in range(8):
        alone, _, _ = generate(method, single("llama", batch, row), 8)
        assert torch.equal(alone.argmax(-1)[0], together.argmax(-1)[row])
        torch.testing.assert_close(alone[0], together[row], rtol=2e-4, atol=2e-4)


def test_one_pass_is_cached_decoding() -> None:
    theta = float(calibrated().state["cosine"].median())
    method, batch, model = at(theta=theta, k=2, W=2, s=1, e=11), prompt("llama", (7, 5)), deep()
    with torch.no_grad(), sparing.attach(model, method) as run:
        out = model.generate(**batch, max_new_tokens=8, **OPTIONS)
        run.prompt = 7
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
        again = model(input_ids=out.sequences, attention_mask=mask).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), again, rtol=2e-4, atol=2e-4)


# ---- calibration


def test_fit_records_the_generated_tokens_of_dense_passes() -> None:
    model, batches = deep(), data()
    expected = []
    with torch.no_grad(), Watched(model) as watched:
        for batch in batches:
            model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    for before, after in zip(watched.before, watched.after, strict=True):
        c = torch.stack([torch.cosine_similarity(x, y, dim=-1) for x, y in zip(before, after)][:-1], -1)
        expected.append(c[:, 8:].flatten(0, 1))
    torch.testing.assert_close(calibrated().state["cosine"], torch.cat(expected))
    attention, mlp = 2 * D * D + 2 * D * D // 2, 3 * D * 40
    assert calibrated().state["mlp"].tolist() == pytest.approx([mlp / (attention + mlp)] * L)
    assert tuple(calibrated().state["hot"].tolist()) == _saturated(torch.cat(expected).mean(0))


def test_fit_leaves_padding_out_where_nothing_is_labelled() -> None:
    batch = prompt("llama", (7, 4))
    assert len(FfnSkipLLM().fit(deep(), [batch]).state["cosine"]) == 11
    with pytest.raises(sparing.Error, match="empty"):
        FfnSkipLLM().fit(deep(), [])
    with pytest.raises(sparing.Error, match="empty"):
        FfnSkipLLM().fit(deep(), [{**batch, "labels": torch.full((2, 7), -100)}])


@pytest.mark.parametrize(
    ("means", "hot"),
    [
        ([0.2, 0.5, 0.8, 0.9, 0.95, 0.93, 0.7], (3, 6)),  # rises, stays, drops
        ([0.99, 0.95, 0.8, 0.5, 0.7, 0.6, 0.4], (1, 3)),  # the first layer is never in it
        ([0.1, 0.2, 0.3, 0.8, 0.9, 0.7, 0.95], (3, 5)),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], (4, 7)),
        ([0.9, 0.2, 0.9, 0.1, 0.9, 0.1, 0.3], (0, 0)),  # no two neighbours
        ([0.9] * 7, (0, 0)),  # flat
        ([0.9, 0.8, 0.3, 0.2, 0.1], (0, 0)),  # falls: only the second layer is above
    ],
)
def test_where_a_model_saturates(means: list[float], hot: tuple[int, int]) -> None:
    assert _saturated(torch.tensor(means)) == hot


def test_a_model_without_saturation_is_refused_and_left_dense() -> None:
    flat = calibrated().with_state({**calibrated().state, "hot": torch.tensor([0, 0])})
    shape = sparing.shape(deep())
    with pytest.raises(sparing.BudgetError, match=r"keep = 0.8: the model does not saturate"):
        flat.at(0.8, shape)
    batch = prompt("llama", (7, 5))
    assert torch.equal(generate(flat.replace(theta=-1), batch)[0], generate(None, batch)[0])
    assert flat.at(1.0, shape).theta > 1


# ---- budgets


def angles(method: FfnSkipLLM) -> float:
    """Mean square of the summed angles of what a recorded token skips, token by token."""
    cosines = method.state["cosine"].tolist()
    skipped = [by_hand(c, method.theta, method.k or 99, *method.hot(L)) for c in cosines]
    return sum(sum(math.acos(c[x]) for x in xs) ** 2 for c, xs in zip(cosines, skipped, strict=True)) / len(cosines)


@pytest.mark.parametrize("keep", [0.97, 0.9, 0.8, 0.7])
def test_at_saves_as_much_as_asked_where_tokens_turn_least(keep: float) -> None:
    shape, wanted = sparing.shape(deep()), (1 - keep) * L
    method = calibrated().at(keep, shape)
    saved = sum(len(by_hand(c, method.theta, method.k or 99, *method.hot(L))) for c in method.state["cosine"].tolist())
    share = saved / len(method.state["cosine"]) * float(method.state["mlp"][0]) / L
    assert 1 - share == pytest.approx(keep, abs=0.02)
    assert 1 - share <= keep + 1e-9
    assert method.saved(L) == pytest.approx(share * L)
    hot = calibrated().hot(L)
    reach = [
        at(k=k, s=s, e=e)
        for s, e in _growing(*hot, calibrated().state["cosine"].double().mean(0))
        for k in range(1, e - s)
        if at(k=k, s=s, e=e, theta=-1).saved(L) >= wanted
    ]
    inside = [other for other in reach if other.hot(L) == hot]
    assert bool(inside) == (keep > 0.85) and (not inside or method.hot(L) == hot)
    others = [other._sparing(wanted, other.state["cosine"], L) for other in inside or reach]
    assert len(others) > 1 and angles(method) == min(map(angles, others))
    assert any(angles(other) > 1.05 * angles(method) for other in others)


def recorded(c_RL: list[list[float]], hot: tuple[int, int]) -> FfnSkipLLM:
    """A method with these cosines of a model of one layer more, whose FFNs are half of a layer."""
    c = torch.tensor(c_RL)
    mlp = torch.full((c.shape[1] + 1,), 0.5, dtype=torch.float64)
    return FfnSkipLLM(W=0).with_state({"cosine": c, "mlp": mlp, "hot": torch.tensor(hot)})


SEVEN = Shape(8, 4, 2, 8, 32, 48)


def test_at_stays_in_the_saturated_range_while_it_can() -> None:
    """Four layers are saturated, the next ones are not: inside k = 3 skips three FFNs, outside k = 1 would do."""
    method = recorded([[0.2, 0.99, 0.99, 0.99, 0.99, 0.5, 0.5]] * 4, (1, 5))
    for skipped in (2, 3):
        found = method.at(1 - skipped / 16, SEVEN)
        assert found.hot(8) == (1, 5) and found.saved(8) == skipped / 2
    assert method.at(1 - 3 / 16, SEVEN).k == 3
    wider = method.at(1 - 4 / 16, SEVEN)  # no k skips four of these: the range grows, by no more layers than it has to
    assert wider.hot(8) == (1, 6) and wider.k == 4


def test_at_takes_the_run_whose_skips_turn_tokens_least() -> None:
    """Two FFNs a token: all tokens skip 2 and 4 (k = 1) or 2 and 3 (k = 2); 4 turns them less than 3, or more."""
    third_is_worse = recorded([[0.2, 0.98, 0.97, 0.90, 0.97, 0.3, 0.3]] * 4, (1, 5))
    fourth_is_worse = recorded([[0.2, 0.98, 0.97, 0.97, 0.90, 0.3, 0.3]] * 4, (1, 5))
    assert third_is_worse.at(1 - 2 / 16, SEVEN).k == 1
    assert fourth_is_worse.at(1 - 2 / 16, SEVEN).k == 2


def test_at_spreads_skips_where_all_is_alike() -> None:
    """Equal means: half of the tokens skipping four FFNs turn those tokens far; all of them skipping two do not."""
    c = [[0.2, 0.97 + 0.005 * (row % 2), 0.97, 0.97, 0.97, 0.97, 0.3] for row in range(8)]
    found = recorded(c, (1, 6)).at(1 - 2 / 16, SEVEN)
    assert found.k == 1 and found.skipped(torch.tensor(c), 1, 6).sum(1).tolist() == [2] * 8


def test_settings_are_chosen_by_few_tokens_and_theta_by_all() -> None:
    c = torch.rand(2000, 7, generator=torch.Generator().manual_seed(7)).mul(0.2).add(0.8)
    method = recorded(c.tolist(), (1, 6))
    found = method.at(0.9, SEVEN)
    assert found.saved(8) == pytest.approx(0.8, abs=2e-3) and found.saved(8) >= 0.8
    assert found.theta in c[:, 1:6]


# ---- static


def test_where_all_tokens_skip_the_same_it_says_static() -> None:
    method = recorded([[0.2, 0.99, 0.98, 0.97, 0.96, 0.5, 0.4], [0.3, 0.97, 0.99, 0.98, 0.95, 0.6, 0.5]], (1, 5))
    full = method.at(1 - 3 / 16, SEVEN)
    assert full.static and full.remark == "static: every token skips the same FFNs"
    deciding = full.replace(theta=0.98)  # of the first layer, only one token gets through
    assert not deciding.static and deciding.remark == ""
    none = full.replace(theta=2.0)
    assert not none.static and none.remark == "" and FfnSkipLLM().remark == ""
    assert sparing.parse("skipdecode").remark == ""
    with pytest.raises(sparing.Error, match="needs calibration first"):
        FfnSkipLLM().static  # noqa: B018


def test_at_is_met_on_the_model_itself() -> None:
    """Not exactly: a token that skips has other states behind."""
    model, method = deep(), calibrated().at(0.8, sparing.shape(deep()))
    with torch.no_grad(), sparing.attach(model, method, prompt=8) as run:
        for batch in data():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        ran = run.trace.share("depth")
    assert 1 - 12 / 4 * (1 - ran) == pytest.approx(0.8, abs=0.06)


def test_at_the_least() -> None:
    shape, share = sparing.shape(deep()), float(calibrated().state["mlp"][0])
    least = 1 - (L - 3) / L * share
    with pytest.raises(sparing.BudgetError, match=rf"keep = 0.1: ffn-skipllm keeps at least {least:.2f}"):
        calibrated().at(0.1, shape)
    assert calibrated().at(least + 1e-3, shape).hot(L) == (1, L - 1)
    assert calibrated().at(1.0, shape).theta > 1


def test_the_range_grows_to_the_better_neighbour() -> None:
    m = torch.tensor([0.1, 0.6, 0.7, 0.9, 0.9, 0.65, 0.2])
    assert _growing(3, 5, m) == [(3, 5), (2, 5), (2, 6), (1, 6), (1, 7)]


def test_fields_and_state() -> None:
    with pytest.raises(sparing.Error, match="e = 3: must be >= s = 4"):
        FfnSkipLLM(s=4, e=3)
    with pytest.raises(sparing.Error, match="needs calibration first"):
        FfnSkipLLM().at(0.8, Shape(LAYERS, 4, 2, 8, 32, 48))
    assert FfnSkipLLM(s=2, e=99).hot(LAYERS) == (2, LAYERS - 1)
    assert FfnSkipLLM(W=25).horizon == 200


# ---- controls


@pytest.mark.parametrize("keep", [0.95, 0.85, 0.75])
def test_controls_save_as_much(keep: float) -> None:
    shape, method = sparing.shape(deep()), calibrated().at(keep, sparing.shape(deep())).replace(W=7)
    random, static = (method.control(kind, shape, seed=3) for kind in ("random", "static"))
    mlp = calibrated().state["mlp"]
    for control in (random, static):
        fields = control.fields()
        assert fields["W"] == 7 and fields["seed"] == 3
        assert float(torch.tensor(fields["skip"], dtype=torch.float64) @ mlp) == pytest.approx(method.saved(L))
    s, e = method.hot(L)
    skip = torch.tensor(random.fields()["skip"])
    assert bool((skip[s:e] == skip[s]).all()) and float(skip.sum()) == pytest.approx(float(skip[s:e].sum()))
    skip = torch.tensor(static.fields()["skip"])
    means = calibrated().state["cosine"].mean(0)
    chosen = skip[: L - 1] > 0
    assert int(((skip > 0) & (skip < 1)).sum()) <= 1
    others = torch.zeros(L - 1, dtype=torch.bool)
    others[s:e] = ~chosen[s:e]
    assert means[chosen].min() > means[others].max() and not chosen[:s].any() and not chosen[e:].any()


def test_controls_of_the_full_budget_skip_nothing() -> None:
    shape = sparing.shape(deep())
    for kind in ("random", "static"):
        assert not any(calibrated().at(1.0, shape).control(kind, shape).fields()["skip"])
    with pytest.raises(sparing.Error, match="control = 'uniform': ffn-skipllm has random, static"):
        calibrated().control("uniform", shape)

"""HiDrop: the oracles of its card, by number."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import sparing
from sparing.engine.overlap import deferred_vision
from sparing.engine.probe import VisualProbe
from sparing.engine.stream import Stream, StreamMethod, take
from sparing.grid.method import Card, Shape
from sparing.grid.select import soft_top_k
from sparing.testing.models import LAYERS, VISUAL, build, prompt
from sparing.tokens import hidrop
from sparing.tokens.hidrop import HiDrop, ilvas

LLAVA_7B = Shape(32, 32, 32, 128, 4096, 11008, 576)
CUT = HiDrop(inject=2, filters=(3, 4), keeps=(7, 3), of=VISUAL, exit=5)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_1_everything_kept_is_dense(name: str) -> None:
    model, batch = build(name), prompt(name)
    with torch.no_grad():
        dense = model(**batch).logits
        with sparing.attach(model, HiDrop(inject=1, filters=(), keeps=(), exit=LAYERS)):
            assert torch.equal(model(**batch).logits, dense)


@pytest.mark.parametrize(
    ("method", "total"),
    [
        (HiDrop(), 2048),
        (HiDrop(keeps=(87, 10, 5, 1)), 1536),
        (HiDrop(filters=(10, 13, 16, 19), keeps=(453, 10, 5, 1)), 2561),
        (HiDrop(exit=25), 2049),
    ],
)
def test_2_published_schedules(method: HiDrop, total: int) -> None:
    counts = [round(576 * s) for s in method.shares(LLAVA_7B)]
    assert sum(counts) == total
    assert counts[:8] == [0] * 8 and counts[8] == 576
    if total == 2048:
        assert sum(counts) / 32 == 64.0
        assert counts == [0] * 8 + [576] * 2 + [215] * 4 + [10] * 2 + [5] * 2 + [1] * 6 + [0] * 8


def test_3_soft_top_k_by_hand() -> None:
    keep, mask = soft_top_k(torch.tensor([[0.2, 0.9, 0.5, 0.1]]), 2)
    torch.testing.assert_close(mask, torch.tensor([[0.5, 0.8808, 0.7311, 0.2689]]), rtol=0, atol=1e-4)
    assert keep[0].nonzero().flatten().tolist() == [1, 2]


def test_3_exactly_k_and_the_papers_rule_for_every_k() -> None:
    scores = torch.rand(3, 17)
    for k in range(1, 18):
        keep, mask = soft_top_k(scores, k)
        assert keep.sum(1).tolist() == [k] * 3
        assert torch.equal(keep, mask > 0.5 + 1e-4)  # distinct scores: the paper's m > 1/2 is the same set


def test_4_ties_keep_exactly_k_the_earlier_ones() -> None:
    keep, _ = soft_top_k(torch.full((2, 9), 0.3), 4)
    assert keep.tolist() == [[True] * 4 + [False] * 5] * 2


def test_5_ilvas_by_hand() -> None:
    before = torch.tensor([[0.4, 0.1], [0.3, 0.3], [0.05, 0.1]]).T[None]
    after = torch.tensor([[0.2, 0.2], [0.3, 0.3], [0.1, 0.0]]).T[None]
    torch.testing.assert_close(ilvas(before, after, 2), torch.tensor([0.9287]), rtol=0, atol=1e-4)
    torch.testing.assert_close(ilvas(before, before, 3), torch.ones(1))
    other = torch.tensor([[0.1, 0.0], [0.5, 0.5], [0.2, 0.2]]).T[None]  # most attended: token 1
    first = torch.tensor([[0.6, 0.2], [0.1, 0.1], [0.2, 0.1]]).T[None]  # token 0: the first layer says which count
    torch.testing.assert_close(ilvas(first, other, 1), torch.tensor([0.6 / 0.4**0.5]))
    torch.testing.assert_close(ilvas(other, first, 1), torch.ones(1))


def _positions_seen(model: PreTrainedModel, batch: dict[str, torch.Tensor], method: HiDrop) -> list[torch.Tensor]:
    """cos of every row each layer's attention got, with the rows' columns."""
    seen = []

    def note(module: torch.nn.Module, args: object, kwargs: dict[str, object]) -> None:
        cos = kwargs["position_embeddings"][0]  # type: ignore[index]
        if cos.shape[1] != 2:  # two rows alone: how the engine finds out once whether a layer turns its keys
            seen.append(cos.clone())

    layers = sparing.view(model).layers
    with sparing.attach(model, method):
        hooks = [layer.attention.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]  # type: ignore[union-attr]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
    return seen


def test_6_text_positions_are_the_same_in_every_layer(llava: PreTrainedModel) -> None:
    batch = prompt("llava", (6, 6), side="none")
    seen = _positions_seen(llava, batch, CUT)
    first, last = slice(0, 2), slice(-4, None)  # two text tokens before the image, four behind it
    assert [s.shape[1] for s in seen] == [6, 22, 22, 13, 9, 6]
    for rows in seen[1:]:
        torch.testing.assert_close(rows[:, first], seen[1][:, first].expand_as(rows[:, first]))
        torch.testing.assert_close(rows[:, last], seen[1][:, last].expand_as(rows[:, last]))


def test_6_compact_positions_are_another_thing(llava: PreTrainedModel) -> None:
    batch = prompt("llava", (6, 6), side="none")
    seen = _positions_seen(llava, batch, CUT.replace(compact=True))
    reference = seen[1]  # the whole sequence: row r has position r
    torch.testing.assert_close(seen[3][0], reference[0, :13])
    with torch.no_grad():
        with sparing.attach(llava, CUT):
            persistent = llava(**batch).logits
        with sparing.attach(llava, CUT.replace(compact=True)) as run:
            compact = llava(**batch).logits
            out = llava.generate(
                **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            run.prompt = 22
            again = llava(out.sequences, pixel_values=batch["pixel_values"]).logits[:, 21:-1]
    assert not torch.allclose(persistent, compact)
    torch.testing.assert_close(torch.stack(out.logits, 1), again, rtol=2e-4, atol=2e-4)


def test_6_compact_is_refused_for_three_dimensional_positions() -> None:
    model, batch = build("qwen2.5-vl"), prompt("qwen2.5-vl")
    with sparing.attach(model, CUT.replace(compact=True)), pytest.raises(sparing.Error, match="compact positions"):
        model(**batch)


def test_6_dropped_content_cannot_change_the_output(llava: PreTrainedModel) -> None:
    """Whatever dropped tokens become in the layers behind the cut, nobody reads it."""
    batch = prompt("llava", (6, 6), side="none")

    class Poison(StreamMethod):
        name = "poison"
        card = Card("", 2026, "test", "stream", "prefill")

        def before_layer(self, stream: Stream, layer: int) -> None:
            if stream._out is not None:
                stream._out = stream._out + 1e6

    with torch.no_grad():
        with sparing.attach(llava, CUT):
            clean = llava(**batch, logits_to_keep=1).logits
        with sparing.attach(llava, CUT, Poison()):
            assert torch.equal(llava(**batch, logits_to_keep=1).logits, clean)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_7_one_query_scores_equal_the_materialised_row(name: str) -> None:
    model, batch = build(name), prompt(name, (7, 5))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    got: dict[int, torch.Tensor] = {}

    class Look(StreamMethod):
        name = "look"
        card = Card("", 2026, "test", "stream", "prefill")

        def before_layer(self, stream: Stream, layer: int) -> None:
            got[layer] = stream.received()
            if layer:
                torch.testing.assert_close(stream.watched(), got[layer - 1])  # from the keys the layer computed
            stream.watch()

    with torch.no_grad(), sparing.attach(model, Look()):
        model(**batch)
    image = batch["input_ids"] == model.config.image_token_id
    for layer in range(LAYERS):
        row = maps[layer][:, :, -1].float().mean(1)
        expected = torch.stack([row[b][image[b]] for b in range(2)])
        torch.testing.assert_close(got[layer], expected, rtol=1e-4, atol=1e-5)


def test_budget_is_met_for_any_depth() -> None:
    for layers, keeps in ((8, (0.3, 0.5)), (16, (0.25, 0.5)), (32, (0.11, 0.5)), (40, (0.11, 0.4))):
        shape = Shape(layers, 8, 8, 16, 128, 256, 256)
        for keep in keeps:
            method = HiDrop().at(keep, shape)
            assert sum(method.shares(shape)) / layers == pytest.approx(keep, abs=8 / layers / 256)
    with pytest.raises(sparing.BudgetError, match=r"keep = 0.9: hidrop with inject = 9"):
        HiDrop().at(0.9, LLAVA_7B)


def test_layers_that_were_set_are_taken_as_they_are() -> None:
    """Only published layers are scaled to a model that is shallower than the published exit."""
    for layers in (16, 30, 40):  # all set, on any depth
        method = HiDrop(inject=9, filters=(10, 12), keeps=(64, 8), exit=14)
        assert method.scaled(layers) == method
    assert HiDrop().scaled(24) == HiDrop() and HiDrop().scaled(40) == HiDrop()
    scaled = HiDrop().scaled(16)
    assert (scaled.inject, scaled.filters, scaled.exit) == (5, (5, 7, 8, 9), 12)
    assert HiDrop().scaled(8).filters == (3, 4, 5, 6) and HiDrop().scaled(8).exit == 7  # room for four filters
    own = HiDrop(inject=1, filters=(1, 2), keeps=(64, 32), of=256)
    assert (own.scaled(8).inject, own.scaled(8).filters, own.scaled(8).exit) == (1, (1, 2), 6)
    shape = Shape(8, 4, 2, 8, 32, 48, 256)
    assert own.shares(shape)[:3] == (1.0, 0.25, 0.125) and own.shares(shape)[5:] == (0.125, 0.0, 0.0)
    assert own.at(0.3, shape).filters == (1, 2)
    late = HiDrop(inject=4, filters=(5, 7), keeps=(64, 32), of=256)
    assert (late.scaled(8).inject, late.scaled(8).filters, late.scaled(8).exit) == (4, (5, 7), 8)
    alone = HiDrop(inject=7).scaled(16)  # the scaled filters make room for it
    assert (alone.inject, alone.filters, alone.exit) == (7, (7, 8, 9, 10), 12)
    deep = HiDrop(filters=(8, 9), keeps=(64, 32)).scaled(12)
    assert (deep.inject, deep.filters, deep.exit) == (4, (8, 9), 10)


@pytest.mark.parametrize(
    ("method", "layers", "message"),
    [
        (HiDrop(exit=20), 16, "exit = 20: must be at most 16, the layers of the model"),
        (HiDrop(inject=1, filters=(1, 8), keeps=(8, 4)), 8, r"inject = 1, filters = \(1, 8\): do not fit .* 8 layers"),
        (HiDrop(inject=10, filters=(), keeps=()), 8, "inject = 10, filters = .*: do not fit a model of 8 layers"),
        (HiDrop(), 3, "do not fit a model of 3 layers; set inject, filters, exit"),
    ],
)
def test_layers_beyond_the_model_are_refused(method: HiDrop, layers: int, message: str) -> None:
    with pytest.raises(sparing.Error, match=message):
        method.shares(Shape(layers, 4, 2, 8, 32, 48, 256))


def test_controls_follow_the_same_schedule() -> None:
    shape = Shape(LAYERS, 4, 2, 8, 32, 48, VISUAL)
    for kind in ("random", "uniform", "oracle"):
        assert CUT.control(kind, shape).fields()["schedule"] == CUT.shares(shape)


def test_gradient_reaches_the_projections_that_select_and_nothing_before_them() -> None:
    """Scores come from detached states, so against a hard top-k only norm, q and k of the filter layers gain."""
    model, batch = build("llava"), prompt("llava", (6, 6), side="none")
    batch["labels"] = torch.where(torch.arange(22) >= 20, batch["input_ids"], -100)
    model.train()

    class HardTopK(HiDrop):
        def _select(self, stream: Stream, count_B: torch.Tensor) -> torch.Tensor:
            return soft_top_k(stream.received(), count_B)[0]

    def gradients(method: HiDrop) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with sparing.attach(model, method):
            model(**batch, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    soft, hard = gradients(CUT), gradients(HardTopK(**CUT.fields()))
    assert set(soft) == set(hard)
    layers = "model.language_model.layers."
    parts = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight")
    selecting = {f"{layers}{layer}.{part}" for layer in (3, 4) for part in parts}  # behind filters 3 and 4
    for name in soft:
        same = torch.allclose(soft[name], hard[name], rtol=1e-3, atol=1e-6)
        assert same == (name not in selecting), name


def test_training_ranks_by_the_mean_over_all_tokens_before_an_answer() -> None:
    """Two answers in the first sample, one in the second; without labels the last prompt token asks."""
    model, batch = build("llava"), prompt("llava", (7, 7), side="none")
    asking, answer = torch.zeros(2, 23, dtype=torch.bool), torch.zeros(2, 23, dtype=torch.bool)
    asking[0, [18, 20]] = asking[1, 19] = True
    answer[0, [19, 21, 22]] = answer[1, 20] = True
    labels = torch.where(answer, batch["input_ids"], -100)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    seen: list[torch.Tensor] = []

    class Look(HiDrop):
        def _select(self, stream: Stream, count_B: torch.Tensor) -> torch.Tensor:
            seen.append(stream.received().detach())
            return super()._select(stream, count_B)

    look = Look(inject=1, filters=(3,), keeps=(7,), of=VISUAL, exit=5)
    image = batch["input_ids"][0] == model.config.image_token_id
    last = torch.zeros_like(asking)
    last[:, -1] = True
    for given, queries in (({"labels": labels}, asking), ({}, last)):
        with sparing.attach(model, look, trace=True) as run:
            model(**batch, **given, use_cache=False)
        index = run.trace.cells[0].index[3]
        for b in range(2):
            score = maps[3][b][:, queries[b]].mean((0, 1))[image]
            torch.testing.assert_close(seen[-1][b], score, rtol=1e-4, atol=1e-6)
            kept = image.nonzero().flatten()[score.topk(7).indices].sort().values
            assert [i for i in index[b].tolist() if image[i]] == kept.tolist()  # type: ignore[index]
    assert len(seen) == 2


def test_fit_changes_only_a_copy_and_trains() -> None:
    model = build("llava")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = prompt("llava", (6, 6, 6), side="none")
    batch["labels"] = torch.where(torch.arange(22) >= 20, batch["input_ids"], -100)
    fitted = CUT.fit(model, [batch], epochs=15, lr=3e-3, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any("vision_tower" in k or "embed_tokens" in k for k in fitted.state)
    with torch.no_grad():
        with sparing.attach(model, CUT):
            old = model(**batch).loss
        with sparing.attach(model, fitted):
            assert model(**batch).loss < 0.8 * old
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def _turning(cosines: list[float]) -> list[torch.Tensor]:
    """Unit vectors (2,), one more than cosines, each at that cosine to the one before."""
    angles = torch.tensor([0.0, *(math.acos(c) for c in cosines)], dtype=torch.double).cumsum(0)
    return [torch.stack([a.cos(), a.sin()]) for a in angles]


INTRA = [0.1, 0.9, 0.8, 0.5, 0.7, 0.4, 0.6, 0.9, 0.95, 0.9, 0.9, 0.9, 0.9]  # S_intra(l) at index l: 3, then 5 lower
ILVAS = [0.2, 0.3, 0.99, 0.3, 0.6, 0.3, 0.8, 0.2, 0.7, 0.1, 0.9, 0.3, 0.2]  # of layers 1, 2, …: 3, 5, 7, 9, 11 peak
JOINS = [1.0, 1.0, 1.0, 0.9, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
LEAVES = [0.1, 0.1, 0.2, 0.3, 0.5, 0.8, 0.995, 0.98, 0.985, 0.989, 0.99, 1.0, 1.0, 1.0]


def _choose(
    patch: pytest.MonkeyPatch,
    *,
    intra: list[float] = INTRA,
    joins: list[float] = JOINS,
    leaves: list[float] = LEAVES,
    filters: int = 2,
    keep: float | None = None,
) -> tuple[HiDrop, dict[str, list[float]]]:
    """The choice for a dense run of 14 layers that looks like this."""
    L = len(joins)
    hidden = [v.expand(3, 5, 2) for v in _turning(intra)]  # three samples, five visual tokens
    # two heads, three tokens: the first is the one attended most, the others must not count at K = 1
    attention = [torch.cat([v[:, None], -9 - torch.rand(2, 2)], 1).expand(3, 2, 3) for v in _turning(ILVAS)]
    patch.setattr(hidrop, "probe", lambda model, data: VisualProbe(hidden, attention))
    patch.setattr(hidrop, "View", lambda model: SimpleNamespace(shape=Shape(L, 4, 2, 8, 32, 48, VISUAL)))
    patch.setattr(
        HiDrop, "_agreement", lambda self, model, data, first, last: leaves[last - 1] if last < L else joins[first - 1]
    )
    start = HiDrop(inject=1, filters=tuple(range(1, filters + 1)), keeps=(8, 4, 2, 1)[:filters], of=VISUAL, exit=12)
    model: Any = None
    return start.choose(model, [], keep=keep, K=1)


def test_choose_takes_the_layers_that_the_curves_show(monkeypatch: pytest.MonkeyPatch) -> None:
    method, curves = _choose(monkeypatch)
    assert curves["intra"] == pytest.approx(INTRA) and curves["ilvas"] == pytest.approx(ILVAS)
    assert curves["inject"] == JOINS and curves["exit"] == LEAVES
    assert method.inject == 4  # behind the first local minimum, the cosine to the embeddings not being one
    assert method.exit == 11  # 7 would change 0.5 %, but 8 to 10 more than 1 %
    assert method.filters == (7, 9)  # the highest of the peaks from inject on and before exit, in their order
    assert method.keeps == (8, 4)
    assert _choose(monkeypatch, filters=1)[0].filters == (7,)
    assert _choose(monkeypatch, filters=4)[0].filters == (5, 7, 9)


def test_choose_injects_late_only_where_the_answers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    early = [*JOINS[:3], 0.89, *JOINS[4:]]
    method, _ = _choose(monkeypatch, joins=early)
    assert method.inject == 1 and method.filters == (3, 7)  # now the peak at layer 3 counts too
    rising = [0.1, *(0.5 + 0.03 * i for i in range(12))]
    assert _choose(monkeypatch, intra=rising)[0].inject == 1  # no local minimum
    later = [*INTRA[:2], 0.85, 0.8, 0.75, *INTRA[5:]]  # the first minimum is 5 now
    joins = [1.0] * 6 + JOINS[6:]
    method, _ = _choose(monkeypatch, intra=later, joins=joins)
    assert method.inject == 6 and method.filters == (7, 9)
    on_it = [*INTRA[:2], 0.85, 0.8, 0.75, 0.7, 0.6, *INTRA[7:]]  # 6: inject = 7, which is a peak itself
    assert _choose(monkeypatch, intra=on_it, joins=[1.0] * 14)[0].filters == (7, 9)


def test_choose_exits_behind_injection(monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = _choose(monkeypatch, leaves=[1.0] * 14)
    assert (method.inject, method.exit) == (4, 5) and method.filters == (4,)  # no peak between: thinned at once


def test_choose_thins_early_enough_for_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = _choose(monkeypatch, keep=0.25)
    assert (method.inject, method.filters, method.exit) == (4, (4, 7), 11)  # one layer, of 14 / 4 / 2, before the first
    assert sum(method.shares(Shape(14, 4, 2, 8, 32, 48, VISUAL))) / 14 == pytest.approx(0.25, abs=7 / 14 / VISUAL)
    assert _choose(monkeypatch, keep=0.45)[0].filters == (6, 7)
    assert _choose(monkeypatch, keep=0.6, leaves=[0.0] * 13 + [1.0])[0].filters == (7, 11)  # early enough as they are


def test_choose_compares_the_answers_with_the_dense_ones() -> None:
    model = build("llava")
    data = [prompt("llava", (6, 6, 6), side="none", seed=s) for s in (1, 2)]
    start = HiDrop(inject=1, filters=(2, 3), keeps=(7, 3), exit=4, of=VISUAL)
    method, curves = start.choose(model, [{**batch, "labels": batch["input_ids"]} for batch in data])
    assert 1 <= method.inject <= method.exit <= LAYERS
    assert {k: len(v) for k, v in curves.items()} == {"intra": 5, "ilvas": 5, "inject": LAYERS, "exit": LAYERS}
    assert curves["exit"][-1] == curves["inject"][0] == 1.0

    def answers(method: HiDrop) -> torch.Tensor:
        with torch.no_grad(), sparing.attach(model, method):
            return torch.cat([model(**batch).logits[:, -1].argmax(-1) for batch in data])

    every = HiDrop(inject=1, filters=(), keeps=(), exit=LAYERS)
    dense = answers(every)
    for layer in range(1, LAYERS + 1):
        for name, one in (("inject", every.replace(inject=layer)), ("exit", every.replace(exit=layer))):
            assert curves[name][layer - 1] == pytest.approx(float((answers(one) == dense).float().mean()))
    assert len(set(curves["inject"] + curves["exit"])) > 2  # so it is seen


def test_8_deferred_vision_gives_the_same_result(llava: PreTrainedModel) -> None:
    """On CUDA the tower runs on a side stream; the same hand-over without CUDA must change nothing."""
    for batch in (prompt("llava"), prompt("llava", (6, 6), side="right")):
        with torch.no_grad(), sparing.attach(llava, CUT) as run:
            plain = llava(**batch).logits
            with deferred_vision(run, force=True):
                assert torch.equal(llava(**batch).logits, plain)
            assert "get_image_features" not in vars(llava.model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keeps": (5, 10, 3, 1)}, "keeps = .*must fall"),
        ({"keeps": (5,)}, "needs one count for each"),
        ({"filters": (10, 10, 16, 18)}, "must rise"),
        ({"exit": 5}, "inject = 9.*must satisfy"),
    ],
)
def test_contradicting_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(sparing.Error, match=message):
        HiDrop(**fields)  # type: ignore[arg-type]


def test_take_broadcasts() -> None:
    assert take(torch.arange(5)[None], torch.tensor([[1, 2], [3, 4]])).tolist() == [[1, 2], [3, 4]]

"""HiDrop: the oracles of its card, by number."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import sparing
from sparing.engine.overlap import deferred_vision
from sparing.engine.stream import Stream, StreamMethod, take
from sparing.grid.method import Card, Shape
from sparing.grid.select import soft_top_k
from sparing.testing.models import LAYERS, VISUAL, build, prompt
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


def test_controls_follow_the_same_schedule() -> None:
    shape = Shape(LAYERS, 4, 2, 8, 32, 48, VISUAL)
    for kind in ("random", "uniform", "oracle"):
        assert CUT.control(kind, shape).fields()["schedule"] == CUT.shares(shape)


def test_gradient_reaches_the_projections_that_select() -> None:
    model, batch = build("llava"), prompt("llava", (6, 6), side="none")
    batch["labels"] = torch.where(torch.arange(22) >= 20, batch["input_ids"], -100)
    model.train()
    with sparing.attach(model, CUT):
        model(**batch, use_cache=False).loss.backward()
    straight = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    attention = "model.language_model.layers.3.self_attn.q_proj.weight"

    class HardTopK(HiDrop):
        def _select(self, stream: Stream, count_B: torch.Tensor) -> torch.Tensor:
            return soft_top_k(stream.received(), count_B)[0]

    model.zero_grad()
    with sparing.attach(model, HardTopK(**CUT.fields())):
        model(**batch, use_cache=False).loss.backward()
    hard = dict(model.named_parameters())[attention].grad
    assert hard is not None and not torch.allclose(straight[attention], hard)


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


def test_choose_finds_layers_in_range() -> None:
    model = build("llava")
    method, curves = HiDrop(filters=(2, 3), keeps=(7, 3), inject=1, exit=4, of=VISUAL).choose(
        model, [prompt("llava", (6, 6), side="none")]
    )
    assert 1 <= method.inject <= method.exit <= LAYERS
    assert {k: len(v) for k, v in curves.items()} == {
        "intra": LAYERS - 1,
        "ilvas": LAYERS - 1,
        "inject": LAYERS,
        "exit": LAYERS,
    }
    assert curves["exit"][-1] == curves["inject"][0] == 1.0
    budgeted, _ = HiDrop(filters=(2, 3), keeps=(7, 3), inject=1, exit=4, of=VISUAL).choose(
        model, [prompt("llava", (6, 6), side="none")], keep=0.3
    )
    assert sum(budgeted.shares(sparing.shape(model))) / LAYERS == pytest.approx(0.3, abs=0.06)


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

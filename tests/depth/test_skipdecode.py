"""SkipDecode: the oracles of its card, by number."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparing
from sparing.depth.skipdecode import SkipDecode, _prompts
from sparing.grid.method import Shape
from sparing.testing.models import LAYERS, VOCAB, build, prompt, single

SHAPE = Shape(LAYERS, 4, 2, 8, 32, 48)
FALLING = SkipDecode(e_max=5, e_min=2, T_ref=5, w=1)  # 5, 4, 4, 3, 3, 2, 2, … of 6 layers
OPTIONS = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def test_1_all_layers_are_dense(llama: PreTrainedModel) -> None:
    batch = prompt("llama")
    method = SkipDecode(e_max=LAYERS, e_min=LAYERS)
    with torch.no_grad():
        dense = llama.generate(**batch, max_new_tokens=4, **OPTIONS)
        whole = llama(**batch).logits
        with sparing.attach(llama, method) as run:
            out = llama.generate(**batch, max_new_tokens=4, **OPTIONS)
            run.prompt = 3
            assert torch.equal(llama(**batch).logits, whole)
    assert torch.equal(torch.stack(out.logits), torch.stack(dense.logits))


def test_2_worked_schedules() -> None:
    method = SkipDecode(e_max=8, e_min=4, T_ref=8)
    assert [method.budget(t, 12) for t in range(9)] == [8, 8, 7, 7, 6, 6, 5, 5, 4]
    method = SkipDecode(e_max=16, e_min=8, T_ref=10)
    assert [method.budget(t, 24) for t in range(11)] == [16, 15, 14, 14, 13, 12, 11, 10, 10, 9, 8]
    assert method.mean(24) == pytest.approx(12.4)


def test_3_worked_layer_sets() -> None:
    method = SkipDecode(e_max=16, e_min=8, T_ref=10, w=1)
    assert method.layer_set(24, 0) == (0, *range(9, 24))
    assert method.layer_set(24, 10) == (0, *range(17, 24))
    assert all(len(method.layer_set(24, t)) == method.budget(t, 24) for t in range(12))
    assert method.replace(w=None).layer_set(24, 10) == (0, 1, *range(18, 24))
    assert method.replace(w=3).layer_set(24, 10) == (0, 1, 2, *range(19, 24))
    assert method.replace(drop="top").layer_set(24, 10) == tuple(range(8))


def drawn(count: int) -> list[tuple[SkipDecode, int]]:
    """Methods with fields by lot, and a number of layers each is for."""
    rng = random.Random(3)
    found = []
    for _ in range(count):
        L = rng.randint(2, 40)
        e_max = rng.randint(1, L)
        e_min = rng.randint(1, e_max)
        drop = rng.choice(("middle", "top"))
        w = rng.choice((rng.randint(0, L - 1), None))
        found.append((SkipDecode(e_max, e_min, rng.randint(1, 60), w, drop), L))
    return found


def test_4_budgets_never_rise_and_sets_are_nested() -> None:
    for method, L in drawn(300):
        case, w = (method, L), method.warm(L)
        assert method.e_min is not None and method.e_max is not None
        sets = [set(method.layer_set(L, t)) for t in range(method.T_ref + 4)]
        budgets = [method.budget(t, L) for t in range(method.T_ref + 4)]
        exact = [method.e_max - (method.e_max - method.e_min) * min(t / method.T_ref, 1) for t in range(len(sets))]
        for t, (now, b) in enumerate(zip(sets, budgets, strict=True)):
            assert t == 0 or (now <= sets[t - 1] and b <= budgets[t - 1]), case
            assert max(method.e_min, w + 1) <= b == len(now) <= L, case
            assert abs(b - max(exact[t], w + 1)) <= 0.5 + 1e-9, case
            assert set(range(w)) <= now, case
        for layer in range(L):  # the closed form of what before_layer follows
            ran = sum(layer in now for now in sets)
            assert min(method.lasts(layer, L), len(sets)) == ran, (*case, layer)
            assert (method.lasts(layer, L) == math.inf) == (layer in sets[-1]), (*case, layer)


def by_mask(model: PreTrainedModel, ids: Tensor, start: int, method: SkipDecode) -> Tensor:
    """One sequence recomputed from scratch: a position that skips a layer keeps its state and is no key there."""
    decoder, T = model.model, ids.shape[1]
    hidden = decoder.embed_tokens(ids)
    rope = decoder.rotary_emb(hidden, position_ids=torch.arange(T)[None])
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    for i, layer in enumerate(decoder.layers):
        runs = torch.tensor([t < start or i in method.layer_set(LAYERS, t - start) for t in range(T)])
        mask = (causal & runs) | torch.eye(T, dtype=torch.bool)
        changed = layer(hidden, attention_mask=mask[None, None], position_embeddings=rope)
        hidden = torch.where(runs[:, None], changed, hidden)
    return model.lm_head(decoder.norm(hidden))


@pytest.mark.parametrize("drop", ["middle", "top"])
@pytest.mark.parametrize("lengths", [(7,), (7, 3, 5, 7, 4, 6, 2, 5)])
def test_5_6_cached_decoding_equals_recomputation(llama: PreTrainedModel, lengths: tuple[int, ...], drop: str) -> None:
    """… with no key missing where attention reads (`checks_cache`), at batch 1 and at batch 8 with left padding."""
    method, batch = FALLING.replace(drop=drop), prompt("llama", lengths)
    with torch.no_grad():
        with sparing.attach(llama, method) as run:
            run.checks_cache = True
            out = llama.generate(**batch, max_new_tokens=9, **OPTIONS)
        for row in range(len(lengths)):
            alone = single("llama", batch, row)["input_ids"]
            whole = torch.cat([alone, out.sequences[row : row + 1, 7:]], 1)
            expected = by_mask(llama, whole, alone.shape[1], method)
            got = torch.stack(out.logits, 1)[row]
            torch.testing.assert_close(got, expected[0, alone.shape[1] - 1 : -1], rtol=2e-4, atol=2e-4)


def test_6_a_schedule_that_rises_would_miss_keys(llama: PreTrainedModel) -> None:
    """What `checks_cache` is there for: it refuses the increasing schedule."""

    class Rising(SkipDecode):
        def lasts(self, layer: int, L: int) -> float:
            return math.inf

        def before_layer(self, stream: sparing.engine.stream.Stream, layer: int) -> None:
            if stream.common_step == 0 and layer == 2:
                stream.bypass()

    with torch.no_grad(), sparing.attach(llama, Rising()) as run:
        run.checks_cache = True
        with pytest.raises(sparing.Error, match="layer 2 would attend without 1 keys"):
            llama.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)


def test_6_layers_that_left_hold_no_cache(llama: PreTrainedModel) -> None:
    """Right after the step at which the last token ran them; the others hold every token."""
    method, ids = FALLING, prompt("llama", (6,))["input_ids"]
    with torch.no_grad(), sparing.attach(llama, method):
        cache = llama(ids).past_key_values
        for t in range(7):
            llama(ids[:, :1], past_key_values=cache)
            held = [layer.keys.shape[-2] if layer.is_initialized else 0 for layer in cache.layers]
            assert held == [6 + t + 1 if i in method.layer_set(LAYERS, t) else 0 for i in range(LAYERS)]
            assert cache.get_seq_length() == 6 + t + 1


def test_7_batch_mates_do_not_matter(llama: PreTrainedModel) -> None:
    one, two = prompt("llama", (7, 4), seed=1), prompt("llama", (7, 4), seed=1)
    two["input_ids"][1, 3:] = torch.randint(2, VOCAB, (4,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), sparing.attach(llama, FALLING):
        first, second = (llama.generate(**b, max_new_tokens=8, **OPTIONS) for b in (one, two))
    assert torch.equal(torch.stack(first.logits, 1)[0], torch.stack(second.logits, 1)[0])
    assert not torch.equal(torch.stack(first.logits, 1)[1], torch.stack(second.logits, 1)[1])


def test_8_beyond_the_reference_length_and_from_the_first_generated_token(llama: PreTrainedModel) -> None:
    """Steps count from each row's own first generated token; the trace shows which layers each of them ran."""
    batch = prompt("llama", (7, 4))
    with torch.no_grad(), sparing.attach(llama, FALLING) as run:
        llama.generate(**batch, max_new_tokens=10, do_sample=False)
        ran = [sum(cells.rows) / cells.tokens for cells in run.trace.cells]
    assert ran == [LAYERS, 5, 4, 4, 3, 3, 2, 2, 2, 2]
    ids = prompt("llama", (12, 12))["input_ids"]
    with torch.no_grad(), sparing.attach(llama, FALLING, prompt=torch.tensor([5, 8]), trace=True) as run:
        llama(ids, use_cache=False)
        for row, start in enumerate((5, 8)):
            for column in range(12):
                here = run.trace.map(row)[:, column].nonzero().flatten().tolist()
                wanted = range(LAYERS) if column < start else FALLING.layer_set(LAYERS, column - start)
                assert here == list(wanted), (row, column)


def test_prefill_is_dense(llama: PreTrainedModel) -> None:
    batch = prompt("llama")
    with torch.no_grad():
        dense = llama(**batch).logits
        with sparing.attach(llama, FALLING):
            assert torch.equal(llama(**batch).logits, dense)


def test_fields_the_model_decides() -> None:
    assert SkipDecode().ends(24) == (16, 8)
    assert SkipDecode().ends(6) == (3, 3) and SkipDecode(w=1).ends(6) == (4, 2)
    assert SkipDecode(e_max=10).ends(24) == (10, 5)
    assert SkipDecode(e_min=10).ends(12) == (12, 10)
    assert SkipDecode().layer_set(2) == (0, 1) and SkipDecode(w=0).layer_set(1) == (0,)
    assert len(SkipDecode().layer_set(4)) == 3 and len(SkipDecode(w=1).layer_set(4)) == 2  # w + 1 at least
    assert [SkipDecode().warm(L) for L in (1, 2, 3, 12, 30, 35, 36, 48, 80)] == [0, 1, 2, 2, 2, 2, 3, 4, 6]
    assert SkipDecode(w=1).warm(48) == 1 and SkipDecode(w=0).warm(48) == 0
    for method, L, words in [
        (SkipDecode(e_max=7), 6, "e_max = 7: must be <= 6"),
        (SkipDecode(e_min=7), 6, "e_min = 7: must be <= 6"),
        (SkipDecode(w=6), 6, "w = 6: must be <= 5, the model has 6 layers"),
    ]:
        with pytest.raises(sparing.Error, match=words):
            method.layer_set(L)
    with pytest.raises(sparing.Error, match="e_min = 5: must be <= e_max = 4"):
        SkipDecode(e_max=4, e_min=5)


@pytest.mark.parametrize("T_ref", [1, 7, 64, 512])
@pytest.mark.parametrize("L", [6, 12, 24, 33])
def test_budget_is_the_mean_over_the_reference_length(L: int, T_ref: int) -> None:
    shape = Shape(L, 4, 2, 8, 32, 48)
    for R in range(3, L + 1):
        method = SkipDecode(T_ref=T_ref).at(R / L, shape)
        mean = sum(method.budget(t, L) for t in range(T_ref)) / T_ref
        assert method.mean(L) == pytest.approx(mean)
        assert abs(mean - R) < 0.5 and (T_ref < 64 or abs(mean - R) <= L / T_ref / 2)
        assert method.mirrored(shape) == {"R": R}
    assert SkipDecode(T_ref=T_ref).at(1.0, shape).ends(L) == (L, L)
    with pytest.raises(sparing.BudgetError, match=rf"at least w \+ 1 = 3 of {L} layers, {3 / L:.3g}"):
        SkipDecode().at(2 / L, shape)
    assert SkipDecode(w=1, T_ref=T_ref).at(2 / L, shape).ends(L) == (2, 2)


def test_budget_of_the_card() -> None:
    assert SkipDecode(T_ref=40).horizon == 40
    assert SkipDecode(T_ref=512).at(0.5, Shape(24, 4, 2, 8, 32, 48)).ends(24) == (16, 8)


def test_controls_spend_the_same() -> None:
    shape = Shape(24, 4, 2, 8, 32, 48)
    method = SkipDecode().at(0.5, shape)
    for kind in SkipDecode.card.controls:
        control = method.control(kind, shape)
        spent = sum(min(control.lasts(layer, 24), 512) for layer in range(24)) / 512  # type: ignore[attr-defined]
        assert spent == pytest.approx(12, abs=0.02), kind
    constant = method.control("constant", shape)
    assert constant.layer_set(24, 0) == constant.layer_set(24, 600) == (0, 1, *range(14, 24))  # type: ignore[attr-defined]
    assert method.control("termination", shape).layer_set(24, 0) == tuple(range(16))  # type: ignore[attr-defined]


def test_fit_trains_this_schedule_and_holds_for_its_budget() -> None:
    model = build("llama")
    batch = prompt("llama", (9, 9), side="none")
    batch["labels"] = torch.where(torch.arange(9) >= 4, batch["input_ids"], -100)
    method = FALLING
    fitted = method.fit(model, [batch], epochs=12, lr=3e-3, progress=False)
    with torch.no_grad():
        with sparing.attach(model, method, prompt=4):
            before = model(**batch).loss
        with sparing.attach(model, fitted, prompt=4):
            assert model(**batch).loss < 0.8 * before
    assert fitted.at(0.7, SHAPE) is fitted  # 3.8 layers on average, 4 of 6
    with pytest.raises(sparing.BudgetError, match=r"keep = 0.5: skipdecode was fitted at 0.667; fit it anew"):
        fitted.at(0.5, SHAPE)


def test_a_first_layer_that_leaves_is_never_layer_1() -> None:
    """keep = 0.9 of a real model's 30 layers: layer 1 is one that cannot be lost, so layer 2 leaves first."""
    shape = Shape(30, 4, 2, 8, 32, 48)
    for method in (SkipDecode(T_ref=40).at(0.9, shape), SkipDecode(T_ref=40).at(0.9, shape).control("constant", shape)):
        assert all({0, 1} <= set(method.layer_set(30, t)) for t in range(41))  # type: ignore[attr-defined]
        assert 2 not in method.layer_set(30, 40)  # type: ignore[attr-defined]
    assert 1 not in SkipDecode(T_ref=40, w=1).at(0.9, shape).layer_set(30, 40)


# ---- what fit trains


def labelled(*rows: str) -> dict[str, Tensor]:
    """A batch drawn as text: `.` padding, `p` prompt, `x` a labelled token."""
    kinds = [list(row) for row in rows]
    labels = torch.tensor([[5 if kind == "x" else -100 for kind in row] for row in kinds])
    real = torch.tensor([[int(kind != ".") for kind in row] for row in kinds])
    return {"input_ids": torch.full_like(labels, 5), "attention_mask": real, "labels": labels}


def ends(data: list[dict[str, Tensor]], T_ref: int) -> list[list[int]]:
    return [prompt_B.tolist() for prompt_B in _prompts(data, T_ref)]


def test_prompts_end_where_labels_begin_if_a_response_is_long_enough() -> None:
    data = [labelled("pppxxxxx", "..ppppxx"), labelled("ppppppxx")]
    assert ends(data, 5) == ends(data, 3) == [[3, 6], [6]]
    assert ends([labelled("ppxxpxx.")], 5) == [[2]]  # a gap between labels counts


def test_prompts_end_earlier_in_turn_where_responses_are_shorter() -> None:
    """Three parts of four steps each, up to T_ref = 12; a token of prompt stays in any case."""
    rows = labelled("ppppppppppppxxxx", "ppppppppppppxxxx")
    assert ends([rows, rows], 12) == ends([rows, rows], 9) == [[12, 8], [4, 12]]
    assert ends([rows, rows], 16) == [[12, 8], [4, 1]]
    assert ends([{k: v for k, v in rows.items() if k != "attention_mask"}], 12) == [[12, 8]]
    padded = labelled("ppppppppppppxxxx", "....ppppppppxxxx", "......ppppppxxxx", "............xxxx")
    assert ends([padded], 8) == [[12, 8, 12, 12]]
    assert ends([padded], 16) == [[12, 8, 7, 12]]
    assert ends([labelled("pppp", "ppxx")], 4) == [[4, 1]]  # nothing labelled: all of it is prompt


def test_fit_trains_every_step_that_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a text with half as many labels as T_ref: all steps below T_ref are met by a label, evenly."""
    seen: list[tuple[int, int]] = []
    before = SkipDecode.before_layer

    def watch(self: SkipDecode, stream: Any, layer: int) -> None:
        if layer == 0:
            step_BT = stream.step
            labelled_BT = torch.arange(step_BT.shape[1]) >= 8
            seen.extend((row, int(step_BT[row, column])) for row, column in labelled_BT.expand_as(step_BT).nonzero())
        before(self, stream, layer)

    monkeypatch.setattr(SkipDecode, "before_layer", watch)
    ids = prompt("llama", (15, 15), side="none")["input_ids"]
    batch = {"input_ids": ids, "labels": torch.where(torch.arange(15) >= 8, ids, -100)}
    SkipDecode(e_max=5, e_min=2, T_ref=14, w=1).fit(build("llama"), [batch], progress=False)
    assert sorted(step for _, step in seen) == list(range(14))
    seen.clear()
    SkipDecode(e_max=5, e_min=2, T_ref=7, w=1).fit(build("llama"), [batch], progress=False)
    assert sorted(step for _, step in seen) == sorted([*range(7)] * 2)


def test_fit_gives_a_layer_that_left_no_gradient_from_later_tokens() -> None:
    """Layer 1 runs no generated token of b <= 5: it learns through the prompt alone."""
    model = build("llama").train()
    ids = prompt("llama", (8,))["input_ids"]

    def gradient(answer_from: int) -> float:
        model.zero_grad()
        labels = ids.clone()
        labels[:, :answer_from] = -100
        with sparing.attach(model, FALLING, prompt=answer_from):
            model(ids, labels=labels, use_cache=False).loss.backward()
        return sum(float(p.grad.abs().sum()) for p in model.model.layers[1].parameters() if p.grad is not None)

    assert gradient(4) > 0
    assert gradient(0) == 0

"""FastV: which tokens stay, against the materialised attention map."""

from __future__ import annotations

import math

import pytest
import torch

import sparing
from sparing.grid.method import Shape
from sparing.testing.models import VISUAL, build, prompt
from sparing.tokens.fastv import FastV

SHAPE = Shape(6, 4, 2, 8, 32, 48, VISUAL)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("side", ["left", "none"])
def test_keeps_what_the_last_token_attends_to_in_layer_K(K: int, side: str) -> None:
    model, batch = build("llava"), prompt("llava", (7, 5), side=side)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(**batch, output_attentions=True).attentions[K - 1][:, :, -1].mean(1)
    model.set_attn_implementation("sdpa")
    image = batch["input_ids"] == model.config.image_token_id
    with torch.no_grad(), sparing.attach(model, sparing.parse(f"fastv:K={K},R=0.7"), trace=True) as run:
        model(**batch)
    index = run.trace.cells[0].index[K]
    assert index is not None
    for b in range(2):
        best = attention[b].masked_fill(~image[b], -1).topk(round(0.3 * VISUAL)).indices.sort().values
        kept = [i for i in index[b].tolist() if image[b, i]]
        assert kept == best.tolist()
        assert set(index[b].tolist()) >= set((~image[b]).nonzero().flatten().tolist())  # text and padding stay


def test_budget_counts_the_layers_before_the_cut() -> None:
    method = sparing.parse("fastv:K=2").at(0.5, SHAPE)
    assert sum(method.shares(SHAPE)) / 6 == pytest.approx(0.5)
    with pytest.raises(sparing.BudgetError, match=r"keep = 0.25: fastv .* at least 0.333"):
        sparing.parse("fastv:K=2").at(0.25, SHAPE)


def test_published_settings() -> None:
    method = FastV()
    assert (method.K, method.R) == (2, 0.5)
    card = FastV.card
    assert (card.axis, card.kind, card.phase, card.needs) == ("tokens", "stream", "prefill", "nothing")
    assert card.visual and card.controls == ("random", "uniform", "oracle") and not card.is_control and not card.trains


def test_shares_before_and_behind_the_cut() -> None:
    assert FastV(K=2, R=0.75).shares(SHAPE) == (1.0, 1.0, 0.25, 0.25, 0.25, 0.25)
    assert FastV(K=8, R=0.75).shares(SHAPE) == (1.0,) * 6  # all of it lies before the cut
    for K, keep in ((1, 0.3), (2, 0.5), (3, 0.9), (2, 1.0)):
        dropped = FastV(K=K).at(keep, SHAPE).R
        assert dropped == pytest.approx(1 - (6 * keep - K) / (6 - K))
    assert FastV(K=2).at(1.0, SHAPE).R == 0
    with pytest.raises(sparing.BudgetError, match="spends all tokens in its first K = 3 of 6 layers"):
        FastV(K=3).at(0.5, SHAPE)  # nothing would be left for the other three


@pytest.mark.parametrize("R", [0.0, 0.3, 0.97, 1.0])
def test_how_many_tokens_run_each_layer(R: float) -> None:
    model, batch = build("llava"), prompt("llava", (7, 5))
    with torch.no_grad():
        dense = model(**batch).logits
        with sparing.attach(model, FastV(K=3, R=R)) as run:
            out = model(**batch).logits
    left = 0 if R == 1 else max(1, math.floor((1 - R) * VISUAL + 0.5))  # rounded half up, at least one
    assert run.trace.share("tokens") == pytest.approx((3 + 3 * left / VISUAL) / 6)
    assert torch.equal(out, dense) == (R == 0)

"""FastV: which tokens stay, against the materialised attention map."""

from __future__ import annotations

import pytest
import torch

import sparing
from sparing.grid.method import Shape
from sparing.testing.models import VISUAL, build, prompt

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

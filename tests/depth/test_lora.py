"""LoRA without skipping: it runs every layer, learns, and trains as the methods' own LoRA does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparing
from sparing.depth.first import First
from sparing.depth.lora import LoraDepth
from sparing.engine.lora import adapt
from sparing.engine.train import Training
from sparing.grid.method import Shape
from sparing.testing.models import LAYERS, prompt

SHAPE = Shape(LAYERS, 4, 2, 8, 32, 48)


def data() -> list[dict[str, Tensor]]:
    ids = prompt("llama", (9,) * 4, side="none")["input_ids"]
    return [{"input_ids": ids, "labels": torch.where(torch.arange(9) >= 5, ids, -100)}]


def test_it_learns_and_runs_everything(llama: PreTrainedModel) -> None:
    batch = data()[0]
    fitted = LoraDepth().fit(llama, [batch], epochs=20, lr=1e-2, progress=False)
    with torch.no_grad():
        dense = llama(**batch).loss
        with sparing.attach(llama, fitted, prompt=5) as run:
            assert llama(**batch).loss < 0.8 * dense
            assert run.trace.share("depth") == 1
        assert torch.equal(llama(**batch).loss, dense)


def test_every_budget_is_the_same_method(llama: PreTrainedModel) -> None:
    fitted = LoraDepth(rank=2).fit(llama, data(), progress=False)
    for keep in (0.3, 1.0):
        assert fitted.at(keep, SHAPE) is fitted
    assert fitted.card.is_control and not fitted.card.controls


def test_it_trains_as_a_method_that_skips_nothing(llama: PreTrainedModel) -> None:
    """The LoRA of a `first` whose prompts keep every layer, from the same seed: the same steps, the same result."""
    routers = {"router.weight": torch.zeros(LAYERS, 32), "router.bias": torch.full((LAYERS,), 9.0)}
    how = Training(epochs=3, lr=1e-2, progress=False)
    torch.manual_seed(5)
    mine = LoraDepth().fit(llama, data(), epochs=3, lr=1e-2, progress=False).state
    torch.manual_seed(5)
    other = adapt(llama, First().with_state(routers), batches=data(), how=how, name="fit")
    assert set(mine) == set(other)
    for name, tensor in other.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-5)


def test_wrong_use_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(sparing.Error, match="'lora-depth': needs training first"):
        sparing.attach(llama, LoraDepth())
    with pytest.raises(sparing.Error, match="rank = 0: must be a whole number >= 1"):
        LoraDepth(rank=0)

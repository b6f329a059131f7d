"""Saturation: cosines around every FFN against hooks on the modules, in serial and parallel layers; their shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparing
from sparing.depth.random_ffn import RandomFfn
from sparing.engine.saturation import mlp_shares, saturation
from sparing.engine.view import View
from sparing.testing.models import LAYERS, build, prompt


def around(model: Any, batch: dict[str, Tensor], mlp: str) -> Tensor:
    """(B, T, L-1): cosine of a layer's output without and with what its MLP adds, by hooks."""
    added: list[Tensor] = []
    given: list[Tensor] = []
    handles = []
    for layer in View(model).layers:
        adds = getattr(layer.module, mlp)
        handles.append(
            adds.register_forward_hook(lambda m, a, out: added.append(out[0] if isinstance(out, tuple) else out))
        )
        handles.append(
            layer.module.register_forward_hook(
                lambda m, a, out: given.append(out[0] if isinstance(out, tuple) else out)
            )
        )
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    cosines = [torch.cosine_similarity(y - f.view_as(y), y, dim=-1) for f, y in zip(added, given, strict=True)]
    return torch.stack(cosines[:-1], -1)


@pytest.mark.parametrize(
    ("name", "adds"),
    [
        ("llama", "mlp"),
        ("gpt-neox", "mlp"),  # attention and MLP side by side
        ("gemma3", "post_feedforward_layernorm"),  # a norm behind the MLP, too
        ("qwen3-moe", "mlp"),
    ],
)
def test_cosines_of_unpadded_rows(name: str, adds: str) -> None:
    model, batch = build(name), prompt(name, (9, 6))
    expected = around(model, batch, adds)[batch["attention_mask"].bool()]
    torch.testing.assert_close(saturation(model, [batch], rows=100), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == (15, LAYERS - 1)


def test_rows_are_taken_evenly_behind_the_first_label() -> None:
    model = build("llama")
    batch = prompt("llama", (9, 9), side="none")
    batch["labels"] = torch.where(torch.tensor([2, 7])[:, None] <= torch.arange(9), batch["input_ids"], -100)
    whole = saturation(model, [batch, batch], rows=100)
    assert len(whole) == 2 * (7 + 2)
    torch.testing.assert_close(saturation(model, [batch, batch], rows=5), whole[::4])
    with pytest.raises(sparing.Error, match="empty"):
        saturation(model, [], rows=5)
    with pytest.raises(sparing.Error, match=r"OPTForCausalLM.*no MLP module"):
        saturation(build("opt"), [prompt("opt")], rows=5)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "deepseek-v3"])
def test_shares_are_what_the_trace_counts(name: str) -> None:
    """A model whose FFNs are all skipped keeps the share of attention, layer by layer."""
    model, ids = build(name), prompt(name, (5,))["input_ids"]
    with torch.no_grad(), sparing.attach(model, RandomFfn(skip=(1.0,))) as run:
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
    torch.testing.assert_close(torch.tensor(run.trace.cells[1].rows).double(), 1 - mlp_shares(model), rtol=0, atol=1e-6)

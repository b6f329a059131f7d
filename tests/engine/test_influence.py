"""Similarity of a layer's input and output: against transformers' own hidden states, padded, in any batching."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import sparing
from sparing.engine.influence import similarities
from sparing.engine.view import View
from sparing.testing.checks import fingerprint
from sparing.testing.models import ARCHITECTURES, LAYERS, build, prompt, single


def reference(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Whole hidden states, the last one taken before the final norm; float64 sums of each token's cosine."""
    states: list[list[Tensor]] = [[] for _ in range(LAYERS + 1)]
    view, last = View(model), []
    norm = getattr(view.decoder, "norm", None) or getattr(view.decoder, "final_layer_norm", None)
    handle = norm.register_forward_pre_hook(lambda m, a: last.append(a[0]))
    with torch.no_grad():
        for batch in batches:
            real = batch["attention_mask"].bool()
            hidden = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
            for place, x in enumerate([*hidden[:LAYERS], last.pop()]):
                states[place].append(x[real].double())
    handle.remove()
    rows = [torch.cat(part) for part in states]
    dot = [(a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt() for a, b in itertools.pairwise(rows)]
    return torch.stack([x.mean() for x in dot])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_hidden_states(name: str) -> None:
    model = build(name)
    batches = [prompt(name, (9, 4, 6), side="right"), prompt(name, (3, 8), side="left", seed=3)]
    found, want = similarities(model, batches), reference(model, batches)
    assert found.shape == (LAYERS,) and want.std() > 1e-3
    torch.testing.assert_close(found, want, rtol=0, atol=2e-6)


def test_padding_and_batching_do_not_count() -> None:
    model = build("llama")
    batch = prompt("llama", (9, 4, 6))
    alone = [single("llama", batch, row) for row in range(3)]
    found = similarities(model, [batch])
    torch.testing.assert_close(similarities(model, alone), found, rtol=0, atol=2e-6)
    ids = [{"input_ids": one["input_ids"]} for one in alone]
    torch.testing.assert_close(similarities(model, ids), found, rtol=0, atol=2e-6)
    filled = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert (similarities(model, [filled]) - found).abs().max() > 1e-3


def test_tokens_count_alike_and_not_batches() -> None:
    model = build("llama")
    one, two = (prompt("llama", (length,), seed=length) for length in (3, 12))
    apart = torch.stack([similarities(model, [batch]) for batch in (one, two)])
    weight = torch.tensor([3, 12], dtype=torch.float64)[:, None] / 15
    torch.testing.assert_close(similarities(model, [one, two]), (apart * weight).sum(0))


def test_worked_values() -> None:
    """Layers made to scale, turn round and silence what passes."""
    model = build("llama")
    factors = {0: 3.0, 2: -0.5, 4: 0.0}
    layers = View(model).layers
    for place, factor in factors.items():
        layers[place].module.register_forward_hook(lambda m, args, out, f=factor: args[0] * f)
    found = similarities(model, [prompt("llama")])
    torch.testing.assert_close(found[[0, 2, 4]], torch.tensor([1.0, -1, 0]).double(), rtol=0, atol=1e-6)


def test_one_pass_and_nothing_left_behind() -> None:
    model = build("llama").train()
    model.model.layers[1].eval()
    batches = [prompt("llama", seed=seed) for seed in range(3)]
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    similarities(model, batches[:1])  # transformers adds hooks of its own in its first pass
    marks, passes = fingerprint(model), []
    handle = model.model.register_forward_hook(lambda m, a, out: passes.append(m.training))
    similarities(model, labelled)
    handle.remove()
    assert passes == [False] * 3 and fingerprint(model) == marks


def test_bfloat16_cosines_are_taken_in_float32() -> None:
    model = build("llama")
    batch = prompt("llama", (9, 9))
    found = similarities(model.bfloat16(), [batch])
    assert found.dtype == torch.float64
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    want = torch.nn.functional.cosine_similarity(states[1].float(), states[2].float(), dim=-1).mean()
    assert abs(float(found[1] - want)) < 1e-5


def test_no_data_is_refused() -> None:
    model = build("llama")
    with pytest.raises(sparing.Error, match="calibration data is empty"):
        similarities(model, [])
    padding = {k: torch.zeros_like(v) for k, v in prompt("llama").items()}
    with pytest.raises(sparing.Error, match="calibration data is empty"):
        similarities(model, [padding])

"""Similarity of a layer's input and output: against transformers' own hidden states, padded, in any batching."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import sparing
from sparing.engine.influence import similarities
from sparing.engine.view import View
from sparing.testing.checks import fingerprint
from sparing.testing.models import ARCHITECTURES, LAYERS, build, prompt, single


def final_norm(model: Any) -> Any:
    decoder = View(model).decoder
    names = ("norm", "final_layer_norm", "ln_f", "final_layernorm")
    return next(getattr(decoder, name) for name in names if hasattr(decoder, name))


def turning(name: str) -> Any:
    """A model whose final norm turns what passes: its weights are unlike, as those of trained models are."""
    model = build(name)
    weight = final_norm(model).weight
    weight.data = torch.linspace(0.2, 3, len(weight)).to(weight)
    return model


def reference(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Hidden states as transformers gives them, so the last one behind the final norm; float64 mean cosines."""
    states: list[list[Tensor]] = [[] for _ in range(LAYERS + 1)]
    with torch.no_grad():
        for batch in batches:
            real = batch["attention_mask"].bool()
            hidden = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
            for place, x in enumerate(hidden):
                states[place].append(x[real].double())
    rows = [torch.cat(part) for part in states]
    dot = [(a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt() for a, b in itertools.pairwise(rows)]
    return torch.stack([x.mean() for x in dot])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_hidden_states(name: str) -> None:
    model = turning(name)
    batches = [prompt(name, (9, 4, 6), side="right"), prompt(name, (3, 8), side="left", seed=3)]
    found, want = similarities(model, batches), reference(model, batches)
    assert found.shape == (LAYERS,) and want.std() > 1e-3
    torch.testing.assert_close(found, want, rtol=0, atol=2e-6)


def test_the_final_norm_counts_as_part_of_the_last_layer() -> None:
    """By hand: the last layer leaves its input as it is, the norm's weight keeps one channel and turns the rest."""
    model: Any = build("llama")
    View(model).layers[-1].module.register_forward_hook(lambda m, args, out: args[0])
    batches, given = [prompt("llama", (9, 4))], []
    assert float(similarities(model, batches)[-1]) == pytest.approx(1, abs=1e-6)
    model.model.norm.weight.data.fill_(-1)[0] = 1
    model.model.norm.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    found = similarities(model, batches)
    x = given[0][batches[0]["attention_mask"].bool()].double()
    want = (2 * x[:, 0].square() / x.square().sum(-1) - 1).mean()
    torch.testing.assert_close(found[-1], want, rtol=0, atol=1e-6)
    assert (found[:-1] - similarities(build("llama"), batches)[:-1]).abs().max() < 1e-9


def test_a_decoder_that_gives_out_another_width_counts_before_it() -> None:
    """OPT-350m: no final norm, and states are projected to the width of the embedding."""
    torch.manual_seed(0)
    config = hf.OPTConfig(
        vocab_size=120, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    model: Any = hf.OPTForCausalLM(config).eval()
    batch, around = prompt("opt", (9,)), []
    handle = model.model.decoder.layers[-1].register_forward_hook(
        lambda m, args, kwargs, out: around.append((args[0] if args else kwargs["hidden_states"], out)),
        with_kwargs=True,
    )
    found = similarities(model, [batch])
    handle.remove()
    before, after = around[0][0], around[0][1]
    after = after[0] if isinstance(after, tuple) else after
    torch.testing.assert_close(found[-1].float(), torch.cosine_similarity(before, after, dim=-1).mean())


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

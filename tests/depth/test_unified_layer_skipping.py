"""Unified Layer Skipping: the oracles of its card, by number."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import sparing
from sparing.depth.unified_layer_skipping import UnifiedLayerSkipping
from sparing.grid.method import Shape
from sparing.testing.models import LAYERS, VOCAB, build, prompt, single

SHAPE = Shape(LAYERS, 4, 2, 8, 32, 48)


def test_1_speed_one_is_dense(llama: PreTrainedModel) -> None:
    batch = prompt("llama")
    method = UnifiedLayerSkipping(S=1)
    assert method.layer_set(30) == tuple(range(30))
    assert method.layer_set(1) == (0,)
    with torch.no_grad():
        dense = llama(**batch).logits
        with sparing.attach(llama, method) as run:
            run.prompt = 4
            assert torch.equal(llama(**batch).logits, dense)


@pytest.mark.parametrize(
    ("L", "S", "layers"),
    [
        (30, 2, (*range(0, 27, 2), 29)),
        (30, 3, (*range(0, 25, 3), 29)),
        (30, 5, (0, 6, 12, 18, 24, 29)),
        (30, 10, (0, 15, 29)),
        (32, 5, (0, 6, 12, 18, 24, 31)),
        (40, 10, (0, 13, 26, 39)),
    ],
)
def test_2_published_sets(L: int, S: int, layers: tuple[int, ...]) -> None:
    assert UnifiedLayerSkipping(S=S, rule="code").layer_set(L) == layers
    assert UnifiedLayerSkipping(S=S).layer_set(L) == layers  # auto: the code's rule for whole S >= 2


def test_2_even_equals_code_where_it_divides() -> None:
    S = 31 / 11  # R = 11, and 10 divides 30
    assert UnifiedLayerSkipping(S=S, rule="even").layer_set(31) == UnifiedLayerSkipping(S=S, rule="code").layer_set(31)
    assert UnifiedLayerSkipping(S=1.5).layer_set(30) == UnifiedLayerSkipping(S=1.5, rule="even").layer_set(30)


@pytest.mark.parametrize("rule", ["code", "even"])
@pytest.mark.parametrize("L", [6, 12, 29, 32])
@pytest.mark.parametrize("S", [1.5, 2, 2.4, 3])
def test_3_sizes_and_ends(rule: str, L: int, S: float) -> None:
    kept = UnifiedLayerSkipping(S=S, rule=rule).layer_set(L)
    assert len(kept) == int(L / S) and kept[0] == 0 and kept[-1] == L - 1


def test_3_fewer_than_two_layers_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(sparing.Error, match="S = 4: leaves 1 of 6 layers"):
        UnifiedLayerSkipping(S=4).layer_set(LAYERS)
    with pytest.raises(sparing.BudgetError, match=r"keep = 0.2: .*at least 2 of 6"):
        UnifiedLayerSkipping().at(0.2, SHAPE)


@pytest.mark.parametrize("S", [2, 3])
def test_4_prefill_is_dense(llama: PreTrainedModel, S: int) -> None:
    batch = prompt("llama")
    with torch.no_grad():
        dense = llama.generate(
            **batch, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        with sparing.attach(llama, UnifiedLayerSkipping(S=S)):
            assert torch.equal(llama(**batch).logits, llama(**batch).logits)
            out = llama.generate(
                **batch, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
    assert torch.equal(out.logits[0], dense.logits[0])
    assert not torch.equal(out.logits[1], dense.logits[1])


def two_pass(
    model: PreTrainedModel, prompt_ids: torch.Tensor, answer: torch.Tensor, kept: tuple[int, ...]
) -> torch.Tensor:
    """The paper's two passes written out: prompt through all layers, response through K on the prompt's cache."""
    decoder = model.model
    ids = torch.cat([prompt_ids, answer], 1)
    P, T = prompt_ids.shape[1], ids.shape[1]
    positions = torch.arange(T)[None]
    hidden = decoder.embed_tokens(ids)
    rope = decoder.rotary_emb(hidden, position_ids=positions)
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    a, b = hidden[:, :P], hidden[:, P:]
    for i, layer in enumerate(decoder.layers):
        if i in kept:
            both = layer(torch.cat([a, b], 1), attention_mask=mask, position_embeddings=rope)
            a, b = both[:, :P], both[:, P:]
        else:
            a = layer(a, attention_mask=mask[..., :P, :P], position_embeddings=tuple(r[:, :P] for r in rope))
    return model.lm_head(decoder.norm(torch.cat([a, b], 1)))


@pytest.mark.parametrize("S", [1.5, 2, 3])
def test_5_cached_decoding_equals_two_passes(llama: PreTrainedModel, S: float) -> None:
    method = UnifiedLayerSkipping(S=S)
    batch = prompt("llama", (7, 4))
    with torch.no_grad():
        with sparing.attach(llama, method):
            out = llama.generate(
                **batch, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        for row in range(2):
            alone = single("llama", batch, row)["input_ids"]
            expected = two_pass(llama, alone, out.sequences[row : row + 1, 7:], method.layer_set(LAYERS))
            got = torch.stack(out.logits, 1)[row]
            torch.testing.assert_close(got, expected[0, alone.shape[1] - 1 : -1], rtol=2e-4, atol=2e-4)


def test_6_batch_mates_do_not_matter(llama: PreTrainedModel) -> None:
    one, two = prompt("llama", (7, 4), seed=1), prompt("llama", (7, 4), seed=1)
    two["input_ids"][1, 3:] = torch.randint(2, VOCAB, (4,))
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad(), sparing.attach(llama, UnifiedLayerSkipping(S=2)):
        assert torch.equal(llama.generate(**one, **options)[0], llama.generate(**two, **options)[0])


def test_7_a_skipped_layer_counts_only_through_the_prompt() -> None:
    model = build("llama")
    method = UnifiedLayerSkipping(S=3)  # layers 0 and 5
    ids = prompt("llama", (6,))["input_ids"]
    with torch.no_grad(), sparing.attach(model, method):
        cache = model(ids).past_key_values
        before = model(ids[:, :1], past_key_values=cache).logits
        freed = [getattr(layer, "is_initialized", True) for layer in cache.layers]
        assert freed == [True, False, False, False, False, True]  # the skipped layers' prompt cache is given back
        for p in model.model.layers[2].parameters():
            p.mul_(3)
        cache = model(ids).past_key_values  # the prompt pass changes …
        assert not torch.allclose(model(ids[:, :1], past_key_values=cache).logits, before)
        cache = model(ids).past_key_values
        now = model(ids[:, :1], past_key_values=cache).logits
        for p in model.model.layers[2].parameters():
            p.mul_(2)
        cache.crop(-1)  # … while on a given prompt cache the layer is not read at all
        assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, now)


def test_8_gradient_of_a_skipped_layer_comes_from_the_prompt_alone() -> None:
    model = build("llama").train()
    ids = prompt("llama", (8,))["input_ids"]
    skipped = model.model.layers[2]

    def gradient(answer_from: int) -> float:
        model.zero_grad()
        labels = ids.clone()
        labels[:, :answer_from] = -100
        with sparing.attach(model, UnifiedLayerSkipping(S=3), prompt=answer_from):
            model(ids, labels=labels, use_cache=False).loss.backward()
        return sum(float(p.grad.abs().sum()) for p in skipped.parameters() if p.grad is not None)

    assert gradient(4) > 0
    assert gradient(0) == 0


def test_fit_trains_through_the_kept_layers() -> None:
    model = build("llama")
    batch = prompt("llama", (9, 9), side="none")
    batch["labels"] = torch.where(torch.arange(9) >= 4, batch["input_ids"], -100)
    method = UnifiedLayerSkipping(S=2)
    fitted = method.fit(model, [batch], epochs=12, lr=3e-3, progress=False)
    with torch.no_grad():
        with sparing.attach(model, method, prompt=4):
            before = model(**batch).loss
        with sparing.attach(model, fitted, prompt=4):
            assert model(**batch).loss < 0.8 * before
    assert not any("embed_tokens" in name for name in fitted.state)


def test_fit_takes_what_stands_before_the_labels_for_the_prompt() -> None:
    """Labelled from the start, a skipped layer has no token to learn from; behind a prompt it has."""
    model = build("llama")
    ids = prompt("llama", (9, 9), side="none")["input_ids"]
    name = "model.layers.2.mlp.down_proj.weight"

    def learned(start: int) -> torch.Tensor:
        batch = {"input_ids": ids, "labels": torch.where(torch.arange(9) >= start, ids, -100)}
        fitted = UnifiedLayerSkipping(S=3).fit(model, [batch], lr=1e-2, progress=False)
        (found,) = (value for key, value in fitted.state.items() if name.endswith(key.removeprefix("weight.")))
        return found

    before = model.get_parameter(name)
    assert torch.equal(learned(0), before) and not torch.equal(learned(4), before)


def test_at_keeps_the_nearest_number_of_layers() -> None:
    for keep, R in ((1.0, 6), (0.8, 5), (0.6, 4), (0.5, 3), (0.34, 2)):
        assert len(UnifiedLayerSkipping().at(keep, SHAPE).layer_set(LAYERS)) == R


def test_decode_runs_only_kept_layers(llama: PreTrainedModel) -> None:
    ran = []
    hooks = [
        layer.mlp.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
        for i, layer in enumerate(llama.model.layers)
    ]
    with torch.no_grad(), sparing.attach(llama, UnifiedLayerSkipping(S=2)) as run:
        llama.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
    for hook in hooks:
        hook.remove()
    assert ran == [*range(LAYERS), *(0, 3, 5) * 2]
    assert run.trace.share("depth", phase="decode") == 0.5


def test_controls() -> None:
    shape = Shape(12, 4, 2, 8, 32, 48)
    method = UnifiedLayerSkipping(S=2)
    random = method.control("random", shape, seed=3)
    assert len(random.layer_set(12)) == 6 and {0, 11} <= set(random.layer_set(12))  # type: ignore[attr-defined]
    assert random.layer_set(12) != method.control("random", shape, seed=4).layer_set(12)  # type: ignore[attr-defined]
    assert method.control("uniform", shape).layer_set(12) == tuple(range(6))  # type: ignore[attr-defined]

"""Every method on every architecture it applies to: dense at full budget, restored, batched, padded, cached."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import transformers

import sparing
from tests.models import ARCHITECTURES, IMAGE, LAYERS, TEXT, VISION, VISUAL, VOCAB, build, prompt, single

# One budget of each method that cuts, and its fields at full budget.
CUTS = {
    "fastv": ("fastv:K=2,R=0.6", "fastv:R=0"),
    "hidrop": (
        f"hidrop:inject=2,filters=3/4,keeps=7/3,of={VISUAL},exit=5",
        f"hidrop:inject=1,filters=,keeps=,exit={LAYERS}",
    ),
    "random-tokens": ("random-tokens:schedule=1/1/0.5/0.5/0.2/0", "random-tokens:schedule=1"),
    "uniform-tokens": ("uniform-tokens:schedule=0/0/1/0.5/0.5/0.2", "uniform-tokens:schedule=1"),
    "oracle-tokens": ("oracle-tokens:schedule=0.4", "oracle-tokens:schedule=1"),
    "unified-layer-skipping": ("unified-layer-skipping:S=2", "unified-layer-skipping:S=1"),
    "random-depth": ("random-depth:R=3,seed=4", f"random-depth:R={LAYERS}"),
    "uniform-depth": ("uniform-depth:R=3,part=top", f"uniform-depth:R={LAYERS}"),
    "flap": ("flap:p=0.4,multiple=8", "flap:p=0"),
    "random-width": ("random-width:groups=1/2/1/2/1/1,neurons=16/24/48/8/16/32", "random-width:groups=2,neurons=48"),
    "uniform-width": ("uniform-width:groups=1,neurons=24", "uniform-width:groups=2,neurons=48"),
}


@functools.cache
def model_of(name: str) -> Any:
    return build(name)


def ready(spec: str, name: str) -> sparing.Method:
    method = sparing.parse(spec)
    if not method.ready or method.card.needs == "calibration":
        method = method.fit(model_of(name), [prompt(name, (9, 9, 9, 9), side="none", seed=s) for s in (5, 6)])
    return method


def attached(model: Any, method: sparing.Method, **options: Any) -> sparing.Run:
    run = sparing.attach(model, method, **options)
    run.oracle = torch.arange(VISUAL) % 3
    return run


def applies(method: str, name: str) -> bool:
    return not (sparing.get(method).card.visual and name in TEXT)


CASES = [(m, a) for m in CUTS for a in ARCHITECTURES if applies(m, a)]
each_case = pytest.mark.parametrize(("method", "name"), CASES)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def fingerprint(model: Any) -> list[tuple[str, list[str], int]]:
    """Everything that attaching touches: instance attributes and hooks of every module."""
    return [
        (n, sorted(k for k in vars(m) if not k.startswith("_")), len(m._forward_hooks) + len(m._forward_pre_hooks))
        for n, m in model.named_modules()
    ]


def test_every_method_is_covered() -> None:
    assert set(CUTS) == set(sparing.methods())


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("method", [m for m in CUTS if sparing.get(m).card.visual])
def test_visual_method_refused_on_text(method: str, name: str) -> None:
    with pytest.raises(sparing.Error, match=f"{method}.*visual tokens"):
        sparing.attach(model_of(name), sparing.parse(CUTS[method][0]))


@each_case
def test_full_budget_is_dense_bitwise(method: str, name: str) -> None:
    model, batch = model_of(name), prompt(name)
    with torch.no_grad():
        dense = model(**batch).logits
        long = model.generate(**batch, max_new_tokens=4, do_sample=False)
        with attached(model, ready(CUTS[method][1], name)) as run:
            assert torch.equal(model(**batch).logits, dense)
            assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), long)
            assert run.trace.share("depth") == 1.0


@each_case
def test_below_full_budget_has_an_effect_and_is_restored(method: str, name: str) -> None:
    model, batch = model_of(name), prompt(name)
    dense_flops, _ = sparing.count(lambda: model.generate(**batch, max_new_tokens=4, do_sample=False))
    with torch.no_grad():
        dense = model(**batch).logits  # before the fingerprint: transformers adds hooks of its own at the first pass
        before, marks, implementation = weights(model), fingerprint(model), model.config._attn_implementation
        cut = ready(CUTS[method][0], name)
        with attached(model, cut, trace=True) as run:
            out = model.generate(
                **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            assert model.config._attn_implementation == implementation
            executed = run.trace.flops
        reference = model.generate(
            **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert not torch.equal(torch.stack(out.logits), torch.stack(reference.logits))
        if cut.card.kind == "stream":
            assert executed < dense_flops
        assert torch.equal(model(**batch).logits, dense)
    assert fingerprint(model) == marks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@each_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles(method: str, name: str, side: str) -> None:
    model, batch = model_of(name), prompt(name, (7, 4, 6), side=side)
    with torch.no_grad(), attached(model, ready(CUTS[method][0], name)) as run:
        run.prompt = _prompt_columns(batch, 2)
        together = model(**batch).logits
        for row in range(3):
            alone = single(name, batch, row)
            run.prompt = alone["input_ids"].shape[1] - 2
            expected = model(**alone).logits[0]
            got = together[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def _prompt_columns(batch: dict[str, torch.Tensor], generated: int) -> torch.Tensor:
    """Bool (B, T): all but the last `generated` real tokens of each sample."""
    real = batch["attention_mask"].bool()
    behind = real.flip(1).cumsum(1).flip(1)
    return ~(real & (behind <= generated))


@each_case
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_recomputation(method: str, name: str, beams: int) -> None:
    model, batch = model_of(name), prompt(name)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "return_dict_in_generate": True}
    if name in VISION:  # a random model might write an image token
        options["suppress_tokens"] = [IMAGE, VOCAB - 1, VOCAB - 3]
    with torch.no_grad(), attached(model, ready(CUTS[method][0], name)) as run:
        out = model.generate(**batch, **options, output_logits=True, output_scores=True)
        width = batch["input_ids"].shape[1]
        run.prompt = width
        full = dict(batch)
        full["input_ids"] = out.sequences
        grown = out.sequences.shape[1] - width
        full["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(len(out.sequences), grown)], 1).long()
        if "mm_token_type_ids" in batch:
            zeros = torch.zeros(len(out.sequences), grown, dtype=torch.int)
            full["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], zeros], 1)
        again = model(**full).logits[:, width - 1 : -1]
        if beams == 1:
            torch.testing.assert_close(torch.stack(out.logits, 1), again, rtol=2e-4, atol=2e-4)
        else:  # the score of the chosen beam, summed over steps, from the recomputed logits
            scores = again.log_softmax(-1).gather(-1, out.sequences[:, width:, None])[..., 0].sum(1)
            torch.testing.assert_close(out.sequences_scores * grown, scores, rtol=1e-3, atol=1e-3)


@each_case
def test_sampling_and_bfloat16_run(method: str, name: str) -> None:
    model = build(name, torch.bfloat16)
    method_ = ready(CUTS[method][0], name)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in prompt(name).items()}
    with torch.no_grad(), attached(model, method_):
        torch.manual_seed(3)
        first = model.generate(**batch, max_new_tokens=4, do_sample=True)
        torch.manual_seed(3)
        assert torch.equal(first, model.generate(**batch, max_new_tokens=4, do_sample=True))
        assert model(**batch, logits_to_keep=1).logits.shape[:2] == (2, 1)
        assert torch.isfinite(model(**batch).logits).all()


@each_case
def test_wrong_fields_are_refused(method: str, name: str) -> None:
    instance = sparing.parse(CUTS[method][0])
    for field in dataclasses.fields(instance):
        rule = field.metadata["rule"]
        for wrong in rule.wrong:
            with pytest.raises(sparing.Error, match=f"{field.name} = .*must be"):
                instance.replace(**{field.name: wrong})


@each_case
def test_save_and_load(method: str, name: str, tmp_path: Any) -> None:
    model, batch = model_of(name), prompt(name)
    fitted = ready(CUTS[method][0], name)
    again = sparing.load(fitted.save(tmp_path / "m"))
    assert again == fitted
    with torch.no_grad():
        with attached(model, fitted):
            one = model(**batch).logits
        with attached(model, again):
            assert torch.equal(model(**batch).logits, one)


@each_case
def test_sdpa_stays_and_no_attention_matrix_appears(method: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(name), prompt(name)
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(query.shape)
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad(), attached(model, ready(CUTS[method][0], name)):
        eager = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get("eager")
        assert eager is None  # nothing of ours is registered in its place
        model(**batch)
    assert len(calls) >= LAYERS - 3  # every layer that ran attention ran it fused

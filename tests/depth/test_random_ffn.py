"""Random feed-forward blocks: shares, seeds, warm-up, and the same draw in any batch."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import sparing
from sparing.depth.random_ffn import RandomFfn
from sparing.grid.method import Shape
from sparing.testing.models import LAYERS, prompt, single

SHARES = (0, 0.5, 1, 0.2, 0.9, 0)


def ran(model: PreTrainedModel, method: RandomFfn, lengths: tuple[int, ...], tokens: int) -> list[list[int]]:
    """Pass -> rows in each layer's FFN, seen by hooks on the modules."""
    rows: list[list[int]] = []
    layers = model.model.layers
    handles = [model.model.register_forward_pre_hook(lambda *_: rows.append([0] * LAYERS))]
    for i, layer in enumerate(layers):
        handles.append(
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda m, args, i=i: rows[-1].__setitem__(i, args[0][..., 0].numel())  # type: ignore[misc]
            )
        )
    with torch.no_grad(), sparing.attach(model, method):
        model.generate(**prompt("llama", lengths), max_new_tokens=tokens, do_sample=False)
    for handle in handles:
        handle.remove()
    return rows


def test_prompt_and_warm_up_run_everything_then_shares_hold(llama: PreTrainedModel) -> None:
    rows = ran(llama, RandomFfn(skip=SHARES, W=3), (5, 4), 64)
    assert rows[0] == [10] * LAYERS and rows[1:4] == [[2] * LAYERS] * 3
    later = torch.tensor(rows[4:], dtype=torch.float)
    assert set(later.flatten().tolist()) == {0, 2}  # who skips depends on the step alone
    skipped = (later == 0).float().mean(0)
    assert skipped[0] == skipped[5] == 0 and skipped[2] == 1
    torch.testing.assert_close(skipped, torch.tensor(SHARES), rtol=0, atol=0.15)


def test_shares_of_many_steps() -> None:
    from sparing.depth.random_ffn import _drawn

    for share in (0.1, 0.45, 0.8):
        found = [float((_drawn(seed, layer) < share).double().mean()) for seed in (0, 1) for layer in range(8)]
        assert max(abs(x - share) for x in found) < 0.03
    assert not torch.equal(_drawn(0, 1), _drawn(0, 2)) and not torch.equal(_drawn(0, 1), _drawn(1, 1))


def test_a_sequence_draws_the_same_in_any_batch_and_in_one_pass(llama: PreTrainedModel) -> None:
    method, batch = RandomFfn(skip=(0.5,), W=1, seed=4), prompt("llama", (7, 4, 6))
    with torch.no_grad(), sparing.attach(llama, method) as run:
        together = llama.generate(**batch, max_new_tokens=8, do_sample=False)
        for row in range(3):
            alone = single("llama", batch, row)
            out = llama.generate(
                **alone, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            start = alone["input_ids"].shape[1]
            assert torch.equal(out.sequences[0, start:], together[row, 7:])
            run.prompt = start
            again = llama(out.sequences).logits[0, start - 1 : -1]
            run.prompt = None
            torch.testing.assert_close(again, torch.stack(out.logits, 1)[0], rtol=2e-4, atol=2e-4)


def test_the_trace_shows_what_was_asked(llama: PreTrainedModel) -> None:
    """keep = 0.8: a gated MLP of 3 x 48 to attention of 2 x 8 x 6 is 0.6 of a layer, so a third of the FFNs is left."""
    shape = Shape(LAYERS, 4, 2, 8, 32, 48)
    assert RandomFfn().at(0.8, shape).skip == (pytest.approx(1 / 3),)
    assert RandomFfn().at(1.0, shape).skip == (0.0,)
    with torch.no_grad(), sparing.attach(llama, RandomFfn().at(0.8, shape)) as run:
        llama.generate(**prompt("llama", (5,)), max_new_tokens=80, do_sample=False)
    assert run.trace.share("depth", "decode") == pytest.approx(0.8, abs=0.03)
    assert run.trace.share("depth", "prefill") == 1


def test_budgets() -> None:
    """Attention is 0.4 of a layer: what can be asked for ends there, and takes all FFNs."""
    shape = Shape(LAYERS, 4, 2, 8, 32, 48)
    assert RandomFfn().at(0.45, shape).skip == (pytest.approx(0.55 / 0.6),)
    assert RandomFfn().at(0.4, shape).skip == (1.0,)
    assert RandomFfn().at(1.0, Shape(LAYERS, 4, 2, 8, 32, 0)).skip == (0.0,)  # no width is needed to skip nothing


def test_a_measurement_spans_warm_up_and_draws() -> None:
    assert RandomFfn().horizon == 64 and RandomFfn(W=25).horizon == 200


def test_refusals(llama: PreTrainedModel) -> None:
    with pytest.raises(sparing.BudgetError, match=r"keeps attention, 0\.4 of the layers' work"):
        RandomFfn().at(0.3, Shape(LAYERS, 4, 2, 8, 32, 48))
    with pytest.raises(sparing.BudgetError, match="cannot tell the MLP's share"):
        RandomFfn().at(0.8, Shape(LAYERS, 4, 2, 8, 32, 0))
    with (
        torch.no_grad(),
        pytest.raises(sparing.Error, match="skip: 2 entries for a model of 6 layers"),
        sparing.attach(llama, RandomFfn(skip=(0.1, 0.2))),
    ):
        llama(prompt("llama", (5,))["input_ids"])

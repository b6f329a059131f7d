"""Attach: composition, conflicts, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import sparing
from sparing.engine.stream import Stream, StreamMethod
from sparing.grid.method import Card
from sparing.testing.checks import fingerprint
from sparing.testing.models import LAYERS, build, prompt


def test_two_methods_on_one_axis_are_refused(llava: PreTrainedModel) -> None:
    with pytest.raises(sparing.Error, match=r"'fastv' and 'random-tokens' both act on tokens"):
        sparing.attach(llava, sparing.parse("fastv"), sparing.parse("random-tokens"))


def test_second_attach_that_conflicts_names_both(llava: PreTrainedModel) -> None:
    with torch.no_grad():
        llava(**prompt("llava"))  # transformers adds hooks of its own at the first pass
    marks = fingerprint(llava)
    with sparing.attach(llava, sparing.parse("fastv")):
        with pytest.raises(sparing.Error, match=r"'uniform-tokens'.*'fastv' is attached"):
            with sparing.attach(llava, sparing.parse("uniform-tokens")):
                pass
        with sparing.attach(llava, sparing.parse("unified-layer-skipping")), torch.no_grad():
            llava(**prompt("llava"))
    assert fingerprint(llava) == marks


def test_axes_compose_and_nested_runs_equal_one(llava: PreTrainedModel) -> None:
    batch = prompt("llava")
    tokens, depth = sparing.parse("fastv:K=2,R=0.5"), sparing.parse("unified-layer-skipping:S=2")
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        with sparing.attach(llava, tokens, depth) as run:
            together = torch.stack(llava.generate(**batch, **options).logits)
            assert run.trace.cells[0].rows[2] < run.trace.cells[0].rows[1]
            assert run.trace.cells[1].rows == [2, 0, 0, 2, 0, 2]
        with sparing.attach(llava, tokens), sparing.attach(llava, depth):
            assert torch.equal(torch.stack(llava.generate(**batch, **options).logits), together)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_restored_after_an_exception_in_the_middle(llava: PreTrainedModel, error: type[BaseException]) -> None:
    batch = prompt("llava")
    with torch.no_grad():
        dense = llava(**batch).logits
    marks = fingerprint(llava)

    class Fails(StreamMethod):
        name = "fails"
        card = Card("", 2026, "test", "stream", "prefill")

        def before_layer(self, stream: Stream, layer: int) -> None:
            if layer == 3:
                raise error("stop")

    with pytest.raises(error) as caught, sparing.attach(llava, sparing.parse("fastv"), Fails()), torch.no_grad():
        llava(**batch)
    if error is RuntimeError:
        assert "in fails before layer 3 of 6" in caught.value.__notes__[0]
    assert fingerprint(llava) == marks
    with torch.no_grad():
        assert torch.equal(llava(**batch).logits, dense)


def test_a_run_can_be_entered_again_but_not_twice_at_once(llava: PreTrainedModel) -> None:
    batch = prompt("llava")
    run = sparing.attach(llava, sparing.parse("fastv:K=2,R=0.5"))
    with torch.no_grad():
        with run:
            first = llava(**batch).logits
            with pytest.raises(sparing.Error, match="attached already"):
                run.__enter__()
        with run:
            assert torch.equal(llava(**batch).logits, first)
            assert len(run.trace.cells) == 1  # a new block, a new trace


def test_exceptions_do_not_leak_into_the_next_pass(llava: PreTrainedModel) -> None:
    batch = prompt("llava")
    with torch.no_grad(), sparing.attach(llava, sparing.parse("fastv:K=2,R=0.5")):
        good = llava(**batch).logits
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            llava(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"][:1])
        assert torch.equal(llava(**batch).logits, good)


def test_static_cache_is_refused_with_a_reason(llava: PreTrainedModel) -> None:
    with sparing.attach(llava, sparing.parse("fastv:K=2,R=0.5")), torch.no_grad():
        with pytest.raises(sparing.Error, match="needs a DynamicCache"):
            llava.generate(**prompt("llava"), max_new_tokens=2, cache_implementation="static", disable_compile=True)


def test_no_decoder_is_refused() -> None:
    with pytest.raises(sparing.Error, match="no decoder layers found"):
        sparing.view(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_needs_calibration(llama: PreTrainedModel) -> None:
    with pytest.raises(sparing.Error, match="'flap': needs calibration"):
        sparing.attach(llama, sparing.parse("flap"))


def test_state_of_another_model_is_refused(llama: PreTrainedModel) -> None:
    method = sparing.parse("unified-layer-skipping").with_state({"weight.model.norm.weight": torch.ones(7)})
    with pytest.raises(sparing.Error, match="trained on another model"), sparing.attach(llama, method):
        pass


def test_view_reads_structure() -> None:
    shape = sparing.shape(build("qwen3"))
    assert (shape.layers, shape.heads, shape.groups, shape.head_dim, shape.neurons) == (LAYERS, 4, 2, 16, 48)
    assert sparing.view(build("gemma3")).layers[0].sliding == 8
    assert sparing.view(build("gemma3")).layers[2].sliding is None
    assert sparing.shape(build("llava")).visual == 16

"""LoRA: which weights it changes, that merging is what PEFT computes, and that nothing is left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import sparing
from sparing.engine.lora import adapt, merged, targets
from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.train import Training, student
from sparing.grid.method import Card
from sparing.testing.checks import fingerprint
from sparing.testing.models import ARCHITECTURES, LAYERS, build, prompt
from sparing.testing.suite import fitting_data

QUICK = Training(epochs=2, lr=1e-2, progress=False)
Q, V = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"
KINDS = {
    "phi3": ("self_attn.qkv_proj",),
    "gpt-neox": ("attention.query_key_value",),
    "deepseek-v3": ("self_attn.q_b_proj", "self_attn.kv_b_proj"),
    "deepseek-v2": ("self_attn.q_b_proj", "self_attn.kv_b_proj"),
    "falcon": ("self_attention.query_key_value",),
    "bloom": ("self_attention.query_key_value",),
    "gptj": ("attn.q_proj", "attn.v_proj"),
}


def carrying(state: dict[str, Tensor]) -> Any:
    """A method that skips nothing and carries a state."""
    return sparing.parse(f"uniform-depth:R={LAYERS}").with_state(state)


def random_lora(model: nn.Module, name: str = Q.format(2), rank: int = 3) -> dict[str, Tensor]:
    out, inside = model.get_submodule(name).weight.shape
    key = f"lora.{name}.weight"
    scale = torch.tensor(0.5)
    return {f"{key}.A": torch.randn(rank, inside), f"{key}.B": torch.randn(out, rank), "lora.scale": scale}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_targets(architecture: str) -> None:
    model = build(architecture)
    if architecture == "gpt2":  # Conv1D
        with pytest.raises(sparing.Error, match="no projection for LoRA"):
            targets(model)
        return
    names = targets(model)
    kinds = KINDS.get(architecture, ("self_attn.q_proj", "self_attn.v_proj"))
    assert sorted(names) == sorted(
        name for name, _ in model.named_modules() if name.endswith(kinds) and "vision" not in name
    )
    assert len(names) == LAYERS * len(kinds)


def test_latent_attention_without_a_latent_of_queries() -> None:
    model = build("deepseek-v3")
    for layer in model.model.layers:
        layer.self_attn.q_proj = layer.self_attn.q_b_proj
        del layer.self_attn.q_b_proj
    assert targets(model)[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.kv_b_proj"]


def test_a_model_without_projections_is_refused() -> None:
    model = build("llama")
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, nn.Identity())
    with pytest.raises(sparing.Error, match=r"LlamaForCausalLM: no projection for LoRA found \(looked for .*q_proj"):
        targets(model)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "opt", "deepseek-v3"])
def test_merged_is_what_peft_computes(architecture: str) -> None:
    """PEFT runs A and B beside the weight; attached, the weight holds them."""
    from peft import LoraConfig, inject_adapter_in_model

    model = build(architecture)
    state = adapt(model, batches=fitting_data(architecture), how=QUICK, rank=4, alpha=10.0, name="fit")
    assert float(state["lora.scale"]) == 2.5
    beside = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=10, target_modules=targets(model)), copy.deepcopy(model)
    )
    with torch.no_grad():
        for key, tensor in state.items():
            if key != "lora.scale":
                name, which = key.removeprefix("lora.").rsplit(".weight.", 1)
                beside.get_parameter(f"{name}.lora_{which}.default.weight").copy_(tensor)
        batch = prompt(architecture)
        with sparing.attach(model, carrying(state)):
            got = model(**batch).logits
        torch.testing.assert_close(got, beside.eval()(**batch).logits, rtol=2e-4, atol=2e-4)
        assert not torch.allclose(got, model(**batch).logits, rtol=1e-2, atol=1e-2)


def test_training_leaves_the_model_alone_and_lowers_its_loss() -> None:
    model, batch = build("llama"), fitting_data("llama")[0]
    before, marks = copy.deepcopy(model.state_dict()), fingerprint(model)
    state = adapt(model, batches=[batch], how=Training(epochs=15, lr=1e-2, progress=False), name="fit")
    assert fingerprint(model) == marks and not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k.rsplit(".", 1)[1] for k in state} == {"A", "B", "scale"}
    assert state[f"lora.{Q.format(0)}.weight.A"].shape == (8, 32)
    assert state[f"lora.{V.format(0)}.weight.B"].shape == (16, 8)
    with torch.no_grad():
        dense = model(**batch).loss
        with sparing.attach(model, carrying(state)):
            assert model(**batch).loss < 0.8 * dense


def test_adapters_train_in_float32_on_a_bfloat16_model() -> None:
    model = build("llama", torch.bfloat16)
    state = adapt(model, batches=fitting_data("llama"), how=QUICK, name="fit")
    assert {t.dtype for t in state.values()} == {torch.float32}
    weight = merged(model, carrying(state))[f"{Q.format(1)}.weight"]
    own = model.get_parameter(f"{Q.format(1)}.weight")
    A, B = (state[f"lora.{Q.format(1)}.weight.{k}"] for k in "AB")
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, (own.float() + 2 * B @ A).bfloat16())


@pytest.mark.parametrize("fails", [False, True])
def test_the_old_tensors_come_back(fails: bool) -> None:
    model = build("llama")
    state, place = random_lora(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    changed = f"{Q.format(2)}.weight"
    try:
        with sparing.attach(model, carrying(state)):
            moved = {name for name, p in model.named_parameters() if p.data_ptr() != place[name]}
            assert moved == {changed}  # no weight is copied that does not change
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == place
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_trained_weights_and_lora_add_up_in_one_state_and_in_nested_runs() -> None:
    model, name = build("llama"), f"{Q.format(2)}.weight"
    state, weight = random_lora(model), torch.randn(32, 32)
    A, B = state[f"lora.{name}.A"], state[f"lora.{name}.B"]
    own = model.get_parameter(name)
    with sparing.attach(model, carrying({**state, f"weight.{name}": weight})):
        torch.testing.assert_close(own.data, weight + 0.5 * B @ A)
    first = own.data.clone()

    class Other(StreamMethod):
        name = "other"
        card = Card("", 2026, axis="test", kind="stream", phase="prefill")

        def before_layer(self, stream: Stream, layer: int) -> None:
            pass

    with sparing.attach(model, carrying(state)), sparing.attach(model, Other().with_state(state)):
        torch.testing.assert_close(own.data, first + 2 * 0.5 * B @ A)
    assert torch.equal(own.data, first)


def test_gradients_reach_the_parameters_through_merged_weights() -> None:
    model = build("llama").train()
    batch = fitting_data("llama")[0]
    with sparing.attach(model, carrying(random_lora(model))):
        model(**batch, use_cache=False).loss.backward()
    grad = model.get_parameter(f"{Q.format(2)}.weight").grad
    assert grad is not None and float(grad.abs().sum()) > 0


def test_a_lora_of_another_model_is_refused(llama: PreTrainedModel) -> None:
    state = random_lora(llama)
    key = f"lora.{Q.format(2)}.weight"
    elsewhere = {k.replace("layers.2", "layers.7"): v for k, v in state.items()}
    cases = [
        (
            elsewhere,
            r"lora\.model\.layers\.7\.self_attn\.q_proj\.weight is 32x32 .*LlamaForCausalLM has no such parameter",
        ),
        ({**state, f"{key}.A": torch.randn(3, 48)}, r"is 32x48 \(B 32x3 times A 3x48\), LlamaForCausalLM has 32x32"),
        ({**state, f"{key}.A": torch.randn(4, 32)}, r"is no matrix \(B 32x3 times A 4x32\)"),
        ({**state, f"{key}.B": torch.randn(32)}, r"is no matrix \(B 32 times A 3x32\)"),
        ({**state, "lora.scale": torch.ones(2)}, r"lora\.scale is 2: must be one number"),
        ({k: v for k, v in state.items() if not k.endswith(".B")}, r"its state has no lora\.model\.layers\.2"),
        ({k: v for k, v in state.items() if k != "lora.scale"}, r"its state has no lora\.scale"),
    ]
    for wrong, message in cases:
        with pytest.raises(sparing.Error, match=message):
            sparing.attach(llama, carrying(wrong))


def test_adapt_refuses_data_without_labels(llama: PreTrainedModel) -> None:
    with pytest.raises(sparing.Error, match="training needs labels"):
        adapt(llama, batches=[prompt("llama")], how=QUICK, name="fit")
    assert student(llama).training and not llama.training

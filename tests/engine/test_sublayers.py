"""Whole attentions and MLPs go, in families whose sub-layers are called in other ways than Llama's."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import sparing
from sparing.engine.elastic import Elastic, units
from sparing.engine.surgery import LayerCut, NoMLP, Plan, cut, drop_attention, drop_mlp, masked
from sparing.engine.view import View
from sparing.testing.models import _SIZES, prompt

hf: Any = transformers
_GPT2 = {"vocab_size": 120, "n_embd": 32, "n_layer": 6, "n_head": 4, "bos_token_id": 1, "eos_token_id": None}
_BLOOM = {"vocab_size": 120, "hidden_size": 32, "n_layer": 6, "n_head": 4, "bos_token_id": 1, "eos_token_id": None}
_OSS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
_LONG = {"max_position_embeddings": 4096 * 32}  # as long as its rotary scaling says

#: family -> a model, its attention, and the modules that give out what attention and MLP add
FAMILIES: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    "gpt-oss": (  # its experts give back (hidden, what the router said); sinks are parameters of one dimension
        lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**{**_SIZES, **_LONG}, **_OSS)),
        "self_attn", "self_attn.o_proj", "mlp.experts",
    ),
    "bloom": (  # its sub-layers add the residual themselves
        lambda: hf.BloomForCausalLM(hf.BloomConfig(**_BLOOM)),
        "self_attention", "self_attention.dense", "mlp.dense_4h_to_h",
    ),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)), "attn", "attn.c_proj", "mlp.c_proj"),  # Conv1D
    "falcon": (
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**_SIZES)),
        "self_attention", "self_attention.dense", "mlp.dense_4h_to_h",
    ),
    "olmo2": (  # the norm is behind the sub-layer
        lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_SIZES)), "self_attn", "self_attn.o_proj", "mlp.down_proj",
    ),
}  # fmt: skip


def model_of(family: str) -> Any:
    torch.manual_seed(2)
    model = FAMILIES[family][0]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.ndim >= 2 else p.add_(0.3 * torch.randn_like(p))
    return model


def without(model: Any, *modules: str) -> Tensor:
    """Logits where the weights of these modules are zero, so that what they give out is."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in modules:
            for p in other.get_submodule(name).parameters():
                p.zero_()
        return logits(other)


def logits(model: Any) -> Tensor:
    batch = prompt("llama", (7, 7, 7), side="none")  # three rows: a tensor in place of a pair cannot be taken apart
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_removed_sub_layer_adds_nothing(family: str) -> None:
    model, (_, name, attention, mlp) = model_of(family), FAMILIES[family]
    stack = next(name for name, module in model.named_modules() if module is View(model).stack)
    dense = logits(model)
    gone = f"{stack}.1.{attention}", f"{stack}.3.{mlp}"
    wanted = {(a, m): without(model, *gone[:a], *gone[1:][:m]) for a, m in ((1, 0), (0, 1), (1, 1))}
    assert all(not torch.allclose(dense, w, atol=1e-2) for w in wanted.values())
    for (a, m), expected in wanted.items():
        small = copy.deepcopy(model)
        layers = View(small).layers
        if a:
            own = getattr(layers[1].module, name)  # also where the view does not find it
            drop_attention(dataclasses.replace(layers[1], attention=own), 32)
        if m:
            drop_mlp(layers[3], 32)
        torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-5)
        if a and View(model).layers[1].attention is None:
            continue
        plan = Plan(tuple(LayerCut(attention=not (a and i == 1), mlp=not (m and i == 3)) for i in range(6)))
        with masked(model, plan):
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        again = cut(cut(model, plan), plan)  # what is gone may go once more
        torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("family", ["gpt-oss", "gpt2", "olmo2"])
def test_without_sub_layers_it_generates_and_is_saved_as_it_is(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    small = cut(model, Plan(tuple(LayerCut(attention=i not in (0, 3), mlp=i not in (1, 5)) for i in range(6))))
    ids = prompt("llama", (7, 7), side="none")["input_ids"]
    cached, again = (small.generate(ids, max_new_tokens=5, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, again)
    loaded = sparing.from_pretrained(sparing.save_pretrained(small, tmp_path / "small"))
    torch.testing.assert_close(logits(loaded), logits(small), rtol=1e-5, atol=1e-6)
    elastic = Elastic(loaded, units(loaded, ["depth"]))
    elastic.empty_layers_are_none(ids)


def test_a_checkpoint_that_says_nonsense_of_what_is_gone_is_refused(tmp_path: Path) -> None:
    small = cut(model_of("gpt-oss"), Plan(tuple(LayerCut(mlp=i != 2) for i in range(6))))
    assert isinstance(small.model.layers[2].mlp, NoMLP) and small.model.layers[2].mlp.outputs == 2
    config = Path(sparing.save_pretrained(small, tmp_path / "small")) / "config.json"
    said = json.loads(config.read_text())
    assert said["sparing"]["layers"][2]["mlp_outputs"] == 2 and "mlp_outputs" not in said["sparing"]["layers"][1]
    for value in (0, 9, True, "2"):
        said["sparing"]["layers"][2]["mlp_outputs"] = value
        config.write_text(json.dumps(said))
        with pytest.raises(sparing.Error, match=r"layer 2: mlp_outputs = .*: must be a whole number in 1\.\.8"):
            sparing.from_pretrained(config.parent)


def test_an_mlp_that_needs_more_than_hidden_states_is_refused_by_name() -> None:
    model = model_of("olmo2")

    class Hashed(torch.nn.Linear):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    model.model.layers[4].mlp = Hashed(32, 32)
    said = r"layer 4: Hashed cannot be removed, .* hidden states alone \(TypeError: .*ids"
    with pytest.raises(sparing.Error, match=said):
        cut(model, Plan(tuple(LayerCut(mlp=i != 4) for i in range(6))))

"""Static cuts: moments, masked against really sliced, caches, and checkpoints that load strictly in a fresh process."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparing
from sparing.engine import checkpoint, units, widths
from sparing.engine.checkpoint import save_pretrained
from sparing.engine.surgery import LayerCut, Plan, cut, masked
from sparing.engine.units import Moments, observe
from sparing.engine.view import View
from sparing.testing.models import _SIZES, LAYERS, build, prompt

NAMES = ("llama", "biased", "qwen3", "phi3", "gemma3", "llava")
TEXT = ("llama", "biased", "qwen3", "phi3", "gemma3")


@functools.cache
def model_of(name: str) -> Any:
    """Tiny models with 2 KV groups of 2 query heads (llama, biased, phi3: 3 groups of 2), 48 neurons, 6 layers."""
    if name not in ("llama", "biased", "phi3"):
        return build(name)
    sizes = _SIZES | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
    torch.manual_seed(1)
    model: Any
    if name == "phi3":
        model = hf.Phi3ForCausalLM(hf.Phi3Config(**sizes))
    else:
        biased = name == "biased"
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, attention_bias=biased, mlp_bias=biased))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4) if weight.ndim == 2 else weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def few(*kept: int) -> Tensor:
    return torch.tensor(kept, dtype=torch.long)


def plan_of(name: str, kind: str) -> Plan:
    """Plans that between them cut everything that can be cut."""
    D = model_of(name).get_input_embeddings().weight.shape[1]
    torch.manual_seed(5)
    bias, other = torch.randn(D), torch.randn(D)
    all_of: dict[str, list[LayerCut | None]] = {
        "widths": [
            LayerCut(few(0), few(*range(0, 48, 3)), attention_bias=bias, mlp_bias=other),
            LayerCut(few(1), None),
            LayerCut(None, few(47)),
            LayerCut(few(0, 1), few(*range(48))),
            LayerCut(few(1), few(1, 2, 4, 8, 16, 32), mlp_bias=bias),
            LayerCut(attention_bias=bias, mlp_bias=other),
        ],
        "layers": [None, LayerCut(), None, LayerCut(few(1)), LayerCut(), None],
        "sub-layers": [
            LayerCut(attention=False),
            LayerCut(mlp=False),
            LayerCut(),
            LayerCut(attention=False, mlp=False),
            LayerCut(few(1), mlp=False, attention_bias=bias),
            LayerCut(attention=False, neurons=few(3, 4), mlp_bias=bias),
        ],
        "empty": [
            LayerCut(few(), few(3), attention_bias=bias),
            LayerCut(few(), few()),
            LayerCut(few(1), few(), mlp_bias=other),
            LayerCut(few(), few(), attention_bias=bias, mlp_bias=other),
            None,
            LayerCut(few()),
        ],
    }
    return Plan(tuple(all_of[kind]))


KINDS = ("widths", "layers", "sub-layers", "empty")
each_cut = pytest.mark.parametrize(("name", "kind"), [(n, k) for n in NAMES for k in KINDS])


def real(batch: dict[str, Tensor], x: Tensor) -> Tensor:
    """Rows that are not padding."""
    return x[batch["attention_mask"].bool()]


def parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


# --------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (17, 1, 0, 32), (1,) * 50])
def test_streaming_moments_equal_two_passes(sizes: tuple[int, ...]) -> None:
    x = (torch.randn(50, 7) * torch.arange(1.0, 8.0) + 1000.0).to(torch.float32)
    moments = Moments()
    for part in x.split(list(sizes)):
        moments.add(part, samples=1)
    mean = x.double().mean(0)
    assert (moments.count, moments.samples) == (50, len(sizes))
    torch.testing.assert_close(moments.mean, mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.squares, ((x.double() - mean) ** 2).sum(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(moments.second, (x.double() ** 2).sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.squares.float() / 49, x.var(0), rtol=1e-4, atol=0)


def test_streaming_moments_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, whole, chunked = torch.randn(23, 4) - 3, Moments(), Moments()
    whole.add(x, 2)
    monkeypatch.setattr(units, "_ROWS", 5)
    chunked.add(x, 2)
    assert chunked.count == 23 and chunked.samples == 2
    torch.testing.assert_close(chunked.mean, whole.mean)
    torch.testing.assert_close(chunked.squares, whole.squares)


@pytest.mark.parametrize("name", ["llama", "phi3", "llava"])
def test_observe_leaves_padding_out_and_the_model_as_it_was(name: str) -> None:
    model = model_of(name)
    batch = prompt(name, (9, 4, 6))
    seen: list[Tensor] = []
    layer = View(model).layers[2]
    handle = layer.projection("down_proj").register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    x = real(batch, seen[0]).double()

    model.model.train()
    layer.mlp.eval()  # type: ignore[union-attr]
    modes = [module.training for module in model.modules()]
    try:
        attention, mlp = observe(model, [batch | {"labels": batch["input_ids"]}])
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert (mlp[2].count, mlp[2].samples) == (int(batch["attention_mask"].sum()), 3)
    torch.testing.assert_close(mlp[2].mean, x.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mlp[2].squares, ((x - x.mean(0)) ** 2).sum(0), rtol=1e-5, atol=1e-7)
    assert attention[0].mean.shape == (layer.heads * layer.head_dim,) and len(attention) == LAYERS


def test_observe_does_not_depend_on_batching() -> None:
    batch = prompt("llama", (9, 4, 6, 7), side="right")
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    together, apart = (observe(model_of("llama"), batches)[1] for batches in ([batch], rows))
    for one, other in zip(together, apart, strict=True):
        assert (one.count, one.samples) == (other.count, other.samples) == (26, 4)
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(one.squares, other.squares, rtol=1e-4, atol=1e-7)


def test_observe_refuses_no_data_and_experts() -> None:
    with pytest.raises(sparing.Error, match="calibration data is empty"):
        observe(model_of("llama"), [])
    sizes = _SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    moe = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**sizes))
    with pytest.raises(sparing.Error, match="layer 0 has no down_proj"):
        observe(moe, [prompt("llama")])
    assert not any(module._forward_pre_hooks for module in moe.modules())


@pytest.mark.parametrize("name", NAMES)
def test_unit_costs_are_the_parameters_that_leave(name: str) -> None:
    model = model_of(name)
    group, neuron = units.unit_costs(View(model).layers[1])
    keep = few(*range(View(model).layers[1].groups - 1))
    for part, cost in ((LayerCut(groups=keep), group), (LayerCut(neurons=few(*range(47))), neuron)):
        small = cut(model, Plan((LayerCut(), part, *[LayerCut()] * (LAYERS - 2))))
        assert parameters(model) - parameters(small) == cost


# --------------------------------------------------------------------------- masked against cut


@each_cut
def test_masked_equals_cut_and_restores(name: str, kind: str) -> None:
    model, batch, plan = model_of(name), prompt(name, (7, 5)), plan_of(name, kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        dense = model(**batch).logits
        with masked(model, plan):
            want = model(**batch).logits
        small = cut(model, plan)
        got = small(**batch).logits
        assert torch.equal(model(**batch).logits, dense)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert parameters(small) < parameters(model)
    assert not torch.allclose(real(batch, want), real(batch, dense), atol=1e-2)
    torch.testing.assert_close(real(batch, got), real(batch, want), rtol=1e-4, atol=1e-5)


@each_cut
def test_cached_generation_of_a_cut_model_equals_uncached(name: str, kind: str) -> None:
    model, batch = cut(model_of(name), plan_of(name, kind)), prompt(name, (7, 5))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "suppress_tokens": [118]}
    cached, again = (model.generate(**batch, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, again.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(again.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_cut_model_runs_eager_and_beams(name: str) -> None:
    model, batch = cut(model_of(name), plan_of(name, "widths")), prompt(name, (7, 5))
    with torch.no_grad():
        fused = model(**batch).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(real(batch, model(**batch).logits), real(batch, fused), rtol=1e-4, atol=1e-5)
    assert model.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False).shape[0] == 2


def test_masked_restores_after_an_exception() -> None:
    model, batch = model_of("llama"), prompt("llama")
    with torch.no_grad():
        dense = model(**batch).logits
        with pytest.raises(KeyboardInterrupt), masked(model, plan_of("llama", "empty")):
            raise KeyboardInterrupt
        assert torch.equal(model(**batch).logits, dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "biased", "phi3"])
def test_a_cut_model_can_be_cut_again(name: str) -> None:
    model, batch = model_of(name), prompt(name)
    D = model.config.hidden_size
    first = Plan((LayerCut(few(0, 2), few(*range(0, 48, 2))), LayerCut(few(), few()), *[LayerCut()] * (LAYERS - 2)))
    bias = torch.randn(D)
    second = Plan(
        (LayerCut(few(1), few(3, 5)), LayerCut(few(), few(), attention_bias=bias), *[LayerCut()] * (LAYERS - 2))
    )
    both = Plan((LayerCut(few(2), few(6, 10)), second.layers[1], *[LayerCut()] * (LAYERS - 2)))
    with torch.no_grad():
        small = cut(model, first)
        with masked(small, second):
            once = small(**batch).logits
        for other in (cut(small, second)(**batch).logits, cut(model, both)(**batch).logits):
            torch.testing.assert_close(real(batch, other), real(batch, once), rtol=1e-4, atol=1e-5)


def test_stream_methods_run_on_a_model_without_some_attentions() -> None:
    model, batch = cut(model_of("llama"), plan_of("llama", "sub-layers")), prompt("llama")
    with torch.no_grad(), sparing.attach(model, sparing.parse("uniform-depth:R=4")) as run:
        out = model.generate(
            **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        run.prompt = width = batch["input_ids"].shape[1]
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 4).long()], 1)
        again = model(input_ids=out.sequences, attention_mask=mask).logits[:, width - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([LayerCut()] * (LAYERS - 1), "plan: 5 layers for a model of 6"),
        ([None] * LAYERS, "plan: no layer is left"),
        ([LayerCut(few(0, 3)), *[LayerCut()] * (LAYERS - 1)], r"layer 0 keeps groups 0\.\.3, it has 3"),
        ([LayerCut(neurons=few(-1, 3)), *[LayerCut()] * (LAYERS - 1)], r"layer 0 keeps neurons -1\.\.3, it has 48"),
        ([LayerCut(neurons=few(3, 3)), *[LayerCut()] * (LAYERS - 1)], "layer 0 keeps neurons .*must rise"),
    ],
)
def test_plans_that_do_not_fit_are_refused(layers: list[LayerCut | None], message: str) -> None:
    for act in (cut, lambda model, plan: masked(model, plan).__enter__()):
        with pytest.raises(sparing.Error, match=message):
            act(model_of("llama"), Plan(tuple(layers)))


def test_a_sub_layer_that_was_not_found_cannot_go() -> None:
    model = build("opt")  # its MLP has no module of its own
    plan = Plan(tuple(LayerCut(mlp=i != 2) for i in range(LAYERS)))
    for act in (cut, lambda *both: masked(*both).__enter__()):
        with pytest.raises(sparing.Error, match="plan: the mlp of layer 2 goes; none was found in OPTDecoderLayer"):
            act(model, plan)


def test_layers_that_do_not_fall_apart_are_refused() -> None:
    one = Plan((LayerCut(few(1)), *[LayerCut()] * (LAYERS - 1)))
    olmo = hf.Olmo2ForCausalLM(hf.Olmo2Config(**_SIZES))  # its q and k norms span all heads
    sinks = copy.deepcopy(model_of("llama"))
    sinks.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(6))
    for model, what in ((olmo, "q_norm.weight"), (sinks, "sinks")):
        for act in (cut, lambda model, plan: masked(model, plan).__enter__()):
            with pytest.raises(sparing.Error, match=rf"layer 0: \w+Attention\.{what}.*does not fall apart"):
                act(model, one)
    batch = prompt("llama")
    with torch.no_grad():  # all heads of a layer can go
        assert torch.isfinite(cut(olmo, Plan((LayerCut(few()), *one.layers[1:])))(**batch).logits).all()


def test_only_plain_linear_layers_are_cut() -> None:
    model = copy.deepcopy(model_of("llama"))
    down = model.model.layers[0].mlp.down_proj

    class Adapter(nn.Module):
        in_features, out_features, weight, bias = 48, 48, down.weight, None

    model.model.layers[0].mlp.down_proj = Adapter()
    plan = Plan((LayerCut(neurons=few(1), mlp_bias=torch.zeros(48)), *[LayerCut()] * (LAYERS - 1)))
    with pytest.raises(sparing.Error):
        cut(model, plan)


def test_rounded() -> None:
    assert [widths.rounded(k, 100, 16) for k in (0, 1, 23, 24, 99, 100)] == [0, 16, 16, 32, 96, 100]


def test_equal_counts_spend_the_budget() -> None:
    for budget, groups, limit, cost in ((59.0, 2.4, 20, (10, 2)), (59.0, 2.4, 18, (10, 2)), (7.0, 1.2, 9, (10, 2))):
        g, n = widths.equal_counts(budget, groups, limit, cost)
        assert 0 <= n <= limit and g in (int(groups), int(groups) + 1)
        assert abs(g * cost[0] + n * cost[1] - budget) <= max(cost[1] / 2, 3)
    assert widths.equal_counts(59.0, 2.4, 18, (10, 2)) == (3, 15)  # 18 neurons cannot make up for the third group


# --------------------------------------------------------------------------- checkpoints

_FRESH = """
import sys, torch, sparing, transformers
from pathlib import Path
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = sparing.from_pretrained(folder)
    seen = torch.load(folder / "seen.pt")
    with torch.no_grad():
        logits = model(**seen["batch"]).logits
    torch.testing.assert_close(logits, seen["logits"], rtol=1e-5, atol=1e-6)  # where memory lies decides the last bit
    assert model.state_dict().keys() == seen["weights"].keys()
    assert all(torch.equal(v, seen["weights"][k]) for k, v in model.state_dict().items()), folder
    assert type(model).__name__ == seen["class"] and type(model).__module__.startswith("transformers.")
    assert sum(p.numel() for p in model.parameters()) == seen["parameters"]
    again = sparing.from_pretrained(sparing.save_pretrained(model, folder / "again"))
    with torch.no_grad():
        torch.testing.assert_close(again(**seen["batch"]).logits, logits, rtol=1e-5, atol=1e-6)
    print("ok", folder.name)
"""


def test_saved_cuts_load_in_a_fresh_process(tmp_path: Path) -> None:
    cases = [(n, "widths") for n in NAMES] + [("llama", "layers"), ("biased", "empty"), ("gemma3", "sub-layers")]
    for name, kind in cases:
        small, batch, folder = cut(model_of(name), plan_of(name, kind)), prompt(name), tmp_path / f"{name}-{kind}"
        with torch.no_grad():
            logits = small(**batch).logits
        save_pretrained(small, folder)
        seen = {"batch": batch, "logits": logits, "class": type(small).__name__, "weights": small.state_dict()}
        torch.save({**seen, "parameters": parameters(small)}, folder / "seen.pt")
    folders = [str(tmp_path / f"{name}-{kind}") for name, kind in cases]
    done = subprocess.run([sys.executable, "-c", _FRESH, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok ") == len(cases)

    config = json.loads((tmp_path / "llama-widths" / "config.json").read_text())
    assert config["per_layer_config"]["0"] == {"intermediate_size": 16, "num_key_value_heads": 1}
    assert config["per_layer_config"]["2"] == {"intermediate_size": 1}
    assert config["sparing"]["layers"][0]["num_attention_heads"] == 2
    assert "5" not in config["per_layer_config"] and config["num_attention_heads"] == 6
    config = json.loads((tmp_path / "llava-widths" / "config.json").read_text())
    assert config["text_config"]["per_layer_config"]["1"] == {"num_key_value_heads": 1}
    config = json.loads((tmp_path / "biased-empty" / "config.json").read_text())
    assert set(config["per_layer_config"]["1"]["skip"]) == {"mlp", "self_attn"}
    parsed = hf.AutoConfig.from_pretrained(tmp_path / "llama-widths")
    assert [parsed.per_layer_config[i].intermediate_size for i in range(LAYERS)] == [16, 48, 1, 48, 6, 48]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(cut(model_of("llama"), plan_of("llama", "widths")), tmp_path_factory.mktemp("cut") / "model")


ANY = ("missing", "shape", "extra", "truncated")


@pytest.mark.parametrize(
    ("damage", "plain"), [(d, False) for d in (*ANY, "missing bias", "layers", "version")] + [(d, True) for d in ANY]
)
def test_a_tampered_checkpoint_is_refused(saved: Path, tmp_path: Path, damage: str, plain: bool) -> None:
    if plain:
        model_of("llama").save_pretrained(tmp_path)
    else:
        for file in saved.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights, file = load_file(tmp_path / "model.safetensors"), tmp_path / "config.json"
    name, config = "model.layers.0.mlp.down_proj.weight", json.loads(file.read_text())
    if damage == "missing":
        del weights["model.layers.4.self_attn.o_proj.weight"]
    elif damage == "missing bias":
        del weights["model.layers.0.mlp.down_proj.bias"]
    elif damage == "shape":
        weights[name] = weights[name][:, :-1].contiguous()
    elif damage == "extra":
        weights["model.layers.0.mlp.side_proj.weight"] = torch.zeros(2, 2)
    elif damage == "layers":
        config["sparing"]["layers"].pop()
    elif damage == "version":
        config["sparing"]["version"] = 99
    file.write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if damage == "truncated":
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(sparing.Error, match="do not fit its config"):
        sparing.from_pretrained(tmp_path)


def test_plain_checkpoints_and_wrong_folders(tmp_path: Path) -> None:
    model, batch = model_of("qwen3"), prompt("qwen3")
    model.save_pretrained(tmp_path / "plain")
    assert not checkpoint.is_cut(tmp_path / "plain") and not checkpoint.is_cut(tmp_path)
    with torch.no_grad():
        again, want = sparing.from_pretrained(tmp_path / "plain")(**batch).logits, model(**batch).logits
    torch.testing.assert_close(again, want, rtol=1e-5, atol=1e-6)
    half = sparing.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    for wrong in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(sparing.Error, match=r"no checkpoint there|not a lab model"):
            sparing.from_pretrained(wrong)
    with pytest.raises(sparing.Error, match="only a transformers model"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "linear")


@pytest.mark.parametrize("name", ["llama", "biased", "qwen3", "phi3", "gemma3"])
def test_a_uniform_cut_loads_in_plain_transformers(name: str, tmp_path: Path) -> None:
    model, batch = model_of(name), prompt(name)
    same = LayerCut(few(1), few(*range(0, 48, 3)))
    small = cut(model, Plan((same, same, None, same, same, same)))
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    assert (small.config.intermediate_size, small.config.num_hidden_layers) == (16, 5)
    save_pretrained(small, tmp_path)
    loaded, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    with torch.no_grad():
        want = small(**batch).logits
        for again in (loaded, sparing.from_pretrained(tmp_path)):
            torch.testing.assert_close(again(**batch).logits, want, rtol=1e-5, atol=1e-6)


def test_heads_that_the_config_class_refuses_stay_in_our_section(tmp_path: Path) -> None:
    """Llama wants its width a multiple of its heads: 3 heads of the 5 do not go into 40 channels."""
    torch.manual_seed(1)
    sizes = _SIZES | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "num_hidden_layers": 2}
    model, batch = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval(), prompt("llama")
    same = LayerCut(few(0, 2, 3), few(*range(24)))
    small = cut(model, Plan((same, same)))
    assert (small.config.num_attention_heads, small.config.intermediate_size) == (5, 24)
    save_pretrained(small, tmp_path)
    with torch.no_grad():
        again, want = sparing.from_pretrained(tmp_path)(**batch).logits, small(**batch).logits
    torch.testing.assert_close(again, want, rtol=1e-5, atol=1e-6)


def test_classifiers_load_with_their_own_loss(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**_SIZES | {"num_hidden_layers": 2}, num_labels=3)).eval()
    small, batch = cut(model, Plan((LayerCut(few(1), few(2, 3)), LayerCut()))), prompt("llama")
    again: Any = sparing.from_pretrained(save_pretrained(small, tmp_path))
    assert again.loss_type == small.loss_type == "ForSequenceClassification"
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, small(**batch).logits, rtol=1e-5, atol=1e-6)


def test_the_model_card_says_what_was_done(tmp_path: Path) -> None:
    method = sparing.parse("uniform-width:groups=1,neurons=16,compensate=false")
    small = sparing.prune(model_of("llama"), method)
    text = (save_pretrained(small, tmp_path, card={"data": "none"}) / "README.md").read_text()
    assert "- method: uniform-width" in text and "- data: none" in text and "| 5 | 2 | 1 | 16 |" in text
    assert f"- parameters: {parameters(small):,}" in text
    with pytest.raises(sparing.Error, match="only surgery methods cut"):
        sparing.prune(model_of("llama"), sparing.parse("uniform-depth"))
    with pytest.raises(sparing.Error, match="needs calibration first"):
        sparing.prune(model_of("llama"), sparing.parse("flap"))

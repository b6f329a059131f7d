"""Which experts a token visits: skipped pairs cost nothing, masks equal removal, FLOPs of experts by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparing
from sparing.engine.checkpoint import from_pretrained, save_pretrained
from sparing.engine.routing import Routing, RoutingMethod, restricted
from sparing.engine.surgery import LayerCut, Plan, cut, masked
from sparing.engine.view import View
from sparing.grid.method import Card
from sparing.testing.models import EXPERTS, LAYERS, MOE, TOP_K, build, prompt

_CARD = Card("Skips pairs", year=2026, axis="experts", kind="routing", phase="both", is_control=True)


@dataclass(frozen=True)
class Fewer(RoutingMethod):
    """Keeps k experts a token; with odd=True tokens at odd places keep none."""

    k: int = TOP_K
    odd: bool = False
    renormalise: bool = False

    def route(self, routing: Routing, layer: int) -> None:
        routing.keep(self.k, renormalise=self.renormalise)
        if self.odd:
            odd = torch.arange(len(routing.index)) % 2 == 1
            routing.skip(odd[:, None].expand_as(routing.index))


Fewer.name, Fewer.card = "fewer", _CARD


def reference(model: Any, batch: dict[str, Tensor], k: int, odd: bool, renormalise: bool) -> Tensor:
    """The same by brute force: every expert on every token, summed by dense gates."""
    handles = []
    for layer in View(model).layers:
        experts = layer.experts
        if experts is None:
            continue

        def brute(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            hidden, index, weight = args
            rank = weight.argsort(dim=1, descending=True, stable=True).argsort(1)
            kept = weight * (rank < k)
            if renormalise:
                kept = kept * weight.sum(1, keepdim=True) / kept.sum(1, keepdim=True)
            if odd:
                kept[1::2] = 0
            total = torch.zeros_like(hidden)
            for e in range(EXPERTS):
                if hasattr(module, "gate_up_proj_bias"):  # gpt-oss: what the expert gives alone
                    alone = module.forward(hidden, torch.full_like(index[:, :1], e), torch.ones_like(weight[:, :1]))
                    total += alone * (kept * (index == e)).sum(1, keepdim=True)
                    continue
                gate, up = (hidden @ module.gate_up_proj[e].T).chunk(2, -1)
                expert = (module.act_fn(gate) * up) @ module.down_proj[e].T
                total += expert * (kept * (index == e)).sum(1, keepdim=True)
            return total

        handles.append(experts.module.register_forward_hook(brute))
    out = model(**batch).logits
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("k", "odd", "renormalise"), [(2, False, False), (1, True, False), (2, True, True)])
def test_skipped_pairs_equal_brute_force(name: str, implementation: str, k: int, odd: bool, renormalise: bool) -> None:
    model, batch = build(name), prompt(name, (7, 7))
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        expected = reference(model, batch, k, odd, renormalise)
        with sparing.attach(model, Fewer(k, odd, renormalise)) as run:
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    share = k / TOP_K * (0.5 if odd else 1)
    assert run.trace.share("experts") == pytest.approx(share)


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_executed_flops_of_experts_are_what_the_pairs_cost(name: str, implementation: str) -> None:
    """By hand: a pair costs 2 x (D x 2I + I x D); dense minus method is that times the pairs skipped."""
    model, batch = build(name), prompt(name, (9, 9, 9, 9))
    model.set_experts_implementation(implementation)
    moe = [layer.experts for layer in View(model).layers if layer.experts is not None]
    inner = next(size for size in moe[0].module.down_proj.shape[1:] if size != 32)
    pair = 2 * (32 * 2 * inner + inner * 32)
    with torch.no_grad():
        with sparing.attach(model, Fewer(TOP_K), trace=True) as run:
            model(**batch)
            dense = run.trace.flops
        with sparing.attach(model, Fewer(2, odd=True), trace=True) as run:
            model(**batch)
    tokens = batch["input_ids"].numel()
    assert dense - run.trace.flops == len(moe) * pair * (TOP_K * tokens - tokens)  # half the tokens keep 2: N pairs


def test_flops_of_a_whole_qwen3_moe_by_hand() -> None:
    model, T, D = build("qwen3-moe"), 9, 32
    batch = prompt("qwen3-moe", (T, T), side="none")
    H, G, d, inner, N = 4, 2, 16, 24, 2 * T
    attention = 2 * N * D * (2 * H + 2 * G) * d + 2 * 2 * 2 * H * T * T * d  # projections; two products a sample
    layer = attention + 2 * N * D * EXPERTS + N * TOP_K * 2 * 3 * D * inner
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            flops, _ = sparing.count(lambda: model(**batch))
        assert flops == LAYERS * layer + 2 * N * D * 120  # the head last


def test_full_routing_is_bitwise_dense_and_restored() -> None:
    model, batch = build("olmoe"), prompt("olmoe")
    with torch.no_grad():
        dense = model(**batch).logits
        with sparing.attach(model, Fewer(TOP_K)) as run:
            assert torch.equal(model(**batch).logits, dense)
            assert run.trace.share("experts") == 1
        with pytest.raises(sparing.Error, match="k = 9"), sparing.attach(model, Fewer(9)):
            model(**batch)
        assert torch.equal(model(**batch).logits, dense)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(sparing.Error, match="LlamaForCausalLM has none"):
        sparing.attach(build("llama"), Fewer())


# --------------------------------------------------------------------------- fewer experts


def plan(model: Any, kept: list[int]) -> Plan:
    cuts = [LayerCut(experts=torch.tensor(kept)) if v.experts else LayerCut() for v in View(model).layers]
    return Plan(tuple(cuts))


@pytest.mark.parametrize("name", MOE)
def test_mask_equals_removal_and_reload(name: str, tmp_path: Path) -> None:
    model, batch = build(name), prompt(name)
    kept = [0, 2, 3, 6, 8, 11]  # three of each of deepseek's groups
    small = cut(model, plan(model, kept))
    with torch.no_grad():
        dense = model(**batch).logits
        with masked(model, plan(model, kept)):
            live = model(**batch).logits
        assert not torch.equal(live, dense) and torch.equal(model(**batch).logits, dense)
        torch.testing.assert_close(small(**batch).logits, live, rtol=1e-5, atol=1e-5)
        save_pretrained(small, tmp_path)
        torch.testing.assert_close(from_pretrained(tmp_path)(**batch).logits, live, rtol=1e-5, atol=1e-5)
        plain = type(model).from_pretrained(tmp_path)  # as many experts in every layer: plain transformers loads it
        torch.testing.assert_close(plain(**batch).logits, live, rtol=1e-5, atol=1e-5)
    moe = [v.experts for v in View(small).layers if v.experts]
    assert {e.count for e in moe} == {6} and moe[0].module.gate_up_proj.shape[0] == 6


def test_layers_with_other_numbers_of_experts_reload(tmp_path: Path) -> None:
    model, batch = build("qwen3-moe"), prompt("qwen3-moe")
    cuts = [LayerCut(experts=torch.arange(3 + i)) if i < 5 else LayerCut() for i in range(LAYERS)]
    small = cut(model, Plan(tuple(cuts)))
    save_pretrained(small, tmp_path)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(**batch).logits, small(**batch).logits)


def test_removed_experts_are_never_chosen_and_gates_keep_their_sum() -> None:
    model, batch = build("qwen3-moe"), prompt("qwen3-moe", (9, 9))
    experts = View(model).layers[2].experts
    assert experts is not None
    seen: list[tuple[Tensor, Tensor]] = []
    handle = experts.module.register_forward_pre_hook(lambda m, args: seen.append((args[1], args[2])))
    with torch.no_grad(), masked(model, plan(model, [1, 4, 5, 7])):
        logits = model(**batch, output_router_logits=True).router_logits[2]
    handle.remove()
    index, weight = seen[0]
    assert set(index.flatten().tolist()) <= {1, 4, 5, 7} and index.shape[1] == TOP_K
    assert all(len(set(row)) == TOP_K for row in index.tolist())
    torch.testing.assert_close(weight.sum(1), torch.ones(len(weight)))
    assert torch.isinf(logits).sum(1).tolist() == [EXPERTS - 4] * len(logits)


def test_group_limited_router_with_unequal_groups() -> None:
    """The mask works; removal is refused, because the router's groups are of one size."""
    model, batch = build("deepseek-v3"), prompt("deepseek-v3", (9, 9))
    layer = View(model).layers[1]
    assert layer.experts is not None
    kept = torch.tensor([0, 1, 2, 6, 7, 8, 11])
    seen: list[Tensor] = []
    handle = layer.experts.module.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    before = copy.deepcopy(layer.experts.router.state_dict())
    with torch.no_grad(), restricted(layer, kept):
        model(**batch)
    handle.remove()
    assert set(seen[0].flatten().tolist()) <= set(kept.tolist())
    groups = seen[0] // 6
    assert (groups == groups[:, :1]).all()  # one group a token, as the model was built
    assert all(torch.equal(v, before[k]) for k, v in layer.experts.router.state_dict().items())
    with pytest.raises(sparing.Error, match=r"groups of \[3, 4\] experts"):
        cut(model, plan(model, kept.tolist()))


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("qwen3-moe", [1, 2], "keeps 2 experts, a token needs 3"),
        ("qwen3-moe", [3, 1, 2], "must rise within 0..11"),
        ("qwen3-moe", [1, 2, 12], "must rise within 0..11"),
        ("deepseek-v3", [0, 1, 6, 7], r"in groups of \[2, 2\].*needs 3"),
        ("llama", [0, 1, 2], "layer 0 has no experts"),
    ],
)
def test_plans_that_cannot_be_are_refused(name: str, kept: list[int], message: str) -> None:
    model = build(name)
    wrong = Plan(tuple(LayerCut(experts=torch.tensor(kept)) for _ in range(LAYERS)))
    if name == "deepseek-v3":
        wrong = plan(model, kept)
    for act in (cut, lambda m, p: masked(m, p).__enter__()):
        with pytest.raises(sparing.Error, match=message):
            act(model, wrong)

"""FLOPs against totals worked out by hand for a Llama with grouped queries."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import sparing
from sparing.testing.models import LAYERS, VOCAB, build, prompt

# the tiny Llama: D = 32, H = 4 heads of d = 8, G = 2 KV heads, F = 48 neurons.
D, H, G, d, F = 32, 4, 2, 8, 48


def by_hand(B: int, rows: list[int], keys: list[int], logits: int) -> int:
    """2 FLOPs a multiply-add: q, k, v, o, gate, up, down; scores and values over the full rectangle; the head."""
    total = 2 * B * logits * D * VOCAB
    for M, K in zip(rows, keys):
        total += 2 * B * M * (D * H * d + 2 * D * G * d + H * d * D + 3 * D * F)
        total += 2 * 2 * B * H * M * K * d
    return total


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_prefill(implementation: str) -> None:
    model = build("llama")
    model.set_attn_implementation(implementation)
    ids = torch.randint(2, 99, (3, 13))
    with torch.no_grad():
        flops, moved = sparing.count(lambda: model(ids, use_cache=False))
    assert flops == by_hand(3, [13] * LAYERS, [13] * LAYERS, 13)
    assert moved > sum(p.numel() * 4 for n, p in model.named_parameters() if "layers" in n and p.ndim == 2)


def test_decode_step(llama: PreTrainedModel) -> None:
    ids = torch.randint(2, 99, (2, 9))
    with torch.no_grad():
        cache = llama(ids).past_key_values
        flops, _ = sparing.count(lambda: llama(ids[:, :1], past_key_values=cache))
    assert flops == by_hand(2, [1] * LAYERS, [10] * LAYERS, 1)


def test_dropped_rows_are_not_executed(llava: PreTrainedModel) -> None:
    batch = prompt("llava", (6, 6), side="none")
    schedule = (1.0, 1.0, 0.5, 0.5, 0.25, 0.0)
    method = sparing.get("random-tokens")(schedule=schedule)  # type: ignore[call-arg]
    with torch.no_grad():
        with sparing.attach(llava, method, trace=True) as run:
            llava(**batch, logits_to_keep=1)
            flops = run.trace.flops
            layers = {k: v for k, v in run.trace.by_layer.items() if k is not None}
            cells = run.trace.cells[0]
        with sparing.attach(llava, sparing.parse("random-tokens:schedule=1"), trace=True) as run:
            llava(**batch, logits_to_keep=1)
            outside = run.trace.by_layer[None][0]
    rows = [6 + round(16 * s) for s in schedule]
    assert cells.rows == [2 * r for r in rows]
    assert cells.visual_rows == [2 * round(16 * s) for s in schedule]
    expected = by_hand(2, rows, rows, 0)
    assert sum(f for f, _ in layers.values()) == expected
    assert flops == expected + outside  # vision tower, projector and head run as ever
    assert run.trace.share() == 1.0


def test_compute_map(llava: PreTrainedModel) -> None:
    batch = prompt("llava", (6, 6), side="none")
    with (
        torch.no_grad(),
        sparing.attach(llava, sparing.parse("uniform-tokens:schedule=1/1/0.5/0.5/0.5/0"), trace=True) as run,
    ):
        llava(**batch)
    picture = run.trace.map(sample=1)
    assert picture.shape == (LAYERS, 22)
    assert picture.sum(1).tolist() == [22, 22, 14, 14, 14, 6]
    assert picture[5].nonzero().flatten().tolist() == [0, 1, 18, 19, 20, 21]  # text stays


def test_counts_need_trace(llama: PreTrainedModel) -> None:
    with sparing.attach(llama, sparing.parse("uniform-depth:R=3")) as run:
        pass
    with pytest.raises(sparing.Error, match="trace=True"):
        _ = run.trace.flops


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_grouped_expert_gemms(implementation: str) -> None:
    """A Qwen3-MoE counted by hand: router, and gate, up and down of top-k experts a token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts, top, width = 8, 2, 24
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=F, moe_intermediate_size=width, num_hidden_layers=3,
        num_attention_heads=H, num_key_value_heads=G, head_dim=d, num_experts=experts, num_experts_per_tok=top,
        decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    ids = torch.randint(2, 99, (2, 16))
    with torch.no_grad():
        flops, _ = sparing.count(lambda: model(ids, use_cache=False))
    tokens = 32
    attention = 2 * tokens * (D * H * d + 2 * D * G * d + H * d * D) + 4 * 2 * H * 16 * 16 * d
    moe = 2 * tokens * D * experts + 2 * tokens * top * 3 * D * width
    assert flops == 3 * (attention + moe) + 2 * tokens * D * VOCAB

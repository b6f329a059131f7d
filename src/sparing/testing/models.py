"""Tiny random models of real architectures, and prompts for them: batched, padded, of unequal lengths, with images."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

hf: Any = transformers  # config classes take more than their signatures say

LAYERS = 6
VOCAB = 120
IMAGE = 118  # token id of one visual token
VISUAL = 16  # visual tokens of one image, a 4 x 4 grid
DENSE = (
    *("llama", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "gpt-neox", "opt"),
    *("falcon", "gptj", "bloom", "gpt2", "phi", "olmo2", "cohere2"),
)
MOE = ("qwen3-moe", "olmoe", "mixtral", "deepseek-v3", "deepseek-v2", "gpt-oss")
TEXT = (*DENSE, *MOE)
VISION = ("llava", "qwen2.5-vl")
ARCHITECTURES = (*TEXT, *VISION)
EXPERTS, TOP_K = 12, 3  # of the MoE models

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 256,
}

_TOKENS = {k: _SIZES[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
_OLD = {**_TOKENS, "num_attention_heads": 4}
_GPT = {**_TOKENS, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 256}
_LATENT: dict[str, Any] = {  # of the DeepSeek models
    **_SIZES,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_EXPERTS: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}


def _without(*names: str) -> dict[str, Any]:
    return {k: v for k, v in _SIZES.items() if k not in names}


def build(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A tiny random model of architecture `name`, in eval mode, weights large enough that attention is not flat."""
    torch.manual_seed(1)
    model: Any
    if name == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES))
    elif name == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SIZES, head_dim=16))
    elif name == "gemma3":
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
        model = hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**_SIZES, head_dim=16, sliding_window=8, layer_types=kinds, query_pre_attn_scalar=16)
        )
    elif name == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SIZES))
    elif name == "mistral":
        model = hf.MistralForCausalLM(hf.MistralConfig(**_SIZES, sliding_window=8))
    elif name == "phi3":
        model = hf.Phi3ForCausalLM(hf.Phi3Config(**_SIZES))
    elif name == "gpt-neox":
        model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES))
    elif name == "opt":
        model = hf.OPTForCausalLM(
            hf.OPTConfig(**_without("intermediate_size", "num_key_value_heads"), ffn_dim=48, word_embed_proj_dim=32)
        )
    elif name == "falcon":  # tuples; rotary
        model = hf.FalconForCausalLM(hf.FalconConfig(**_OLD, hidden_size=32, num_hidden_layers=LAYERS))
    elif name == "gptj":
        model = hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT, rotary_dim=4))
    elif name == "bloom":  # tuples; ALiBi; sub-layers add the residual themselves
        model = hf.BloomForCausalLM(hf.BloomConfig(**_OLD, hidden_size=32, n_layer=LAYERS))
    elif name == "gpt2":  # Conv1D; learned positions
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT))
    elif name == "phi":  # partial rotary; attention and MLP side by side
        model = hf.PhiForCausalLM(hf.PhiConfig(**_SIZES, partial_rotary_factor=0.5))
    elif name == "olmo2":  # norms over all heads together; norms behind sub-layers
        model = hf.Olmo2ForCausalLM(hf.Olmo2Config(**_SIZES))
    elif name == "cohere2":  # interleaved rotary, none in every third layer
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
        model = hf.Cohere2ForCausalLM(hf.Cohere2Config(**_SIZES, sliding_window=8, layer_types=kinds))
    elif name == "deepseek-v2":  # one complex rotary tensor; latent attention
        model = hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**_LATENT, n_group=1, topk_group=1, topk_method="greedy"))
    elif name == "gpt-oss":  # attention sinks, one number a head
        sizes = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "sliding_window": 8}
        model = hf.GptOssForCausalLM(hf.GptOssConfig(**_SIZES, head_dim=16, **sizes))
    elif name == "llama4":  # chunked attention, complex rotary, none in every fourth layer; experts in every second
        sizes = {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
        model = hf.Llama4ForCausalLM(
            hf.Llama4TextConfig(**_SIZES, **sizes, head_dim=8, attention_chunk_size=8, interleave_moe_layer_step=2)
        )
    elif name == "qwen3-moe":
        model = hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(**_SIZES, head_dim=16, moe_intermediate_size=24, norm_topk_prob=True, **_EXPERTS)
        )
    elif name == "olmoe":
        model = hf.OlmoeForCausalLM(hf.OlmoeConfig(**_SIZES, **_EXPERTS))
    elif name == "mixtral":
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**_SIZES, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K))
    elif name == "deepseek-v3":
        model = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**_LATENT, n_group=2, topk_group=1))
    elif name == "llava":
        vision = hf.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        model = hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=vision,
                text_config=hf.LlamaConfig(**_SIZES),
                image_token_id=IMAGE,
                vision_feature_layer=-1,
            )
        )
    elif name == "qwen2.5-vl":
        config = hf.Qwen2_5_VLConfig(
            text_config={
                **_SIZES,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            image_token_id=IMAGE,
            video_token_id=VOCAB - 1,
            vision_start_token_id=VOCAB - 3,
            pad_token_id=0,
            bos_token_id=1,
        )
        model = hf.Qwen2_5_VLForConditionalGeneration(config)
        model.generation_config.eos_token_id = None
    else:
        raise ValueError(name)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(4)
    return model.eval().to(dtype)


def prompt(name: str, lengths: tuple[int, ...] = (7, 5), *, side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """A padded batch: for each length that many text tokens, around one image where the model sees.

    side: "left", "right" or "none" (all samples as long as the longest).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    longest = max(lengths)
    for length in lengths:
        text = torch.randint(2, VOCAB - 5, (longest,), generator=generator)
        text = text if side == "none" else text[:length]
        if name in VISION:
            image = torch.full((VISUAL,), IMAGE)
            rows.append(torch.cat([text[:2], image, text[2:]]))
        else:
            rows.append(text)
    width = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    out: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    if name == "llava":
        out["pixel_values"] = torch.randn(len(rows), 3, 32, 32, generator=generator)
    if name == "qwen2.5-vl":
        # 8 x 8 patches of 2 x 3 x 4 x 4 values a frame pair, merged 2 x 2 to 16 tokens
        out["pixel_values"] = torch.randn(len(rows) * 64, 3 * 2 * 4 * 4, generator=generator)
        out["image_grid_thw"] = torch.tensor([[1, 8, 8]] * len(rows))
        out["mm_token_type_ids"] = (ids == IMAGE).int()
    return out


def single(name: str, batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of a batch, without padding."""
    keep = batch["attention_mask"][row].bool()
    out: dict[str, Tensor] = {
        k: batch[k][row : row + 1, keep] for k in ("input_ids", "attention_mask", "mm_token_type_ids") if k in batch
    }
    if name == "llava":
        out["pixel_values"] = batch["pixel_values"][row : row + 1]
    if name == "qwen2.5-vl":
        out["pixel_values"] = batch["pixel_values"][row * 64 : row * 64 + 64]
        out["image_grid_thw"] = batch["image_grid_thw"][row : row + 1]
    return out

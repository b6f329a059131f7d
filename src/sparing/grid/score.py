"""How important: scores from tensors that a model has at hand. Larger means more important unless stated."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_received(
    query_BHQd: Tensor, key_BGKd: Tensor, scale: float, visible_BQK: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Attention that each key gets from a few queries: softmax over the whole row, mean over heads and queries.

    Costs Q rows of the attention matrix, never the matrix.

    Args:
        query_BHQd: a few query rows after position embedding.
        key_BGKd: the layer's keys, G key/value heads (H a multiple of G).
        scale: of the dot product, usually d ** -0.5.
        visible_BQK: bool, which keys a query may see; None for all. A query that sees nothing counts for nothing.
        softcap: logit soft-capping of the model, if it has one.

    Returns:
        float32 (B, K); rows sum to 1.
    """
    return attention_rows(query_BHQd, key_BGKd, scale, visible_BQK, softcap).mean(dim=(1, 2))


def attention_rows(
    query_BHQd: Tensor, key_BGKd: Tensor, scale: float, visible_BQK: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The attention rows themselves, (B, H, Q, K) in float32."""
    B, H, Q, d = query_BHQd.shape
    G = key_BGKd.shape[1]
    grouped = query_BHQd.reshape(B, G, H // G * Q, d)
    logits = (grouped @ key_BGKd.transpose(-1, -2)).float().reshape(B, H, Q, -1) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible_BQK is not None:
        logits = logits.masked_fill(~visible_BQK[:, None], -torch.inf)
    return torch.nan_to_num(logits.softmax(-1))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity along the last dimension, in float32."""
    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits) along the last dimension."""
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm along the last dimension, in float32."""
    return x.float().norm(dim=-1)


def standardise(x: Tensor) -> Tensor:
    """z-scores along the last dimension, (x - mean) / std with N-1; zero where all values are equal."""
    std = x.std(dim=-1, keepdim=True)
    return torch.where(std > 0, (x - x.mean(-1, keepdim=True)) / std, torch.zeros_like(x))


def divergence(p_logits: Tensor, q_logits: Tensor, *, top_k: int | None = None, chunk: int = 1024) -> Tensor:
    """KL(p || q) in nats at every position, float32, of distributions given by logits over the last dimension.

    Args:
        p_logits, q_logits: (…, V).
        top_k: only p's k likeliest entries, both distributions renormalised over them; None takes all.
        chunk: positions at a time, so that float32 copies of all logits are never held.

    >>> p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    >>> round(divergence(p, q).item(), 6)
    0.085123
    """
    flat = [x.reshape(-1, x.shape[-1]) for x in (p_logits, q_logits)]
    out = []
    for p_NV, q_NV in zip(flat[0].split(chunk), flat[1].split(chunk), strict=True):
        if top_k is not None and top_k < p_NV.shape[-1]:
            index = p_NV.topk(top_k, dim=-1).indices
            p_NV, q_NV = p_NV.gather(-1, index), q_NV.gather(-1, index)
        logp, logq = p_NV.float().log_softmax(-1), q_NV.float().log_softmax(-1)
        gap = torch.where(logp > -torch.inf, logp - logq, torch.zeros_like(logp))
        out.append((logp.exp() * gap).sum(-1))
    return torch.cat(out).reshape(p_logits.shape[:-1])

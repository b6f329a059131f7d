"""Learned yes/no decisions: hard going forward, soft going back, and the losses that hold them to a budget."""

from __future__ import annotations

import torch
from torch import Tensor


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Value of `hard`, gradient of `soft`.

    >>> p = torch.tensor([0.3, 0.8], requires_grad=True)
    >>> straight_through((p > 0.5).float(), p).tolist()
    [0.0, 1.0]
    """
    return hard.detach().to(soft.dtype) + (soft - soft.detach())


def gumbel(logits: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Softmax over the last dimension of logits with Gumbel noise: a soft sample of the categories."""
    draw = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-9, 1 - 1e-7)
    noise = -torch.log(-torch.log(draw))
    return ((logits + noise) / temperature).softmax(-1)


def mean_over(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of x where the mask holds, whatever stands elsewhere; mask broadcasts from the left, None takes all."""
    if mask is None:
        return x.mean()
    holds = mask.bool().reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)).expand_as(x)
    return x.masked_fill(~holds, 0).sum() / holds.sum().clamp(min=1)


def budget_loss(p: Tensor, rho: float, mask: Tensor | None = None) -> Tensor:
    """(mean p - rho)^2: one global target; the gradient is the same at every entry, in whatever layer.

    >>> round(budget_loss(torch.tensor([[0.9, 0.1], [0.5, 0.3]]), 0.25).item(), 6)
    0.04
    """
    return (mean_over(p, mask) - rho) ** 2


def excess_loss(value: Tensor, limit: Tensor | float) -> Tensor:
    """mean(max(0, value - limit)^2): only what lies above its limit costs, and has a gradient."""
    return torch.relu(value - limit).square().mean()

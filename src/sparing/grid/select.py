"""Which: selections from scores. Masks in, masks out: True means kept, and exactly k survive, also when scores tie."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.grid.method import Error


def _counts(k: int | Tensor, score_BN: Tensor) -> Tensor:
    count_B = torch.as_tensor(k, device=score_BN.device).expand(score_BN.shape[0])
    if bool((count_B < 0).any()):
        raise Error(f"k = {k}: must be >= 0")
    return count_B


def ranks(score_BN: Tensor) -> Tensor:
    """Rank 0 … N-1 of every score in its row, best first; ties go to the lower index, NaN ranks last. Shape (B, N)."""
    clean = torch.where(score_BN.isnan(), -torch.inf, score_BN)
    order_BN = clean.sort(dim=-1, descending=True, stable=True).indices
    rank_BN = torch.empty_like(order_BN)
    places = torch.arange(score_BN.shape[-1], device=score_BN.device).expand_as(order_BN)
    return rank_BN.scatter_(-1, order_BN, places)


def top_k(score_BN: Tensor, k: int | Tensor) -> Tensor:
    """Keep the k highest scores of each row.

    Exactly min(k, N) survive: of equal scores the one with the lower index stays (plain `torch.topk` leaves it open,
    and a threshold would keep all of them).

    Args:
        score_BN: scores; give entries that must not be chosen -inf and count them out of k.
        k: one count, or one a row (B).

    Returns:
        bool (B, N).

    >>> top_k(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2).tolist()
    [[False, True, True, False]]
    """
    return ranks(score_BN) < _counts(k, score_BN)[:, None]


def threshold(score_BN: Tensor, at: float | Tensor) -> Tensor:
    """Keep scores strictly above `at` (a number, or one a row). Bool (B, N); the count is whatever it is."""
    return score_BN > torch.as_tensor(at, device=score_BN.device).reshape(-1, 1)


def evenly(count_N: int, k: int, device: torch.device | None = None) -> Tensor:
    """k of N at even spacing: index floor((i + 1/2) N / k). Bool (N,).

    >>> evenly(6, 2).nonzero().flatten().tolist()
    [1, 4]
    """
    keep_N = torch.zeros(count_N, dtype=torch.bool, device=device)
    if k > 0:
        index = ((torch.arange(min(k, count_N), device=device) * 2 + 1) * count_N) // (2 * min(k, count_N))
        keep_N[index] = True
    return keep_N


def diverse(item_BND: Tensor, k: int, bonus_BN: Tensor | None = None, valid_BN: Tensor | None = None) -> Tensor:
    """Greedy max-min (farthest-point) selection by cosine distance, with a bonus per item.

    Starts at the highest bonus (index 0 without one); then k-1 times takes the item whose distance to the nearest
    chosen item, plus its bonus, is largest; ties go to the lower index. Cost O(k N D), no N x N matrix.

    Args:
        item_BND: features.
        k: how many to keep, clipped to N.
        bonus_BN: added to the distances (which lie in [0, 2]); default 0.
        valid_BN: False entries are never chosen.

    Returns:
        bool (B, N), exactly min(k, valid) True a row.
    """
    B, N, _ = item_BND.shape
    unit_BND = torch.nn.functional.normalize(item_BND.float(), dim=-1)
    bonus_BN = item_BND.new_zeros(B, N, dtype=torch.float) if bonus_BN is None else bonus_BN.float()
    open_BN = torch.ones(B, N, dtype=torch.bool, device=item_BND.device) if valid_BN is None else valid_BN.clone()
    keep_BN = torch.zeros_like(open_BN)
    near_BN = torch.full_like(bonus_BN, 0.0)
    rows = torch.arange(B, device=item_BND.device)
    for step in range(min(k, N)):
        gain_BN = (near_BN + bonus_BN).masked_fill(~open_BN, -torch.inf)
        pick_B = ranks(gain_BN).argmin(-1)
        alive_B = open_BN[rows, pick_B]
        keep_BN[rows, pick_B] |= alive_B
        open_BN[rows, pick_B] = False
        distance_BN = 1 - torch.einsum("bnd,bd->bn", unit_BND, unit_BND[rows, pick_B])
        near_BN = distance_BN if step == 0 else torch.minimum(near_BN, distance_BN)
    return keep_BN


def cluster(item_BND: Tensor, k: int, neighbours: int = 5) -> tuple[Tensor, Tensor]:
    """Density-peak clustering (DPC-kNN): centres are dense points far from any denser point.

    Args:
        item_BND: features, Euclidean distances.
        k: clusters, 1 <= k <= N.
        neighbours: for the local density exp(-mean squared distance to the nearest ones).

    Returns:
        centre_BN: bool, exactly k True a row (ties to the lower index).
        owner_BN: index of the centre that each item belongs to; a centre owns itself.
    """
    B, N, D = item_BND.shape
    if not 1 <= k <= N:
        raise Error(f"k = {k}: must lie in 1..{N}")
    distance_BNN = torch.cdist(item_BND.float(), item_BND.float()) / D**0.5
    near_BNM = distance_BNN.topk(min(neighbours, N), dim=-1, largest=False).values
    density_BN = (-(near_BNM**2).mean(-1)).exp()
    # Equal densities are ordered by index, so that exactly one point has no denser one.
    order_BN = ranks(density_BN)
    denser_BNN = order_BN[:, None, :] < order_BN[:, :, None]
    gap_BN = distance_BNN.masked_fill(~denser_BNN, torch.inf).min(-1).values
    gap_BN = torch.where(gap_BN.isinf(), distance_BNN.flatten(1).max(-1).values[:, None] + 1, gap_BN)
    centre_BN = top_k(gap_BN * density_BN, k)
    owner_BN = distance_BNN.masked_fill(~centre_BN[:, None, :], torch.inf).argmin(-1)
    own = torch.arange(N, device=item_BND.device).expand(B, N)
    return centre_BN, torch.where(centre_BN, own, owner_BN)


def soft_top_k(score_BN: Tensor, k: int | Tensor, sharpness: float | None = None) -> tuple[Tensor, Tensor]:
    """Differentiable top-k of HiDrop (2026): sigmoid of the normalised rank, kept where it exceeds 1/2.

    c'_i = (1/N) sum_j 1[c_i >= c_j],  m_i = sigmoid(lambda (c'_i - a)),  a = 1 - k/N,  lambda = N by default.
    The rank c' is a step function, so m as defined has no gradient to c. Values here are the paper's; the gradient is
    that of sigmoid(2 (z_i - t)), z being c scaled to mean 0 and spread 1 over the row, t half-way between the k-th and
    the next.
    (A smooth rank with lambda = N was tried: only a handful of tokens next to the threshold then get any gradient.)

    Args:
        score_BN: c; -inf marks entries that take no part (they count out of N).
        k: how many to keep, one number or one a row.
        sharpness: lambda; default N a row.

    Returns:
        keep_BN: bool, exactly k a row, ties to the lower index (the released code keeps all tied tokens).
        mask_BN: m in [0, 1], with gradient to score_BN.

    >>> keep, m = soft_top_k(torch.tensor([[0.2, 0.9, 0.5, 0.1]]), 2)
    >>> keep.tolist(), [round(v, 4) for v in m[0].tolist()]
    ([[False, True, True, False]], [0.5, 0.8808, 0.7311, 0.2689])
    """
    part_BN = ~score_BN.isinf()
    count_B1 = part_BN.sum(-1, keepdim=True).clamp(min=1)
    k_B1 = _counts(k, score_BN)[:, None]
    lam_B1 = count_B1.float() if sharpness is None else torch.full_like(count_B1, sharpness, dtype=torch.float)
    score = score_BN.float()
    hard_BN = ((score[:, :, None] >= score[:, None, :]) & part_BN[:, None, :]).sum(-1) / count_B1
    at_B1 = 1 - k_B1 / count_B1
    mask_BN = torch.sigmoid(lam_B1 * (hard_BN - at_B1)) * part_BN
    keep_BN = top_k(score, torch.minimum(k_B1[:, 0], part_BN.sum(-1))) & part_BN
    if score_BN.requires_grad:
        finite = score.masked_fill(~part_BN, 0.0)
        gap = (finite - finite.sum(-1, keepdim=True) / count_B1) * part_BN
        z_BN = gap / ((gap**2).sum(-1, keepdim=True) / count_B1).sqrt().clamp(min=1e-6)
        lowest_kept = z_BN.masked_fill(~keep_BN, torch.inf).min(-1, keepdim=True).values
        best_lost = z_BN.masked_fill(keep_BN | ~part_BN, -torch.inf).max(-1, keepdim=True).values
        edge_B1 = torch.nan_to_num((lowest_kept + best_lost) / 2, nan=0.0, posinf=0.0, neginf=0.0).detach()
        smooth_BN = torch.sigmoid(2 * (z_BN - edge_B1)) * part_BN
        mask_BN = mask_BN.detach() + (smooth_BN - smooth_BN.detach())
    return keep_BN, mask_BN


def straight_through(mask: Tensor) -> Tensor:
    """A factor that is exactly 1 forward and has the gradient of `mask`: 1 + (m - stop(m))."""
    return 1 + (mask - mask.detach())

"""Selections: exactly k survive, whatever the scores."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparing.grid.select import cluster, diverse, evenly, ranks, soft_top_k, straight_through, threshold, top_k


def test_top_k_ties_go_to_the_lower_index() -> None:
    assert top_k(torch.zeros(2, 7), 3).tolist() == [[True] * 3 + [False] * 4] * 2


@pytest.mark.parametrize("k", range(0, 9))
def test_top_k_keeps_exactly_k(k: int) -> None:
    scores = torch.randint(0, 3, (5, 8)).float()
    scores[2, 3] = torch.nan
    keep = top_k(scores, k)
    assert keep.sum(1).tolist() == [k] * 5
    clean = scores.nan_to_num(-1)
    for row in range(5):  # no kept score lies below a dropped one
        if 0 < k < 8:
            assert clean[row][keep[row]].min() >= clean[row][~keep[row]].max()


def test_top_k_one_count_a_row() -> None:
    assert top_k(torch.rand(3, 6), torch.tensor([1, 6, 0])).sum(1).tolist() == [1, 6, 0]


def test_ranks_are_a_permutation() -> None:
    rank = ranks(torch.tensor([[2.0, 5.0, 2.0, torch.nan]]))
    assert rank.tolist() == [[1, 0, 2, 3]]


def test_threshold_is_strict() -> None:
    assert threshold(torch.tensor([[1.0, 2.0]]), 1.0).tolist() == [[False, True]]


def test_evenly_covers_the_range() -> None:
    for n, k in itertools.product(range(1, 20), range(0, 20)):
        keep = evenly(n, k)
        assert int(keep.sum()) == min(n, k)
    gaps = evenly(256, 26).nonzero().flatten().diff()
    assert int(gaps.max() - gaps.min()) <= 1


def test_diverse_equals_brute_force_greedy() -> None:
    items, bonus = torch.randn(2, 9, 4), torch.rand(2, 9)
    keep = diverse(items, 4, bonus)
    unit = items / items.norm(dim=-1, keepdim=True)
    for b in range(2):
        chosen = [int(bonus[b].argmax())]
        while len(chosen) < 4:
            gain = [
                (min(1 - float(unit[b, i] @ unit[b, j]) for j in chosen) + float(bonus[b, i]), -i)
                if i not in chosen
                else (-9.0, -i)
                for i in range(9)
            ]
            chosen.append(-max(gain)[1])
        assert sorted(chosen) == keep[b].nonzero().flatten().tolist()


def test_diverse_respects_validity() -> None:
    valid = torch.tensor([[True, False, True, False, True]])
    keep = diverse(torch.randn(1, 5, 3), 4, valid_BN=valid)
    assert keep.sum() == 3 and not (keep & ~valid).any()


def test_cluster_finds_separated_groups() -> None:
    centres = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]])
    group = torch.tensor([0, 1, 2] * 5)
    points = (centres[group] + 0.1 * torch.randn(15, 2))[None]
    centre, owner = cluster(points, 3)
    assert int(centre.sum()) == 3
    assert len(set(group[centre[0]].tolist())) == 3
    assert torch.equal(group[owner[0]], group)


def test_cluster_keeps_exactly_k_when_all_points_agree() -> None:
    centre, owner = cluster(torch.zeros(1, 6, 3), 2)
    assert int(centre.sum()) == 2 and bool(centre[0][owner[0]].all())


def test_soft_top_k_gradient_points_the_right_way() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4, 0.9]], requires_grad=True)
    _, mask = soft_top_k(scores, 2)
    mask[0, 2].backward()
    assert scores.grad is not None
    assert scores.grad[0, 2] > 0  # a higher own score raises the own mask
    assert (scores.grad[0, [0, 1, 3]] <= 0).all()  # a rival's higher score lowers it


def test_soft_top_k_ignores_padding() -> None:
    padded = torch.tensor([[0.2, 0.9, 0.5, 0.1, -torch.inf]])
    keep, mask = soft_top_k(padded, 2)
    alone = soft_top_k(padded[:, :4], 2)
    assert torch.equal(keep[:, :4], alone[0]) and not keep[0, 4]
    torch.testing.assert_close(mask[:, :4], alone[1])


def test_straight_through_is_one_with_the_gradient_of_the_mask() -> None:
    m = torch.tensor([0.3], requires_grad=True)
    factor = straight_through(m)
    assert factor.item() == 1.0
    factor.backward()
    assert m.grad is not None and m.grad.item() == 1.0

"""Scores against their textbook form."""

from __future__ import annotations

import torch

from sparing.grid.score import attention_received, attention_rows, cosine, entropy, norm, standardise


def test_attention_rows_equal_the_materialised_map() -> None:
    B, H, G, T, d = 2, 6, 3, 9, 4
    q, k = torch.randn(B, H, T, d), torch.randn(B, G, T, d)
    full = (q @ k.repeat_interleave(H // G, 1).transpose(-1, -2)) * 0.7
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    full = full.masked_fill(~causal, -torch.inf).softmax(-1)
    rows = attention_rows(q[:, :, [3, 8]], k, 0.7, causal[[3, 8]].expand(B, -1, -1))
    torch.testing.assert_close(rows, full[:, :, [3, 8]])
    received = attention_received(q[:, :, [3, 8]], k, 0.7, causal[[3, 8]].expand(B, -1, -1))
    torch.testing.assert_close(received, full[:, :, [3, 8]].mean((1, 2)))


def test_a_query_that_sees_nothing_is_zero_not_nan() -> None:
    rows = attention_rows(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 3, 4), 1.0, torch.zeros(1, 1, 3, dtype=torch.bool))
    assert (rows == 0).all()


def test_softcap() -> None:
    q, k = torch.randn(1, 1, 1, 4) * 9, torch.randn(1, 1, 5, 4) * 9
    expected = (5 * torch.tanh((q @ k.transpose(-1, -2)) / 5)).softmax(-1)
    torch.testing.assert_close(attention_rows(q, k, 1.0, None, 5.0), expected)


def test_small_scores() -> None:
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert norm(x).tolist() == [5.0, 1.0]
    torch.testing.assert_close(cosine(x[0], x[1]), torch.tensor(0.6))
    torch.testing.assert_close(entropy(torch.zeros(1, 8)), torch.tensor([8.0]).log())
    torch.testing.assert_close(standardise(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([-1.0, 0.0, 1.0]))
    assert standardise(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]

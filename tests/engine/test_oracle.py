"""The route oracle: oracles 2, 3, 4 and 8 of Duo-LLM's card, by number, and what the tree must not get wrong."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

import sparing
from sparing.engine import oracle
from sparing.engine.view import LayerView, View
from sparing.testing.models import VOCAB, build

Forward = Callable[[Tensor], Tensor]


class Half(nn.Module):
    """A second FFN for every layer: another function of the same input."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.double) / 4

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x)).tanh()


HALF = Half()
CHOICES: tuple[oracle.Choice, ...] = (
    lambda layer, x, forward: forward(x),
    lambda layer, x, forward: HALF(x) * (1 + layer.index),
    lambda layer, x, forward: torch.zeros_like(x),
)


def model_of(layers: int, architecture: str = "llama") -> Any:
    model: Any = build(architecture).double()
    stack = model.get_decoder().layers
    while len(stack) < layers:
        stack.append(copy.deepcopy(stack[0]))
        stack[-1].self_attn.layer_idx = len(stack) - 1
    del stack[layers:]
    model.config.get_text_config().num_hidden_layers = layers
    return model


def text(length: int = 14, seed: int = 3) -> Tensor:
    return torch.randint(2, VOCAB - 5, (length,), generator=torch.Generator().manual_seed(seed))


class Switched(nn.Module):
    """An MLP with a switch."""

    def __init__(self, layer: LayerView, mlp: nn.Module) -> None:
        super().__init__()
        self.layer, self.mlp, self.choice = layer, mlp, 0

    def forward(self, x: Tensor) -> Tensor:
        return CHOICES[self.choice](self.layer, x, self.mlp)


@torch.no_grad()
def brute(model: Any, ids: Tensor, column: int, route: list[int]) -> float:
    """Dense prefill into a cache, then one decode step with every MLP switched by hand."""
    twin = copy.deepcopy(model)
    switches = []
    for layer in View(twin).layers:
        layer.module.mlp = Switched(layer, layer.mlp)  # type: ignore[arg-type]
        switches.append(layer.module.mlp)
    cache = DynamicCache(config=twin.config)
    if column:
        twin(ids[None, :column], past_key_values=cache)
    for switch, choice in zip(switches, route, strict=True):
        switch.choice = choice
    logits = twin(ids[None, column : column + 1], past_key_values=cache).logits[0, -1]
    return float(F.cross_entropy(logits, ids[column + 1]))


@pytest.fixture(scope="module")
def losses() -> Tensor:
    """(5 tokens, 64 routes) of two choices."""
    return oracle.explore(model_of(6), CHOICES[:2], text(), [2, 4, 6, 8, 11], progress=False).loss_NMR[:, 0]


def test_oracle_2_no_route_is_better_than_the_oracle(losses: Tensor) -> None:
    count = oracle.first_choices(6)
    budgets = oracle.by_budget(losses, count)
    assert budgets.shape == (5, 7)
    for r in range(64):
        assert (budgets[:, count[r]] <= losses[:, r]).all()
    assert torch.equal(budgets.amin(1), losses.amin(1))  # the free oracle is the least over k
    assert torch.equal(budgets[:, 6], losses[:, 0]) and torch.equal(budgets[:, 0], losses[:, 63])


def test_oracle_2_best_of_some_routes(losses: Tensor) -> None:
    three = losses[:, oracle.first_choices(6) == 3]
    assert three.shape[1] == math.comb(6, 3)
    found = torch.stack([oracle.best_of(three, n) for n in range(1, 21)], 1)
    assert (found[:, 1:] <= found[:, :-1] + 1e-12).all()
    torch.testing.assert_close(found[:, -1], three.amin(1), rtol=0, atol=1e-12)  # all of them, without replacement
    torch.testing.assert_close(found[:, 0], three.mean(1))
    few = losses[:, :6]
    by_hand = torch.stack([few[:, list(c)].amin(1) for c in itertools.combinations(range(6), 3)]).mean(0)
    torch.testing.assert_close(oracle.best_of(few, 3), by_hand)


@pytest.mark.parametrize("width", [1, 2, 64])
@pytest.mark.parametrize("column", [0, 1, 12])
def test_oracle_3_tree_equals_brute_force(column: int, width: int) -> None:
    model, ids = model_of(4), text()
    found = oracle.explore(model, CHOICES[:2], ids, [column], width=width, progress=False).loss_NMR[0, 0]
    expected = [brute(model, ids, column, route) for route in oracle.routes(4).tolist()]
    assert len(expected) == 16 and max(expected) - min(expected) > 0.1
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double), rtol=0, atol=1e-6)


def test_oracle_3_with_three_choices() -> None:
    model, ids = model_of(3), text()
    found = oracle.explore(model, CHOICES, ids, [9], width=8, progress=False).loss_NMR[0, 0]
    expected = [brute(model, ids, 9, route) for route in oracle.routes(3, 3).tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["gemma3", "mistral", "phi3", "qwen3"])
def test_oracle_3_on_other_architectures(architecture: str) -> None:
    """Windows of 8 tokens (gemma3, mistral), norms behind the MLP, fused projections."""
    model, ids = model_of(6, architecture), text()
    found = oracle.explore(model, CHOICES[:2], ids, [12], progress=False).loss_NMR[0, 0]
    for number in (0, 5, 38, 63):
        expected = brute(model, ids, 12, oracle.routes(6)[number].tolist())
        assert float(found[number]) == pytest.approx(expected, abs=1e-6)


def test_oracle_4_worked_counts() -> None:
    assert len(oracle.routes(12)) == 4096 and len(oracle.routes(12, 3)) == 531_441
    count = oracle.first_choices(12)
    assert [int((count == k).sum()) for k in (1, 4, 6)] == [12, 495, 924]
    table = oracle.routes(5, 3)
    assert table.unique(dim=0).shape == table.shape
    assert [oracle.number(route, 3) for route in table.tolist()] == list(range(243))


def test_oracle_4_rows_of_twelve_layers() -> None:
    rows: dict[str, int] = {"ffn": 0, "attention": 0}

    def counting(choice: oracle.Choice) -> oracle.Choice:
        def run(layer: LayerView, x: Tensor, forward: Forward) -> Tensor:
            rows["ffn"] += x.shape[:-1].numel()
            return choice(layer, x, forward)

        return run

    def attended(module: nn.Module, args: Any, out: Any) -> None:
        rows["attention"] += out.shape[:-1].numel()

    model = model_of(12).float()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(attended)
    dense = len(text(6)) * 12  # the pass that gives the keys
    explored = oracle.explore(model, [counting(c) for c in CHOICES[:2]], text(6), [4], progress=False)
    assert explored.loss_NMR.shape == (1, 1, 4096) and explored.loss_NMR.dtype == torch.float32
    assert rows == {"ffn": 8190, "attention": 4095 + dense}


def test_oracle_8_equal_choices_gain_nothing() -> None:
    same: list[oracle.Choice] = [CHOICES[0], lambda layer, x, forward: forward(x)]
    found = oracle.explore(model_of(6), same, text(), [3, 7, 12], progress=False).loss_NMR[:, 0]
    assert float((found.amax(1) - found.amin(1)).max()) < 1e-12  # products of other sizes round otherwise
    assert float(oracle.difficulty(found, 63).max()) < 1e-12


def test_difficulty_is_what_routes_gain(losses: Tensor) -> None:
    found = oracle.difficulty(losses, 63)
    assert torch.equal(found, losses[:, 63] - losses.amin(1)) and (found > 0).any() and (found >= 0).all()


def test_labels_of_other_tokens_are_scored_beside_the_true_ones() -> None:
    model, ids = model_of(3), text()
    labels = torch.stack([ids[[4, 8]], torch.tensor([7, 11])], 1)
    found = oracle.explore(model, CHOICES[:2], ids, [3, 7], labels_NM=labels, progress=False).loss_NMR
    plain = oracle.explore(model, CHOICES[:2], ids, [3, 7], progress=False).loss_NMR
    assert found.shape == (2, 2, 8) and torch.equal(found[:, :1], plain)
    other = ids.clone()
    other[8] = 11
    assert torch.equal(found[1, 1], oracle.explore(model, CHOICES[:2], other, [7], progress=False).loss_NMR[0, 0])


def test_what_a_router_notes_leads_to_its_route() -> None:
    model, ids = model_of(4), text()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    found = oracle.explore(model, CHOICES[:2], ids, [3, 6, 9], note=lambda layer, x: x @ direction, progress=False)
    assert [x.shape for x in found.noted] == [(3, 1), (3, 2), (3, 4), (3, 8)]
    assert torch.equal(oracle.walk(found.noted, -math.inf), torch.zeros(3).long())
    assert torch.equal(oracle.walk(found.noted, math.inf), torch.full((3,), 15))
    route_N = oracle.walk(found.noted, 0.0)
    twin = copy.deepcopy(model)
    for layer in View(twin).layers:  # now the router itself decides, on the last token only
        mlp = layer.mlp

        def routed(x: Tensor, layer: LayerView = layer, mlp: Any = mlp) -> Tensor:
            big = x[:, -1:] @ direction > 0
            last = torch.where(big[..., None], mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))[:, -1:],
                               CHOICES[1](layer, x[:, -1:], mlp))  # fmt: skip
            return torch.cat([mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))[:, :-1], last], 1)

        mlp.forward = routed  # type: ignore[union-attr, assignment]
    for n, column in enumerate((3, 6, 9)):
        with torch.no_grad():
            logits = twin(ids[None, : column + 1], use_cache=False).logits[0, -1]
        expected = float(F.cross_entropy(logits, ids[column + 1]))
        assert float(found.loss_NMR[n, 0, route_N[n]]) == pytest.approx(expected, abs=1e-9)
    assert len(route_N.unique()) > 1


def test_the_model_is_left_as_it_was() -> None:
    model, ids = model_of(3), text()
    model.train()

    def marks() -> list[Any]:
        return [(m.training, sorted(k for k in vars(m) if k == "forward")) for m in model.modules()]

    before = marks()
    oracle.explore(model, CHOICES[:2], ids, [5], progress=False)
    assert marks() == before

    def fails(layer: LayerView, x: Tensor, forward: Forward) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        oracle.explore(model, [CHOICES[0], fails], ids, [5], progress=False)
    assert marks() == before


def test_wrong_use_is_refused() -> None:
    model, ids = model_of(3), text()
    with pytest.raises(sparing.Error, match=r"at = 13: must be in 0\.\.12, for a text of 14 tokens"):
        oracle.explore(model, CHOICES[:2], ids, [13])
    with pytest.raises(sparing.Error, match="no tokens to examine"):
        oracle.explore(model, CHOICES[:2], ids, [])
    with pytest.raises(sparing.Error, match="1 rows for 2 tokens"):
        oracle.explore(model, CHOICES[:2], ids, [3, 4], labels_NM=torch.ones(1, 1).long())
    with pytest.raises(sparing.Error, match=r"choices = 3: make 3\^12 = 531441 routes"):
        oracle.explore(model_of(12), CHOICES, ids, [3])
    with pytest.raises(sparing.Error, match=r"tries = 5: must be in 1\.\.4"):
        oracle.best_of(torch.zeros(1, 4), 5)
    with sparing.attach(model, sparing.parse("unified-layer-skipping:S=1.5")):
        with pytest.raises(sparing.Error, match="has methods attached"):
            oracle.explore(model, CHOICES[:2], ids, [3], progress=False)
    with pytest.raises(sparing.Error, match="has no MLP module of its own"):
        oracle.explore(build("opt"), CHOICES[:2], ids, [3])

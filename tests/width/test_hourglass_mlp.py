"""Hourglass MLP: the card's oracles by number, then saving, counting, the search of designs, and refusals."""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import math
import pickle
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from sparing.grid.method import BudgetError, Error
from sparing.grid.trace import count
from sparing.width.hourglass_mlp import (
    Block,
    Design,
    FixedLift,
    HourglassMLP,
    ResidualMLP,
    designs,
    draw_lift,
    flops,
    non_dominated,
    parameters,
)

M = TypeVar("M", bound=nn.Module)
X, Z, H, L, Y, B = 7, 19, 5, 3, 6, 4  # all unequal


def trained(model: M, steps: int = 3) -> M:
    """A few steps on data off the origin: weights and running statistics are no longer those of the start."""
    torch.manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        x = 2 + 3 * torch.rand(16, X)
        optimiser.zero_grad()
        (model.train()(x) - 0.3).square().mean().backward()
        optimiser.step()
    return model.eval()


def blocks(model: ResidualMLP) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def by_hand(model: ResidualMLP, x: Tensor) -> Tensor:
    """Steps 1 to 3 of the docstring in plain algebra, BatchNorm from its running statistics, in float64."""
    weights = {name: value.double() for name, value in model.named_parameters()}
    weights |= {name: value.double() for name, value in model.named_buffers()}
    z = x.double()
    if "W_in.weight" in weights:
        z = torch.einsum("zx,bx->bz", weights["W_in.weight"], z)
    for i in range(model.design.L):
        u = z
        if f"blocks.{i}.norm.running_mean" in weights:
            mean, var = weights[f"blocks.{i}.norm.running_mean"], weights[f"blocks.{i}.norm.running_var"]
            u = (z - mean) / torch.sqrt(var + 1e-5)
        h = torch.einsum("hz,bz->bh", weights[f"blocks.{i}.W1.weight"], u).clamp(min=0)
        z = z + torch.einsum("zh,bh->bz", weights[f"blocks.{i}.W2.weight"], h)
    if "W_out.weight" in weights:
        z = torch.einsum("yz,bz->by", weights["W_out.weight"], z)
    return 1 / (1 + torch.exp(-z)) if model.sigmoid else z


def test_oracle_1_without_residuals_only_the_two_projections_remain() -> None:
    model = HourglassMLP(X, Z, H, L, Y)
    x = torch.randn(B, X)
    assert isinstance(model.W_in, nn.Linear) and isinstance(model.W_out, nn.Linear)
    expected = torch.sigmoid(x @ model.W_in.weight.T @ model.W_out.weight.T)
    assert not torch.allclose(model(x), expected)
    with torch.no_grad():
        for block in blocks(model):
            block.W2.weight.zero_()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.eval()(x), expected)


def test_oracle_2_block_by_hand() -> None:
    block = Block(3, 1, norm="none")
    with torch.no_grad():
        block.W1.weight.copy_(torch.tensor([[1.0, -1, 0.5]]))
        block.W2.weight.copy_(torch.tensor([[0.5], [0], [-1]]))
    z = torch.tensor([[1.0, 0, 2], [0, 1, 0]])  # of the second sample h = ReLU(-1) = 0
    assert torch.equal(block(z), torch.tensor([[2.0, 0, 0], [0, 1, 0]]))
    assert torch.equal(block.act(block.W1(z)), torch.tensor([[2.0], [0]]))


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_oracle_3_rank_of_the_update(norm: str, activation: str) -> None:
    model = trained(HourglassMLP(X, Z, H, L, Y, norm=norm, activation=activation)).double()
    z_BZ = model.W_in(2 + 3 * torch.rand(B, X, dtype=torch.float64))
    for block in blocks(model):
        full = torch.autograd.functional.jacobian(lambda z, block=block: block(z).sum(0), z_BZ).transpose(0, 1)
        assert full.shape == (B, Z, Z)  # a sample does not see the others
        ranks = torch.linalg.matrix_rank(full - torch.eye(Z), rtol=1e-9)
        assert ranks.max() <= H and ranks.max() >= (H if activation == "gelu" else 1)
        assert torch.linalg.matrix_rank(full).min() > H  # of the sum itself that is not so
        z_BZ = block(z_BZ)


@pytest.mark.parametrize("init", ["uniform", "normal", "orthonormal"])
def test_oracle_4_fixed_lift(init: str) -> None:
    state = torch.get_rng_state()
    model = HourglassMLP(X, Z, H, L, Y, lift="fixed", lift_init=init, seed=5)
    assert isinstance(model.W_in, FixedLift)
    before = model.W_in.weight.clone()
    names = {name for name, _ in model.named_parameters()}
    assert names == {"W_out.weight"} | {f"blocks.{i}.W{k}.weight" for i in range(L) for k in (1, 2)}
    assert not any(p.shape == (Z, X) for g in torch.optim.AdamW(model.parameters()).param_groups for p in g["params"])
    trained(model)
    assert model.W_in.weight.grad is None and not model.W_in.weight.requires_grad
    assert torch.equal(model.W_in.weight, before)

    torch.manual_seed(99)  # the lift does not care
    torch.randn(3)
    assert torch.equal(draw_lift(Z, X, init, seed=5), before)
    assert not torch.equal(draw_lift(Z, X, init, seed=6), before)
    torch.set_rng_state(state)
    draw_lift(Z, X, init, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_oracle_4_the_draw_is_the_same_everywhere() -> None:
    """Pinned: models saved by an earlier version are drawn again."""
    assert zlib.crc32(draw_lift(Z, X, "uniform", 3).numpy().tobytes()) == 2131357726
    torch.testing.assert_close(
        draw_lift(2, 2, "normal", 3), torch.tensor([[0.568002, 0.123626], [0.062917, -0.433964]]), rtol=0, atol=1e-6
    )


def test_oracle_5_count_of_the_published_row() -> None:
    design = Design(d_x=784, d_z=785, d_h=115, L=4, d_y=784)
    assert parameters(design) == (722_200 + 615_440 + 615_440,) * 2 == (1_953_080,) * 2
    model = HourglassMLP(784, 785, 115, 4, 784)
    assert sum(p.numel() for p in model.parameters()) == 1_953_080


def test_oracle_6_normal_lift_keeps_the_length_on_average() -> None:
    draws, d_z, d_x = 4000, 50, 7
    x = torch.linspace(-1, 3, d_x)
    ratio = torch.stack(
        [(draw_lift(d_z, d_x, "normal", s) @ x).square().sum() / x.square().sum() for s in range(draws)]
    )
    assert ratio.mean() == pytest.approx(1, abs=4 * math.sqrt(2 / d_z / draws))
    assert ratio.var() == pytest.approx(2 / d_z, rel=0.12)


def test_lift_of_the_other_two_kinds() -> None:
    w = draw_lift(400, 300, "uniform", 0)
    assert w.abs().max() <= 1 / math.sqrt(300) and w.abs().max() > 0.999 / math.sqrt(300)
    assert w.mean() == pytest.approx(0, abs=1e-3) and w.var() == pytest.approx(1 / 900, rel=0.02)
    w = draw_lift(40, 30, "orthonormal", 0)
    torch.testing.assert_close(w.T @ w, torch.eye(30), rtol=0, atol=1e-6)
    signs = torch.stack([draw_lift(3, 2, "orthonormal", s).sign() for s in range(400)]).mean(0)
    assert signs.abs().max() < 0.2  # no column prefers a side, which plain Householder QR does


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "batch"},
        {"norm": "none", "activation": "gelu"},
        {"norm": "none", "lift": "fixed"},
        {"norm": "batch", "lift": "fixed", "lift_init": "orthonormal", "activation": "gelu"},
        {"sigmoid": False},
        {"L": 1},
        {"L": 0},
    ],
    ids=str,
)  # fmt: skip
def test_oracle_7_collapsed(options: dict[str, Any]) -> None:
    sizes = {"d_x": X, "d_z": Z, "d_h": H, "L": L, "d_y": Y} | options
    model = trained(HourglassMLP(**sizes))
    state = copy.deepcopy(model.state_dict())
    narrow = model.collapsed()
    x = 2 + 3 * torch.rand(B, X)
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.double().collapsed()(x.double()), model(x.double()), rtol=1e-12, atol=1e-12)
    widths = {size for p in narrow.parameters() for size in p.shape}
    assert Z not in widths  # the wide state is not there
    assert not any(p.requires_grad for p in narrow.parameters())
    model.float()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items() if isinstance(v, Tensor))


def test_oracle_7_needs_the_folding() -> None:
    """Weights alone, without BatchNorm's statistics, are another function; and collapsing leaves training mode on."""
    model = trained(HourglassMLP(X, Z, H, L, Y))
    x = 2 + 3 * torch.rand(B, X)
    assert all(mean.abs().max() > 0.1 for name, mean in model.named_buffers() if name.endswith("running_mean"))
    model.train()
    narrow = model.collapsed()
    assert all(module.training for module in model.modules())
    assert not torch.allclose(narrow(x), copy.deepcopy(model)(x), atol=1e-3)
    torch.testing.assert_close(narrow(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(Error, match=r"norm = 'layer'.*must be batch \| none"):
        HourglassMLP(X, Z, H, L, Y, norm="layer").collapsed()


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_oracle_8_conventional_residual_mlp(norm: str) -> None:
    wide = 2 * X
    plain = trained(ResidualMLP(X, X, wide, L, X, lift="identity", readout=False, norm=norm, sigmoid=False))
    assert {p.shape for p in plain.parameters()} == {(wide, X), (X, wide)}
    x = 2 + 3 * torch.rand(B, X)
    torch.testing.assert_close(plain(x).double(), by_hand(plain, x), rtol=1e-4, atol=1e-5)

    both = ResidualMLP(X, X, wide, L, X, norm=norm, sigmoid=False).eval()  # with W_in = W_out = I
    both.load_state_dict(plain.state_dict() | {"W_in.weight": torch.eye(X), "W_out.weight": torch.eye(X)})
    assert torch.equal(both(x), plain(x))
    torch.testing.assert_close(plain.collapsed()(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lift", ["trained", "fixed"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_forward_against_plain_algebra(lift: str, norm: str) -> None:
    model = trained(HourglassMLP(X, Z, H, L, Y, lift=lift, norm=norm))
    x = 2 + 3 * torch.rand(B, X)
    torch.testing.assert_close(model(x).double(), by_hand(model, x), rtol=1e-4, atol=1e-5)


def test_norms() -> None:
    z = 3 + 2 * torch.randn(50, Z)
    batch, layer = Block(Z, H).norm(z), Block(Z, H, norm="layer").norm(z)
    torch.testing.assert_close(batch.mean(0), torch.zeros(Z), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.mean(1), torch.zeros(50), rtol=0, atol=1e-5)
    assert not list(Block(Z, H).norm.parameters()) and not list(Block(Z, H, norm="layer").norm.parameters())
    assert Block(Z, H, norm="none").norm(z) is z


@pytest.mark.parametrize("init", ["uniform", "normal", "orthonormal"])
def test_saved_is_the_seed_alone(init: str) -> None:
    model = trained(HourglassMLP(X, Z, H, L, Y, lift="fixed", lift_init=init, seed=8))
    state = model.state_dict()
    assert not any(tuple(value.shape) == (Z, X) for value in state.values())
    assert state["W_in._extra_state"].tolist()[:2] == [8, ("uniform", "normal", "orthonormal").index(init)]
    x = torch.randn(B, X)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    for loaded in (torch.load(buffer, weights_only=True), load(save(state))):
        other = HourglassMLP(X, Z, H, L, Y, lift="fixed", seed=1).eval()
        assert not torch.equal(other(x), model(x))
        other.load_state_dict(loaded)
        assert isinstance(other.W_in, FixedLift) and (other.W_in.seed, other.W_in.init) == (8, init)
        assert torch.equal(other(x), model(x))
        assert torch.equal(other.state_dict()["W_in._extra_state"], state["W_in._extra_state"])
    half = HourglassMLP(X, Z, H, L, Y, lift="fixed").to(torch.bfloat16)
    half.load_state_dict(state)
    assert isinstance(half.W_in, FixedLift) and isinstance(model.W_in, FixedLift)
    assert torch.equal(half.W_in.weight, model.W_in.weight.bfloat16())
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_a_lift_that_comes_out_differently_is_refused() -> None:
    state = HourglassMLP(X, Z, H, L, Y, lift="fixed", seed=8).state_dict()
    state["W_in._extra_state"] = state["W_in._extra_state"] + torch.tensor([0, 0, 1])
    with pytest.raises(Error, match=r"seed = 8.*another W_in \(19 x 7\)"):
        HourglassMLP(X, Z, H, L, Y, lift="fixed").load_state_dict(state)


def test_trained_and_fixed_start_from_the_same_lift() -> None:
    a = HourglassMLP(X, Z, H, L, Y, lift="fixed", lift_init="normal", seed=4)
    b = HourglassMLP(X, Z, H, L, Y, lift_init="normal", seed=4)
    assert torch.equal(a.W_in.weight, b.W_in.weight)  # type: ignore[arg-type]
    assert b.W_in.weight.requires_grad


VARIANTS = [
    {"d_z": Z, "d_h": H, "d_y": Y, "lift": "trained"},
    {"d_z": Z, "d_h": H, "d_y": Y, "lift": "fixed"},
    {"d_z": 8, "d_h": 11, "d_y": Y, "lift": "trained"},
    {"d_z": X, "d_h": 11, "d_y": Y, "lift": "identity"},
    {"d_z": X, "d_h": 11, "d_y": X, "lift": "identity", "readout": False},
    {"d_z": 8, "d_h": 11, "d_y": 8, "lift": "fixed", "readout": False},
]


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_counts_are_those_of_torch(sizes: dict[str, Any], depth: int) -> None:
    model = ResidualMLP(d_x=X, L=depth, **sizes).eval()
    x = torch.randn(B, X)
    buffers = X * sizes["d_z"] if sizes["lift"] == "fixed" else 0
    numel = sum(p.numel() for p in model.parameters())
    assert parameters(model.design) == (numel, numel + buffers)
    assert count(lambda: model(x))[0] == B * flops(model.design)
    narrow = model.collapsed()
    assert count(lambda: narrow(x))[0] == B * flops(model.design, collapsed=True)
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-4, atol=1e-5)


def test_collapsed_is_cheaper_where_the_bottlenecks_are_narrow() -> None:
    """The bound of `flops`, off its edge and just at it: L d_h < sqrt(2) d."""
    for d, wider, depth in itertools.product((50, 100), (0, 30), (1, 2, 7, 40)):
        for d_h in range(1, d):
            design = Design(d, d + wider, d_h, depth, d)
            if depth * d_h < math.sqrt(2) * d:
                assert flops(design, collapsed=True) < flops(design)
    assert flops(Design(100, 100, 10, 100, 100), collapsed=True) > flops(Design(100, 100, 10, 100, 100))


@pytest.mark.parametrize("hourglass", [True, False])
@pytest.mark.parametrize("lift", ["trained", "fixed"])
def test_designs_against_enumeration(hourglass: bool, lift: str) -> None:
    """For each pair of the grid the best d_h of all there are, found by trying every one."""
    budget, grid, depths = 3000, (16, 40, 60), (1, 2, 5)
    found = designs(budget, 20, 10, d_z=grid, L=depths, lift=lift, hourglass=hourglass)
    expected = []
    for d_z, depth in itertools.product(grid, depths):
        allowed = range(1, d_z) if hourglass else range(d_z + 1, 400)
        costs = {h: d_z * (10 + 20 * (lift == "trained")) + 2 * depth * d_z * h for h in allowed}
        best = min(costs, key=lambda h: abs(costs[h] - budget))
        if abs(costs[best] - budget) <= 150:
            expected.append((d_z, best, depth))
    assert [(d.d_z, d.d_h, d.L) for d in found] == expected and len(expected) >= 2
    assert all(d.lift == lift and (d.d_x, d.d_y) == (20, 10) for d in found)
    for design in found:
        kind = HourglassMLP if hourglass else ResidualMLP
        model = kind(design.d_x, design.d_z, design.d_h, design.L, design.d_y, lift=design.lift)
        assert sum(p.numel() for p in model.parameters()) == parameters(design)[0]


def test_a_budget_out_of_reach_names_the_nearest() -> None:
    with pytest.raises(BudgetError, match=r"budget = 100: no hourglass .* within 5%; nearest is 600$"):
        designs(100, 20, 10, d_z=(30, 60), L=(5,), lift="fixed")
    with pytest.raises(Error, match=r"L = \[0, 2\]"):
        designs(3000, 20, 10, d_z=(40,), L=(0, 2))
    with pytest.raises(Error, match="d_z = 40: must be d_x = 20"):
        designs(3000, 20, 10, d_z=(40,), L=(2,), lift="identity", hourglass=False)


def test_non_dominated_against_the_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        points = [(float(a), float(b)) for a, b in torch.randint(0, 6, (12, 2), generator=generator)]
        kept = {
            i for i, (c, q) in enumerate(points) if not any(d <= c and r >= q and (d < c or r > q) for d, r in points)
        }
        found = non_dominated(points)
        assert set(found) == kept and len(found) == len(kept)
        assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)
    assert non_dominated([]) == []
    with pytest.raises(Error, match="finite"):
        non_dominated([(1.0, math.nan)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d_h": Z}, f"d_h = {Z}: must be < d_z = {Z} in an hourglass"),
        ({"d_h": 0}, "d_h = 0: must be a whole number >= 1"),
        ({"d_h": "few"}, "d_h = 'few': must be a whole number >= 1"),
        ({"d_x": 2.0}, "d_x = 2.0: must be a whole number"),
        ({"L": -1}, "L = -1: must be a whole number >= 0"),
        ({"lift": "identity"}, "lift = 'identity': must be trained | fixed"),
        ({"lift": "frozen"}, "lift = 'frozen': must be trained | fixed | identity"),
        ({"lift_init": "zeros"}, "lift_init = 'zeros': must be uniform | normal | orthonormal"),
        ({"norm": "group"}, "norm = 'group': must be batch | layer | none"),
        ({"activation": "tanh"}, "activation = 'tanh': must be relu | gelu"),
        ({"seed": -1}, "seed = -1: must be a whole number >= 0"),
        ({"seed": 2**63}, "must be a whole number >= 0 and < 2"),
        ({"d_z": 6, "lift_init": "orthonormal"}, "d_z = 6: must be >= d_x = 7 for orthonormal"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, Any], said: str) -> None:
    with pytest.raises(Error) as error:
        HourglassMLP(**({"d_x": X, "d_z": Z, "d_h": H, "L": L, "d_y": Y} | change))
    assert said in str(error.value)


def test_refusals_of_the_conventional_form() -> None:
    with pytest.raises(Error, match="d_z = 8: must be d_x = 7 without W_in"):
        ResidualMLP(X, 8, 9, L, Y, lift="identity")
    with pytest.raises(Error, match="d_z = 8: must be d_y = 6 without W_out"):
        ResidualMLP(X, 8, 9, L, Y, readout=False)
    with pytest.raises(Error, match=r"x: has shape \(4, 6\): must be \(B, 7\)"):
        HourglassMLP(X, Z, H, L, Y)(torch.zeros(4, 6))
    with pytest.raises(Error, match="must be \\(B, 7\\)"):
        HourglassMLP(X, Z, H, L, Y)(torch.zeros(2, 4, X))


# --------------------------------------------------------------------------- benchmarks/hourglass.py


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("hourglass")


def test_benchmark_data(bench: ModuleType) -> None:
    classify, denoise = bench.load("classify"), bench.load("denoise")
    sizes = {split: len(x) for split, x in classify.x.items()}
    assert sum(sizes.values()) == 1797 and sizes["val"] > 350 and sizes["test"] > 350
    for split, targets in classify.y.items():
        found, of = targets.unique(dim=0, return_inverse=True)
        assert len(found) == 10 and len(of) == sizes[split]
        assert all(any(torch.equal(t, x) for x in classify.x["train"]) for t in found)  # real images, seen in training
        assert torch.equal(found, classify.y["test"].unique(dim=0))  # the same ones in every split
    assert torch.equal(denoise.y["test"], classify.x["test"]) and torch.equal(denoise.x["train"], denoise.y["train"])
    assert (denoise.x["test"] - denoise.y["test"]).std() == pytest.approx(0.25, rel=0.02)
    assert bench.psnr(torch.full((2, 5), 0.1), torch.zeros(2, 5)) == pytest.approx(20)


def test_benchmark_budgets_hold_for_what_is_built(bench: ModuleType) -> None:
    for family, budget in itertools.product(list(bench.FAMILIES)[:6], (5_000, 45_000)):
        for sizes in bench.sizes_of(family, budget)[::5]:
            model = bench.build(family, sizes, 0).eval()
            said = bench.cost(family, sizes)
            assert said["trainable"] == sum(p.numel() for p in model.parameters())
            assert said["trainable"] == pytest.approx(budget, rel=0.05)
            assert said["flops"] == count(lambda model=model: model(torch.zeros(1, 64)))[0]
    assert bench.cost("random features", {"features": 703})["trainable"] == 44_992


def test_benchmark_ridge_is_least_squares(bench: ModuleType) -> None:
    task = bench.load("classify")
    one = {split: torch.cat([x, torch.ones(len(x), 1)], 1) for split, x in task.x.items()}
    weight = torch.linalg.lstsq(one["train"].double(), task.y["train"].double(), driver="gelsd").solution
    plain = bench.psnr((one["test"].double() @ weight).clamp(0, 1), task.y["test"])
    assert bench.ridge(task, None, 0)["test"] == pytest.approx(plain, abs=0.1)


def test_benchmark_interpolates_on_the_front(bench: ModuleType) -> None:
    points = [{"flops": c, "tests": [q]} for c, q in ((100, 10.0), (1000, 9.0), (10_000, 14.0))]
    assert bench.at_cost(points, "flops", 1000) == pytest.approx(12)
    assert bench.at_cost(points, "flops", 10_000) == 14
    assert math.isnan(bench.at_cost(points, "flops", 90)) and math.isnan(bench.at_cost(points, "flops", 20_000))
    ours, theirs = {"tests": [3.0, 4.0]}, [{"tests": [1.0, 2.0]}, {"tests": [2.0, 2.9]}]
    assert bench.beside(ours, theirs) == (pytest.approx(1.05), "ahead")
    assert bench.beside({"tests": [2.5, 4.0]}, theirs)[1] == "level"
    assert bench.beside({"tests": [1.0, 1.5]}, theirs)[1] == "behind"


def test_benchmark_runs_and_goes_on(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COLLAPSED", bench.COLLAPSED[:1])
    monkeypatch.setattr(bench, "SEEDS", (0, 1))
    small = ["--budgets", "5000", "--tasks", "classify", "--epochs", "1", "--batch", "4"]
    families = ["--families", "hourglass", "conventional", "linear map"]
    where = ["--out", str(tmp_path), "--results", str(tmp_path)]
    bench.main([*small, *families, *where])
    page = (tmp_path / "hourglass.md").read_text()
    assert "| 5,000 | hourglass |" in page and "| 5,000 | conventional |" in page
    assert "- **hourglass** against the best conventional variant" in page
    assert (tmp_path / "hourglass.png").stat().st_size > 10_000
    rows = (tmp_path / "rows.jsonl").read_text()
    with pytest.raises(SystemExit, match="--resume goes on with it"):
        bench.main([*small, *families, *where])

    lines = rows.splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # killed in the middle of a row
    bench.main([*small, *families, *where, "--resume"])
    again = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    assert again[:-1] == lines[:-1] and len(again) == len(lines)

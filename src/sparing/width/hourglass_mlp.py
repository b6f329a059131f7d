"""Hourglass MLP: the skip connection lives in a wide space, every residual branch goes through a narrow bottleneck."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparing.grid.method import BudgetError, Error

LIFTS = ("trained", "fixed", "identity")
INITS = ("uniform", "normal", "orthonormal")
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": lambda d_z: nn.BatchNorm1d(d_z, affine=False),
    "layer": lambda d_z: nn.LayerNorm(d_z, elementwise_affine=False),
    "none": lambda d_z: nn.Identity(),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class Design:
    """The sizes of a residual MLP, which are all that its cost depends on.

    Attributes:
        d_x, d_y: features of the input and of the output.
        d_z: width of the skip connection.
        d_h: width of the residual branches: below d_z in an hourglass, above it in a conventional MLP.
        L: blocks; 0 leaves W_out W_in x.
        lift: W_in is "trained", "fixed" (random, never trained) or "identity" (there is none, d_z = d_x).
        readout: W_out exists; without it d_z = d_y.
    """

    d_x: int
    d_z: int
    d_h: int
    L: int
    d_y: int
    lift: str = "trained"
    readout: bool = True

    def __post_init__(self) -> None:
        for name, low in (("d_x", 1), ("d_z", 1), ("d_h", 1), ("L", 0), ("d_y", 1)):
            value = getattr(self, name)
            _require(name, value, type(value) is int and value >= low, f"a whole number >= {low}")
        _require("lift", self.lift, self.lift in LIFTS, " | ".join(LIFTS))
        _require("d_z", self.d_z, self.lift != "identity" or self.d_z == self.d_x, f"d_x = {self.d_x} without W_in")
        _require("d_z", self.d_z, self.readout or self.d_z == self.d_y, f"d_y = {self.d_y} without W_out")


def parameters(design: Design) -> tuple[int, int]:
    """Parameters (trainable, total). A fixed lift is in the total only, though a checkpoint holds just its seed."""
    lift = 0 if design.lift == "identity" else design.d_z * design.d_x
    rest = 2 * design.L * design.d_z * design.d_h + design.readout * design.d_y * design.d_z
    return rest + lift * (design.lift == "trained"), rest + lift


def flops(design: Design, collapsed: bool = False) -> int:
    """FLOPs of one sample's matrix products (2 a multiply-add), in the plain or in the collapsed form.

    A fixed lift saves none. The collapsed form does not depend on d_z: with d_x = d_y = d <= d_z it is the cheaper one
    wherever the bottlenecks together are narrow, L d_h < sqrt(2) d.
    """
    if not collapsed:
        return 2 * parameters(design)[1]
    h, L = design.d_h, design.L
    return 2 * (L * h * design.d_x + L * (L - 1) // 2 * h * h + design.d_y * (design.d_x + L * h))


class ResidualMLP(nn.Module):
    """Residual MLP of either shape, and so the conventional counterpart of an hourglass.

    1. z_0 = W_in x.
    2. z_{i+1} = z_i + W2_i act(W1_i norm(z_i)) for i < L; W1_i (d_h, d_z), W2_i (d_z, d_h).
    3. y = sigmoid(W_out z_L).

    The conventional variants have d_h > d_z and d_z near d_x: with both projections, without W_in (lift "identity"),
    without both (and readout=False). Blocks and W_out start as torch initialises linear layers, from its global
    generator; W_in, trained or not, is drawn from `seed`.

    Args:
        d_x, d_z, d_h, L, d_y, lift, readout: see `Design`.
        lift_init: uniform | normal | orthonormal, see `draw_lift`. Uniform as released; the others keep the length of
            x, whatever d_z.
        norm: batch | layer | none. Batch as released; layer where statistics of a batch are unwelcome.
        activation: relu | gelu.
        sigmoid: outputs are pixels in [0, 1]; False gives W_out z_L.
        seed: of W_in.

    Raises:
        Error: names the argument, its value and what is allowed.

    Source: Rethinking the shape convention of an MLP, 2025, arXiv 2510.01796, and its released code.
    """

    def __init__(
        self, d_x: int, d_z: int, d_h: int, L: int, d_y: int, *, lift: str = "trained", readout: bool = True,
        lift_init: str = "uniform", norm: str = "batch", activation: str = "relu", sigmoid: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.design = Design(d_x, d_z, d_h, L, d_y, lift, readout)
        self.sigmoid = sigmoid
        self.W_in: FixedLift | nn.Linear | nn.Identity = nn.Identity()
        if lift == "fixed":
            self.W_in = FixedLift(d_z, d_x, lift_init, seed)
        elif lift == "trained":
            self.W_in = nn.Linear(d_x, d_z, bias=False)
            self.W_in.weight.data.copy_(draw_lift(d_z, d_x, lift_init, seed))
        self.blocks = nn.ModuleList(Block(d_z, d_h, norm, activation) for _ in range(L))
        self.W_out = nn.Linear(d_z, d_y, bias=False) if readout else nn.Identity()

    def forward(self, x_BX: Tensor) -> Tensor:
        """x (B, d_x) -> y (B, d_y)."""
        if x_BX.ndim != 2 or x_BX.shape[1] != self.design.d_x:
            raise Error(f"x: has shape {tuple(x_BX.shape)}: must be (B, {self.design.d_x})")
        z_BZ = self.W_in(x_BX)
        for block in self.blocks:
            z_BZ = block(z_BZ)
        y_BY = self.W_out(z_BZ)
        return y_BY.sigmoid() if self.sigmoid else y_BY

    def collapsed(self) -> Collapsed:
        """The function of evaluation mode as a network that never forms z; a frozen copy, see `Collapsed`."""
        like = next(self.parameters(), torch.zeros(()))
        if isinstance(self.W_in, nn.Identity):
            z_ZF = torch.eye(self.design.d_z, dtype=torch.float64, device=like.device)
        else:
            z_ZF = self.W_in.weight.detach().double()
        act: Callable[[Tensor], Tensor] = F.relu
        layers = []
        for block in self.blocks:  # z is always z_ZF times (x, h_1, h_2 …)
            assert isinstance(block, Block)
            weight_HZ, bias_H = block.folded()
            layers.append(_linear(weight_HZ @ z_ZF, bias_H))
            z_ZF = torch.cat([z_ZF, block.W2.weight.detach().double()], dim=1)
            act = block.act
        if isinstance(self.W_out, nn.Linear):
            z_ZF = self.W_out.weight.detach().double() @ z_ZF
        return Collapsed(layers, _linear(z_ZF), act, self.sigmoid).to(like).requires_grad_(False)


class HourglassMLP(ResidualMLP):
    """Residual MLP whose branches are narrower than its skip connection, d_h < d_z, behind a lift into that width.

    Steps, arguments and source as in `ResidualMLP`, except that there is always a lift. Cost: `parameters` and `flops`.
    A fixed lift saves its gradient and optimiser state, not FLOPs. Training keeps L d_z activations a sample, more than
    a conventional MLP with as many parameters.

    >>> parameters(HourglassMLP(d_x=784, d_z=785, d_h=115, L=4, d_y=784).design)
    (1953080, 1953080)
    """

    def __init__(
        self, d_x: int, d_z: int, d_h: int, L: int, d_y: int, *, lift: str = "trained", lift_init: str = "uniform",
        norm: str = "batch", activation: str = "relu", sigmoid: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        _require("lift", lift, lift != "identity", "trained | fixed in an hourglass")
        Design(d_x, d_z, d_h, L, d_y, lift)  # whole numbers, before they are compared
        _require("d_h", d_h, d_h < d_z, f"< d_z = {d_z} in an hourglass; ResidualMLP takes wider branches")
        super().__init__(
            d_x, d_z, d_h, L, d_y, lift=lift,
            lift_init=lift_init, norm=norm, activation=activation, sigmoid=sigmoid, seed=seed,
        )  # fmt: skip


class Block(nn.Module):
    """z + W2 act(W1 norm(z)), z (B, d_z); no biases, and no learned scale or shift in the norm."""

    def __init__(self, d_z: int, d_h: int, norm: str = "batch", activation: str = "relu") -> None:
        super().__init__()
        _require("norm", norm, norm in NORMS, " | ".join(NORMS))
        _require("activation", activation, activation in ACTIVATIONS, " | ".join(ACTIVATIONS))
        self.norm = NORMS[norm](d_z)
        self.W1 = nn.Linear(d_z, d_h, bias=False)
        self.act = ACTIVATIONS[activation]
        self.W2 = nn.Linear(d_h, d_z, bias=False)

    def forward(self, z_BZ: Tensor) -> Tensor:
        return z_BZ + self.W2(self.act(self.W1(self.norm(z_BZ))))

    def folded(self) -> tuple[Tensor, Tensor]:
        """W1 (d_h, d_z) and a bias (d_h,), float64, that contain the norm of evaluation mode."""
        weight_HZ, norm = self.W1.weight.detach().double(), self.norm
        if isinstance(norm, nn.LayerNorm):
            raise Error("norm = 'layer': differs from sample to sample and cannot be folded: must be batch | none")
        if not isinstance(norm, nn.BatchNorm1d):
            return weight_HZ, weight_HZ.new_zeros(len(weight_HZ))
        assert norm.running_mean is not None and norm.running_var is not None
        weight_HZ = weight_HZ / (norm.running_var.double() + norm.eps).sqrt()
        return weight_HZ, -weight_HZ @ norm.running_mean.double()


class FixedLift(nn.Module):
    """W_in x with a W_in drawn from `seed` and never trained: no parameter, and in no state dict.

    A state dict holds the seed, the kind of draw and a checksum of W_in, int64 (3,); loading draws W_in again and
    refuses one that is not the same bit for bit.
    """

    weight: Tensor

    def __init__(self, d_z: int, d_x: int, init: str, seed: int) -> None:
        super().__init__()
        self.init, self.seed = init, seed
        weight_ZX = draw_lift(d_z, d_x, init, seed)
        self.checksum = zlib.crc32(weight_ZX.numpy().tobytes())
        self.register_buffer("weight", weight_ZX, persistent=False)

    def forward(self, x_BX: Tensor) -> Tensor:
        return F.linear(x_BX, self.weight)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.seed, INITS.index(self.init), self.checksum], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        seed, init, checksum = state.tolist()
        d_z, d_x = self.weight.shape
        drawn = FixedLift(d_z, d_x, INITS[init], seed)
        if drawn.checksum != checksum:
            raise Error(f"seed = {seed}: gives another W_in ({d_z} x {d_x}) here than where the model was saved")
        self.init, self.seed, self.checksum = drawn.init, drawn.seed, drawn.checksum
        self.weight = drawn.weight.to(self.weight)


def draw_lift(d_z: int, d_x: int, init: str, seed: int) -> Tensor:
    """W_in, float32 (d_z, d_x) on the CPU: from the seed alone, torch's global generator is neither read nor moved.

    uniform: U(+-1 / sqrt(d_x)), torch's own start of a linear layer. normal: N(0, 1 / d_z), E |W_in x|^2 = |x|^2.
    orthonormal: columns, uniform among all such, |W_in x| = |x|; needs d_z >= d_x.
    """
    _require("lift_init", init, init in INITS, " | ".join(INITS))
    _require("seed", seed, type(seed) is int and 0 <= seed < 2**63, "a whole number >= 0 and < 2^63")
    _require("d_z", d_z, init != "orthonormal" or d_z >= d_x, f">= d_x = {d_x} for orthonormal columns")
    draw = torch.rand if init == "uniform" else torch.randn
    # float64, rounded once: where machines differ in the last bit of a logarithm or of LAPACK, float32 seldom shows it
    w_ZX = draw(d_z, d_x, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    if init == "uniform":
        w_ZX = (2 * w_ZX - 1) / math.sqrt(d_x)
    elif init == "normal":
        w_ZX = w_ZX / math.sqrt(d_z)
    else:
        w_ZX, r_XX = torch.linalg.qr(w_ZX)
        w_ZX = w_ZX * r_XX.diagonal().sign()
    return w_ZX.float()


class Collapsed(nn.Module):
    """A residual MLP as a densely connected narrow network: h_i = act(M_i x + sum_{j<i} G_ij h_j + b_i).

    y = sigmoid(S x + sum_j T_j h_j), with M_i = W1_i W_in, G_ij = W1_i W2_j, S = W_out W_in, T_j = W_out W2_j. The norm
    is folded into W1_i and b_i. Equal to the plain form up to rounding: the products are formed once, in float64.
    """

    def __init__(self, layers: list[nn.Linear], out: nn.Linear, act: Callable[[Tensor], Tensor], sigmoid: bool) -> None:
        super().__init__()
        self.layers, self.out, self.act, self.sigmoid = nn.ModuleList(layers), out, act, sigmoid

    def forward(self, x_BX: Tensor) -> Tensor:
        f_BF = x_BX  # x, h_1, h_2 …
        for layer in self.layers:
            f_BF = torch.cat([f_BF, self.act(layer(f_BF))], dim=1)
        y_BY = self.out(f_BF)
        return y_BY.sigmoid() if self.sigmoid else y_BY


def designs(
    budget: int, d_x: int, d_y: int, *, d_z: Iterable[int], L: Iterable[int],
    lift: str = "trained", readout: bool = True, hourglass: bool = True, tolerance: float = 0.05,
) -> list[Design]:  # fmt: skip
    """All designs of a grid of d_z and L that have `budget` trainable parameters: d_h is what these leave.

    Args:
        budget: trainable parameters.
        d_z, L: values of the grid.
        lift, readout: see `Design`.
        hourglass: d_h < d_z; otherwise conventional, d_h > d_z.
        tolerance: relative distance from the budget that is allowed.

    Raises:
        BudgetError: no design of the grid comes so close; names the nearest count.
    """
    layers = list(L)
    _require("L", layers, all(depth > 0 for depth in layers), "whole numbers >= 1")
    found: list[tuple[int, Design]] = []
    for width in d_z:
        for depth in layers:
            ends = parameters(Design(d_x, width, 1, 0, d_y, lift, readout))[0]
            wanted = round((budget - ends) / (2 * depth * width))
            d_h = min(max(wanted, 1), width - 1) if hourglass else max(wanted, width + 1)
            if d_h:  # d_z = 1 has no bottleneck
                design = Design(d_x, width, d_h, depth, d_y, lift, readout)
                found.append((parameters(design)[0], design))
    near = [design for cost, design in found if abs(cost - budget) <= tolerance * budget]
    if not near:
        kind = "hourglass" if hourglass else "conventional MLP"
        nearest = min((cost for cost, _ in found), key=lambda cost: abs(cost - budget), default="none")
        raise BudgetError(f"budget = {budget}: no {kind} of the grid is within {tolerance:.0%}; nearest is {nearest}")
    return near


def non_dominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, quality) that no other point betters in one without losing in the other.

    By rising cost; of equal points all stay.

    >>> non_dominated([(5, 20.0), (9, 24.0), (7, 19.0), (9, 23.0)])
    [0, 1]
    """
    _require("points", points, all(math.isfinite(v) for point in points for v in point), "finite numbers")
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not kept or points[i][1] > points[kept[-1]][1] or points[i] == points[kept[-1]]:
            kept.append(i)
    return kept


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise Error(f"{name} = {value!r}: must be {allowed}")

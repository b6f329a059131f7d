"""Compress one matrix: prune it to an exact number of zeros, or round it to a few bits, by what its inputs are like.

Shapes: N tokens, O outputs and C inputs of a linear layer, b columns of a block, G groups of input channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sparing.grid.files import finite, short, sized
from sparing.grid.method import Error
from sparing.grid.select import top_k

PRUNERS, QUANTISERS = ("sparsegpt", "wanda", "magnitude"), ("gptq", "rtn")
SOLVERS = (*PRUNERS, *QUANTISERS)
DATA_FREE = ("magnitude", "rtn")
BITS = range(2, 9)


def must(name: str, value: object, good: bool, what: str) -> None:
    if not good:
        raise Error(f"{name} = {short(value)}: must be {what}")


@dataclass
class Gram:
    """Streaming X^T X of the rows that a linear layer reads: half the Hessian of its squared output error.

    Attributes:
        size: C, input channels.
        full: keep the matrix; False keeps only its diagonal.
        dtype: that sums are kept in, float32 or float64. Rows of half precision are widened before they are multiplied.
        count: rows taken in.
        total: (C, C), or (C,) of the diagonal; on the device of the rows.
    """

    size: int
    full: bool = True
    dtype: torch.dtype = torch.float32
    count: int = 0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros((self.size,) * (2 if self.full else 1), dtype=self.dtype)

    def add(self, x_NC: Tensor) -> None:
        """Take in N rows."""
        self.total = self.total.to(x_NC.device)
        for part in x_NC.detach().split(4096):
            wide = part.to(self.dtype)
            self.total += wide.T @ wide if self.full else wide.square().sum(0)
        self.count += len(x_NC)

    @property
    def norm(self) -> Tensor:
        """||X_c|| of every input channel, (C,)."""
        return (self.total.diagonal() if self.full else self.total).sqrt()


# --------------------------------------------------------------------------- pruning one matrix


def _zeros(weight_OC: Tensor, sparsity: float | None, zeros: int | None) -> int:
    """How many weights are pruned, from a share (half up) or a count."""
    must("weight", sized(tuple(weight_OC.shape)), weight_OC.ndim == 2 and weight_OC.numel() > 0, "a matrix")
    if sparsity is not None and zeros is None:
        must("sparsity", sparsity, 0 <= sparsity <= 1, "a share of the weights, in 0..1")
        return int(sparsity * weight_OC.numel() + 0.5)
    if zeros is not None and sparsity is None:
        must("zeros", zeros, 0 <= zeros <= weight_OC.numel(), f"a number of weights, in 0..{weight_OC.numel()}")
        return zeros
    raise Error(f"sparsity = {sparsity}, zeros = {zeros}: give one of them")


def _square(name: str, gram_CC: Tensor, columns: int) -> None:
    must(name, sized(tuple(gram_CC.shape)), gram_CC.shape == (columns, columns), f"{columns}x{columns}")


def _lowest(score_OC: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` entries with the lowest scores; ties go to the earlier column, then the earlier row."""
    return top_k(-score_OC.T.reshape(1, -1), count).view(score_OC.shape[::-1]).T


def magnitude(weight_OC: Tensor, sparsity: float | None = None, *, zeros: int | None = None) -> Tensor:
    """The smallest weights of the whole matrix set to zero, no update of the rest.

    Args:
        weight_OC: (O, C), any floating type.
        sparsity: share of the weights set to zero, rounded half up to whole weights.
        zeros: their exact number, instead of a share.

    Returns:
        (O, C), a new tensor of the weight's type.
    """
    count = _zeros(weight_OC, sparsity, zeros)
    return weight_OC.detach().masked_fill(_lowest(weight_OC.detach().abs(), count), 0)


def wanda(weight_OC: Tensor, norm_C: Tensor, sparsity: float | None = None, *, zeros: int | None = None) -> Tensor:
    """Wanda: in every output row, the weights with the lowest |W_oc| ||X_c|| set to zero, no update of the rest.

    Source: A Simple and Effective Pruning Approach for Large Language Models, 2023, arXiv 2306.11695.

    Args:
        weight_OC: (O, C), any floating type.
        norm_C: ||X_c|| of every input channel over calibration tokens, `Gram.norm`.
        sparsity: share of each row set to zero: exactly that many a row, rounded half up.
        zeros: their exact number in the whole matrix, instead of a share; rows then differ by at most one.

    Returns:
        (O, C), a new tensor of the weight's type. Ties: the earlier column is pruned.
    """
    count = _zeros(weight_OC, sparsity, zeros)
    rows, columns = weight_OC.shape
    must("norm", sized(tuple(norm_C.shape)), norm_C.shape == (columns,), f"one number for {columns} input channels")
    if sparsity is not None:
        count = rows * int(sparsity * columns + 0.5)
    edges = torch.arange(rows + 1, device=weight_OC.device) * count // rows
    score_OC = weight_OC.detach().float().abs() * norm_C.to(weight_OC.device).float()
    return weight_OC.detach().masked_fill(top_k(-score_OC, edges.diff()), 0)


def inverse_factor(gram_CC: Tensor, damp: float = 0.01) -> Tensor:
    """U, upper triangular, with U^T U = (X^T X + damp mean(diag) I)^-1; float32 (C, C).

    1 / U_cc^2 is what it costs in squared error, a unit of weight, to lose channel c when only later channels can make
    up for it, and row c of U says how they do. From one Cholesky factorisation in reversed order and one triangular
    inverse, without the inverse itself, which float32 would blur. A channel that was never active gets next to none of
    the damping: it costs nothing to speak of, and moves nothing.

    Raises:
        Error: the matrix is not positive definite, or not finite.
    """
    _square("gram", gram_CC, gram_CC.shape[-1])
    must("damp", damp, damp >= 0, "a share of the mean of the diagonal, >= 0")
    h_CC = gram_CC.detach().to(torch.promote_types(gram_CC.dtype, torch.float32), copy=True)
    mean = float(h_CC.diagonal().mean()) or 1.0
    h_CC.diagonal().add_(torch.where(h_CC.diagonal() > 0, damp, 1e-12) * mean)
    lower_CC, failed = torch.linalg.cholesky_ex(h_CC.flip(0, 1))
    if int(failed) or not finite(lower_CC):
        raise Error(f"gram: not positive definite at damp = {damp:g} (mean of the diagonal {mean:g}); raise damp")
    eye_CC = torch.eye(len(h_CC), dtype=h_CC.dtype, device=h_CC.device)
    return torch.linalg.solve_triangular(lower_CC.flip(0, 1), eye_CC, upper=True).float()


Settle = Callable[[int, Tensor], Tensor]  # column of the block, its weights (O,) -> what they become, (O,)


def _sweep(weight_OC: Tensor, factor_CC: Tensor, block: int, begin: Callable[[Tensor, int], Settle]) -> Tensor:
    """Optimal brain surgery, column by column: each becomes what `settle` says, later columns make up for the error.

    Args:
        block: columns updated at once; those beyond it are brought up to date at its end.
        begin: called with a block's weights (O, b), up to date, and its first column; gives `settle`.

    Returns:
        (O, C) float32.
    """
    w_OC = weight_OC.detach().to(torch.float32, copy=True)
    for start in range(0, w_OC.shape[1], block):
        end = min(start + block, w_OC.shape[1])
        u_bb = factor_CC[start:end, start:end]
        settle = begin(w_OC[:, start:end], start)
        w_bO = w_OC[:, start:end].T.contiguous()  # so that a column lies in one piece
        error_bO = torch.zeros_like(w_bO)
        for j in range(end - start):
            settled_O = settle(j, w_bO[j])
            error_bO[j] = (w_bO[j] - settled_O) / u_bb[j, j]
            w_bO[j] = settled_O
            w_bO[j + 1 :].addr_(u_bb[j, j + 1 :], error_bO[j], alpha=-1)
        w_OC[:, start:end] = w_bO.T
        w_OC[:, end:] -= error_bO.T @ factor_CC[start:end, end:]
    return w_OC


def sparsegpt(
    weight_OC: Tensor,
    gram_CC: Tensor,
    sparsity: float | None = None,
    *,
    zeros: int | None = None,
    block: int = 128,
    damp: float = 0.01,
) -> Tensor:
    """SparseGPT: prune block by block of columns, and let later columns make up for what is lost.

    In each block the weights with the lowest w^2 / U_cc^2 go (U: `inverse_factor`), chosen on weights that are up to
    date with all blocks before; then column after column is set to zero there and its error passed on.

    Source: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023, arXiv 2301.00774.

    Departures: each block gets its share of an exact number of zeros (`zeros` c // C of them lie before column c; the
    published threshold counts a share of each block and all that tie with it). Channels that were never active are
    pruned first in their block (published: all their weights, whatever the number).

    Args:
        weight_OC: (O, C), any floating type; computed in float32.
        gram_CC: X^T X of calibration rows, `Gram.total`.
        sparsity: share of the weights set to zero, rounded half up to whole weights.
        zeros: their exact number, instead of a share.
        block: columns a mask is chosen for at once.
        damp: added to the diagonal, as a share of its mean.

    Returns:
        (O, C), a new tensor of the weight's type. Ties: earlier column, then earlier row, is pruned.
    """
    _square("gram", gram_CC, weight_OC.shape[-1])
    factor_CC = inverse_factor(gram_CC.to(weight_OC.device), damp)
    return sparsegpt_factored(weight_OC, factor_CC, _zeros(weight_OC, sparsity, zeros), block)


def sparsegpt_factored(weight_OC: Tensor, factor_CC: Tensor, zeros: int, block: int) -> Tensor:
    must("block", block, block >= 1, "a number of columns, >= 1")
    C = weight_OC.shape[1]

    def begin(w_Ob: Tensor, start: int) -> Settle:
        end = start + w_Ob.shape[1]
        score_Ob = w_Ob.abs() / factor_CC.diagonal()[start:end]
        gone_Ob = _lowest(score_Ob, zeros * end // C - zeros * start // C)
        return lambda j, w_O: w_O.masked_fill(gone_Ob[:, j], 0)

    return _sweep(weight_OC, factor_CC, block, begin).to(weight_OC.dtype)


# --------------------------------------------------------------------------- quantising one matrix


@dataclass(frozen=True)
class Quantised:
    """A matrix as small whole numbers: w = (code - zero) scale, one scale and zero for `group` columns of a row.

    Attributes:
        codes: uint8 (O, C), each below 2^bits; `pack` leaves no gaps.
        scale: float32 (O, G).
        zero: uint8 (O, G), the code of 0.
        bits: of a code.
        group: input channels that share a scale; the last group may be shorter.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int

    def dequantised(self) -> Tensor:
        """The weights, float32 (O, C)."""
        C = self.codes.shape[1]
        return _value(self.codes, _spread(self.scale, self.group, C), _spread(self.zero, self.group, C))

    @property
    def bits_per_weight(self) -> float:
        """Bits stored a weight: packed codes, scales of 32 bits and zeros of 8."""
        return (self.bits * self.codes.numel() + 40 * self.scale.numel()) / self.codes.numel()


def pack(codes_OC: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits without gaps, row by row, lowest bit first: uint8 (O, ceil(C bits / 8)), on the CPU.

    >>> pack(torch.tensor([[1, 0, 3, 2]], dtype=torch.uint8), bits=2).tolist()
    [[177]]
    """
    codes = codes_OC.cpu().numpy()
    stream = np.stack([(codes >> bit) & 1 for bit in range(bits)], axis=-1)
    return torch.from_numpy(np.packbits(stream.reshape(len(codes), -1), axis=-1, bitorder="little"))


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes that `pack` packed: uint8 (O, `columns`)."""
    stream = np.unpackbits(packed.numpy(), axis=-1, count=columns * bits, bitorder="little")
    codes = np.zeros((len(packed), columns), dtype=np.uint8)
    for bit in range(bits):
        codes |= stream[:, bit::bits] << bit
    return torch.from_numpy(codes)


def _spread(of_OG: Tensor, group: int, columns: int) -> Tensor:
    return of_OG.repeat_interleave(group, 1)[:, :columns]


def _grid(w_Og: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero, float32 (O,), of the even grid from the least to the greatest weight of a row, 0 among them."""
    low_O, high_O = w_Og.amin(1).clamp_max(0), w_Og.amax(1).clamp_min(0)
    scale_O = ((high_O - low_O) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    return scale_O, (-low_O / scale_O).round()


def _grids(w_OC: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    scales, zeros = zip(*(_grid(part, bits) for part in w_OC.split(group, 1)), strict=True)
    return torch.stack(scales, 1), torch.stack(zeros, 1).to(torch.uint8)


def _codes(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((w / scale).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)


def _value(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (codes.float() - zero.float()) * scale


def _check_grid(weight_OC: Tensor, bits: int, group: int) -> None:
    must("weight", sized(tuple(weight_OC.shape)), weight_OC.ndim == 2 and weight_OC.numel() > 0, "a matrix")
    must("bits", bits, bits in BITS, f"a whole number in {BITS[0]}..{BITS[-1]}")
    must("group", group, group >= 1, "a number of input channels, >= 1")


def rtn(weight_OC: Tensor, bits: int, group: int = 128) -> tuple[Tensor, Quantised]:
    """Round to nearest: each group of a row on its own asymmetric min-max grid.

    Args:
        weight_OC: (O, C), any floating type; computed in float32.
        bits: of a weight, 2..8.
        group: input channels that share a scale.

    Returns:
        the dequantised weight, float32 (O, C), off by at most half a scale; and the same as codes.
    """
    _check_grid(weight_OC, bits, group)
    w_OC = weight_OC.detach().float()
    scale_OG, zero_OG = _grids(w_OC, bits, group)
    columns = w_OC.shape[1]
    codes_OC = _codes(w_OC, _spread(scale_OG, group, columns), _spread(zero_OG, group, columns), bits)
    packed = Quantised(codes_OC, scale_OG, zero_OG, bits, group)
    return packed.dequantised(), packed


def gptq(
    weight_OC: Tensor, gram_CC: Tensor, bits: int, group: int = 128, *, damp: float = 0.01, act_order: bool = False
) -> tuple[Tensor, Quantised]:
    """GPTQ: round column after column, and let later columns make up for the error.

    The grid of a group (asymmetric, min-max) is laid when its first column's turn comes, over weights that are up to
    date with all columns before.

    Source: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022, arXiv 2210.17323.

    Args:
        weight_OC: (O, C), any floating type; computed in float32.
        gram_CC: X^T X of calibration rows, `Gram.total`.
        bits: of a weight, 2..8.
        group: input channels that share a scale, and columns that are updated at once.
        damp: added to the diagonal, as a share of its mean.
        act_order: columns in the order of falling activity, diag(X^T X). Groups stay runs of neighbours, so their grids
            are laid beforehand, over the given weights.

    Returns:
        the dequantised weight, float32 (O, C), and the same as codes.
    """
    _check_grid(weight_OC, bits, group)
    _square("gram", gram_CC, weight_OC.shape[1])
    return gptq_factored(
        weight_OC, *ordered_factor(gram_CC.to(weight_OC.device), damp, act_order), bits, group, act_order
    )


def ordered_factor(gram_CC: Tensor, damp: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """The order that columns are settled in, (C,), and the factor in that order."""
    order_C = torch.arange(len(gram_CC), device=gram_CC.device)
    if act_order:
        order_C = gram_CC.diagonal().argsort(descending=True, stable=True)
    return order_C, inverse_factor(gram_CC[order_C][:, order_C] if act_order else gram_CC, damp)


def gptq_factored(
    weight_OC: Tensor, order_C: Tensor, factor_CC: Tensor, bits: int, group: int, act_order: bool
) -> tuple[Tensor, Quantised]:
    w_OC, order = weight_OC.detach().float(), order_C.tolist()
    scale_OG, zero_OG = _grids(w_OC, bits, group)
    codes_OC = torch.zeros_like(w_OC, dtype=torch.uint8)

    def begin(w_Og: Tensor, start: int) -> Settle:
        if not act_order:
            scale_OG[:, start // group], zero_OG[:, start // group] = _grid(w_Og, bits)

        def settle(j: int, w_O: Tensor) -> Tensor:
            column = order[start + j]
            scale_O, zero_O = scale_OG[:, column // group], zero_OG[:, column // group]
            codes_OC[:, column] = _codes(w_O, scale_O, zero_O, bits)
            return _value(codes_OC[:, column], scale_O, zero_O)

        return settle

    found_OC = torch.empty_like(w_OC)
    found_OC[:, order_C] = _sweep(w_OC[:, order_C], factor_CC, group, begin)
    return found_OC, Quantised(codes_OC, scale_OG, zero_OG, bits, group)


# --------------------------------------------------------------------------- levels


@dataclass(frozen=True)
class SparsityLevels:
    """Levels -n..n around a sparsity, a level apart being the same number of weights in every matrix.

    So the zeros of a model depend on the sum of its levels alone: one matrix up and another down keep the budget.

    Attributes:
        s: sparsity of level 0, between 0 and 1.
        n: levels on either side, at least 1.
        d: weights between two levels, at least 1.
    """

    s: float
    n: int
    d: int

    def __post_init__(self) -> None:
        must("s", self.s, isinstance(self.s, float | int) and 0 < self.s < 1, "a sparsity between 0 and 1")
        for name, value in (("n", self.n), ("d", self.d)):
            must(name, value, isinstance(value, int) and value >= 1, "a whole number >= 1")

    def zeros(self, numel: int, level: int) -> int:
        """Zeros of a matrix of `numel` weights: round(s numel) + level d.

        Raises:
            Error: there is no such level, or it would be below 0 or above `numel`; nothing is clipped.
        """
        must("level", level, -self.n <= level <= self.n, f"in {-self.n}..{self.n}")
        count = int(self.s * numel + 0.5) + level * self.d
        if not 0 <= count <= numel:
            raise Error(f"level = {level}: would be {count:,} zeros in a matrix of {numel:,} weights")
        return count

    def of(self, numel: int) -> tuple[int, ...]:
        """The levels that a matrix of `numel` weights can have, rising, 0 among them; a small one has fewer."""
        base = int(self.s * numel + 0.5)
        return tuple(i for i in range(-self.n, self.n + 1) if 0 <= base + i * self.d <= numel)


def sparsity_levels(s: float, n: int, hidden: int) -> SparsityLevels:
    """Levels -n..n around sparsity s, d = int(0.5 min(s, 1 - s) / n D^2) weights apart, D the model's width.

    A matrix of D x D reaches from half of s to three halves (up to s = 0.5). One much smaller, such as the keys of few
    groups, cannot have the outer levels, and does not get them.

    Source: EvoPress: Accurate Dynamic Model Compression via Evolutionary Search, 2024, arXiv 2410.14649.

    >>> levels = sparsity_levels(0.5, n=8, hidden=64)
    >>> levels.d, levels.zeros(64 * 64, 0), levels.zeros(64 * 64, 8), levels.of(64 * 16)
    (128, 2048, 3072, (-4, -3, -2, -1, 0, 1, 2, 3, 4))
    """
    must("s", s, 0 < s < 1, "a sparsity between 0 and 1")
    must("n", n, n >= 1, "a number of levels on either side, >= 1")
    d = int(0.5 * min(s, 1 - s) / n * hidden**2)
    must("n", n, d >= 1, f"smaller: levels of a model of width {hidden} would be less than one weight apart")
    return SparsityLevels(s, n, d)

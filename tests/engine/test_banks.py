"""Banks of weights: solvers against dense least squares and textbook steps, the streaming pass, files, live models."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparing
from sparing.engine import banks
from sparing.engine.banks import Bank, at_levels, hessian, linears, load_levels_
from sparing.engine.units import observe
from sparing.engine.view import View
from sparing.grid.compress import (
    BITS,
    DATA_FREE,
    PRUNERS,
    SOLVERS,
    Gram,
    SparsityLevels,
    gptq,
    inverse_factor,
    magnitude,
    pack,
    rtn,
    sparsegpt,
    sparsity_levels,
    unpack,
    wanda,
)
from sparing.testing.models import ARCHITECTURES, build, prompt

OUT, C, N = 24, 40, 400
SPARSE = sparsity_levels(0.5, 1, 32)  # for models of width 32


def correlated(columns: int = C, rows: int = N, seed: int = 0) -> Tensor:
    """Inputs off the origin, of unequal strength, where channels tell of each other. (N, C) float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    causes = columns // 3
    strength = torch.rand(columns, generator=generator, dtype=torch.float64) * 3 + 0.1
    x = normal(rows, causes) @ normal(causes, columns) / causes**0.5 + normal(rows, columns) / 3
    return x * strength + normal(columns) / 4


def matrix(rows: int = OUT, columns: int = C, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gram(x: Tensor) -> Tensor:
    return (x.T @ x).float()


def loss(x: Tensor, weight: Tensor, other: Tensor) -> float:
    """Squared output error over all rows and outputs."""
    return float(((weight.double() - other.double()) @ x.T).square().sum())


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


def refuses(act: Callable[[], Any], *words: str) -> None:
    with pytest.raises(sparing.Error) as caught:
        act()
    for word in words:
        assert word in str(caught.value), str(caught.value)


# --------------------------------------------------------------------------- references


def least_squares(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """For every row the best weights on its support, from the inputs themselves."""
    target = x @ weight.double().T
    found = torch.zeros_like(weight, dtype=torch.float64)
    for row, support in enumerate(kept):
        found[row, support] = torch.linalg.lstsq(x[:, support], target[:, row]).solution
    return found


def textbook(weight: Tensor, h: Tensor, settle: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Optimal brain surgery with a fresh inverse of what is left at every column, float64."""
    w = weight.double().clone()
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        error = (w[:, j] - settle(j, w)) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return w


def damped(x: Tensor, damp: float = 0.01) -> Tensor:
    h = x.T @ x
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


# --------------------------------------------------------------------------- Gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_streams(dtype: torch.dtype) -> None:
    x = correlated(rows=5000)
    found, diagonal = Gram(C, dtype=dtype), Gram(C, full=False, dtype=dtype)
    for part in x.split(1700):
        found.add(part)
        diagonal.add(part)
    assert found.count == 5000 and found.total.dtype == dtype
    torch.testing.assert_close(found.total.double(), x.T @ x, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-3)
    torch.testing.assert_close(found.norm.double(), x.norm(dim=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(diagonal.norm, found.norm)


def test_gram_widens_half_precision_before_it_multiplies() -> None:
    x = torch.full((3000, 2), 3.0, dtype=torch.bfloat16)
    found = Gram(2)
    found.add(x)
    assert found.total.tolist() == [[27000.0] * 2] * 2


def test_inverse_factor_is_the_triangular_root_of_the_inverse() -> None:
    x = correlated()
    u = inverse_factor(gram(x), damp=0.02).double()
    h = damped(x, 0.02)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.T @ u @ h, torch.eye(C, dtype=torch.float64), rtol=0, atol=2e-4)
    left = torch.stack([torch.linalg.inv(h[j:, j:])[0, 0] for j in range(C)])
    torch.testing.assert_close(u.diagonal() ** 2, left, rtol=1e-4, atol=0)


def test_inverse_factor_refuses_what_cannot_be_inverted() -> None:
    x = correlated()
    x[:, 3] = x[:, 4]
    refuses(lambda: inverse_factor(gram(x) - 0.1 * torch.eye(C), damp=0), "gram", "damp = 0")
    refuses(lambda: inverse_factor(torch.full((3, 3), torch.nan)), "gram")
    refuses(lambda: inverse_factor(torch.eye(3), damp=-1), "damp = -1")
    refuses(lambda: inverse_factor(torch.zeros(3, 4)), "gram", "3x4")


# --------------------------------------------------------------------------- pruning


def test_magnitude_by_hand() -> None:
    weight = torch.tensor([[3.0, -1, 2], [-1, 5, 1]])
    assert magnitude(weight, zeros=1).tolist() == [[3, -1, 2], [0, 5, 1]]  # column 0 before 1 and 2
    assert magnitude(weight, zeros=2).tolist() == [[3, 0, 2], [0, 5, 1]]
    assert magnitude(weight, zeros=3).tolist() == [[3, 0, 2], [0, 5, 0]]
    assert magnitude(weight, 0.25).tolist() == magnitude(weight, zeros=2).tolist()  # 1.5, half up


def test_wanda_by_hand_and_against_plain_loops() -> None:
    weight, norm = torch.tensor([[1.0, -2, 3, 4], [8, 4, 2, 1]]), torch.tensor([4.0, 2, 1, 0.5])
    # scores: 4 4 3 2 and 32 8 2 0.5; of the tie in row 0 the earlier column goes third
    assert wanda(weight, norm, 0.75).tolist() == [[0, -2, 0, 0], [8, 0, 0, 0]]
    w, x = matrix(), correlated()
    score = (w * x.norm(dim=0)).abs()
    expected = w.clone()
    for row in range(OUT):
        expected[row, score[row].argsort()[:14]] = 0
    assert torch.equal(wanda(w, x.norm(dim=0), 0.35), expected)


@pytest.mark.parametrize("count", [0, 1, 23, 25, 500, OUT * C - 1, OUT * C])
def test_exact_counts(count: int) -> None:
    w, x = matrix(), correlated()
    for block in (7, 16, 128):
        assert zeros(sparsegpt(w, gram(x), zeros=count, block=block)) == count
    assert zeros(magnitude(w, zeros=count)) == count
    by_row = wanda(w, x.norm(dim=0), zeros=count)
    assert zeros(by_row) == count
    rows = (by_row == 0).sum(1)
    assert int(rows.max() - rows.min()) <= 1


def test_blocks_get_their_share_of_the_zeros() -> None:
    found = sparsegpt(matrix(), gram(correlated()), zeros=333, block=12)
    edges = [333 * c // C for c in (0, 12, 24, 36, 40)]
    assert [zeros(part) for part in found.split(12, 1)] == [b - a for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("block", [10, 16, 40])
def test_sparsegpt_against_the_textbook(block: int) -> None:
    """Same masks, and column by column the same steps with dense inverses."""
    x, w = correlated(), matrix()
    found = sparsegpt(w, gram(x), zeros=480, block=block)
    h, mask = damped(x), torch.zeros(OUT, C, dtype=torch.bool)

    def settle(j: int, now: Tensor) -> Tensor:
        if j % block == 0:  # a block's mask, on weights up to date
            ends = range(j, min(j + block, C))
            root = torch.stack([torch.linalg.inv(h[k:, k:])[0, 0] for k in ends]).sqrt()
            score = (now[:, ends.start : ends.stop] / root) ** 2
            count = 480 * ends.stop // C - 480 * ends.start // C
            mask[:, ends.start : ends.stop] = score <= score.flatten().kthvalue(count).values
        return now[:, j].masked_fill(mask[:, j], 0)

    expected = textbook(w, h, settle)
    assert torch.equal(found == 0, mask)
    torch.testing.assert_close(found.double(), expected * ~mask, rtol=1e-3, atol=1e-4)


def test_sparsegpt_lies_between_least_squares_and_plain_masks() -> None:
    for seed in range(3):
        x, w = correlated(seed=seed), matrix(seed=seed + 9)
        found = sparsegpt(w, gram(x), 0.5, block=16)
        kept = found != 0
        best, ours = loss(x, w, least_squares(x, w, kept)), loss(x, w, found)
        masked = loss(x, w, w * kept)
        plain = {"magnitude": magnitude(w, 0.5), "wanda": wanda(w, x.norm(dim=0), 0.5)}
        assert 0 < best <= ours * (1 + 1e-6)
        assert ours < 0.7 * masked
        for name, other in plain.items():
            assert ours < 0.7 * loss(x, w, other), name
        assert loss(x, w, plain["wanda"]) < loss(x, w, plain["magnitude"])


def test_sparsegpt_is_least_squares_where_only_leading_columns_go() -> None:
    """No kept column is frozen before the last one pruned, so the steps lose nothing."""
    x, w = correlated(), matrix()
    w[:, :13] *= 1e-2
    w[:, 13:] = w[:, 13:].sign() + w[:, 13:]
    found = sparsegpt(w, gram(x), zeros=13 * OUT, block=C, damp=1e-7)
    kept = torch.arange(C).expand(OUT, C) >= 13
    assert torch.equal(found != 0, kept)
    expected = least_squares(x, w, kept)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert float((expected - w).abs().max()) > 0.01  # and there was something to make up for


def test_identity_hessian_makes_sparsegpt_magnitude_and_gptq_rtn() -> None:
    w, eye = matrix(), 5 * torch.eye(C)
    assert torch.equal(sparsegpt(w, eye, 0.4, block=C), magnitude(w, 0.4))
    for bits in (2, 4, 8):
        for act_order in (False, True):
            found, packed = gptq(w, eye, bits, group=16, act_order=act_order)
            plain, codes = rtn(w, bits, group=16)
            assert torch.equal(found, plain)
            assert torch.equal(packed.codes, codes.codes)


# --------------------------------------------------------------------------- quantising


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [1, 16, 40, 128])
def test_rtn_is_off_by_at_most_half_a_scale(bits: int, group: int) -> None:
    w = matrix() + 0.7
    found, packed = rtn(w, bits, group)
    scale = packed.scale.repeat_interleave(group, 1)[:, :C]
    assert bool(((found - w).abs() <= scale * (0.5 + 1e-4)).all())
    assert packed.codes.max() <= 2**bits - 1
    assert torch.equal(packed.dequantised(), found)
    for g, part in enumerate(w.split(group, 1)):  # the grid reaches from the least to the greatest, 0 among them
        span = part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)
        torch.testing.assert_close(packed.scale[:, g], span / (2**bits - 1))


def test_rtn_by_hand() -> None:
    found, packed = rtn(torch.tensor([[-1.0, 2.0, 0.4, 0.0]]), bits=2)
    assert packed.codes.tolist() == [[0, 3, 1, 1]] and packed.zero.tolist() == [[1]]
    assert found.tolist() == [[-1, 2, 0, 0]]


def test_zero_groups_stay_zero() -> None:
    w = matrix()
    w[:, :16] = 0
    for found, packed in (rtn(w, 3, 16), gptq(w, gram(correlated()), 3, 16)):
        assert bool(found.isfinite().all()) and torch.equal(packed.dequantised(), found)
        assert zeros(found[:, :16]) == 16 * OUT


@pytest.mark.parametrize("group", [8, 16, 40, 64])
def test_gptq_against_the_textbook(group: int) -> None:
    x, w, top = correlated(), matrix(), 7
    found, packed = gptq(w, gram(x), 3, group)
    assert torch.equal(packed.dequantised(), found)
    grid: dict[str, Tensor] = {}

    def settle(j: int, now: Tensor) -> Tensor:
        if j % group == 0:
            part = now[:, j : j + group]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            grid["scale"] = (high - low) / top
            grid["zero"] = (-low / grid["scale"]).round()
        code = ((now[:, j] / grid["scale"]).round() + grid["zero"]).clamp(0, top)
        return (code - grid["zero"]) * grid["scale"]

    expected = textbook(w, damped(x), settle)
    close = ((found - expected).abs() < 1e-3).double().mean()
    assert float(close) > 0.99  # a code may flip where float32 and float64 round apart


def test_gptq_beats_rounding_on_correlated_inputs() -> None:
    for bits in (2, 3, 4, 8):
        for seed in range(3):
            x, w = correlated(seed=seed), matrix(seed=seed + 9)
            plain = loss(x, w, rtn(w, bits, 16)[0])
            for act_order in (False, True):
                assert loss(x, w, gptq(w, gram(x), bits, 16, act_order=act_order)[0]) < 0.8 * plain


def test_act_order_keeps_groups_of_neighbours_and_settles_the_active_first() -> None:
    x, w = correlated(), matrix()
    order = gram(x).diagonal().argsort(descending=True)
    found, packed = gptq(w, gram(x), 3, 16, act_order=True)
    assert torch.equal(packed.dequantised(), found)
    assert torch.equal(packed.scale, rtn(w, 3, 16)[1].scale)  # grids over the given weights
    first = int(order[0])
    assert torch.equal(found[:, first], rtn(w, 3, 16)[0][:, first])  # nothing was passed on to it yet
    assert not torch.equal(found[:, int(order[-1])], rtn(w, 3, 16)[0][:, int(order[-1])])


@pytest.mark.parametrize("bits", BITS)
def test_pack_leaves_no_gaps_and_comes_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 13), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, -(-13 * bits // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, 13), codes)
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes[2]))
    assert bytes(packed[2].tolist()) == number.to_bytes(packed.shape[1], "little")


def test_bits_per_weight_counts_scales_and_zeros() -> None:
    _, packed = rtn(matrix(8, 256), 3, 128)
    assert packed.bits_per_weight == 3 + 40 / 128
    stored = 8 * (pack(packed.codes, 3).numel() + 4 * packed.scale.numel() + packed.zero.numel())
    assert packed.bits_per_weight * 8 * 256 == stored


# --------------------------------------------------------------------------- dead channels, number types, refusals


def test_dead_channels_go_first_and_disturb_nothing() -> None:
    x, w = correlated(), matrix()
    dead = torch.tensor([2, 17, 39])
    alive = torch.tensor([c for c in range(C) if c not in dead])
    x[:, dead] = 0
    count = 300
    found = sparsegpt(w, gram(x), zeros=count, block=C)
    assert zeros(found) == count and zeros(found[:, dead]) == 3 * OUT
    # the mean of the diagonal is taken over all channels
    other = sparsegpt(w[:, alive], gram(x[:, alive]), zeros=count - 3 * OUT, block=C, damp=0.01 * len(alive) / C)
    torch.testing.assert_close(found[:, alive], other, rtol=1e-4, atol=1e-5)
    quantised, _ = gptq(w, gram(x), 4, 1)
    assert torch.equal(quantised[:, dead], rtn(w, 4, 1)[0][:, dead])
    for gone in (sparsegpt(w, torch.zeros(C, C), 0.5), gptq(w, torch.zeros(C, C), 4)[0]):
        assert bool(gone.isfinite().all())  # no channel was ever active


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    x, w = correlated(), matrix().to(dtype)
    before = w.clone()
    for found in (sparsegpt(w, gram(x), 0.5), magnitude(w, 0.5), wanda(w, x.norm(dim=0), 0.5)):
        assert found.dtype == dtype and zeros(found) == OUT * C // 2
    torch.testing.assert_close(
        sparsegpt(w, gram(x), 0.5).float(), sparsegpt(w.float(), gram(x), 0.5), rtol=1e-2, atol=1e-2
    )
    for found, packed in (rtn(w, 4, 16), gptq(w, gram(x), 4, 16)):
        assert found.dtype == torch.float32 and torch.equal(found, packed.dequantised())
    assert torch.equal(w, before)


def test_solvers_leave_the_weight_alone() -> None:
    x, w = correlated(), matrix()
    before, h = w.clone(), gram(x)
    for act in (lambda: sparsegpt(w, h, 0.5), lambda: gptq(w, h, 3), lambda: rtn(w, 3), lambda: magnitude(w, 0.5)):
        act()
        assert torch.equal(w, before) and torch.equal(h, gram(x))


def test_refusals_name_argument_value_and_what_is_allowed() -> None:
    w, h = matrix(), gram(correlated())
    refuses(lambda: sparsegpt(w, h, 1.5), "sparsity = 1.5", "0..1")
    refuses(lambda: sparsegpt(w, h, zeros=OUT * C + 1), "zeros = 961", "0..960")
    refuses(lambda: magnitude(w), "give one")
    refuses(lambda: magnitude(w, 0.5, zeros=3), "give one")
    refuses(lambda: magnitude(w[0], 0.5), "weight", "a matrix")
    refuses(lambda: sparsegpt(w, h[:5, :5], 0.5), "gram", "5x5", "40x40")
    refuses(lambda: sparsegpt(w, h, 0.5, block=0), "block = 0")
    refuses(lambda: wanda(w, h, 0.5), "norm", "40x40")
    refuses(lambda: gptq(w, h, 9), "bits = 9", "2..8")
    refuses(lambda: rtn(w, 4, group=0), "group = 0")


# --------------------------------------------------------------------------- levels


def test_sparsity_levels_are_the_same_number_of_weights_apart() -> None:
    levels = sparsity_levels(0.5, 8, 4096)
    assert levels.d == int(0.5 * 0.5 / 8 * 4096**2) == 524288
    sizes = [4096 * 4096, 14336 * 4096]
    for size in sizes:
        assert levels.of(size) == tuple(range(-8, 9))
        assert [levels.zeros(size, i) - levels.zeros(size, i - 1) for i in range(-7, 9)] == [levels.d] * 16
        assert levels.zeros(size, 0) == size // 2
    up, down = levels.zeros(sizes[0], 3), levels.zeros(sizes[1], -3)
    assert up + down == sum(size // 2 for size in sizes)
    assert sparsity_levels(0.7, 4, 100).d == int(0.5 * 0.3 / 4 * 100**2)


def test_sparsity_levels_clip_nothing() -> None:
    levels = sparsity_levels(0.5, 8, 4096)
    small = 1024 * 4096  # keys of few groups
    assert levels.of(small) == tuple(range(-4, 5))
    refuses(lambda: levels.zeros(small, 5), "level = 5", "4,718,592 zeros")
    refuses(lambda: levels.zeros(small, -5), "level = -5")
    refuses(lambda: levels.zeros(1 << 40, 9), "level = 9", "-8..8")
    refuses(lambda: sparsity_levels(0.5, 8, 4), "n = 8", "smaller")
    refuses(lambda: sparsity_levels(1.0, 8, 64), "s = 1.0")
    refuses(lambda: SparsityLevels(0.5, 0, 1), "n = 0")


# --------------------------------------------------------------------------- the streaming pass


def batches(name: str = "llama") -> list[dict[str, Tensor]]:
    return [prompt(name, (9, 12, 7), seed=5), prompt(name, (6, 11), seed=6)]


@functools.cache
def model() -> Any:
    return build("llama")


def make(folder: Path, solver: str = "sparsegpt", net: Any = None, **options: Any) -> Bank:
    levels = options.pop("levels", SPARSE if solver in PRUNERS else (2, 4))
    data = None if solver in DATA_FREE else batches()
    return Bank.build(net or model(), data, folder, levels, solver=solver, group=16, progress=False, **options)


def test_hessian_leaves_padding_out_and_agrees_with_moments() -> None:
    net = model()
    found = hessian(net, batches())
    assert set(found) == {name for name, p in net.named_parameters() if "proj" in name}
    attention, mlp = observe(net, batches())
    for layer in range(len(attention)):
        for moments, name in ((attention[layer], "self_attn.o_proj"), (mlp[layer], "mlp.down_proj")):
            own = found[f"model.layers.{layer}.{name}.weight"]
            assert own.count == moments.count == 9 + 12 + 7 + 6 + 11
            torch.testing.assert_close(own.norm.double() ** 2, moments.second, rtol=1e-4, atol=1e-6)
    first = found["model.layers.0.self_attn.q_proj.weight"]
    rows = []  # from hidden states, by the model's own norm
    for batch in batches():
        x = net.model.layers[0].input_layernorm(net.model.embed_tokens(batch["input_ids"]))
        rows.append(x[batch["attention_mask"].bool()])
    x = torch.cat(rows).detach()
    torch.testing.assert_close(first.total, x.T @ x, rtol=1e-4, atol=1e-4)
    assert first is found["model.layers.0.self_attn.v_proj.weight"]  # read the same, are summed once
    assert first is not found["model.layers.0.mlp.up_proj.weight"]
    some = hessian(net, batches(), ["model.layers.3.mlp.down_proj.weight"], torch.float64)
    assert list(some) == ["model.layers.3.mlp.down_proj.weight"]
    refuses(lambda: hessian(net, batches(), ["lm_head.weight"]), "lm_head.weight", "q_proj")
    refuses(lambda: hessian(net, []), "batches", "empty")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])  # whose layers have Conv1D
def test_layer_by_layer_reads_what_the_whole_model_reads(name: str) -> None:
    net, data = build(name), batches(name)
    expected = hessian(net, data)
    with torch.no_grad():
        replay = banks._Replay(net, data)
        for index, layer in enumerate(linears(net)):
            assert len(layer) >= 2
            for key, found in replay.grams(index, layer, full=True, move=True).items():
                assert torch.equal(found.total, expected[key].total), key
                assert found.count == int(sum(b["attention_mask"].sum() for b in data))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in View(net).stack.modules())


def test_a_model_that_adds_between_layers_is_refused(tmp_path: Path) -> None:
    net = copy.deepcopy(model())
    forward = net.model.layers[3].forward
    net.model.layers[3].forward = lambda hidden, **kwargs: forward(hidden + 1, **kwargs)
    make(tmp_path / "inside", "wanda", net=net)  # what a layer does inside is its own affair
    net.model.layers[3].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]), prepend=True)
    refuses(lambda: make(tmp_path / "between", "wanda", net=net), "layer 3", "layer 2")


@pytest.mark.parametrize("solver", SOLVERS)
def test_bank_holds_what_the_solver_gives_on_dense_inputs(solver: str, tmp_path: Path) -> None:
    net = model()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bank, grams = make(tmp_path, solver), hessian(net, batches())
    weights = dict(net.named_parameters())
    assert bank.names == tuple(grams) and len(bank.names) == 7 * 6
    act: dict[str, Callable[[Tensor, Gram, int], Tensor]] = {
        "sparsegpt": lambda w, g, i: sparsegpt(w, g.total, zeros=SPARSE.zeros(w.numel(), i)),
        "wanda": lambda w, g, i: wanda(w, g.norm, zeros=SPARSE.zeros(w.numel(), i)),
        "magnitude": lambda w, g, i: magnitude(w, zeros=SPARSE.zeros(w.numel(), i)),
        "gptq": lambda w, g, i: gptq(w, g.total, i, 16)[0],
        "rtn": lambda w, g, i: rtn(w, i, 16)[0],
    }
    for name in bank.names[::4]:
        assert bank.size(name) == weights[name].numel()
        for level in bank.levels(name):
            expected = act[solver](weights[name].detach(), grams[name], level)
            found = bank.load(name, level)
            if solver == "wanda":  # norms from a diagonal and from a matrix product
                assert torch.isclose(found, expected).float().mean() > 0.99
            else:
                assert torch.equal(found, expected), (name, level)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.training


def test_sparse_levels_have_their_exact_zeros(tmp_path: Path) -> None:
    bank = make(tmp_path, "wanda", levels=SparsityLevels(0.5, 2, 200))
    assert {bank.size(name): bank.levels(name) for name in bank.names} == {
        1024: (-2, -1, 0, 1, 2),
        1536: (-2, -1, 0, 1, 2),
        512: (-1, 0, 1),  # keys and values of few groups: 256 - 400 would be below 0
    }
    for name in bank.names:
        for level in bank.levels(name):
            assert zeros(bank.load(name, level)) == bank.size(name) // 2 + 200 * level


def test_wrong_model_mode_comes_back(tmp_path: Path) -> None:
    net = copy.deepcopy(model()).train()
    net.model.layers[2].eval()
    modes = [m.training for m in net.modules()]
    make(tmp_path, "magnitude", net=net)
    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize(("solver", "level"), [("sparsegpt", 0), ("gptq", 4)])
def test_inputs_at_a_level_are_those_of_the_layers_before_at_it(solver: str, level: int, tmp_path: Path) -> None:
    net = model()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bank = make(tmp_path / "sequential", solver, inputs_at=level)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    dense = make(tmp_path / "dense", solver)
    probe = copy.deepcopy(net)
    own = dict(probe.named_parameters())
    for index, layer in enumerate(linears(net)):
        grams = hessian(probe, batches(), list(layer))  # layers before: at the level; this one and later: dense
        for name in layer:
            weight = own[name].detach().clone()
            if solver == "gptq":
                expected = gptq(weight, grams[name].total, level, 16)[0]
            else:
                expected = sparsegpt(weight, grams[name].total, zeros=SPARSE.zeros(weight.numel(), 0))
            assert torch.equal(bank.load(name, level), expected)
            assert torch.equal(dense.load(name, level), expected) == (index == 0)
        for name in layer:
            own[name].data = bank.load(name, level)


def test_bfloat16_models(tmp_path: Path) -> None:
    net = build("qwen3", torch.bfloat16)
    for solver in ("sparsegpt", "gptq"):
        levels = SPARSE if solver == "sparsegpt" else (3,)
        bank = Bank.build(net, batches("qwen3"), tmp_path / solver, levels, solver=solver, progress=False)
        name = bank.names[0]
        assert bank.load(name, bank.levels(name)[0]).dtype == torch.bfloat16
        with at_levels(net, bank, {n: bank.levels(n)[0] for n in bank.names}), torch.no_grad():
            assert bool(net(**batches("qwen3")[0]).logits.isfinite().all())


# --------------------------------------------------------------------------- files


def test_storage_is_what_is_saved(tmp_path: Path) -> None:
    sparse, quantised = make(tmp_path / "s", "magnitude"), make(tmp_path / "q", "rtn")
    for name in sparse.names:
        numel = sparse.size(name)
        assert sparse.bytes(name, 0) == numel / 8 + 4 * numel / 2  # one bit a weight, and the float32 half that stays
        _, packed = rtn(dict(model().named_parameters())[name], 2, 16)
        assert quantised.bytes(name, 2) * 8 == packed.bits_per_weight * numel


def test_a_bank_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(tmp_path / "whole", inputs_at=0)
    solved: list[str] = []
    stored = banks._Recipe.stored

    def counted(self: Any, weight: Tensor, level: int, prepared: Any) -> dict[str, Tensor]:
        solved.append("one")
        if len(solved) == 50:
            raise KeyboardInterrupt
        return stored(self, weight, level, prepared)

    monkeypatch.setattr(banks._Recipe, "stored", counted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "part", inputs_at=0)
    there = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "part").glob("*.safetensors")}
    assert 5 < len(there) < 30
    refuses(lambda: Bank.open(tmp_path / "part"), "is missing", "not finished")
    resumed = make(tmp_path / "part", inputs_at=0)
    levels = sum(len(whole.levels(name)) for name in whole.names)
    done = sum(len(whole.levels(name)) for name in whole.names if f"{name}.safetensors" in there)
    assert len(solved) == 50 + levels - done
    for name, at in there.items():
        assert (tmp_path / "part" / name).stat().st_mtime_ns == at
    for name in whole.names:
        assert (tmp_path / "part" / f"{name}.safetensors").read_bytes() == whole._file(name).read_bytes()
    make(tmp_path / "part", inputs_at=0)
    assert len(solved) == 50 + levels - done  # nothing is left to do
    Bank.build(
        model(), None, tmp_path / "part", SPARSE, group=16, inputs_at=0, progress=False
    )  # not even data is needed
    assert resumed.names == whole.names
    assert not list((tmp_path / "part").glob("*.new"))


def test_another_bank_in_the_folder_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "rtn")
    refuses(lambda: make(tmp_path, "gptq"), "holds another bank", "solver", "'rtn'", "'gptq'")
    refuses(lambda: make(tmp_path, "rtn", levels=(2, 3)), "levels")
    other = build("qwen3")
    refuses(lambda: make(tmp_path, "rtn", net=other), "model.layers.0.self_attn.q_proj.weight", "32", "64")


def test_build_refuses_wrong_arguments(tmp_path: Path) -> None:
    refuses(lambda: make(tmp_path, "sparse"), "solver = 'sparse'", "sparsegpt, wanda")
    refuses(lambda: make(tmp_path, "sparsegpt", levels=(2, 3)), "levels of sparsegpt", "sparsity_levels")
    refuses(lambda: make(tmp_path, "gptq", levels=SPARSE), "levels of gptq", "2..8")
    refuses(lambda: make(tmp_path, "gptq", levels=(4, 3)), "rising")
    refuses(lambda: make(tmp_path, "gptq", inputs_at=3), "inputs_at = 3", "(2, 4)")
    refuses(lambda: make(tmp_path, block=0), "block = 0")
    refuses(lambda: make(tmp_path, damp=-0.1), "damp = -0.1")
    refuses(lambda: Bank.build(model(), None, tmp_path, SPARSE, progress=False), "batches = None", "magnitude and rtn")
    refuses(lambda: Bank.build(model(), [], tmp_path, SPARSE, progress=False), "batches", "empty")
    refuses(lambda: linears(torch.nn.Linear(3, 3)), "decoder layers")


def test_damaged_banks_are_refused(tmp_path: Path) -> None:
    bank = make(tmp_path / "bank", "magnitude")
    name = bank.names[8]
    file, about = bank._file(name), tmp_path / "bank" / "bank.json"
    refuses(lambda: Bank.open(tmp_path), "bank.json is missing")
    good, said = load_file(file), about.read_text()

    def with_file(**changes: Tensor | None) -> None:
        tensors = {k: v for k, v in {**good, **changes}.items() if v is not None}
        save_file(tensors, file)

    with_file(**{"0.mask": None})
    refuses(lambda: Bank.open(tmp_path / "bank"), file.name, "0.mask is missing")
    with_file(**{"0.mask": torch.zeros(3, 3, dtype=torch.uint8)})
    refuses(lambda: Bank.open(tmp_path / "bank"), "0.mask is U8 3x3")
    with_file(**{"0.values": good["0.values"].double()})
    refuses(lambda: Bank.open(tmp_path / "bank"), "0.values is F64")
    with_file(**{"0.values": good["0.values"][1:].clone()})
    refuses(lambda: Bank.open(tmp_path / "bank").load(name, 0), "0.values has 255", "256")
    with_file(**{"0.values": good["0.values"] * torch.nan})
    refuses(lambda: Bank.open(tmp_path / "bank").load(name, 0), "0.values", "NaN")
    file.write_bytes(file.read_bytes()[:-9])
    refuses(lambda: Bank.open(tmp_path / "bank"), "cut off")
    save_file(good, file)
    for change, words in (
        ({"version": 2}, "version is 2"),
        ({"matrices": []}, "matrices"),
        ({"recipe": {}}, "KeyError"),
        ({"recipe": {"solver": "x", "group": 1}}, "solver 'x'"),
        ({"matrices": {name: {"shape": [32], "dtype": "float32", "levels": [0]}}}, "IndexError"),
        ({"matrices": {name: {"shape": [32, 32], "dtype": "int8", "levels": [0]}}}, "int8"),
        ({"matrices": {"../out": {"shape": [32, 32], "dtype": "float32", "levels": [0]}}}, "../out"),
    ):
        about.write_text(json.dumps({**json.loads(said), **change}))
        refuses(lambda: Bank.open(tmp_path / "bank"), words)
    about.write_text(said)
    assert Bank.open(tmp_path / "bank").names == bank.names


# --------------------------------------------------------------------------- live models


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make(tmp_path_factory.mktemp("bank"), "magnitude")


def logits(net: Any) -> Tensor:
    with torch.no_grad():
        return net(**batches()[0]).logits


def test_at_levels_restores_bit_for_bit(bank: Bank) -> None:
    net = copy.deepcopy(model())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    homes = {k: v.data_ptr() for k, v in net.named_parameters()}
    dense = logits(net)
    levels = {name: bank.levels(name)[0] for name in bank.names[:9]}
    for fails in (False, True):
        try:
            with at_levels(net, bank, levels) as loaded:
                assert loaded == levels
                assert not torch.equal(logits(net), dense)
                for name, parameter in net.named_parameters():
                    expected = bank.load(name, levels[name]) if name in levels else before[name]
                    assert torch.equal(parameter, expected)
                load_levels_(net, bank, {bank.names[-1]: 0}, loaded)  # beyond the first choice: restored as well
                if fails:
                    raise RuntimeError("stop")
        except RuntimeError:
            assert fails
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert {k: v.data_ptr() for k, v in net.named_parameters()} == homes
        assert torch.equal(logits(net), dense)


def test_oracle_7_load_levels_touches_changed_matrices_only(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    net = copy.deepcopy(model())
    loads: list[tuple[str, int]] = []
    load = Bank.load
    monkeypatch.setattr(Bank, "load", lambda self, n, i: loads.append((n, i)) or load(self, n, i))
    loaded: dict[str, int] = {}
    start = dict.fromkeys(bank.names, 0)
    assert load_levels_(net, bank, start, loaded) == list(bank.names)
    assert loaded == start and len(loads) == len(bank.names)
    loads.clear()
    homes = {k: v.data_ptr() for k, v in net.named_parameters()}
    child = {**start, bank.names[3]: 1, bank.names[20]: -1}
    assert load_levels_(net, bank, child, loaded) == [bank.names[3], bank.names[20]]
    assert loads == [(bank.names[3], 1), (bank.names[20], -1)] and loaded == child
    moved = {k for k, v in net.named_parameters() if v.data_ptr() != homes[k]}
    assert moved == {bank.names[3], bank.names[20]}
    assert load_levels_(net, bank, child, loaded) == [] and len(loads) == 2
    fresh = copy.deepcopy(model())
    load_levels_(fresh, bank, child, {})
    assert torch.equal(logits(fresh), logits(net))


def test_oracle_7_nothing_loaded_is_the_dense_model(bank: Bank) -> None:
    net = copy.deepcopy(model())
    with at_levels(net, bank, {}):
        assert torch.equal(logits(net), logits(model()))


def test_another_model_is_refused_by_its_tensor(bank: Bank) -> None:
    net = copy.deepcopy(model())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    name = bank.names[0]

    def enter(other: Any, levels: dict[str, int]) -> None:
        with at_levels(other, bank, levels):
            raise AssertionError("entered")

    refuses(lambda: enter(build("qwen3"), {name: 0}), name, "64x32", "32x32", "another model")
    refuses(lambda: load_levels_(build("phi3"), bank, {name: 0}, {}), "self_attn.q_proj.weight", "no such linear layer")
    longer = copy.deepcopy(model())
    longer.model.layers.append(copy.deepcopy(longer.model.layers[0]))
    refuses(lambda: enter(longer, {name: 0}), "model.layers.6.self_attn.q_proj.weight", "no such matrix")
    loaded: dict[str, int] = {}
    refuses(lambda: load_levels_(net, bank, {name: 0, "lm_head.weight": 0}, loaded), "lm_head.weight")
    refuses(lambda: load_levels_(net, bank, {name: 0, bank.names[1]: 9}, loaded), "level = 9", bank.names[1])
    assert loaded == {} and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_sparser_level_is_further_from_dense(bank: Bank) -> None:
    net, dense, off = copy.deepcopy(model()), logits(model()), []
    for level in (-1, 0, 1):
        with at_levels(net, bank, dict.fromkeys(bank.names, level)):
            off.append(float((logits(net) - dense).square().mean()))
    assert off == sorted(off)


def test_view_finds_the_layers_linears() -> None:
    for name in ("llama", "phi3", "opt", "qwen3-moe"):
        net = build(name)
        own = dict(net.named_parameters())
        found = linears(net)
        assert len(found) == len(View(net))
        for layer in found:
            for key, linear in layer.items():
                assert own[key] is linear.weight
    assert sorted(n.split(".", 3)[3] for n in linears(build("phi3"))[0]) == [
        "mlp.down_proj.weight", "mlp.gate_up_proj.weight", "self_attn.o_proj.weight", "self_attn.qkv_proj.weight",
    ]  # fmt: skip

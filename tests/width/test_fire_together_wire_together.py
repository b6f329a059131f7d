"""Fire Together Wire Together: the oracles of its card, by number, for filters of a CNN and for neurons of decoders."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparing
from sparing.engine import gating
from sparing.engine.gating import (
    Fired,
    GatedCNN,
    GatedConv,
    alike,
    flops,
    gate_loss,
    gathered_mlp,
    mlp_activity,
    relabelled,
    train_gates,
)
from sparing.engine.view import View
from sparing.grid.method import BudgetError, Error, Shape
from sparing.grid.trace import count
from sparing.testing.models import LAYERS, build, prompt
from sparing.width.fire_together_wire_together import (
    FireTogetherWireTogether,
    Gate,
    curve,
    labels,
    uniform_labels,
)

PLAIN = ("llama", "qwen2", "gemma3", "phi3", "llava")  # separate and fused projections, silu and gelu, biases elsewhere


# --------------------------------------------------------------------------- a small CNN


def cnn(joint: bool = False, seed: int = 0, **gate: Any) -> GatedCNN:
    """Two blocks with strides, a bias and an inverted scale; running statistics that are off 0 and 1."""
    torch.manual_seed(seed)
    blocks = []
    for channels, filters, stride, bias in ((3, 7, 1, True), (7, 10, 2, False), (10, 6, 1, False)):
        conv = nn.Conv2d(channels, filters, 3, stride, 1, bias=bias)
        norm = nn.BatchNorm2d(filters)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        blocks.append(GatedConv(conv, norm, Gate(channels, filters, **gate), joint=joint))
    return GatedCNN(blocks, nn.Sequential(nn.Flatten(), nn.Linear(6 * 16, 4))).eval()


def images(count: int = 9) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def masks(count: int = 9, share: float = 0.5) -> list[Tensor]:
    lot = torch.Generator().manual_seed(4)
    return [torch.rand(count, filters, generator=lot) < share for filters in (7, 10, 6)]


def by_hand(a: list[float], r: float) -> list[int]:
    """The definition, with exact sums over one sorted row."""
    order = sorted(range(len(a)), key=lambda c: -a[c])
    total, mass, fires = math.fsum(a), 0.0, [0] * len(a)
    for c in order:
        mass += a[c]
        if mass / total - r <= 1e-5:
            fires[c] = 1
    return fires


# --------------------------------------------------------------------------- 1, 2: labels


@pytest.mark.parametrize(
    ("a", "r", "expected"),
    [
        ([4, 3, 2, 1], 0.85, [1, 1, 0, 0]),
        ([4, 3, 2, 1], 0.9, [1, 1, 1, 0]),
        ([1, 1, 1, 1], 0.75, [1, 1, 1, 0]),
        ([4, 0, 2, 0], 1.0, [1, 0, 1, 0]),
        ([1, 3, 2, 4], 0.9, [0, 1, 1, 1]),
        ([1, 9], 0.85, [0, 1]),
    ],
)
def test_oracle_1_worked_labels(a: list[float], r: float, expected: list[int]) -> None:
    assert labels(torch.tensor([a], dtype=torch.float), r).int().tolist() == [expected]


def test_oracle_1_the_strongest_alone_above_r() -> None:
    a = torch.tensor([[9.0, 1.0]])
    assert labels(a, 0.85, keep_one=False).tolist() == [[False, False]]
    assert labels(a, 0.85).tolist() == [[True, False]]
    assert not labels(torch.zeros(2, 3), 0.85).any() and not labels(torch.zeros(2, 3), 1.0).any()


def test_oracle_1_uniform_variant() -> None:
    a = torch.tensor([[5.0, 1, 4, 2, 3], [0.0, 0, 0, 2, 3]])
    assert uniform_labels(a, 0.5).int().tolist() == [[1, 0, 1, 0, 1], [0, 0, 0, 1, 1]]  # floor(2.5) = 2 leave, and dead
    assert uniform_labels(a, 0.0).int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert bool(uniform_labels(a, -1.0).all())
    assert not uniform_labels(a, 1.0).any()


@pytest.mark.parametrize("r", [0, 1.01, -0.5, math.nan])
def test_oracle_1_r_is_a_share(r: float) -> None:
    with pytest.raises(Error, match=r"r = .*: must be a number in \(0, 1\]"):
        labels(torch.ones(1, 2), r)
    with pytest.raises(Error, match=r"ratio = 1.5: must be"):
        uniform_labels(torch.ones(1, 2), 1.5)


def test_oracle_2_monotone_scale_free_and_per_sample() -> None:
    lot = torch.Generator().manual_seed(7)
    a = torch.randn(40, 23, generator=lot).relu() ** 2
    a[:, 3] = 1e-7  # neither dead nor worth the slack
    rs = [0.05, 0.2, 0.5, 0.8, 0.95, 0.999, 0.99999, 1.0]
    found = [labels(a, r) for r in rs]
    for low, high in itertools.pairwise(found):
        assert not (low & ~high).any()  # nested, so k does not fall
    assert found[0].sum() < found[-1].sum()
    for r, label in zip(rs, found):
        for c in (2.0**-10, 0.5, 2.0**14, *(() if r == 0.99999 else (1e-3, 37.0))):  # there, r + slack is a sum itself
            assert torch.equal(labels(c * a, r), label)
        alone = torch.cat([labels(a[i : i + 1], r) for i in range(len(a))])
        assert torch.equal(alone, label)
    for row in a[:5]:
        expected = by_hand(row.tolist(), 0.8)
        assert labels(row[None], 0.8).int().tolist() == [expected]


# --------------------------------------------------------------------------- 3, 4, 8: the gate


def test_oracle_3_a_perfect_gate_at_r_1_changes_nothing() -> None:
    model, x = cnn(), images()
    dense, fired = model.dense(x)
    with torch.no_grad():
        model.blocks[1].norm.bias[2:4] = -30.0  # type: ignore[union-attr, index]
        dense, fired = model.dense(x)
        goal = [f.mask_BK for f in relabelled(fired, functools.partial(labels, r=1.0))]
        assert not goal[1][:, 2:4].any() and 0 < goal[0].float().mean() <= 1  # something is dropped
        masked, _ = model(x, goal)
    torch.testing.assert_close(masked, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_oracle_4_gates_forced_open_give_the_dense_network(training: bool) -> None:
    model, x = cnn(), images()
    for block in model.blocks:
        nn.init.zeros_(block.gate.linear.weight)  # type: ignore[union-attr, arg-type]
        nn.init.ones_(block.gate.linear.bias)  # type: ignore[union-attr, arg-type]
    reference = x
    with torch.no_grad():
        for block in model.blocks:
            block.train(training)
            reference = block.norm(block.conv(reference)).relu()  # type: ignore[operator]
        for norm in (block.norm for block in model.blocks):
            norm.momentum = 0.0  # the pass above moved the statistics, which only evaluation reads
        model.train(training)
        out, fired = model(x)
    assert all(bool(f.mask_BK.all()) for f in fired)
    assert torch.equal(out, model.head(reference))


def test_oracle_8_a_logit_of_zero_is_closed() -> None:
    model, x = cnn(), images(2)
    for block in model.blocks:
        nn.init.zeros_(block.gate.linear.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(block.gate.linear.bias)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        out, fired = model(x)
    assert not any(f.mask_BK.any() for f in fired)
    assert torch.equal(out, model.head(torch.zeros(2, 6, 4, 4)))


def test_oracle_8_for_neurons() -> None:
    state = {"gate.0.down": torch.ones(1, 4), "gate.0.up": torch.zeros(3, 1), "gate.0.bias": torch.tensor([-1.0, 0, 1])}
    method = FireTogetherWireTogether().with_state(state)
    assert method.fires(0, torch.randn(2, 4)).tolist() == [[False, False, True]] * 2


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("side", [1, 2])
def test_gate_reads_the_pooled_input(pool: str, softmax: bool, side: int) -> None:
    gate, x = Gate(3, 5, pool, side, softmax), images(2)
    step = 8 // side
    for b in range(2):
        cells = [
            x[b, c, i * step : (i + 1) * step, j * step : (j + 1) * step]
            for c in range(3)
            for i in range(side)
            for j in range(side)
        ]
        e = torch.tensor([float(cell.max() if pool == "max" else cell.mean()) for cell in cells])
        e = e.exp() / e.exp().sum() if softmax else e
        torch.testing.assert_close(gate(x)[b], gate.linear.weight @ e + gate.linear.bias)


def test_gate_and_block_refuse_what_they_cannot_do() -> None:
    with pytest.raises(Error, match=r"pool = 'sum': must be max \| avg"):
        Gate(3, 5, "sum")
    with pytest.raises(Error, match=r"side = 0: must be"):
        Gate(3, 5, side=0)
    with pytest.raises(Error, match=r"conv: groups = 2"):
        GatedConv(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), Gate(4, 4))
    with pytest.raises(Error, match=r"conv: padding = 'same'"):
        GatedConv(nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4), Gate(4, 4))
    with pytest.raises(Error, match="no peaks"):
        gate_loss([Fired(torch.ones(1, 2).bool(), torch.zeros(1, 2), None, 1)], lambda a: a > 0)
    with pytest.raises(Error, match="no logits"):
        gate_loss([Fired(torch.ones(1, 2).bool(), None, torch.ones(1, 2), 1)], lambda a: a > 0)


# --------------------------------------------------------------------------- 5: what trains what


def gradients(model: GatedCNN, loss: Tensor) -> tuple[float, float]:
    """Summed gradient of the gates and of the rest."""
    model.zero_grad()
    loss.backward()
    parts = [0.0, 0.0]
    for name, p in model.named_parameters():
        parts[".gate." not in name] += 0.0 if p.grad is None else float(p.grad.abs().sum())
    return parts[0], parts[1]


@pytest.mark.parametrize("joint", [False, True])
def test_oracle_5_who_gets_which_gradient(joint: bool) -> None:
    model = cnn(joint=joint).train()
    label = functools.partial(labels, r=0.7)
    scores, fired = model(images())
    assert any(0 < f.mask_BK.float().mean() < 1 for f in fired)
    gates, backbone = gradients(model, gate_loss(fired, label))
    assert gates > 0 and (backbone > 0) == joint
    if not joint:
        assert backbone == 0.0
    scores, fired = model(images())
    gates, backbone = gradients(model, nn.functional.cross_entropy(scores, torch.arange(9) % 4))
    assert gates == 0.0 and backbone > 0


def test_oracle_5_the_loss_is_a_sum_over_filters_and_means_over_images_and_layers() -> None:
    model = cnn().train()
    _, fired = model(images())
    label = functools.partial(labels, r=0.7)
    expected = 0.0
    for f in fired:
        assert f.logits_BK is not None and f.peak_BK is not None
        for z, g in zip(f.logits_BK.tolist(), label(f.peak_BK).tolist()):
            p = [1 / (1 + math.exp(-v)) for v in z]
            expected -= sum(math.log(q if on else 1 - q) for q, on in zip(p, g)) / 9 / 3
    assert gate_loss(fired, label).item() == pytest.approx(expected, rel=1e-5)


def test_training_path_labels_the_unpruned_output() -> None:
    block = cnn().blocks[0].train()
    x, mask = images(), masks()[0]
    out, fired = block(x, None, mask)
    full = block.norm(block.conv(x)).relu()  # type: ignore[operator]
    torch.testing.assert_close(fired.peak_BK, full.abs().flatten(2).max(-1).values.detach())
    torch.testing.assert_close(out, full * mask[..., None, None])
    assert fired.places == 64 and torch.equal(fired.mask_BK, mask)


def test_train_gates_follows_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates move in the first half only; the backbone's rate falls at the milestones, the gates' does not."""
    steps: list[tuple[float, float, float]] = []
    own = torch.optim.SGD.step

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        group = self.param_groups[0]
        steps.append((group["lr"], group["weight_decay"], group["momentum"]))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    model, x = cnn(), images(8)
    label = functools.partial(labels, r=0.7)
    train_gates(model, x, torch.arange(8) % 4, label, epochs=4, milestones=(1, 3), batch=8, progress=False)
    backbone = [pytest.approx((lr, 5e-4, 0.9)) for lr in (1e-3, 1e-4, 1e-4, 1e-5)]
    gates = (0.1, 0, 0.9)
    assert steps == [backbone[0], gates, backbone[1], gates, backbone[2], backbone[3]]
    assert not model.training


# --------------------------------------------------------------------------- 6: only the selected ones are computed


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("relu", [True, False])
def test_oracle_6_selected_filters_equal_compute_then_mask(share: float, relu: bool) -> None:
    model, x = cnn(), images()
    mask = masks(share=share)
    mask[0][3] = mask[0][5]  # two images alike, seven of their own
    with torch.no_grad():
        h, g, alive = x, x, None
        for block, m in zip(model.blocks, mask):
            assert isinstance(block, GatedConv)
            block.relu = relu
            h = block.dense(h) * m[..., None, None]
            g = block.wanted(g, m, alive)
            alive = m
            assert (g - h).abs().max() < 1e-5
        out, fired = model(x, mask)
    torch.testing.assert_close(out, model.head(h))
    assert all(torch.equal(f.mask_BK, m) for f, m in zip(fired, mask))


def test_oracle_6_images_of_one_mask_are_one_product() -> None:
    mask = torch.tensor([[1, 0], [0, 1], [1, 0], [1, 0]]).bool()
    groups = {tuple(m.tolist()): rows.tolist() for rows, m in alike(mask)}
    assert groups == {(True, False): [0, 2, 3], (False, True): [1]}


@pytest.mark.parametrize("piece", [1, 700, 1 << 20])  # bytes gathered at a time: a row, a few, all
@pytest.mark.parametrize("name", PLAIN)
def test_oracle_6_selected_neurons_equal_compute_then_mask(
    name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gating, "_PIECE", piece)
    model = build(name)
    layer = View(model).layers[2]
    for linear in (m for m in layer.mlp.modules() if isinstance(m, nn.Linear)):  # type: ignore[union-attr]
        linear.bias = nn.Parameter(torch.randn(linear.out_features))
    x = torch.randn(3, 5, 32)
    keep = torch.rand(3, 5, layer.neurons) < 0.4
    keep[0, 0], keep[1, 1] = False, True
    down = layer.projection("down_proj")
    held: dict[str, Tensor] = {}
    hook = down.register_forward_pre_hook(lambda m, args: held.update(a=args[0]))
    with torch.no_grad():
        layer.mlp(x)  # type: ignore[misc]
        hook.remove()
        expected = down(held["a"] * keep)
        out, ran = gathered_mlp(layer, x, keep)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert ran == 1  # the union of fifteen tokens, one of which wants all
        out, ran = gathered_mlp(layer, x[2, 3:4], keep[2, 3:4])
        torch.testing.assert_close(out, expected[2, 3:4], rtol=1e-4, atol=1e-4)
        done = count(lambda: gathered_mlp(layer, x[2, 3:4], keep[2, 3:4]))[0]
    k = int(keep[2, 3].sum())
    assert done == 2 * 32 * (2 * k + layer.neurons)  # gate and up of k neurons, down_proj whole
    assert ran == pytest.approx(done / (6 * 32 * layer.neurons))


def test_mlps_that_cannot_be_gathered_are_refused() -> None:
    model = build("llama")
    layer = View(model).layers[0]
    mlp: Any = layer.mlp
    x, keep = torch.randn(1, 32), torch.ones(1, 48).bool()
    mlp.up_proj.weight = nn.Parameter(torch.zeros(48 * 32, 1))  # as packed weights look
    with pytest.raises(Error, match="cannot be gathered"):
        gathered_mlp(layer, x, keep)
    mlp.act_fn = None
    with pytest.raises(Error, match="layer 0: LlamaMLP has no activation"):
        gathered_mlp(layer, x, keep)


# --------------------------------------------------------------------------- 7: FLOPs


def test_oracle_7_estimate_by_hand() -> None:
    model, x = cnn(), images()
    found = relabelled(model.dense(x)[1], functools.partial(labels, r=0.6))
    k = [float(f.mask_BK.sum(1).float().mean()) for f in found]
    by_formula = k[0] * 64 * 3 * 9 + k[1] * 16 * k[0] * 9 + k[2] * 16 * k[1] * 9
    assert flops(model, found) == pytest.approx(2 * by_formula)
    assert curve(model, x, [0.6])[0.6] == pytest.approx(2 * by_formula)


def test_oracle_7_measured_flops_of_label_masks_match_the_estimate() -> None:
    model, x = cnn(), images(60)
    fired = model.dense(x)[1]
    rs = (0.3, 0.6, 0.9, 1.0)
    estimates = curve(model, x, rs)
    assert list(estimates.values()) == sorted(estimates.values())
    with torch.no_grad():
        for r in rs:
            goal = [f.mask_BK for f in relabelled(fired, functools.partial(labels, r=r))]
            ran = count(lambda goal=goal: model(x, goal))[0] / len(x) - 2 * 4 * 96  # without the head
            exact = [
                sum(2 * int(b) * places * a * 9 for a, b in zip(before, now))
                for before, now, places in zip(
                    [[3] * 60, goal[0].sum(1).tolist(), goal[1].sum(1).tolist()], [m.sum(1) for m in goal], (64, 16, 16)
                )
            ]
            assert ran == pytest.approx(sum(exact) / len(x))
            assert ran == pytest.approx(estimates[r], rel=0.03)


def test_oracle_7_trained_gates_spend_what_was_estimated() -> None:
    """Images of two kinds that light up different filters: their labels can be learned."""
    torch.manual_seed(5)
    model, kind = cnn(softmax=False, seed=5), torch.arange(96) % 2
    x = 0.05 * torch.randn(96, 3, 8, 8)
    x[kind == 0, 0] += 2.0
    x[kind == 1, 2] += 2.0
    frozen = {k: v.clone() for k, v in model.state_dict().items() if ".gate." not in k and "head" not in k}
    label = functools.partial(labels, r=0.8)
    estimate = curve(model, x, [0.8])[0.8]
    with torch.no_grad():
        untrained = flops(model, model(x)[1])
    for block in model.blocks:  # BCE alone, on the dense network that the estimate was made of
        gate, y = block.gate, x
        for before in model.blocks[: list(model.blocks).index(block)]:
            y = before.dense(y).detach()  # type: ignore[operator]
        goal = label(block.dense(y).abs().amax((2, 3)))  # type: ignore[operator]
        optimizer = torch.optim.SGD(gate.parameters(), lr=0.1, momentum=0.9)  # type: ignore[union-attr]
        for _ in range(150):
            logits = gate(y)  # type: ignore[operator]
            loss = gate_loss([Fired(logits > 0, logits, goal.float(), 1)], lambda a: a > 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        fired = model(x)[1]
    gates = 2 * sum(b.gate.linear.weight.numel() for b in model.blocks)  # type: ignore[union-attr, arg-type, misc]
    assert flops(model, fired) - gates == pytest.approx(estimate, rel=0.05)
    assert abs(untrained - gates - estimate) > 0.1 * estimate
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in frozen.items())


# --------------------------------------------------------------------------- neurons of decoders: the method


def text(name: str = "llama") -> list[dict[str, Tensor]]:
    return [prompt(name, (9, 12, 7, 12), side="right", seed=s) for s in (5, 6, 7)]


@functools.cache
def fitted() -> FireTogetherWireTogether:
    return FireTogetherWireTogether(r=0.7, rank=4).fit(build("llama"), text(), epochs=30, progress=False)


def decode(model: Any, steps: int = 4, batch: dict[str, Tensor] | None = None) -> Any:
    batch = {"input_ids": torch.tensor([[3, 17, 90, 4]])} if batch is None else batch
    with torch.no_grad():
        return model.generate(
            **batch, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )


def test_activity_is_what_the_neurons_give() -> None:
    model, batch = build("llama"), text()[0]
    labelled = {**batch, "labels": torch.where(torch.arange(12) >= 10, batch["input_ids"], -100)}
    seen: dict[str, Tensor] = {}
    mlp = model.model.layers[3].mlp
    model.train()
    hook = mlp.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    found = mlp_activity(model, batch)
    hook.remove()
    assert model.training and len(found) == LAYERS
    real = batch["attention_mask"].bool()
    x, a = found[3]
    torch.testing.assert_close(x, seen["x"][real])
    torch.testing.assert_close(a, mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp.down_proj(a), seen["out"][real])
    assert len(mlp_activity(model, labelled)[3][0]) == 4 * 2


def test_fit_learns_what_fires_and_leaves_the_model() -> None:
    model, batch = build("llama"), prompt("llama", (12, 12, 12, 12), side="none", seed=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = FireTogetherWireTogether(r=0.7, rank=8).fit(model, [batch], epochs=60, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())  # decoupled: the backbone gets nothing
    right = static = 0.0
    for i, (x, a) in enumerate(mlp_activity(model, batch)):
        goal = labels(a.abs(), 0.7)
        right += float((method.fires(i, x) == goal).float().mean()) / LAYERS
        static += float(torch.maximum(goal.float().mean(0), 1 - goal.float().mean(0)).mean()) / LAYERS
    assert right > static + 0.3 * (1 - static)  # far fewer errors than the best mask that does not read x
    again = FireTogetherWireTogether(r=0.7, rank=8).fit(model, [batch], epochs=60, progress=False)
    assert all(torch.equal(v, again.state[k]) for k, v in method.state.items())
    assert method.state["gate.0.down"].shape == (8, 32) and method.state["gate.0.up"].shape == (48, 8)


def test_fit_refuses_a_model_without_plain_mlps_and_no_data() -> None:
    with pytest.raises(Error, match="down_proj"):
        FireTogetherWireTogether().fit(build("gpt-neox"), [prompt("gpt-neox")])
    with pytest.raises(Error, match=r"layer 0.*no plain MLP"):
        mlp_activity(build("mixtral"), prompt("mixtral"))
    with pytest.raises(Error, match="batches: the calibration data is empty"):
        FireTogetherWireTogether().fit(build("llama"), [])
    with pytest.raises(Error, match="batches: one has no token"):
        batch = prompt("llama", (6, 6))
        FireTogetherWireTogether().fit(build("llama"), [{**batch, "labels": torch.full((2, 6), -100)}])


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_oracle_7_the_budget_is_the_share_of_neurons_that_fires(keep: float) -> None:
    method = fitted().replace(neurons=keep)
    shares = [
        float(method.fires(i, x).float().mean())
        for batch in text()
        for i, (x, _) in enumerate(mlp_activity(build("llama"), batch))
    ]
    assert sum(shares) / len(shares) == pytest.approx(keep, abs=0.02)


def test_oracle_4_full_budget_is_dense_bit_for_bit() -> None:
    model = build("llama")
    dense = decode(model)
    for method in (fitted().replace(neurons=1.0), fitted().at(1.0, sparing.shape(model))):
        with sparing.attach(model, method) as run:
            out = decode(model)
        assert torch.equal(torch.stack(out.logits), torch.stack(dense.logits))
        assert run.trace.share("width", "decode") == 1
    bias = {f"gate.{i}.bias": torch.ones(48) for i in range(LAYERS)}
    zero = {f"gate.{i}.up": torch.zeros(48, 4) for i in range(LAYERS)}
    with sparing.attach(
        model, fitted().with_state({**fitted().state, **bias, **zero}), warn=False
    ):  # z = +1 everywhere
        out = decode(model)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(dense.logits), rtol=1e-5, atol=1e-5)


def test_prompt_runs_dense_and_generated_tokens_are_gated() -> None:
    """Against a model whose down_proj inputs are masked by hand, from the first generated token on."""
    model, method = build("llama"), fitted().replace(neurons=0.3)
    with sparing.attach(model, method) as run:
        out = decode(model)
        ids = out.sequences
        once = model(ids, use_cache=False)
        run.prompt = 4
        uncached = model(ids, use_cache=False).logits
    inputs: dict[int, Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda m, args, i=i: inputs.update({i: args[0]}))

        def mask(m: Any, args: Any, i: int = i) -> Tensor:
            z = inputs[i] @ method.state[f"gate.{i}.down"].T @ method.state[f"gate.{i}.up"].T
            fires = z + method.state[f"gate.{i}.bias"] > method._offset
            return args[0] * (fires | (torch.arange(args[0].shape[1]) < 4)[:, None])

        layer.mlp.down_proj.register_forward_pre_hook(mask)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(uncached, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected[:, 3:-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(once.logits, build("llama")(ids).logits)  # all columns prompt: dense


def test_trace_and_flops_show_what_ran() -> None:
    model, method = build("llama"), fitted().replace(neurons=0.25)
    batch = {"input_ids": torch.tensor([[3, 17, 90, 4]])}
    read: list[Tensor] = []
    hooks = [layer.mlp.register_forward_pre_hook(lambda m, args: read.append(args[0])) for layer in model.model.layers]
    with torch.no_grad(), sparing.attach(model, method, trace=True) as run:
        cache = model(**batch).past_key_values
        prefill = run.trace.flops
        model(torch.tensor([[9]]), past_key_values=cache)
        flops = run.trace.flops - prefill
        assert run.trace.share("width", "prefill") == 1
        share = run.trace.share("width", "decode")
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        dense = count(lambda: model(**batch))[0]
        cache = model(**batch).past_key_values
        step = count(lambda: model(torch.tensor([[9]]), past_key_values=cache))[0]
    assert prefill == dense
    neurons = [int(method.fires(i, x).sum()) for i, x in enumerate(read[LAYERS:])]
    gates = LAYERS * 4 * (32 + 48)
    saved = 2 * (2 * 32 * sum(48 - k for k in neurons) - gates)
    assert flops == step - saved
    mlp = [(2 * k / 48 + 1) / 3 + (4 * (32 + 48) + 48) / (3 * 32 * 48) for k in neurons]
    layer = 3072 + 3 * 32 * 48  # attention and MLP
    assert share == pytest.approx(sum((3072 + 3 * 32 * 48 * s) / layer for s in mlp) / LAYERS, rel=1e-6)


def test_trace_counts_generated_tokens_only_in_a_pass_that_holds_both() -> None:
    model, method, ids = build("llama"), fitted().replace(neurons=0.25), torch.tensor([[3, 17, 90, 4, 33, 8, 61, 9]])
    with torch.no_grad(), sparing.attach(model, method) as run:
        cache = model(ids[:, :7]).past_key_values
        model(ids[:, 7:], past_key_values=cache)
        step = run.trace.share("width", "decode")
        run.trace.reset()
        run.prompt = 7
        model(ids, use_cache=False)
        both = run.trace.share("width")
    assert step < 1
    assert both == pytest.approx(1 - (1 - step) / 8, rel=1e-5)


SHAPE = Shape(layers=LAYERS, heads=4, groups=2, head_dim=8, hidden=32, neurons=48)


def test_at_counts_the_parameters_of_the_blocks() -> None:
    method = FireTogetherWireTogether(rank=4)
    for keep in (0.7, 0.8, 0.95):
        s = method.at(keep, SHAPE).neurons
        assert s is not None
        runs = 3072 + 4 * (32 + 48) + 32 * 48 * (2 * s + 1)
        assert runs == pytest.approx(keep * (3072 + 3 * 32 * 48))
    assert FireTogetherWireTogether()._costs(SHAPE)[1] == 2 * (32 + 48) / 32  # rank D // 16
    with pytest.raises(BudgetError, match=r"keep = 0.5: .*0.642 of the parameters"):
        method.at(0.5, SHAPE)


def test_controls_run_as_many_parameters() -> None:
    model, method = build("llama"), fitted().at(0.75, SHAPE)
    random, uniform = method.control("random", SHAPE, seed=3), method.control("uniform", SHAPE)
    neurons = random.fields()["neurons"]
    assert len(set(neurons)) > 1  # the gates spread their neurons unevenly over the layers
    spent = sum(3072 + 3 * 32 * n for n in neurons) / LAYERS / (3072 + 3 * 32 * 48)
    assert spent == pytest.approx(0.75, abs=0.02)
    assert random.fields()["seed"] == 3 and random.fields()["groups"] is None
    batch = text()[0]
    with torch.no_grad():
        dense = model(**batch).logits
        for control in (random, uniform):
            with sparing.attach(model, control):  # compensated from the same state
                assert not torch.equal(model(**batch).logits, dense)
    assert fitted().replace(neurons=1.0).control("uniform", SHAPE).fields()["neurons"] == (48,) * LAYERS


def test_save_and_load(tmp_path: Any) -> None:
    method = fitted().replace(neurons=0.4)
    again = sparing.load(method.save(tmp_path))
    assert again.fields() == method.fields()
    model = build("llama")
    with sparing.attach(model, method):
        here = decode(model)
    with sparing.attach(model, again):
        there = decode(model)
    assert torch.equal(torch.stack(here.logits), torch.stack(there.logits))
    with pytest.raises(Error, match="was fitted on another model"):
        sparing.attach(build("qwen3"), again)
    for use in (
        lambda: sparing.attach(model, FireTogetherWireTogether()),
        lambda: FireTogetherWireTogether(neurons=0.5).control("random", SHAPE),
    ):
        with pytest.raises(Error, match="needs training first"):
            use()

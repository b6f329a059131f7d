"""Image x filter and token x neuron: products with only those rows of a weight that a gate wants for this input."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sparing.engine.view import LayerView, View, evaluating
from sparing.grid.method import Error

# Shape letters: B images, C input channels, K filters, H and W of an image; R tokens, D hidden, N neurons.

Label = Callable[[Tensor], Tensor]  # strengths (B, K) -> which fire, bool (B, K)
_PIECE = 1 << 20  # bytes of a weight that are gathered at a time on a CPU


# --------------------------------------------------------------------------- convolutions


class Fired(NamedTuple):
    """What a gated convolution did with a batch.

    Attributes:
        mask_BK: bool, filters that count.
        logits_BK: of the gate; None where the mask was given.
        peak_BK: max |O| over the places of each filter's output, without gradient; None where only the filters of the
            mask were computed.
        places: H' W' of the output.
    """

    mask_BK: Tensor
    logits_BK: Tensor | None
    peak_BK: Tensor | None
    places: int


def alike(mask_BC: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of rows with the same mask: (indices of the rows, the mask (C,)).

    >>> [rows.tolist() for rows, _ in alike(torch.tensor([[True, False], [False, True], [True, False]]))]
    [[1], [0, 2]]
    """
    masks_GC, group_B = mask_BC.unique(dim=0, return_inverse=True)
    for number, mask_C in enumerate(masks_GC):
        yield (group_B == number).nonzero().flatten(), mask_C


class GatedConv(nn.Module):
    """Convolution, batch norm and ReLU, with a gate that says for each image which filters count.

    In training all filters are computed and the others multiplied by zero. In evaluation only the wanted filters are
    computed, from only the input channels that are alive, and zeros stand elsewhere: weights are gathered once for each
    group of images with the same mask (for every image, in the worst case). Both give the same numbers.

    Args:
        conv: one group; its filters are gated.
        norm: batch norm of its outputs.
        gate: (B, C, H, W) -> logits (B, K); a filter counts where its logit is above 0.
        relu: False leaves the ReLU out, as before the addition of a residual block.
        joint: the gate's loss reaches what lies before the gate; otherwise its input is detached.

    Raises:
        Error: the convolution has groups, or a padding by other than a number of zeros.
    """

    def __init__(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d, gate: nn.Module, *, relu: bool = True, joint: bool = False
    ) -> None:
        super().__init__()
        plain = {"groups": conv.groups == 1, "padding": not isinstance(conv.padding, str)}
        plain["padding_mode"] = conv.padding_mode == "zeros"
        for name, holds in plain.items():
            if not holds:
                raise Error(f"conv: {name} = {getattr(conv, name)!r}: must be one group, padded by zeros, in numbers")
        self.conv, self.norm, self.gate = conv, norm, gate
        self.relu, self.joint = relu, joint

    def dense(self, x_BCHW: Tensor) -> Tensor:
        """O, all filters: (B, K, H', W')."""
        y_BKHW = self.norm(self.conv(x_BCHW))
        return y_BKHW.relu() if self.relu else y_BKHW

    def wanted(self, x_BCHW: Tensor, mask_BK: Tensor, alive_BC: Tensor | None = None) -> Tensor:
        """Only the filters of the mask, zeros elsewhere; evaluation statistics. (B, K, H', W').

        Args:
            alive_BC: input channels that are not zero; None for all.
        """
        conv, norm = self.conv, self.norm
        B, C = x_BCHW.shape[:2]
        alive_BC = mask_BK.new_ones(B, C) if alive_BC is None else alive_BC
        out_BKHW = x_BCHW.new_zeros(B, conv.out_channels, *self.size(x_BCHW))
        for rows, mask in alike(torch.cat([alive_BC, mask_BK], 1)):
            channel, filters = mask[:C].nonzero().flatten(), mask[C:].nonzero().flatten()
            if not len(filters):
                continue
            channel = channel if len(channel) else channel.new_zeros(1)  # all are zero, and so is channel 0
            y = F.conv2d(
                x_BCHW[rows][:, channel],
                conv.weight[filters][:, channel],
                None if conv.bias is None else conv.bias[filters],
                conv.stride,
                conv.padding,
                conv.dilation,
            )
            of = [None if v is None else v[filters] for v in (norm.running_mean, norm.running_var)]
            scale = [None if v is None else v[filters] for v in (norm.weight, norm.bias)]
            y = F.batch_norm(y, of[0], of[1], scale[0], scale[1], eps=norm.eps)
            out_BKHW[rows[:, None], filters] = y.relu() if self.relu else y
        return out_BKHW

    def size(self, x_BCHW: Tensor) -> list[int]:
        """H', W'."""
        conv: Any = self.conv
        sizes = zip(x_BCHW.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        return [(n + 2 * pad - far * (k - 1) - 1) // step + 1 for n, k, step, pad, far in sizes]

    def forward(
        self, x_BCHW: Tensor, alive_BC: Tensor | None = None, mask_BK: Tensor | None = None
    ) -> tuple[Tensor, Fired]:
        """The masked output and what fired; a given mask takes the gate's place."""
        logits = None
        if mask_BK is None:
            logits = self.gate(x_BCHW if self.joint else x_BCHW.detach())
            mask_BK = logits > 0
        if not self.training:
            out = self.wanted(x_BCHW, mask_BK, alive_BC)
            return out, Fired(mask_BK, logits, None, out[0, 0].numel())
        out = self.dense(x_BCHW)
        fired = Fired(mask_BK, logits, out.detach().abs().amax((2, 3)), out[0, 0].numel())
        return out * mask_BK[:, :, None, None], fired


class GatedCNN(nn.Module):
    """A chain of gated convolutions and a head that reads the last one's output."""

    def __init__(self, blocks: Sequence[GatedConv], head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), head

    def forward(self, x_BCHW: Tensor, masks: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Fired]]:
        """What the head says, and what fired in each block.

        Args:
            masks: bool (B, K) or (K,) a block, in place of what the gates say.
        """
        fired: list[Fired] = []
        alive = None
        for i, block in enumerate(self.blocks):
            mask = None if masks is None else masks[i].expand(len(x_BCHW), -1)
            x_BCHW, found = block(x_BCHW, alive, mask)
            alive = found.mask_BK
            fired.append(found)
        return self.head(x_BCHW), fired

    @torch.no_grad()
    def dense(self, x_BCHW: Tensor) -> tuple[Tensor, list[Fired]]:
        """The network without gates, all filters of all blocks, in evaluation mode; gives the peaks of all filters."""
        fired: list[Fired] = []
        with evaluating(self):
            for block in self.blocks:
                x_BCHW = block.dense(x_BCHW)  # type: ignore[operator]
                peak = x_BCHW.abs().amax((2, 3))
                fired.append(Fired(torch.ones_like(peak, dtype=torch.bool), None, peak, x_BCHW[0, 0].numel()))
            return self.head(x_BCHW), fired


def relabelled(fired: Sequence[Fired], label: Label) -> list[Fired]:
    """The same with the labels of the peaks as masks: what a perfect gate would say."""
    found = []
    for layer in fired:
        if layer.peak_BK is None:
            raise Error("fired: holds no peaks: run the network in training mode, or its `dense`")
        found.append(layer._replace(mask_BK=label(layer.peak_BK)))
    return found


def gate_loss(fired: Sequence[Fired], label: Label) -> Tensor:
    """1/L sum over layers of the batch's mean of sum over filters of BCE(z, g), g = label(max |O|)."""
    losses = []
    for layer, goal in zip(fired, relabelled(fired, label)):
        if layer.logits_BK is None:
            raise Error("fired: holds no logits: run the network without given masks")
        goal_BK = goal.mask_BK.to(layer.logits_BK.dtype)
        loss_BK = F.binary_cross_entropy_with_logits(layer.logits_BK, goal_BK, reduction="none")
        losses.append(loss_BK.sum(1).mean())
    return torch.stack(losses).mean()


def flops(model: GatedCNN, fired: Sequence[Fired]) -> float:
    """FLOPs of an image (2 a multiply-add) from mean counts: sum_l E[k_l] H'_l W'_l E[k_(l-1)] K_l^2, gates added.

    The head is not counted. With `relabelled(model.dense(images)[1], label)` it is the estimate before any training.
    """
    done, before = 0.0, None
    for block, found in zip(model.blocks, fired, strict=True):
        conv: Any = block.conv
        before = conv.in_channels if before is None else before
        count = float(found.mask_BK.float().sum(1).mean())
        done += count * found.places * before * math.prod(conv.kernel_size)
        done += conv.in_channels * conv.out_channels * (found.logits_BK is not None)
        before = count
    return 2 * done


def train_gates(
    model: GatedCNN,
    x_NCHW: Tensor,
    y_N: Tensor,
    label: Label,
    *,
    epochs: int = 50,
    lr: float = 1e-3,
    milestones: Sequence[int] = (29, 39, 49),
    gate_lr: float = 0.1,
    cooldown: float = 0.5,
    batch: int = 128,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    masks: Callable[[int], Sequence[Tensor]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Fine-tune a pre-trained network with its gates, in place: CE + w BCE, w = 1 for the first epochs, then 0.

    Masks are hard and without gradient, so CE never reaches a gate; BCE reaches the backbone only in blocks that are
    `joint`. Two SGDs: the backbone's with weight decay and its rate cut to a tenth at the milestones, the gates'
    without either. Behind the cooldown the gates rest (the released optimiser would let their momentum run on).

    Args:
        model: its head gives class scores; left in evaluation mode.
        x_NCHW, y_N: images and classes (int64).
        label: e.g. functools.partial(labels, r=0.85).
        epochs, lr, milestones, batch, momentum, weight_decay: of the backbone; released defaults for fine-tuning.
        gate_lr: of the gates.
        cooldown: share of the epochs with w = 1.
        masks: of a control: batch size -> bool (B, K) or (K,) a block; the gates then take no part.
        seed: of the order of the images.
        progress: show a bar.
    """
    gates = [p for block in model.blocks for p in block.gate.parameters()]  # type: ignore[union-attr]
    own = {id(p) for p in gates}
    rest = [p for p in model.parameters() if id(p) not in own]
    of_rest = torch.optim.SGD(rest, lr=lr, momentum=momentum, weight_decay=weight_decay)
    of_gates = torch.optim.SGD(gates, lr=gate_lr, momentum=momentum)
    falling = torch.optim.lr_scheduler.MultiStepLR(of_rest, list(milestones))
    lot = torch.Generator().manual_seed(seed)
    model.train()
    for epoch in tqdm(range(epochs), desc="fire together", disable=not progress, leave=False):
        wiring = masks is None and epoch < int(cooldown * epochs)
        for at in torch.randperm(len(x_NCHW), generator=lot).split(batch):
            scores, fired = model(x_NCHW[at], None if masks is None else masks(len(at)))
            loss = F.cross_entropy(scores, y_N[at])
            if wiring:
                loss = loss + gate_loss(fired, label)
            of_rest.zero_grad()
            of_gates.zero_grad()
            loss.backward()
            of_rest.step()
            if wiring:
                of_gates.step()
        falling.step()
    model.eval()


# --------------------------------------------------------------------------- the MLP of a decoder layer


def gathered_mlp(layer: LayerView, x_RD: Tensor, keep_RN: Tensor) -> tuple[Tensor, float]:
    """What a layer's MLP gives if of each row only some neurons fire, and the share of the MLP that really ran.

    Gate and up projection compute only the neurons that any row wants: one token costs what it wants, many tokens the
    union of it. `down_proj` reads zeros for the rest and is not cut: its wanted columns lie scattered in memory, and
    gathering them takes longer than reading it whole unless less than about an eighth is wanted.

    Args:
        x_RD: (R, D) or (B, N, D), what the MLP module gets.
        keep_RN: bool, of the same rows.

    Raises:
        Error: the layer's MLP is not gate_proj (or none), up_proj and down_proj, or gate_up_proj and down_proj, around
            an activation act_fn or activation_fn; or they are no plain linear layers.
    """
    index_U = keep_RN.flatten(0, -2).any(0).nonzero().flatten()
    hidden_RU = _neurons(layer, x_RD, index_U)
    if keep_RN[..., 0].numel() > 1:  # another row may have asked for it
        hidden_RU = hidden_RU.masked_fill(~keep_RN[..., index_U], 0)
    hidden_RN = hidden_RU.new_zeros(keep_RN.shape).index_copy(-1, index_U, hidden_RU)
    into = 1 if layer.fused_gate_up is None and not hasattr(layer.mlp, "gate_proj") else 2
    return layer.projection("down_proj")(hidden_RN), (into * len(index_U) / layer.neurons + 1) / (into + 1)


def _neurons(layer: LayerView, x_RD: Tensor, index_U: Tensor) -> Tensor:
    mlp: Any = layer.mlp
    act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if act is None:
        raise Error(f"layer {layer.index}: {type(mlp).__name__} has no activation (looked for act_fn, activation_fn)")
    fused = layer.fused_gate_up
    if fused is not None:
        return act(_rows(fused, x_RD, index_U)) * _rows(fused, x_RD, index_U + layer.neurons)
    up_RU = _rows(layer.projection("up_proj"), x_RD, index_U)
    if not hasattr(mlp, "gate_proj"):
        return act(up_RU)
    return act(_rows(layer.projection("gate_proj"), x_RD, index_U)) * up_RU


def _rows(linear: nn.Linear, x_RD: Tensor, index_U: Tensor) -> Tensor:
    """Some outputs of a linear layer; all of them without gathering."""
    if not isinstance(linear, nn.Linear) or linear.weight.shape != (linear.out_features, linear.in_features):
        raise Error(f"{type(linear).__name__}: its rows cannot be gathered; a plain linear layer is needed")
    if len(index_U) == linear.out_features:
        return F.linear(x_RD, linear.weight, linear.bias)
    rows = len(index_U)
    if x_RD.device.type == "cpu":  # copies that stay in the cache: fresh memory would cost more than the product
        rows = _PIECE // (linear.in_features * linear.weight.element_size())
    parts = [
        F.linear(
            x_RD,
            linear.weight.index_select(0, index),
            None if linear.bias is None else linear.bias.index_select(0, index),
        )
        for index in index_U.split(max(rows, 1))
    ]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


@torch.no_grad()
def mlp_activity(model: nn.Module, batch: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What every MLP reads, (R, D), and what its neurons give, (R, N), in a dense pass over a batch.

    The R tokens are those that would be generated (labels other than -100) where the batch has labels, else all that
    are not padding. The model runs in evaluation mode, without gradients, and is left as it was.

    Raises:
        Error: a layer has no plain MLP.
    """
    view = View(model)
    lacks = view.lacks(("neurons",))
    if lacks is not None:
        raise Error(f"{type(model).__name__}: {lacks}")
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in batch.items()}
    rows_BT = batch["labels"] != -100 if "labels" in batch else batch.get("attention_mask")
    seen: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module] = args[0].flatten(0, -2) if rows_BT is None else args[0][rows_BT.bool()]

    sites = [(layer.mlp, layer.projection("down_proj")) for layer in view.layers]
    with contextlib.ExitStack() as stack:
        for module in (m for site in sites for m in site if m is not None):
            stack.callback(module.register_forward_pre_hook(note).remove)
        stack.enter_context(evaluating(model))
        model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    return [(seen[mlp], seen[down]) for mlp, down in sites if mlp is not None]

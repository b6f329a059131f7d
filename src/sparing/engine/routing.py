"""Token x expert: which experts a token visits, and how many; behind the router and transformers' experts interface.

Shapes: N token rows, K experts a token, E experts, M experts that stay, D hidden.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparing.engine.view import Experts, LayerView
from sparing.grid.method import Error, Method

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # under which modules and configs keep E


@dataclass(frozen=True)
class RoutingMethod(Method):
    """A method that says, layer by layer, which of the experts that a token was sent to really run.

    The engine calls `route` in every pass of the method's phase, after the layer's router and before its experts.
    """

    def route(self, routing: Routing, layer: int) -> None:
        """Skip or change pairs of token and expert in layer `layer` (0-based)."""
        raise Error(f"{type(self).__name__} defines no route")


class Routing:
    """What a layer's router decided for the tokens of one pass, and what a method may do about it.

    Attributes:
        hidden: (N, D) what the experts read.
        logits: (N, E) of the router.
        index: (N, K) experts of each token; E means none.
        weight: (N, K) their gates, as the layer uses them.
        experts: E.
        layer: 0-based.
        phase: "decode" where all columns are generated and the prompt is in a cache, else "prefill".
    """

    def __init__(
        self, hidden_ND: Tensor, logits_NE: Tensor, index_NK: Tensor, weight_NK: Tensor, layer: int, phase: str
    ) -> None:
        self.hidden = hidden_ND
        self.logits = logits_NE
        self.index = index_NK
        self.weight = weight_NK
        self.experts = logits_NE.shape[-1]
        self.layer = layer
        self.phase = phase

    @property
    def skipped(self) -> Tensor:
        """Bool (N, K): pairs that go to no expert."""
        return self.index == self.experts

    def skip(self, mask_NK: Tensor, *, renormalise: bool = False) -> None:
        """These pairs are not computed and add nothing.

        Args:
            mask_NK: bool, of the shape of `index`.
            renormalise: share the gates of skipped pairs out among the token's others in proportion, so that the sum
                of the gates stays; a token without any expert left gets nothing.
        """
        if mask_NK.shape != self.index.shape:
            raise Error(f"mask of shape {tuple(mask_NK.shape)}: must be (N, K) = {tuple(self.index.shape)}")
        total = self.weight.sum(1, keepdim=True)
        self.index = self.index.masked_fill(mask_NK, self.experts)
        self.weight = self.weight.masked_fill(mask_NK, 0)
        if renormalise:
            left = self.weight.sum(1, keepdim=True)
            self.weight = self.weight * torch.where(left > 0, total / left.clamp(min=1e-20), 0).to(self.weight.dtype)

    def keep(self, k: int, *, renormalise: bool = False) -> None:
        """Of each token's experts compute those with the k largest gates; of equal gates the first."""
        if not 0 <= k <= self.index.shape[1]:
            raise Error(f"k = {k}: must lie in 0..{self.index.shape[1]}, the experts of a token")
        order = self.weight.masked_fill(self.skipped, -torch.inf).argsort(dim=1, descending=True, stable=True)
        mask = torch.ones_like(self.index, dtype=torch.bool).scatter(1, order[:, :k], False)
        self.skip(mask, renormalise=renormalise)


def run_experts(forward: Callable[..., Tensor], routing: Routing, before: Tensor) -> tuple[Tensor, int]:
    """Run experts on the pairs that are left, so that the others cost nothing, whatever the experts' implementation.

    Where all tokens have as many experts left, the columns of the routing shrink. Where they differ, every pair becomes
    a row with one expert of its own, and the rows of a token are added up. (Handing the experts index E for the gaps
    gives the same, but carries the gaps through the elementwise work: with half of the pairs skipped by a threshold
    the efficiency was 0.79 in bfloat16 against 0.90, and `batched_mm` even computes them.)

    Args:
        forward: of the layer's experts.
        routing: as the methods left it.
        before: (N, K) the router's own index.

    Returns:
        (N, D) and the number of pairs that ran.
    """
    index, weight, hidden = routing.index, routing.weight, routing.hidden
    if index is before:
        return forward(hidden, index, weight), index.numel()
    there = ~routing.skipped
    count_N = there.sum(1)
    least, most = (int(count) for count in count_N.aminmax()) if len(count_N) else (0, 0)
    if most == 0:
        return torch.zeros_like(hidden), 0
    if least == most:
        order = (~there).byte().argsort(dim=1, stable=True)[:, :most]
        return forward(hidden, index.gather(1, order), weight.gather(1, order)), len(index) * most
    token, column = there.nonzero(as_tuple=True)
    rows = forward(hidden[token], index[token, column][:, None], weight[token, column][:, None])
    slot = token * most + (there.cumsum(1) - 1)[token, column]
    parts = rows.new_zeros(len(index) * most, rows.shape[-1]).index_copy(0, slot, rows)
    return parts.view(len(index), most, -1).sum(1), len(token)


# --------------------------------------------------------------------------- fewer experts


def check_kept(layer: LayerView, keep: Tensor) -> Experts:
    """The layer's experts, once it is known that these may be the only ones left.

    Raises:
        Error: the layer has no experts, or too few would be left to choose from.
    """
    experts = layer.experts
    if experts is None:
        raise Error(f"plan: layer {layer.index} has no experts to keep")
    index = keep.tolist()
    if index != sorted(set(index)) or (index and not 0 <= index[0] <= index[-1] < experts.count):
        raise Error(f"plan: layer {layer.index} keeps experts {index[:8]}…: must rise within 0..{experts.count - 1}")
    if len(index) < experts.top_k:
        raise Error(f"plan: layer {layer.index} keeps {len(index)} experts, a token needs {experts.top_k}")
    if experts.groups > 1:
        left = sorted(count for count in survivors(experts, keep).tolist() if count > 1)
        worst = sum(left[: experts.chosen_groups])
        if len(left) < experts.chosen_groups or worst < experts.top_k:
            raise Error(
                f"plan: layer {layer.index} keeps {len(index)} experts, in groups of {left}; a token chooses "
                f"{experts.chosen_groups} groups of at least 2 and needs {experts.top_k} experts in them"
            )
    return experts


def survivors(experts: Experts, keep: Tensor) -> Tensor:
    """How many experts of each group stay, (groups,)."""
    return torch.bincount(keep.cpu() // (experts.count // experts.groups), minlength=experts.groups)


def first_kept(experts: Experts, count: int) -> Tensor:
    """Some `count` experts, as many of each group, (count,)."""
    size, each = experts.count // experts.groups, count // experts.groups
    cpu = torch.device("cpu")  # also while a model is built on the meta device
    start = torch.arange(experts.groups, device=cpu)[:, None] * size
    return (start + torch.arange(each, device=cpu)).flatten()


def sliced_router(layer: LayerView, keep: Tensor) -> nn.Module:
    """A router that chooses among these experts only and numbers them 0 … M-1; the layer's own stays as it is.

    Raises:
        Error: a group-limited router whose groups would differ in size.
    """
    experts = check_kept(layer, keep)
    if experts.groups > 1 and len(set(survivors(experts, keep).tolist())) > 1:
        raise Error(
            f"layer {layer.index}: groups of {survivors(experts, keep).tolist()} experts; "
            f"{type(experts.router).__name__} needs groups of one size, keep as many of each or attach instead of prune"
        )
    small = copy.copy(experts.router)
    small.__dict__.pop("forward", None)
    small._parameters, small._buffers = dict(small._parameters), dict(small._buffers)
    owners: tuple[dict[str, Any], ...] = (small._parameters, small._buffers)
    for owner in owners:
        for name, value in owner.items():
            if value is not None and value.shape[:1] == (experts.count,):
                rows = value.data[keep.to(value.device)].contiguous()
                owner[name] = nn.Parameter(rows, value.requires_grad) if isinstance(value, nn.Parameter) else rows
    _renumber(small, experts.count, len(keep))
    return small


def _renumber(module: nn.Module, old: int, new: int) -> None:
    for name in EXPERT_COUNTS:
        if module.__dict__.get(name) == old:
            setattr(module, name, new)


@contextlib.contextmanager
def restricted(layer: LayerView, keep: Tensor) -> Iterator[None]:
    """The live layer as if only these experts were there: its router cannot see the others. No weight is changed.

    A group-limited router scores its groups by the experts that are left in them; a group with one expert left cannot
    be chosen.
    """
    experts = check_kept(layer, keep)
    router: Any = experts.router
    if "forward" in router.__dict__:
        raise Error(f"layer {layer.index}: {type(router).__name__} has a forward of its own already (another run?)")
    E, where = experts.count, keep.to(next(router.parameters()).device)
    if experts.groups > 1 and len(set(survivors(experts, keep).tolist())) > 1:
        bias = router.e_score_correction_bias
        hidden = torch.full_like(bias, -torch.inf)
        hidden[where] = bias[where]
        masked = copy.copy(router)
        masked._buffers = {**router._buffers, "e_score_correction_bias": hidden}
        router.forward = masked.forward
    else:
        small: Any = sliced_router(layer, keep)

        def forward(hidden_ND: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
            # not small(…): the copy shares the router's hooks, which are to see what this returns
            logits_NM, weight_NK, index_NK = small.forward(hidden_ND, *args, **kwargs)
            logits_NE = logits_NM.new_full((*logits_NM.shape[:-1], E), -torch.inf)
            logits_NE[..., where] = logits_NM
            return logits_NE, weight_NK, where[index_NK]

        router.forward = forward
    try:
        yield
    finally:
        del router.forward


def cut_experts(layer: LayerView, keep: Tensor) -> None:
    """Remove all but these experts from a layer, in place: their weights go, the router's rows go, the rest renumber.

    Raises:
        Error: the router cannot do with them (see `sliced_router`).
    """
    experts = check_kept(layer, keep)
    setattr(experts.block, experts.router_name, sliced_router(layer, keep))
    module = experts.module
    for name, weight in list(module.named_parameters(recurse=False)):
        if weight.shape[0] != experts.count:
            raise Error(
                f"layer {layer.index}: {type(module).__name__}.{name} {tuple(weight.shape)} is not one an expert"
            )
        rows = weight.data[keep.to(weight.device)].contiguous()
        setattr(module, name, nn.Parameter(rows, requires_grad=weight.requires_grad))
    for owner in (module, experts.block):
        _renumber(owner, experts.count, len(keep))

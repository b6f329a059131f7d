"""What a layer changes: similarity of its input and its output on a model that runs dense."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparing.engine.calls import split
from sparing.engine.view import View, evaluating
from sparing.grid.method import Error
from sparing.grid.score import cosine


@torch.no_grad()
def similarities(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Mean cosine between the residual stream entering and leaving each layer, over all tokens, in one dense pass.

    The states are those of transformers' `hidden_states`: what leaves the last layer is what the decoder gives out, so
    behind its final norm. Where that has another width (OPT-350m projects it), the state before it counts.

    Padding (attention_mask 0) is left out. Nothing is kept but a sum a layer. The model runs in evaluation mode and is
    left as it was.

    Args:
        model: any that `View` knows.
        batches: keyword arguments of the model's forward. Labels are left out.

    Returns:
        float64 (L,) in [-1, 1], each token counting once; a vector of zeros has cosine 0.

    Raises:
        Error: there is no batch, or no token that is not padding.
    """
    view = View(model)
    device = next(model.parameters()).device
    total_L, tokens_L = torch.zeros(2, len(view), dtype=torch.float64)
    mask: Tensor | None = None
    last: tuple[Tensor, Tensor] | None = None  # states around the last layer, until the decoder has given out its own

    def add(layer: int, before_BTD: Tensor, after_BTD: Tensor) -> None:
        same = cosine(before_BTD, after_BTD)
        same = (same if mask is None else same[mask.to(same.device)]).cpu()
        total_L[layer] += same.double().sum()
        tokens_L[layer] += same.numel()

    def leaves(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal last
        before_BTD, _ = split(module.forward, args, kwargs)
        states = before_BTD, out[0] if isinstance(out, tuple) else out
        if layer < len(view) - 1:
            add(layer, *states)
        else:
            last = states

    def ends(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        nonlocal last
        assert last is not None  # the decoder has run its last layer
        before_BTD, after_BTD = last
        given_BTD = out[0].to(before_BTD.device)  # of several devices, the norm may be on another one
        add(len(view) - 1, before_BTD, given_BTD if given_BTD.shape == after_BTD.shape else after_BTD)
        last = None

    with contextlib.ExitStack() as stack:
        for layer in view.layers:
            hook = functools.partial(leaves, layer.index)
            stack.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.callback(view.decoder.register_forward_hook(ends).remove)
        stack.enter_context(evaluating(model))
        for batch in batches:
            given = batch.get("attention_mask")
            mask = None if given is None else given.bool()
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
            model(**inputs, use_cache=False)
    if not bool(tokens_L.all()):
        raise Error("batches: the calibration data is empty")
    return total_L / tokens_L

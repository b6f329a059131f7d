"""Runs the vision tower beside the layers that do not need it yet."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparing.engine.attach import Run


class Deferred:
    """Visual features that are still being computed.

    Attributes:
        features: (all visual tokens of the batch, D), on `side`.
        side: CUDA stream they are computed on, None without CUDA.
    """

    def __init__(self, features: Tensor, side: Any) -> None:
        self.features = features
        self.side = side

    def wait(self) -> Tensor:
        """The features, safe to use on the current stream."""
        if self.side is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self.side)
            self.features.record_stream(current)
        return self.features


@contextlib.contextmanager
def deferred_vision(run: Run, force: bool = False) -> Iterator[None]:
    """While active, image features are computed on a side stream and join the text only when they are released.

    The model gets zeros in their place, which nobody reads: a method that injects late holds all visual tokens, and
    `Stream.release` puts the real features in. Without CUDA nothing changes unless `force` (for tests: same values, no
    overlap).
    """
    owner: Any = getattr(run.model, "model", run.model)
    original = getattr(owner, "get_image_features", None)
    device = next(run.model.parameters()).device
    if original is None or "get_image_features" in vars(owner) or not (force or device.type == "cuda"):
        yield
        return

    @functools.wraps(original)
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # training needs the features in the graph at their place
            return original(*args, **kwargs)
        side = torch.cuda.Stream(device) if device.type == "cuda" else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side) if side is not None else contextlib.nullcontext():
            out = original(*args, **kwargs)
            parts = list(out.pooler_output)
            features = torch.cat([p.reshape(-1, p.shape[-1]) for p in parts])
        run.deferred = Deferred(features, side)
        out.pooler_output = [torch.zeros_like(p) for p in parts]
        return out

    owner.get_image_features = get_image_features
    try:
        yield
    finally:
        del owner.get_image_features
        run.deferred = None

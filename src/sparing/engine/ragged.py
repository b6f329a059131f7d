"""A KV cache whose layers hold different tokens, while the model goes on seeing one logical length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from sparing.grid.method import Error


class RaggedLayer(DynamicLayer):
    """The cache of one layer that holds K/V of some columns only.

    The length reported to the model is the logical one (all tokens seen), so position ids, 2D masks and the masks of
    other layers stay right; `columns` says which tokens are really there.

    Attributes:
        columns: (B, K) absolute column of each entry, rising; a pad entry repeats a column and is not visible.
        visible: (B, K) bool, None if every entry may be attended to.
        seen: tokens the model has seen, T.
        sliding_window: of this layer, None for full attention.
        shift: (B,) how much smaller position ids are here after compact renumbering, None by default.
        skipped: tokens went around the layer and left no keys, as against those that left the stream.
    """

    def __init__(self, origin: Any, seen: int, batch: int, device: torch.device, pad_BT: Tensor | None) -> None:
        super().__init__()
        self.seen = seen
        self.sliding_window: int | None = getattr(origin, "sliding_window", None)
        self.is_sliding = bool(getattr(origin, "is_sliding", False))
        self.shift: Tensor | None = None
        self.skipped = False
        self._coming = 0
        held = origin.keys.shape[-2] if getattr(origin, "is_initialized", False) else 0
        if held:
            self.dtype, self.device = origin.keys.dtype, origin.keys.device
            self.keys, self.values = origin.keys, origin.values
            self.is_initialized = True
        self.columns = torch.arange(seen - held, seen, device=device).expand(batch, held)
        self.visible = None if pad_BT is None or not held else pad_BT[:, seen - held : seen].bool()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states[..., :0, :]
        self.values = value_states[..., :0, :]
        self.is_initialized = True

    def extend(self, columns_BR: Tensor, visible_BR: Tensor | None, seen: int) -> None:
        """Announce the columns that the coming `update` brings."""
        if visible_BR is not None or self.visible is not None:
            old = torch.ones_like(self.columns, dtype=torch.bool) if self.visible is None else self.visible
            new = torch.ones_like(columns_BR, dtype=torch.bool) if visible_BR is None else visible_BR
            self.visible = torch.cat([old, new], 1)
        self.columns = torch.cat([self.columns, columns_BR], 1)
        self.seen = seen
        self._coming = columns_BR.shape[1]

    @property
    def complete(self) -> bool:
        """Whether every token seen is here, in order and at its own position."""
        if self.columns.shape[1] != self.seen or self.shift is not None:
            return False
        if self.visible is None:  # no fill-up entries: columns rise, so that as many as were seen are all of them
            return True
        return bool((self.columns == torch.arange(self.seen, device=self.columns.device)).all())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values behind those held.

        Raises:
            Error: nobody announced them and older ones are missing: the cache is used outside of the block it was
                filled in.
        """
        new, before = key_states.shape[-2], self.seen
        if new == self._coming:
            self._coming = 0
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.complete:
            raise Error(
                f"KV cache: was filled while methods were attached, and this layer holds {self.columns.shape[1]} of "
                f"{self.seen} tokens: outside of the block others would attend without the rest; go on inside the "
                "`with sparing.attach(…)` block, or start with a new cache"
            )
        _, first = self.get_mask_sizes(new)  # where the mask that the model has built begins
        columns = torch.arange(before, before + new, device=key_states.device).expand(len(key_states), -1)
        self.extend(columns, None, before + new)
        self._coming = 0
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys[..., first:, :], values[..., first:, :]

    def free(self) -> None:
        """Give the memory back; the layer is not read any more."""
        self.keys = self.values = None
        self.is_initialized = False
        self.columns = self.columns[:, :0]
        self.visible = None

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # The mask the model builds serves the untouched layers of the same kind; ours is built in `mask`.
        if self.sliding_window is not None and self.is_sliding:
            offset = max(self.seen - self.sliding_window + 1, 0)
            return self.seen - offset + query_length, offset
        return self.seen + query_length, 0

    def mask(self, query_BR: Tensor) -> Tensor | None:
        """Bool (B, 1, R, K) for queries at absolute columns query_BR; None if every query sees every entry."""
        rows = query_BR.shape[1]
        window = self.sliding_window if self.is_sliding else None
        beyond = window is not None and self.seen > window
        if rows == 1 and self.visible is None and not beyond:
            return None
        seen_BRK = self.columns[:, None, :] <= query_BR[:, :, None]
        if beyond and window is not None:
            seen_BRK = seen_BRK & (self.columns[:, None, :] > query_BR[:, :, None] - window)
        if self.visible is not None:
            seen_BRK = seen_BRK & self.visible[:, None, :]
        return seen_BRK[:, None]

    def _apply_kv(self, change: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)

    def _apply(self, change: Any) -> None:
        self._apply_kv(change)
        self.columns = change(self.columns)
        self.visible = None if self.visible is None else change(self.visible)
        self.shift = None if self.shift is None else change(self.shift)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda t: t[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        self.seen -= abs(tokens_to_remove)
        held = int((self.columns[0] < self.seen).sum())
        self.columns = self.columns[:, :held]
        self.visible = None if self.visible is None else self.visible[:, :held]
        if self.is_initialized:
            self._apply_kv(lambda t: t[..., :held, :])

    def reset(self) -> None:
        self.free()
        self.seen = 0
        self.shift = None


def is_dynamic(entry: Any) -> bool:
    """Whether a cache layer holds keys and values that grow by the token, and nothing else."""
    return isinstance(entry, RaggedLayer) or type(entry) in (DynamicLayer, DynamicSlidingWindowLayer)


def check_dynamic(entry: Any) -> None:
    """Refuse cache layers of a fixed layout."""
    if not is_dynamic(entry):
        raise Error(
            f"KV cache: {type(entry).__name__} has a fixed layout; a stream whose layers hold different tokens needs a "
            "DynamicCache (the default of generate)"
        )


def ragged(cache: Cache, layer: int, batch: int, device: torch.device, pad_BT: Tensor | None) -> RaggedLayer:
    """Layer `layer` of a dynamic cache as a RaggedLayer, converted in place at first use."""
    grow: Any = getattr(cache, "layer_class_to_replicate", None)
    while len(cache.layers) <= layer and grow is not None:
        cache.layers.append(grow())
    entry: Any = cache.layers[layer]
    if isinstance(entry, RaggedLayer):
        return entry
    check_dynamic(entry)
    new = RaggedLayer(entry, int(entry.get_seq_length()), batch, device, pad_BT)
    cache.layers[layer] = new
    return new


class Tap:
    """Stands in for the cache during one layer: sees the keys that the layer computes anyway, weighs its values.

    Attributes:
        keys: (B, G, K, d) that the layer attends to, once it has run.
    """

    def __init__(self, cache: Cache | None, weight_BN: Tensor | None = None) -> None:
        self._cache = cache
        self._weight = weight_BN
        self.keys: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._weight is not None:
            value_states = value_states * self._weight[:, None, :, None].to(value_states.dtype)
        if self._cache is not None:
            key_states, value_states = self._cache.update(key_states, value_states, *args, **kwargs)
        self.keys = key_states
        return key_states, value_states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

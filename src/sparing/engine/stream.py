"""Token x layer: the tokens that are alive in a running forward pass, and what a method may do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from sparing.engine.calls import rotary_in
from sparing.engine.ragged import RaggedLayer, is_dynamic
from sparing.engine.view import View
from sparing.grid.method import Error, Method, Shape, model_check
from sparing.grid.score import attention_rows

if TYPE_CHECKING:
    from sparing.engine.execute import Pass

# Shape letters: B batch, T columns of the pass, N alive rows, V visual alive rows, Q query rows, D hidden, L layers.


@dataclass(frozen=True)
class StreamMethod(Method):
    """A method that looks at the alive tokens before each layer and says which of them go on.

    The engine calls `before_layer` on every pass of the method's phase, in layer order. The other verbs are optional
    and cost nothing where a method does not define them:

    - `read_prompt(stream, layer)`: look at the prompt's rows before each layer, and note in `stream.memory` what the
      generated tokens will need. The prompt is read to the end before any generated token runs, also where both are
      in one pass.
    - `attend(stream, layer, x_BND, forward)` and `feed_forward(stream, layer, x_BND, forward)`: run in place of the
      layer's attention or MLP module. `x_BND` is what that module gets, `forward(x_BND)` is the module itself; what
      comes back goes where the module's output goes. `layer` is a `LayerView`.
    """

    #: It ranks the tokens of a prompt against each other, or by its end: it takes no prompt that comes in parts. Holds
    #: for methods on visual tokens without being said, where the part has any.
    whole_prompt: ClassVar[bool] = False

    def before_layer(self, stream: Stream, layer: int) -> None:
        """Drop, hold, release, merge, bypass or exit tokens of `stream` before layer `layer` (0-based) runs."""
        raise Error(f"{type(self).__name__} defines no before_layer")

    @classmethod
    def defines(cls, verb: str) -> bool:
        """Whether the optional verb of that name is defined."""
        return hasattr(cls, verb)

    def shares(self, shape: Shape) -> tuple[float, ...]:
        """Share of visual tokens that runs each layer, length L (token methods)."""
        raise Error(f"{self.name} has no token schedule")

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        return {"schedule": self.shares(shape)}


@model_check
def _skippable(method: Method, model: nn.Module) -> None:
    """Refuses layers that a token cannot be kept out of: they hand a state on, or keep keys that others read."""
    if not isinstance(method, StreamMethod):
        return
    view = View(model)
    entries = DynamicCache(config=view.config).layers
    kinds = {i: type(entry).__name__ for i, entry in enumerate(entries) if i < len(view) and not is_dynamic(entry)}
    if entries:
        kinds |= {i: "no entry of its own" for i in range(len(entries), len(view))}
    if kinds:
        layers = ", ".join(f"{i} ({type(view.layers[i].module).__name__}: {kind})" for i, kind in kinds.items())
        raise Error(
            f"method = {method.name!r}: works on layers that tokens can be kept out of, each with keys and values of "
            f"its own; {type(model).__name__} has others, which hand on a state or share a cache: {layers}"
        )


def pack(keep_BN: Tensor) -> tuple[Tensor, Tensor | None]:
    """Slots of the True entries of each row, rising, padded with slot 0 where rows differ in number.

    Returns:
        slot_BM: long, M the largest count.
        valid_BM: bool, None if all rows have M.
    """
    count_B = keep_BN.sum(1)
    low, high = (int(x) for x in torch.aminmax(count_B))
    if low == high:
        return keep_BN.nonzero()[:, 1].view(keep_BN.shape[0], high), None
    slot_BM = torch.argsort((~keep_BN).byte(), dim=1, stable=True)[:, :high]
    valid_BM = torch.arange(high, device=keep_BN.device) < count_B[:, None]
    return slot_BM.masked_fill(~valid_BM, 0), valid_BM


def take(x_BN: Tensor, slot_BM: Tensor) -> Tensor:
    """Rows slot_BM of x along dimension 1, for x of shape (B, N, …) or (1, N, …)."""
    if x_BN.shape[0] == 1:
        return x_BN[0][slot_BM]
    return x_BN[torch.arange(x_BN.shape[0], device=x_BN.device)[:, None], slot_BM]


def put(x_BTD: Tensor, slot_BN: Tensor, rows_BND: Tensor) -> Tensor:
    """x with these rows at slot_BN; whole rows at a time, five times as fast as a scatter of every element."""
    return x_BTD.index_put((torch.arange(x_BTD.shape[0], device=x_BTD.device)[:, None], slot_BN), rows_BND)


class Stream:
    """The alive tokens of one pass, as methods see them.

    Attributes:
        hidden: (B, N, D) input of the coming layer, alive rows in original order. May be assigned (same shape).
        index: (B, N) original column of each row.
        valid: (B, N) bool; False rows only fill up a batch of unequal counts. None if there are none.
        layers: L.
        layer: the coming layer.
        phase: "decode" where all columns are generated and the prompt is in a cache, else "prefill".
    """

    def __init__(self, work: Pass, view: View, hidden_BTD: Tensor) -> None:
        self._work = work
        self._view = view
        self.hidden = hidden_BTD
        self.batch, self.width = hidden_BTD.shape[:2]
        self.layers = len(view)
        self.layer = 0
        self.phase = work.phase
        self.valid: Tensor | None = None
        self._index: Tensor | None = None  # None: nothing has left yet
        self._out: Tensor | None = None  # (B, T+1, D) last hidden of tokens that left; column T takes the padding
        self._owner: Tensor | None = None  # (B, T) column whose result a merged token copies
        self._held: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._kept: dict[str, Any] = {}  # per-selection memo: visual mask, position embeddings
        self._compact = False
        self.bypassed: Tensor | bool = False
        self.bypassed_attention: Tensor | bool = False
        self.bypassed_mlp: Tensor | bool = False
        self.frees_cache = False
        self._replaced: Callable[[Tensor], Tensor] | None = None
        self._blend: tuple[Tensor, bool] | None = None
        self._running: Tensor | None = None  # columns of the rows inside the layer that runs now, if not all
        self._mlp_share = 1.0
        self._watches_mlp = False
        self._mlp_input: Tensor | None = None
        self._weight: Tensor | None = None  # (B, N) factor on the values that attention reads
        self._watch: tuple[Tensor, Tensor | None, Tensor | None] | None = None  # query, validity, visibility
        self._watched: tuple[tuple[Tensor, Tensor | None, Tensor | None], Tensor] | None = None  # … and keys

    # ---- who is here

    @property
    def index(self) -> Tensor:
        if self._index is None:
            return torch.arange(self.width, device=self.hidden.device).expand(self.batch, -1)
        return self._index

    @property
    def whole(self) -> bool:
        """Nothing has left: the rows are the columns of the pass."""
        return self._index is None

    def _memo(self, key: str, make: Any) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _pick(self, mask_BT: Tensor) -> Tensor:
        mask = mask_BT if self.whole else take(mask_BT, self.index)
        return mask if self.valid is None else mask & self.valid

    @property
    def visual(self) -> Tensor:
        """(B, N) bool: visual tokens of the prompt among the alive rows."""
        return self._memo("visual", lambda: self._pick(self._work.visual_BT))

    @property
    def visual_total(self) -> Tensor:
        """(B,) visual tokens of each sample at the start of the pass."""
        return self._work.visual_BT.sum(1)

    def first_visual(self) -> Tensor:
        """(B,) column of the first visual token of each sample, 0 without any."""
        return self._work.visual_BT.int().argmax(1)

    @property
    def generated(self) -> Tensor | bool:
        """Rows that are generated, not prompt: False (none), True (all, as in cached decoding) or bool (B, N).

        Inside `attend` and `feed_forward`: of the rows that the layer runs.
        """
        generated = self._work.generated_BT
        if isinstance(generated, bool):
            return generated
        return self._pick(generated) if self._running is None else take(generated, self._running)

    @property
    def step(self) -> Tensor:
        """(B, N) long: how many generated tokens stand before each row in its sequence; below 0 in the prompt."""
        step = self._work.step_BT
        return step if self.whole else take(step, self.index)

    @property
    def common_step(self) -> int | None:
        """`step` where it is one number for all rows, as in plain generation; None in any other pass."""
        start = self._work.columns.start
        return (
            self._work.past - start if self.phase == "decode" and self.width == 1 and isinstance(start, int) else None
        )

    @property
    def prompt(self) -> Tensor:
        """(B, N) bool: unpadded rows of the prompt."""
        return self._pick(self._work.prompt_BT)

    @property
    def memory(self) -> dict[str, Any]:
        """What methods note of the sequences of this batch; it lives as long as their KV cache."""
        return self._work.memory

    @property
    def queries(self) -> Tensor:
        """(B, N) bool: the rows whose attention ranks visual tokens.

        The last prompt token of each sample (if it has left: the last one alive); in training (labels given) every
        token just before an answer span.
        """
        return self._memo("queries", self._asking)

    def _asking(self) -> Tensor:
        asking = self._pick(self._work.queries_BT)
        if self.whole or bool(asking.any(1).all()):
            return asking
        alive = self._pick(self._work.prompt_BT)
        columns = torch.arange(alive.shape[1], device=alive.device)
        last_B1 = torch.where(alive, columns, -1).max(1, keepdim=True).values
        return asking | ((columns == last_B1) & ~asking.any(1, keepdim=True))

    @property
    def oracle(self) -> Tensor:
        """(B, V) float: how much the task's world says each alive visual token matters."""
        truth = self._work.run.oracle
        if truth is None:
            raise Error("oracle: the task set no run.oracle; only a world that knows the truth has this control")
        full = torch.zeros(self.batch, self.width, device=self.hidden.device)
        slot, valid = pack(self._work.visual_BT)
        if not slot.shape[1]:
            return self.of_visual(self._pick_float(full))
        values = truth.to(full).expand(self.batch, -1)
        if values.shape[1] != slot.shape[1]:
            raise Error(f"oracle: {values.shape[1]} entries for {slot.shape[1]} visual tokens")
        full.scatter_add_(1, slot, values if valid is None else values * valid)
        return self.of_visual(self._pick_float(full))

    def _pick_float(self, x_BT: Tensor) -> Tensor:
        return x_BT if self.whole else take(x_BT, self.index)

    def visual_slots(self) -> tuple[Tensor, Tensor | None]:
        """Slots of the alive visual rows, (B, V), and which of them are real, (B, V) or None for all."""
        return self._memo("visual_slots", lambda: pack(self.visual))

    def of_visual(self, x_BN: Tensor) -> Tensor:
        """Entries of the alive visual rows, (B, V); -inf where a sample has fewer."""
        slot, valid = self.visual_slots()
        picked = take(x_BN, slot)
        return picked if valid is None else picked.masked_fill(~valid, -torch.inf)

    def visual_rows(self) -> tuple[Tensor, Tensor | None]:
        """Hidden states of alive visual rows (B, V, D) and their validity (B, V) or None."""
        slot, valid = self.visual_slots()
        return take(self.hidden, slot), valid

    # ---- scores

    def _rows(self, queries: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._memo("query_slots", lambda: pack(self.queries)) if queries is None else pack(queries)

    def _past(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys (B, G, P, d) that a layer's cache holds, their columns (B, P) and which are visible; None if none."""
        cache, past = self._work.cache, self._work.past
        entry: Any = cache.layers[layer] if past and cache is not None and layer < len(cache.layers) else None
        if entry is None or not entry.is_initialized or not entry.keys.shape[-2]:
            return None
        if isinstance(entry, RaggedLayer):
            return entry.keys, entry.columns, entry.visible  # type: ignore[return-value]
        first = past - entry.keys.shape[-2]
        columns = torch.arange(first, past, device=entry.keys.device).expand(self.batch, -1)
        mask = self._work.mask2d
        return entry.keys, columns, None if mask is None else mask[:, first:past]

    def _visible(self, slot_BQ: Tensor, valid_BQ: Tensor | None) -> Tensor | None:
        """Keys each query row may see, those in the cache first, (B, Q, P + N): causal, unpadded, inside the layer's
        window; None for all."""
        window = self._view.layers[self.layer].sliding
        past = self._past(self.layer)
        index, pad = self.index, self._work.pad_BT
        at = take(index, slot_BQ)
        if (
            pad is None
            and self.valid is None
            and valid_BQ is None
            and window is None
            and slot_BQ.shape[1] == 1
            and self._work.last_column
            and (past is None or past[2] is None)
        ):
            return None
        if past is None:
            keys = index
        else:
            keys, at = torch.cat([past[1], self._work.past + index], 1), at + self._work.past
        seen = keys[:, None, :] <= at[:, :, None]
        if window is not None:
            seen = seen & (keys[:, None, :] > at[:, :, None] - window)
        here = None if pad is None else self._pick(pad)
        if self.valid is not None:
            here = self.valid if here is None else here & self.valid
        if past is not None and (here is not None or past[2] is not None):
            new = torch.ones_like(index, dtype=torch.bool) if here is None else here
            here = torch.cat([torch.ones_like(past[1], dtype=torch.bool) if past[2] is None else past[2], new], 1)
        if here is not None:
            seen = seen & here[:, None, :]
        return seen if valid_BQ is None else seen & valid_BQ[:, :, None]

    def _mean(self, rows_BHQN: Tensor, valid_BQ: Tensor | None) -> Tensor:
        per_query = rows_BHQN.mean(1)
        if valid_BQ is None:
            return per_query.mean(1)
        return per_query.sum(1) / valid_BQ.sum(1, keepdim=True).clamp(min=1)

    def attention_rows(self, queries: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows of the coming layer's attention at all alive rows, (B, H, Q, N) float32, and their validity (B, Q).

        What a KV cache holds has its part of the softmax and no column.

        Args:
            queries: bool (B, N) of the asking rows; default `self.queries`.
        """
        slot, valid = self._rows(queries)
        layer = self._view.layers[self.layer]
        hidden = self.hidden.detach()
        rope = self._turning()
        query = layer.queries(take(hidden, slot), self._rope_of(rope, slot))
        keys = layer.keys(hidden, rope)
        past = self._past(self.layer)
        keys = keys if past is None else torch.cat([past[0], keys], 2)
        rows = attention_rows(query, keys, layer.scale, self._visible(slot, valid), layer.softcap)
        return rows[..., -self.hidden.shape[1] :], valid

    def received(self, queries: Tensor | None = None) -> Tensor:
        """Attention that alive visual tokens would get in the coming layer, (B, V) float32, -inf for padding.

        Applies the layer's own norm, q/k projections and position embedding to the (detached) hidden states: one key
        projection of the alive rows and one query row a sample; softmax over the full row, mean over heads and queries.

        Args:
            queries: bool (B, N) of the asking rows; default `self.queries`.
        """
        return self.of_visual(self._mean(*self.attention_rows(queries)))

    def watch(self, queries: Tensor | None = None) -> None:
        """Remember the coming layer's attention from `queries`; `watched` returns it from the next layer on.

        Uses the keys that the layer computes anyway, so it costs a query row and one row of attention.
        """
        slot, valid = self._rows(queries)
        query = self._view.layers[self.layer].queries(take(self.hidden, slot), self._rope_of(self._turning(), slot))
        self._watch = (query, valid, self._visible(slot, valid))
        self._watched = None

    def watched(self) -> Tensor:
        """Attention received by alive visual tokens in the watched layer, (B, V) float32, -inf for padding.

        Raises:
            Error: no layer was watched just before, or tokens came or left since.
        """
        if self._watched is None:
            raise Error("watched: the layer before this one was not watched, or tokens came or left since")
        (query, valid, visible), keys = self._watched
        layer = self._view.layers[self.layer - 1]
        rows = attention_rows(query, keys, layer.scale, visible, layer.softcap)[..., -self.hidden.shape[1] :]
        return self.of_visual(self._mean(rows, valid))

    # ---- positions

    def _rope_full(self) -> Any:
        return rotary_in(self._work.kwargs)[1]

    @staticmethod
    def _rope_key(full: Any) -> str:
        """Of the memo: layers of one kind are handed the same tensors, not always in the same tuple."""
        return f"rope{id(full[0] if isinstance(full, tuple) else full)}"

    def rope(self) -> Any:
        """(cos, sin) of the alive rows in the coming layer: their original positions unless `compact` was asked."""
        full = self._rope_full()
        if full is None or (self.whole and not self._compact):
            return full
        key = self._rope_key(full)
        if self._compact:
            return self._memo(key, lambda: self._work.rotate(self.hidden, self.compact_ids()))
        return self._memo(key, lambda: self._rope_of(full, self.index))

    def _turning(self) -> Any:
        """(cos, sin) that the coming layer turns queries and keys by; None where it does not."""
        return self.rope() if self._work.turns(self.layer) else None

    def _rope_of(self, rope: Any, slot_BQ: Tensor) -> Any:
        if rope is None:
            return None
        return tuple(take(x, slot_BQ) for x in rope) if isinstance(rope, tuple) else take(rope, slot_BQ)

    def compact_ids(self) -> Tensor:
        """(B, N) position ids renumbered without gaps over unpadded alive rows."""
        here = torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid
        if self._work.pad_BT is not None:
            here = here & self._pick(self._work.pad_BT)
        return (here.cumsum(1) - 1).clamp(min=0)

    def compact(self) -> None:
        """From the coming layer on number the alive tokens without gaps (default: original positions stay).

        Raises:
            Error: the model's positions are not one-dimensional, or it has no rotary module to renumber with.
        """
        self._work.check_rotary()
        self._compact = True
        self._kept = {k: v for k, v in self._kept.items() if not k.startswith("rope")}

    # ---- acts

    def _scattered(self, out: Tensor | None) -> Tensor:
        if out is None and self.whole and self.valid is None:
            return torch.nn.functional.pad(self.hidden, (0, 0, 0, 1))
        if out is None:
            out = self.hidden.new_zeros(self.batch, self.width + 1, self.hidden.shape[-1])
        at = self.index if self.valid is None else self.index.masked_fill(~self.valid, self.width)
        return put(out, at, self.hidden)

    def result(self) -> Tensor:
        """Hidden states in the input's shape (B, T, D): who left keeps the state it left with."""
        if self.whole:
            return self.hidden
        out = self._scattered(self._out)
        if self._held is not None:  # never released: they leave with the state they were held in
            index, hidden, valid = self._held
            at = index if valid is None else index.masked_fill(~valid, self.width)
            out = put(out, at, hidden)
        out = out[:, : self.width]
        return out if self._owner is None else take(out, self._owner)

    def _subset(self, slot_BM: Tensor, valid_BM: Tensor | None) -> None:
        valid = valid_BM
        if self.valid is not None:
            valid = take(self.valid, slot_BM) if valid is None else valid & take(self.valid, slot_BM)
        self._index, self.hidden, self.valid = take(self.index, slot_BM), take(self.hidden, slot_BM), valid
        self._weight = None if self._weight is None else take(self._weight, slot_BM)
        self._kept = {}
        self._watched = None

    def _alive(self, mask_BN: Tensor) -> Tensor:
        if mask_BN.shape != self.hidden.shape[:2]:
            raise Error(f"mask of shape {tuple(mask_BN.shape)}: must be (B, N) = {tuple(self.hidden.shape[:2])}")
        return mask_BN if self.valid is None else mask_BN & self.valid

    def keep(self, mask_BN: Tensor) -> None:
        """Go on with these rows only; the others leave for good with the state they have."""
        keep = self._alive(mask_BN)
        if bool(keep.all()):
            return
        self._out = self._scattered(self._out)
        self._subset(*pack(keep))

    def drop(self, mask_BN: Tensor) -> None:
        """These rows leave for good."""
        self.keep(~mask_BN)

    def exit(self, mask_BN: Tensor) -> None:
        """These rows are finished: their present state is their output. Without any row left, layers cost nothing."""
        self.keep(~mask_BN)

    def keep_visual(self, keep_BV: Tensor) -> None:
        """Of the visual rows go on with these (in the order of `received`); all other rows stay."""
        slot, valid = self.visual_slots()
        chosen = keep_BV if valid is None else keep_BV & valid
        mask = ~self.visual
        self.keep(mask.scatter(1, slot, chosen | take(mask, slot)))

    def drop_visual(self) -> None:
        """All visual rows leave."""
        self.keep(~self.visual)

    def hold(self, mask_BN: Tensor) -> None:
        """These rows wait unchanged, outside all layers, until `release`."""
        if self._held is not None:
            raise Error("hold: tokens are held already; release them first")
        held = self._alive(mask_BN)
        if not bool(held.any()):
            return
        slot, valid = pack(held)
        self._held = (take(self.index, slot), take(self.hidden, slot), valid)
        if self._out is None:
            self._out = self.hidden.new_zeros(self.batch, self.width + 1, self.hidden.shape[-1])
        rest = ~held if self.valid is None else ~held & self.valid
        self._subset(*pack(rest))

    @property
    def holding(self) -> bool:
        """Whether tokens are held now."""
        return self._held is not None

    def release(self) -> None:
        """The held rows come back at their original places, unchanged."""
        if self._held is None:
            return
        index, hidden, valid = self._held
        self._held = None
        deferred = self._work.run.deferred
        if deferred is not None:  # the features were still being computed when these rows were put aside
            hidden = self._arrived(deferred.wait(), hidden, valid)
        full = torch.cat([self.index, index], 1)
        here = None
        if valid is not None or self.valid is not None:
            parts = [(self.valid, self.index), (valid, index)]
            here = torch.cat([torch.ones_like(i, dtype=torch.bool) if v is None else v for v, i in parts], 1)
        order = torch.argsort(full if here is None else full.masked_fill(~here, self.width), dim=1)
        joined = torch.cat([self.hidden, hidden], 1)
        if self._weight is not None:
            self._weight = take(torch.cat([self._weight, self._weight.new_ones(index.shape)], 1), order)
        self.hidden, self._index = take(joined, order), take(full, order)
        self.valid = None if here is None else take(here, order)
        self._kept, self._watched = {}, None
        if self.hidden.shape[1] == self.width and self.valid is None:
            self._index = None

    @staticmethod
    def _arrived(features: Tensor, hidden: Tensor, valid: Tensor | None) -> Tensor:
        features = features.to(hidden.dtype)
        if valid is None:
            return features.view_as(hidden)
        return hidden.index_put(valid.nonzero(as_tuple=True), features)

    def weigh_visual(self, factor_BV: Tensor) -> None:
        """Multiply what attention reads from alive visual rows (their values) by a factor, in all layers from here on.

        For masks with a gradient: a pre-norm layer does not notice the scale of its input, so a factor on the hidden
        states would learn next to nothing. Factors of several calls multiply.

        Args:
            factor_BV: in the order of `received`.
        """
        slot, valid = self.visual_slots()
        factor = factor_BV if valid is None else torch.where(valid, factor_BV, torch.ones_like(factor_BV))
        ones = torch.ones(self.hidden.shape[:2], dtype=factor.dtype, device=factor.device)
        rows = torch.arange(self.batch, device=slot.device)[:, None].expand_as(slot)
        if valid is None:
            ones = ones.index_put((rows, slot), factor)
        else:
            ones = ones.index_put((rows[valid], slot[valid]), factor[valid])
        self._weight = ones if self._weight is None else self._weight * ones

    def merge(self, owner_BN: Tensor, weight_BN: Tensor | None = None) -> None:
        """Merge rows: each row's state is averaged into row owner_BN, which survives; a row owning itself survives.

        Args:
            owner_BN: slot of the surviving row.
            weight_BN: of each row in the average, default 1. At the end a merged token copies its owner's result.
        """
        N = self.hidden.shape[1]
        weight = torch.ones_like(owner_BN, dtype=self.hidden.dtype) if weight_BN is None else weight_BN
        if self.valid is not None:
            weight = weight * self.valid
        total = torch.zeros_like(weight).scatter_add(1, owner_BN, weight).clamp(min=1e-12)
        rows = owner_BN[..., None].expand_as(self.hidden)
        summed = torch.zeros_like(self.hidden).scatter_add(1, rows, self.hidden * weight[..., None])
        survive = self._alive(owner_BN == torch.arange(N, device=owner_BN.device))
        merged = torch.where(survive[..., None], summed / total[..., None], self.hidden)
        columns = torch.arange(self.width, device=owner_BN.device).expand(self.batch, -1)
        owner = columns.clone() if self._owner is None else self._owner
        into = take(self.index, owner_BN)
        now = torch.cat([columns, columns[:, :1]], 1).clone()
        at = self.index if self.valid is None else self.index.masked_fill(~self.valid, self.width)
        now = now.scatter(1, at, into)[:, : self.width]
        self._owner = take(now, owner)
        self.hidden = merged
        self.keep(survive)

    def bypass(self, mask_BN: Tensor | bool = True, *, free: bool = False) -> None:
        """These rows pass the coming layer unchanged and leave no keys there; True is all of them.

        Args:
            free: the layer's cache will not be read again: give its memory back once no row runs it.
        """
        self.bypassed = _either(self.bypassed, mask_BN)
        self.frees_cache = self.frees_cache or free

    def replace(self, function: Callable[[Tensor], Tensor]) -> None:
        """The coming layer does not run: every row goes through `function` (x_BND -> (B, N, D)) instead.

        It leaves no keys, and the layer's cache is given back.
        """
        self._replaced = function

    def blend(self, weight_BN: Tensor, *, hide: bool = False) -> None:
        """The coming layer adds only a part of what it does: h + weight (F(h) - h). For training with a gradient.

        Args:
            weight_BN: in [0, 1]; every row runs, also those of weight 0.
            hide: other rows do not see the keys of rows of weight 0 (a row always sees its own), as where they had not
                run. Needs a pass without cache.
        """
        self._blend = (weight_BN, hide)

    def mlp_share(self, share: float) -> None:
        """For `feed_forward`: the share of the layer's MLP that its rows really ran, on average. The trace says it."""
        self._mlp_share = share

    def watch_mlp(self) -> None:
        """Remember the state that enters the coming layer's MLP; `watched_mlp` returns it from the next layer on."""
        self._watches_mlp = True
        self._work.executor.watch_mlp(self.layer)

    def watched_mlp(self) -> tuple[Tensor, Tensor]:
        """The state (B, N, D) that entered the MLP of the layer before, its norm not applied, and the state after it.

        Raises:
            Error: that layer was not watched.
        """
        if self._mlp_input is None:
            raise Error("watched_mlp: the MLP of the layer before this one was not watched")
        return self._mlp_input, self.hidden

    def bypass_attention(self, mask_BN: Tensor | bool = True) -> None:
        """These rows skip the coming layer's attention (and leave no keys there) but run its MLP."""
        self.bypassed_attention = _either(self.bypassed_attention, mask_BN)
        self._work.patch_sublayers(self.layer)

    def bypass_mlp(self, mask_BN: Tensor | bool = True) -> None:
        """These rows skip the coming layer's MLP but run its attention."""
        self.bypassed_mlp = _either(self.bypassed_mlp, mask_BN)
        self._work.patch_sublayers(self.layer)


def _either(a: Tensor | bool, b: Tensor | bool) -> Tensor | bool:
    if isinstance(a, bool):
        return True if a else b
    if isinstance(b, bool):
        return True if b else a
    return a | b

"""What ran: cells per layer, the FLOPs and bytes of what executed, and the compute map."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sparing.grid.method import Error


def _fused_cpu_sdpa(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _grouped(
    rows: Tensor, weight: Tensor, offs: Tensor | None = None, *args: Any, out_val: Any = None, **kw: Any
) -> int:
    """One GEMM over rows that are sorted by expert: only rows before the last offset are multiplied."""
    if rows.ndim == weight.ndim == 2:  # gradient of the weights, one (K, S_e) x (S_e, N) product an expert
        return 2 * rows.shape[0] * rows.shape[1] * weight.shape[1]
    done = rows.shape[0] if offs is None else int(offs[-1])
    return 2 * done * weight.shape[-2] * weight.shape[-1]


_grouped._get_raw = True  # type: ignore[attr-defined]

# torch counts the CUDA fused kernels only, on CPU fused attention would be free; and it does not know grouped GEMMs.
_MENDED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_cpu_sdpa,
    torch.ops.aten._grouped_mm: _grouped,
}


def _mended() -> dict[Any, Any]:
    """Formulas by operation; transformers' own grouped GEMM joins where it is loaded."""
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return _MENDED if fallback is None else {**_MENDED, fallback: _grouped}


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_size(v) for v in value)
    return 0


class Counter(FlopCounterMode):
    """`torch.utils.flop_counter` with its CPU holes mended, bytes beside FLOPs, and both split by decoder layer.

    A multiply-add is 2 FLOPs. Attention counts its full query x key rectangle: fused kernels skip part of the causal
    half, how much depends on the kernel. Bytes are the operands and results of the counted operations (matrix products,
    attention, convolutions), each moved once; elementwise work is in neither number.

    Attributes:
        flops, bytes: totals since __enter__.
        layer: decoder layer running now, None outside; set by the engine.
        by_layer: layer -> [flops, bytes].
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_mended())
        self.flops = 0
        self.bytes = 0
        self.layer: int | None = None
        self.by_layer: dict[int | None, list[int]] = defaultdict(lambda: [0, 0])

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        formula = self.flop_registry.get(func_packet)
        if formula is not None:
            flops = int(formula(*args, **kwargs, out_val=out))
            moved = _size(args) + _size(out)
            self.flops += flops
            self.bytes += moved
            entry = self.by_layer[self.layer]
            entry[0] += flops
            entry[1] += moved
        return out


def count(call: Callable[[], object]) -> tuple[int, int]:
    """FLOPs and bytes of one call, as `Counter` counts them. For any model, dense or cut."""
    with Counter() as counter:
        call()
    return counter.flops, counter.bytes


@dataclass
class Cells:
    """One forward pass through the decoder.

    Attributes:
        phase: "decode" where all columns are generated and the prompt is in a cache, else "prefill".
        tokens: token columns of the pass, B * T.
        visual: visual tokens among them.
        rows: per layer, token rows that ran it (padding of unequal batches included: it is executed). Rows that skipped
            a sub-layer count by the share of the layer's active weights in the other one.
        visual_rows: per layer, visual rows among them.
        pairs: per layer, pairs of token and expert that ran; only where a routing method is attached.
        all_pairs: per layer, pairs that the router chose.
        index: per layer, original column of each row that ran, (B, N), -1 for padding; only when asked for.
        batch: B.
        generated: of `tokens`, those that are generated; all of them in a pass of phase "decode".
    """

    phase: str
    tokens: int
    visual: int
    batch: int
    rows: list[float]
    visual_rows: list[int]
    index: list[Tensor | None] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    all_pairs: list[int] = field(default_factory=list)
    generated: int = 0

    @property
    def keeps_visual(self) -> bool:
        """Whether all visual tokens ran every layer."""
        return all(rows == self.visual for rows in self.visual_rows)


@dataclass
class Trace:
    """What ran while methods were attached.

    Attributes:
        cells: one entry a decoder pass, in order.
        flops, bytes: executed, counted by `Counter`; None unless attached with trace=True.
        by_layer: layer (None = outside the decoder layers) -> (flops, bytes).
        seconds_deciding: wall time spent inside the methods' verbs; 0 unless `run.time_decisions`.
    """

    cells: list[Cells] = field(default_factory=list)
    counter: Counter | None = None
    seconds_deciding: float = 0.0

    def reset(self) -> None:
        """Forget everything so far."""
        self.cells.clear()
        self.seconds_deciding = 0.0
        if self.counter is not None:
            self.counter.flops = self.counter.bytes = 0
            self.counter.by_layer.clear()

    def _counted(self) -> Counter:
        if self.counter is None:
            raise Error("trace = False: FLOPs and bytes are counted only under attach(…, trace=True)")
        return self.counter

    @property
    def flops(self) -> int:
        """FLOPs executed (2 a multiply-add)."""
        return self._counted().flops

    @property
    def bytes(self) -> int:
        """Bytes moved by the counted operations."""
        return self._counted().bytes

    @property
    def by_layer(self) -> dict[int | None, tuple[int, int]]:
        """(flops, bytes) a decoder layer; None is everything outside the layers."""
        return {k: (v[0], v[1]) for k, v in self._counted().by_layer.items()}

    def share(self, axis: str = "tokens", phase: str | None = None) -> float:
        """Mean share of cells that ran: visual-token-layers ("tokens"), token-layers of all kinds ("depth") or pairs of
        token and expert among those that the routers chose ("experts").

        Args:
            axis: "tokens", "depth" or "experts".
            phase: only passes of this phase; default all.
        """
        ran, full = 0.0, 0
        for c in self.cells:
            if phase in (None, c.phase) and axis == "experts":
                ran, full = ran + sum(c.pairs), full + sum(c.all_pairs)
            elif phase in (None, c.phase):
                ran += sum(c.visual_rows if axis == "tokens" else c.rows)
                full += len(c.rows) * (c.visual if axis == "tokens" else c.tokens)
        return ran / full if full else 1.0

    def map(self, sample: int = 0, at: int = 0) -> Tensor:
        """The compute map of one sample of pass `at`: bool (layers, T), True where a token ran a layer."""
        cells = self.cells[at]
        width = cells.tokens // cells.batch
        out = torch.zeros(len(cells.index), width, dtype=torch.bool)
        for layer, index in enumerate(cells.index):
            if index is None:
                out[layer] = True
            elif index.numel():
                row = index[sample]
                out[layer, row[row >= 0]] = True
        return out

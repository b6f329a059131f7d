"""Unified Layer Skipping: every generated token runs the same evenly spread layers, fixed by the target speed-up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from sparing.engine.schedule import ScheduledLayers
from sparing.engine.train import finetune
from sparing.grid.budget import spaced
from sparing.grid.method import BudgetError, Card, Error, Shape, choice, number, register


@register(
    "unified-layer-skipping",
    Card(
        "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy",
        year=2024,
        arxiv="2404.06954",
        axis="depth",
        kind="stream",
        phase="decode",
        summary="prompt at full depth, generated tokens through an evenly spread subset of layers",
        trains=True,
    ),
)
@dataclass(frozen=True)
class UnifiedLayerSkipping(ScheduledLayers):
    """Keep R = floor(L / S) of L layers for generated tokens; the prompt runs all layers.

    Layer sets (0-based, first and last layer always in):

    - `code`, the rule of the released script: interval = floor(L / (R-1)); rising i with i mod interval = 0 join until
      there are R. It collapses to a block of bottom layers when L / (R-1) < 2.
    - `even`: round(linspace(0, L-1, R)).
    - `auto`: `code` for whole S >= 2, else `even`.

    A skipped layer is the identity and keeps no cache of generated tokens; its prompt cache is freed at the first
    decode step (the released code keeps it). Decisions cost nothing; every sample runs the same layers. The published
    results are after fine-tuning (`fit`); without it the method runs but is not what the paper reports.

    Args:
        S: target speed-up of generated tokens, >= 1; 1 keeps every layer.
        rule: auto | code | even.

    >>> UnifiedLayerSkipping(S=5).layer_set(32)
    (0, 6, 12, 18, 24, 31)
    """

    S: float = number(2.0, "target speed-up", low=1, source="§3")
    rule: str = choice("auto", ("auto", "code", "even"), "how the layers are spread")

    def layer_set(self, L: int) -> tuple[int, ...]:
        """Kept layers of L, rising."""
        R = math.floor(L / self.S + 1e-9)
        if R >= L:
            return tuple(range(L))
        if R < 2:
            raise Error(
                f"unified-layer-skipping: S = {self.S:g}: leaves {R} of {L} layers, 2 must stay (S <= {L / 2:g})"
            )
        rule = self.rule
        if rule == "auto":
            rule = "code" if int(self.S) == self.S else "even"
        if rule == "even":
            return spaced(L, R)
        kept = {0, L - 1}
        interval = L // (R - 1)
        for i in range(1, L - 1):
            if i % interval == 0 and len(kept) < R:
                kept.add(i)
        return tuple(sorted(kept))

    def at(self, keep: float, shape: Shape) -> Self:
        L = shape.layers
        R = round(keep * L)
        if R < 2:
            raise BudgetError(f"keep = {keep:g}: unified-layer-skipping keeps at least 2 of {L} layers, {2 / L:.3g}")
        return self.replace(S=L / R)

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        return {"R": len(self.layer_set(shape.layers))}

    def fit(self, model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: Any) -> Self:
        """Fine-tune for this S: the prompt at full depth, the response through the kept layers, loss on the response.

        The two passes of the paper (response attending to the prompt's cache of the same layer) are one pass here, with
        prompt and response rows told apart by the labels (-100 is prompt). All weights but the input embedding train.

        Args:
            model: the dense model; left unchanged.
            batches: with input_ids and labels.
            options: epochs, lr, … of `sparing.engine.train.finetune`.
        """
        dense = self.with_state({})
        return self.with_state(finetune(model, dense, batches, prompt_from_labels=True, **options))

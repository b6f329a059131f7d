"""LoRA without skipping: the control that says how much of a method's quality comes from the LoRA that repairs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from sparing.engine.lora import adapt
from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.train import Batch, Training
from sparing.grid.method import Card, Shape, integer, number, register


@register(
    "lora-depth",
    Card(
        "Control: LoRA, every layer runs",
        year=2026,
        axis="depth",
        kind="stream",
        phase="decode",
        needs="training",
        summary="the dense model with LoRA trained on the same data; spends everything at any budget",
        controls=(),
        tunes=True,
        requires=("lora",),
        saves="nothing",
        is_control=True,
    ),
)
@dataclass(frozen=True)
class LoraDepth(StreamMethod):
    """Train LoRA as a method that skips layers and repairs itself by LoRA does, and skip nothing.

    Against dense it shows what LoRA and the data give by themselves; what a method loses against it is the price of
    the layers it skips. For a fair pair give `fit` the same batches and options (epochs, lr) as the method's, and the
    same rank and lora_alpha: the LoRA then takes as many steps as the method's takes.

    It spends everything: `at` gives the same method for every budget, and the share of layers it runs is 1.

    State: see `sparing.engine.lora`.

    Args:
        rank, lora_alpha: of LoRA on queries and values.

    >>> LoraDepth().at(0.5, Shape(layers=12, heads=8, groups=4, head_dim=8, hidden=64, neurons=96)) == LoraDepth()
    True
    """

    rank: int = integer(8, "rank of LoRA", low=1)
    lora_alpha: float = number(16.0, "LoRA is scaled by lora_alpha / rank", low=0)

    def at(self, keep: float, shape: Shape) -> Self:
        return self

    def before_layer(self, stream: Stream, layer: int) -> None:
        """Every row runs every layer."""

    def fit(self, model: nn.Module, batches: Iterable[Batch], **options: Any) -> Self:
        """Train the LoRA on the labels of the dense model.

        Args:
            model: left unchanged; a copy trains.
            batches: with input_ids and labels.
            options: of `sparing.engine.train.Training`; lr is 1e-4 by default.

        Raises:
            Error: no batches, one without labels, or PEFT is missing.
        """
        how = Training(**options)
        lora = adapt(model, batches=batches, how=how, rank=self.rank, alpha=self.lora_alpha, name="fit lora-depth")
        return self.with_state(lora)

"""Sub-layers by lot, or evenly spread: the controls of methods that remove attentions and MLPs for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from sparing.engine.surgery import LayerCut, Plan, SurgeryMethod
from sparing.engine.view import View
from sparing.grid.budget import spaced
from sparing.grid.method import BudgetError, Card, Error, Shape, flag, integer, register


@dataclass(frozen=True)
class Sublayers(SurgeryMethod):
    """Keep so many attentions and so many MLPs of the model's layers; a layer with neither goes whole."""

    attention: int = integer(4, "attentions kept", low=0)
    mlp: int = integer(4, "MLPs kept", low=0)
    blocks: bool = flag(False, "whole layers go: the same ones for both")

    def chosen(self, L: int, count: int, kind: int) -> set[int]:
        """Layers whose attention (kind 0) or MLP (kind 1) stays."""
        raise Error(f"{type(self).__name__} defines no chosen")

    def at(self, keep: float, shape: Shape) -> Self:
        count = shape.layers - int((1 - keep) * shape.layers + 1e-9)
        if count < 1:
            raise BudgetError(f"keep = {keep:g}: {self.name} keeps at least one of {shape.layers} layers")
        return self.replace(attention=count, mlp=count)

    def plan(self, model: nn.Module) -> Plan:
        L = len(View(model))
        for name in ("attention", "mlp"):
            if getattr(self, name) > L:
                raise Error(f"{self.name}: {name} = {getattr(self, name)}: the model has {L} layers")
        kept = [self.chosen(L, self.attention, 0), self.chosen(L, self.mlp, 0 if self.blocks else 1)]
        cuts = [LayerCut(attention=i in kept[0], mlp=i in kept[1]) for i in range(L)]
        return Plan(tuple(cut if cut.attention or cut.mlp else None for cut in cuts))


def _card(summary: str) -> Card:
    return Card(
        f"Control: {summary}",
        year=2026,
        axis="depth",
        kind="surgery",
        phase="static",
        requires=("mlp",),
        summary=summary,
        controls=(),
        is_control=True,
    )


@register("random-sublayers", _card("attentions and MLPs by lot"))
@dataclass(frozen=True)
class RandomSublayers(Sublayers):
    """Attentions and MLPs drawn apart, each once.

    Args:
        attention, mlp: how many stay.
        blocks: whole layers go.
        seed: of the draw.
    """

    seed: int = integer(0, "of the draw")

    def chosen(self, L: int, count: int, kind: int) -> set[int]:
        lot = torch.randperm(L, generator=torch.Generator().manual_seed(self.seed * 1009 + kind))
        return set(lot[:count].tolist())


@register("uniform-sublayers", _card("evenly spaced attentions and MLPs"))
@dataclass(frozen=True)
class UniformSublayers(Sublayers):
    """The first and the last stay, the others evenly spaced.

    Args:
        attention, mlp: how many stay.
        blocks: whole layers go; they are the same for both in any case where the counts are.
    """

    def chosen(self, L: int, count: int, kind: int) -> set[int]:
        return set(spaced(L, count)) if count > 1 else set(range(count))

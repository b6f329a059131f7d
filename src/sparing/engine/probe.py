"""Looks at a model running dense: hidden states and last-token attention of visual tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparing.engine.attach import attach
from sparing.engine.stream import Stream, StreamMethod, take
from sparing.grid.method import Card, Error

_CARD = Card("Looks only", year=2026, axis="probe", kind="stream", phase="prefill", visual=True, is_control=True)


@dataclass
class VisualProbe:
    """What visual tokens went through.

    Attributes:
        hidden: per layer, its input at visual tokens, (samples, V, D).
        attention: per layer, attention a head from the last prompt token to them, (samples, H, V).
    """

    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Look(StreamMethod):
    def before_layer(self, stream: Stream, layer: int) -> None:
        notes: dict[int, list[tuple[Tensor, Tensor]]] = self.__dict__["notes"]
        slot, _ = stream.visual_slots()
        rows, _ = stream.attention_rows()
        pick = slot[:, None].expand(-1, rows.shape[1], -1)
        notes.setdefault(layer, []).append((take(stream.hidden, slot).cpu(), rows[:, :, 0].gather(-1, pick).cpu()))


_Look.name, _Look.card = "probe", _CARD


def probe(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> VisualProbe:
    """Run batches dense and note what visual tokens go through; every sample needs the same number of them.

    Raises:
        Error: no batches.
    """
    notes: dict[int, list[tuple[Tensor, Tensor]]] = {}
    look = _Look()
    look.__dict__["notes"] = notes
    with torch.inference_mode(), attach(model, look, warn=False):
        for batch in batches:
            inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
            model(**inputs)
    if not notes:
        raise Error("batches: the calibration data is empty")
    out = VisualProbe()
    for layer in sorted(notes):
        out.hidden.append(torch.cat([h for h, _ in notes[layer]]))
        out.attention.append(torch.cat([a for _, a in notes[layer]]))
    return out

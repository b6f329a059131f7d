"""What a feed-forward block changes: cosines of the state before and after it, on a model that runs dense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparing.engine.attach import attach
from sparing.engine.execute import Executor
from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.view import evaluating
from sparing.grid.method import Card, Error
from sparing.grid.score import cosine


@torch.no_grad()
def saturation(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], rows: int) -> Tensor:
    """Cosine of x and x + FFN(norm(x)) for generated tokens in every layer but the last, in dense passes.

    Args:
        model: left unchanged; runs in evaluation mode.
        batches: keyword arguments of its forward. What stands before the first label that is not -100 is prompt and
            does not count, nor does padding; without labels every token counts.
        rows: at most as many tokens are kept, evenly from all.

    Returns:
        float32 (R, L-1), on the CPU.

    Raises:
        Error: there is no token, or a layer has no MLP module of its own.
    """
    looking = _Looking()
    found: list[Tensor] = []
    device = next(model.parameters()).device
    with evaluating(model), attach(model, looking, warn=False) as run:
        run.keeps_trace = False
        for batch in batches:
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
            model(**inputs, use_cache=False)
            c_BTL = torch.stack([looking.cosines[layer] for layer in range(len(run.view) - 1)], -1).cpu()
            counts_BT = torch.ones(c_BTL.shape[:2], dtype=torch.bool)
            if "attention_mask" in batch:
                counts_BT &= batch["attention_mask"].bool().cpu()
            if "labels" in batch:
                counts_BT &= (batch["labels"] != -100).cumsum(1).cpu() > 0
            found.append(c_BTL[counts_BT])
    if not sum(map(len, found)):
        raise Error("batches: the calibration data is empty")
    c_RL = torch.cat(found)
    return c_RL[:: -(-len(c_RL) // rows)].contiguous()


def mlp_shares(model: nn.Module) -> Tensor:
    """Share of each layer's active weights in its MLP, float64 (L,): what the trace counts a skipped one as."""
    run = attach(model)
    weights = Executor(run.view, run).weights
    return torch.tensor([weights(layer)[1] for layer in range(len(run.view))], dtype=torch.float64)


@dataclass(frozen=True)
class _Looking(StreamMethod):
    """Runs everything and notes the cosines of all rows, layer -> (B, T)."""

    cosines: dict[int, Tensor] = field(default_factory=dict)

    def before_layer(self, stream: Stream, layer: int) -> None:
        if layer:
            self.cosines[layer - 1] = cosine(*stream.watched_mlp())
        if layer < stream.layers - 1:
            stream.watch_mlp()


_Looking.name, _Looking.card = (
    "saturation",
    Card("Looks only", year=2026, axis="depth", kind="stream", phase="decode", requires=("mlp",), is_control=True),
)

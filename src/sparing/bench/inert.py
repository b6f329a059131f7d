"""Whether a method did anything: a run in which everything ran, though less was asked for, is no result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sparing.engine.attach import Run
from sparing.engine.view import View
from sparing.grid.method import Method
from sparing.grid.trace import Trace


class Inert(Exception):
    """Everything ran; the message is one plain sentence that says so."""


def acted(run: Run, method: Method, generate: Callable[[], object]) -> tuple[float, str]:
    """Share of the cells that a method ran in the phase that it is for, and why that was nothing less than dense.

    For a method that acts in decoding the share is what real decode steps run; the task must have shown it at work too.

    Args:
        run: the method, attached, with the trace of a task's evaluation; the trace is another one afterwards.
        method: what is attached.
        generate: a prompt and real decode steps under `run`.

    Returns:
        share: of visual-token-layers, of token-layers, or of pairs of token and expert.
        why: a sentence without its subject; empty where something was left out.
    """
    card, trace = method.card, run.trace
    if card.axis == "tokens":
        return trace.share("tokens"), _whole_images(trace)
    axis = "experts" if card.axis == "experts" else "depth"
    if card.phase != "decode":
        phase = "prefill" if card.phase == "prefill" else None
        share, what = trace.share(axis, phase), "the prompt" if phase else "every token"
        return share, f"ran everything: {what} in {_everywhere(run, axis)}" if _is_all(share) else ""
    scored = trace.share(axis)
    trace.reset()
    run.prompt = None
    generate()
    share = trace.share(axis, "decode")
    if _is_all(share):
        return share, f"ran everything: each generated token in {_everywhere(run, axis)}"
    if _is_all(scored):
        return share, "did nothing: it acts on generated tokens, and the task scores none"
    return share, ""


def partly(trace: Trace) -> str:
    """A remark where some passes kept all their visual tokens and others did not; else nothing."""
    seen = [cells for cells in trace.cells if cells.visual]
    whole = sum(cells.keeps_visual for cells in seen)
    return f"all visual tokens ran in {whole} of {len(seen)} passes" if 0 < whole < len(seen) else ""


def uncut(dense: nn.Module, small: nn.Module) -> str:
    """Why a cut model is the dense one: nothing of its layers is gone, and no weight is another. Else nothing."""
    left = dict(View(small).stack.named_parameters())
    for name, weight in View(dense).stack.named_parameters():
        if name not in left or left[name].shape != weight.shape or not torch.equal(left[name], weight):
            return ""
    return "ran everything: it cut nothing, all parameters of the layers are left"


def parameters(model: nn.Module) -> int:
    """Parameters of the decoder layers."""
    return sum(weight.numel() for weight in View(model).stack.parameters())


def experts(model: nn.Module) -> int:
    """Experts of all layers."""
    return sum(layer.experts.count for layer in View(model).layers if layer.experts is not None)


def _is_all(share: float) -> bool:
    """As much as dense, no more: a method whose decisions are counted runs more than everything, and acts."""
    return abs(share - 1) < 1e-9


def _whole_images(trace: Trace) -> str:
    seen = [cells for cells in trace.cells if cells.visual]
    if not seen:
        return "did nothing: it acts on visual tokens, and no prompt of the task had one"
    layers = len(seen[0].visual_rows)
    return (
        f"ran everything: all visual tokens in {layers} of {layers} layers" if all(c.keeps_visual for c in seen) else ""
    )


def _everywhere(run: Run, axis: str) -> str:
    layers = len(run.view)
    return (
        f"all experts that the routers chose, in {layers} layers"
        if axis == "experts"
        else f"{layers} of {layers} layers"
    )

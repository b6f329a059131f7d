"""The conformance suite can fail: methods broken on purpose, each caught by the check named beside it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparing.engine.experts import KeepExperts
from sparing.engine.routing import Routing, RoutingMethod
from sparing.engine.schedule import follow
from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.surgery import LayerCut, Plan, SurgeryMethod
from sparing.engine.view import View
from sparing.grid.method import Card, Error, Method, Shape, integer, share
from sparing.grid.select import top_k
from sparing.testing import CHECKS, cases, check_method
from sparing.testing.models import LAYERS


def card(**changes: Any) -> Card:
    given = {"title": "Broken", "year": 2026, "axis": "tokens", "kind": "stream", "phase": "prefill", "visual": True}
    return Card(**(given | changes))


@dataclass(frozen=True)
class Sound(StreamMethod):
    """Drops the visual tokens with the smallest norms before layer 2; what the broken ones are made from."""

    keep: float = share(0.5, "kept")

    def at(self, keep: float, shape: Shape) -> Any:
        return self.replace(keep=keep)

    def shares(self, shape: Shape) -> tuple[float, ...]:
        return (1.0, 1.0, *(self.keep,) * (LAYERS - 2))

    def before_layer(self, stream: Stream, layer: int) -> None:
        follow(stream, layer, self.shares(Shape(LAYERS, 1, 1, 1, 1, 1)), self.choose)

    def choose(self, stream: Stream, count_B: Tensor) -> Tensor:
        hidden, _ = stream.visual_rows()
        return top_k(hidden.norm(dim=-1), count_B)


@dataclass(frozen=True)
class Skips(StreamMethod):
    """Generated tokens skip the layers from `first` on, all but the last."""

    first: int = integer(3, "skipped")

    def at(self, keep: float, shape: Shape) -> Any:
        return self.replace(first=round(keep * shape.layers))

    def before_layer(self, stream: Stream, layer: int) -> None:
        if layer >= self.first:
            stream.bypass(stream.generated, free=True)


DEPTH = card(axis="depth", phase="decode", visual=False)
FITTED = card(needs="calibration", axis="width", kind="surgery", visual=False)
EXPERT = card(axis="experts", kind="surgery", saves="memory", visual=False)
BROKEN: dict[str, tuple[type[Method], str, str]] = {}  # name -> class, check, architecture


def broken(check: str, architecture: str = "llava", given: Card | None = None) -> Any:
    """Class decorator: a method that must be caught by `check`."""

    def add(cls: type[Method]) -> type[Method]:
        cls.name, cls.card = cls.__name__.lower(), given or card()
        BROKEN[cls.name] = (cls, check, architecture)
        return cls

    return add


Sound.name, Sound.card = "sound", card()
Skips.name, Skips.card = "skips", DEPTH


@broken("full-budget")
@dataclass(frozen=True)
class TouchesDense(Sound):
    """Changes the hidden states a little although it keeps everything."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        super().before_layer(stream, layer)
        stream.hidden = stream.hidden * (1 + 1e-6)


@broken("effect")
@dataclass(frozen=True)
class OnlyMasks(Sound):
    """Sets dropped tokens to zero and computes them all the same."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        if layer == 2:
            keep = self.choose(stream, (stream.visual_total * self.keep).long())
            slot, _ = stream.visual_slots()
            factor = torch.ones(stream.hidden.shape[:2]).scatter(1, slot, keep.float())
            stream.hidden = stream.hidden * factor[..., None]


@broken("effect", "llama", DEPTH)
@dataclass(frozen=True)
class DoesNothing(Skips):
    """Never skips."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        return


@broken("effect", "qwen3-moe", card(axis="experts", kind="routing", phase="both", visual=False))
@dataclass(frozen=True)
class OnlyZeroGates(RoutingMethod):
    """Sets gates to zero; the experts run all the same."""

    k: int = integer(2, "experts that count")

    def at(self, keep: float, shape: Shape) -> Any:
        return self.replace(k=max(1, round(keep * shape.top_k)))

    def route(self, routing: Routing, layer: int) -> None:
        routing.weight = routing.weight.clone()
        routing.weight[:, self.k :] = 0


@broken("budget-order")
@dataclass(frozen=True)
class IgnoresBudget(Sound):
    """Drops half, whatever was asked, unless everything was."""

    def shares(self, shape: Shape) -> tuple[float, ...]:
        return (1.0, 1.0, *(0.5 if self.keep < 1 else 1.0,) * (LAYERS - 2))


@broken("nested-parameters", "qwen3-moe", EXPERT)
@dataclass(frozen=True)
class KeepsTooMany(KeepExperts):
    """Keeps six experts, whatever was asked, unless all were."""

    def importance(self, layers: Any) -> Tensor:
        return torch.arange(12.0).expand(len(layers), 12)

    def at(self, keep: float, shape: Shape) -> Any:
        return self.replace(M=6 if keep < 1 else 12)


@broken("batch")
@dataclass(frozen=True)
class FirstSampleDecides(Sound):
    """Takes the choice of sample 0 for the whole batch."""

    def choose(self, stream: Stream, count_B: Tensor) -> Tensor:
        return super().choose(stream, count_B)[:1].expand(stream.batch, -1)


@broken("left-padding", "llava")
@dataclass(frozen=True)
class CountsColumns(Sound):
    """Prefers tokens by their column in the batch, padding included."""

    def choose(self, stream: Stream, count_B: Tensor) -> Tensor:
        score = torch.sin(7.0 * stream.index.float())
        return top_k(stream.of_visual(score), count_B)


@broken("right-padding", "llava")
@dataclass(frozen=True)
class AsksPadding(Sound):
    """Compares tokens with the last column, which is padding in shorter samples."""

    def choose(self, stream: Stream, count_B: Tensor) -> Tensor:
        hidden, _ = stream.visual_rows()
        return top_k((hidden * stream.hidden[:, -1:]).sum(-1), count_B)


@broken("cache-greedy", "llama", card(axis="depth", phase="both", visual=False))
@dataclass(frozen=True)
class OtherLayersWhenCached(Skips):
    """Skips other layers in a cached step than the same tokens skip in one pass."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        if layer >= self.first and (stream.phase == "prefill" or layer % 2):
            stream.bypass(stream.generated)


@broken("cache-beams", "llama", card(axis="depth", phase="both", visual=False))
@dataclass(frozen=True)
class RemembersRows(Skips):
    """Skips by the number of the row in the batch, which beams change."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        if layer >= self.first:
            odd = (torch.arange(stream.batch) % 2 == 1)[:, None].expand(stream.hidden.shape[:2])
            stream.bypass(odd if stream.generated is True else stream.generated & odd)


@broken("restored", "llama", DEPTH)
@dataclass(frozen=True)
class ScalesWeights(Skips):
    """Writes into a weight."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        super().before_layer(stream, layer)
        with torch.no_grad():
            stream._view.layers[0].projection("q_proj").weight[0, 0] += 1e-4


@broken("restored", "llama", DEPTH)
@dataclass(frozen=True)
class LeavesAHook(Skips):
    """Puts a hook on a layer and forgets it."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        super().before_layer(stream, layer)
        if layer == 1:
            stream._view.layers[1].module.register_forward_hook(lambda *_: None)


@broken("restored-after-error", "llama", DEPTH)
@dataclass(frozen=True)
class CleansUpAtTheEnd(Skips):
    """Marks the model in the first layer and unmarks it in the last, which an exception never reaches."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        super().before_layer(stream, layer)
        if layer == 0:
            stream._view.config.sparing_is_running = True
        if layer == LAYERS - 1 and not stream.generated:
            handle = stream._view.decoder.register_forward_hook(
                lambda *_: (handle.remove(), stream._view.config.__dict__.pop("sparing_is_running", None), None)[-1]
            )


@broken("inputs-unchanged")
@dataclass(frozen=True)
class WritesIntoIds(Sound):
    """Overwrites the ids of the prompt that the user handed in."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        super().before_layer(stream, layer)
        ids = stream._work.inputs.get("input_ids")
        if ids is not None:
            ids[:, -1] = 3


@broken("bfloat16", "llama", DEPTH)
@dataclass(frozen=True)
class Overflows(Skips):
    """Has a constant that float32 knows and bfloat16 makes infinite."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        super().before_layer(stream, layer)
        tiny = torch.tensor(1e-39, dtype=torch.float64).to(stream.hidden.dtype)
        if stream.hidden.dtype == torch.bfloat16:
            stream.hidden = stream.hidden / (tiny - tiny)


@broken("gradients", "llama", card(axis="depth", phase="decode", visual=False, trains=True))
@dataclass(frozen=True)
class Detaches(Skips):
    """Cuts the gradient in the middle."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        super().before_layer(stream, layer)
        if layer == 2:
            stream.hidden = stream.hidden.detach()


@broken("deterministic")
@dataclass(frozen=True)
class DrawsGlobally(Sound):
    """Takes its chance from torch's own generator."""

    def choose(self, stream: Stream, count_B: Tensor) -> Tensor:
        return top_k(torch.rand(stream.batch, stream.visual_slots()[0].shape[1]), count_B)


@broken("seeded", "llava", card(is_control=True))
@dataclass(frozen=True)
class IgnoresSeed(Sound):
    """Has a seed and does not use it."""

    seed: int = integer(0, "of nothing")


@broken("fused-attention")
@dataclass(frozen=True)
class SwitchesToEager(Sound):
    """Puts the model on eager attention to get at scores."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        super().before_layer(stream, layer)
        stream._view.config._attn_implementation = "eager"


@broken("situations", "llama", DEPTH)
@dataclass(frozen=True)
class GoesByWidth(Skips):
    """Takes every narrow pass for generated tokens, so also the parts of a prompt that comes in chunks."""

    def before_layer(self, stream: Stream, layer: int) -> None:
        if layer >= self.first and stream.width < 5:
            stream.bypass(free=True)


@broken("memory", "llava")
@dataclass(frozen=True)
class FullAttentionMatrix(Sound):
    """Makes the whole attention matrix to read off one row."""

    def choose(self, stream: Stream, count_B: Tensor) -> Tensor:
        everyone = torch.ones(stream.hidden.shape[:2], dtype=torch.bool)
        rows, _ = stream.attention_rows(everyone)
        return top_k(stream.of_visual(rows.mean(1)[:, -1]), count_B)


@dataclass(frozen=True)
class Narrow(SurgeryMethod):
    """Keeps the first neurons of every layer; what the broken cuts are made from."""

    keep: float = share(0.5, "kept")

    def at(self, keep: float, shape: Shape) -> Any:
        return self.replace(keep=keep)

    def fit(self, model: nn.Module, batches: Any, **options: Any) -> Any:
        neurons = [layer.neurons for layer in View(model).layers]
        if not all(neurons):
            raise Error(f"{self.name}: {type(model).__name__} has layers without plain neurons")
        return self.with_state({"neurons": torch.tensor(neurons)})

    def cut(self, size: int, order: Tensor) -> LayerCut:
        count = int(self.keep * size)
        return LayerCut(neurons=None if count == size else order[:count].sort().values)

    def plan(self, model: nn.Module) -> Plan:
        sizes = self.state["neurons"].tolist()
        return Plan(tuple(self.cut(size, torch.arange(size)) for size in sizes))


Narrow.name, Narrow.card = "narrow", FITTED


@broken("cut-equals-mask", "llama", FITTED)
@dataclass(frozen=True)
class PlansByChance(Narrow):
    """Plans something else every time it is asked."""

    def plan(self, model: nn.Module) -> Plan:
        return Plan(tuple(self.cut(size, torch.randperm(size)) for size in self.state["neurons"].tolist()))


@broken("save-load", "llama", FITTED)
@dataclass(frozen=True)
class KeepsSomethingAside(Narrow):
    """What it learns is not in its state, so it is not saved."""

    def with_state(self, state: Mapping[str, Tensor], *args: Any) -> Any:
        new = super().with_state(state, *args)
        object.__setattr__(new, "order", getattr(self, "order", None))
        return new

    def plan(self, model: nn.Module) -> Plan:
        order: Tensor = torch.arange(48) if self.__dict__.get("order") is None else self.__dict__["order"]
        return Plan(tuple(self.cut(size, order) for size in self.state["neurons"].tolist()))

    def at(self, keep: float, shape: Shape) -> Any:
        new = super().at(keep, shape)
        object.__setattr__(new, "order", torch.arange(48).flip(0))
        return new


@broken("wrong-fields")
@dataclass(frozen=True)
class TakesAnything(Sound):
    """Has a field that nobody checks."""

    mode: str = dataclasses.field(default="any")


@broken("refusal", "qwen3-moe", FITTED)
@dataclass(frozen=True)
class AcceptsEveryModel(Narrow):
    """Finds no neurons to cut, and says nothing."""

    def fit(self, model: nn.Module, batches: Any, **options: Any) -> Any:
        return self.with_state({"neurons": torch.tensor([layer.neurons for layer in View(model).layers])})

    def plan(self, model: nn.Module) -> Plan:
        return Plan(tuple(LayerCut() for _ in View(model).layers))


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_method_is_caught(name: str) -> None:
    method, check, architecture = BROKEN[name]
    result = check_method(method, [architecture], [check])
    assert [case.check.name for case in result.failed] == [check], str(result)


@pytest.mark.parametrize(("method", "architecture"), [(Sound, "llava"), (Skips, "llama")])
def test_the_sound_ones_pass(method: type[Method], architecture: str) -> None:
    """… so that what catches their broken children is the fault and not the parent."""
    result = check_method(method, [architecture])
    assert not result.failed, str(result)
    assert len(result.passed) > 12


def test_every_check_has_a_method_that_it_catches() -> None:
    assert {check for _, check, _ in BROKEN.values()} == set(CHECKS)


def test_a_report_names_what_failed_and_why() -> None:
    text = str(check_method(DoesNothing, ["llama"], ["effect", "deterministic"]))
    assert "FAILED doesnothing-llama-effect: CheckFailed:" in text
    assert "2 cases" in text and "1 passed, 0 refused as they should, 1 failed, 0 skipped" in text
    text = str(check_method("fastv", ["llama"]))
    assert "refused fastv on llama: works on visual tokens, the model reads text only" in text


def test_unknown_names_are_refused() -> None:
    with pytest.raises(Error, match=r"architectures = 'lama': must be among llama"):
        cases(["fastv"], ["lama"])
    with pytest.raises(Error, match=r"checks = 'bath': must be among"):
        cases(["fastv"], ["llava"], ["bath"])


def test_from_the_command_line() -> None:
    command = [sys.executable, "-m", "sparing.testing", "--method", "random-depth", "--architecture", "llama"]
    out = subprocess.run([*command, "--check", "batch"], capture_output=True, text=True, check=False)
    assert out.returncode == 0 and "1 cases in" in out.stdout, out.stdout + out.stderr
    out = subprocess.run([*command, "--check", "bath"], capture_output=True, text=True, check=False)
    assert out.returncode == 2 and "checks = 'bath'" in out.stderr and "Traceback" not in out.stderr

"""`sparing.attach`: put methods on the model the user already holds, and take them off again bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import warnings
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self, cast

from torch import Tensor, nn

from sparing.engine.execute import Executor
from sparing.engine.lora import merged
from sparing.engine.overlap import Deferred
from sparing.engine.routing import RoutingMethod
from sparing.engine.stream import StreamMethod
from sparing.engine.surgery import Plan, SurgeryMethod, masked, trained_weights
from sparing.engine.view import View
from sparing.grid.files import sized
from sparing.grid.method import Error, Method, state_check
from sparing.grid.trace import Counter, Trace

# Runs attached to a model right now, outermost first.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, list[Run]] = weakref.WeakKeyDictionary()


_NUMBERS = itertools.count()


class _Defers(Protocol):
    def deferred_vision(self, run: Run) -> contextlib.AbstractContextManager[None]: ...


class Run:
    """Methods on a model, from entering the `with` block to leaving it.

    Attributes:
        model: the model, unchanged but for instance attributes and hooks that leaving removes.
        methods: what is attached.
        trace: what ran since the block was entered.
        prompt: columns of the sequences that are prompt, cached ones counted: a number, long (B,) or bool (B, T); what
            stands behind is generated, in one pass as in many. None: as `sparing.engine.prompt` tells them apart.
        visual: bool (B, T) of visual tokens, where they cannot be read off input_ids.
        oracle: (B, V) or (V,), how much each visual token matters; set by tasks whose world knows.
        checks_cache: raise an Error where a row would attend to a cache that misses keys of earlier tokens. For methods
            that skip layers; costs a comparison a layer and is off by default.
        time_decisions: measure the wall time spent deciding (`trace.seconds_deciding`).
    """

    def __init__(
        self,
        model: nn.Module,
        methods: tuple[Method, ...],
        prompt: int | Tensor | None = None,
        trace: bool = False,
        warn: bool = True,
    ) -> None:
        self.model = model
        self.methods = methods
        self.prompt = prompt
        self.visual: Tensor | None = None
        self.oracle: Tensor | None = None
        self.warn = warn
        self.time_decisions = False
        self.checks_cache = False
        self.number = next(_NUMBERS)  # notes on a KV cache say whose they are
        self.deferred: Deferred | None = None
        self._executor: Executor | None = None
        self.keeps_trace = True
        self.keeps_index = trace
        self.view = View(model)
        self.trace = Trace(counter=Counter() if trace else None)
        self._stack: contextlib.ExitStack | None = None
        self._plans: dict[str, Plan] = {}
        self._check()

    def _check(self) -> None:
        seen: dict[str, Method] = {}
        for method in self.methods:
            if not isinstance(method, (StreamMethod, RoutingMethod, SurgeryMethod)):
                raise Error(f"method = {method!r}: attach takes methods, e.g. sparing.parse('fastv')")
            if method.card.visual and self.view.image_token_id is None:
                raise Error(
                    f"method = {method.name!r}: it works on visual tokens, and {type(self.model).__name__} has none "
                    "(no image_token_id in its config)"
                )
            if method.card.axis == "experts" and not any(layer.experts for layer in self.view.layers):
                raise Error(
                    f"method = {method.name!r}: it works on experts, and {type(self.model).__name__} has none "
                    "(looked for layers with a router, gate or router, beside a module experts)"
                )
            if method.card.needs != "nothing" and not method.ready:
                needs = method.card.needs
                raise Error(f"method = {method.name!r}: needs {needs} first: method = method.fit(model, batches)")
            method.check_model(self.model)
            other = seen.setdefault(method.card.axis, method)
            if other is not method:
                raise Error(
                    f"methods {other.name!r} and {method.name!r} both act on {method.card.axis}: attach one of them"
                )

    @property
    def streams(self) -> list[StreamMethod]:
        """Methods of kind stream, those of enclosing runs first."""
        return [m for m in self._in_force if isinstance(m, StreamMethod)]

    @property
    def readers(self) -> list[StreamMethod]:
        """Methods that read the prompt before anything is generated."""
        return [m for m in self.streams if m.defines("read_prompt")]

    @property
    def routers(self) -> list[RoutingMethod]:
        """Methods of kind routing, those of enclosing runs first."""
        return [m for m in self._in_force if isinstance(m, RoutingMethod)]

    @property
    def _in_force(self) -> list[Method]:
        outer = [m for run in _ATTACHED.get(self.model, []) if run is not self for m in run.methods]
        return [*outer, *self.methods]

    @property
    def sees_visual(self) -> bool:
        """Whether visual tokens can be told apart."""
        return self.view.image_token_id is not None or self.visual is not None

    def __enter__(self) -> Self:
        runs = _ATTACHED.setdefault(self.model, [])
        if self._stack is not None:
            raise Error("run: this run is attached already; leave it before entering it again")
        for around in runs:
            for a in around.methods:
                for b in self.methods:
                    if a.card.axis == b.card.axis:
                        raise Error(
                            f"method = {b.name!r}: {a.name!r} is attached to this model already, and both act on "
                            f"{a.card.axis}"
                        )
        self.trace.reset()
        with contextlib.ExitStack() as stack:
            runs.append(self)
            stack.callback(runs.remove, self)
            for method in self.methods:
                if isinstance(method, SurgeryMethod):
                    plan = self._plans[method.name] = method.plan(self.model)
                    stack.enter_context(masked(self.model, plan))
                tuned = {**trained_weights(method), **merged(self.model, method)}
                if tuned:
                    stack.enter_context(_tuned(self.model, tuned))
            outer = runs[-2]._executor if len(runs) > 1 else None
            if outer is not None:  # the inner run takes the hooks over, and gives them back
                outer.remove()
                stack.callback(outer.install)
            self._executor = Executor(self.view, self)
            stack.callback(self._executor.remove)
            self._executor.install()
            for method in self.streams:
                if hasattr(method, "deferred_vision"):
                    stack.enter_context(cast(_Defers, method).deferred_vision(self))
            if self.trace.counter is not None:
                stack.enter_context(self.trace.counter)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.__exit__(kind, error, trace)
        if kind is None and self.warn:
            for name, why in self.inert().items():
                warnings.warn(f"sparing: {name} did nothing: {why}", stacklevel=2)

    def inert(self) -> dict[str, str]:
        """Methods of this run that were asked to leave something out and left nothing out, and what ran instead.

        Passes count in which the method has something to act on: those with visual tokens, with generated ones, with
        prompt. A method that had none is not among them, nor one at full budget, nor one that spends everything.
        """
        return {
            method.name: why
            for method in self.methods
            if method.card.saves != "nothing" and (why := self._idle(method)) and not method.asks_all(self.view.shape)
        }

    def _idle(self, method: Method) -> str | None:
        if isinstance(method, SurgeryMethod):
            plan = self._plans.get(method.name)
            if trained_weights(method):  # of its own: EvoPress' zeros and bits cut nothing away
                return None
            return "its plan cuts no head, neuron, expert or layer" if plan is not None and plan.keeps_all else None
        cells = self.trace.cells
        if isinstance(method, RoutingMethod):
            routed = [c for c in cells if c.all_pairs]
            idle = bool(routed) and all(c.pairs == c.all_pairs for c in routed)
            return f"all pairs of token and expert ran in {len(routed)} passes" if idle else None
        if method.card.visual:
            seen = [c for c in cells if c.visual]
            whole = sum(c.keeps_visual for c in seen)
            return f"all visual tokens ran all layers in {whole} of {len(seen)} passes that have any" if whole else None
        phase = method.card.phase
        own = [c for c in cells if phase == "both" or (c.generated if phase == "decode" else c.generated < c.tokens)]
        what = {"decode": "generated", "prefill": "prompt"}.get(phase, "")
        full = bool(own) and all(sum(c.rows) > len(c.rows) * c.tokens - 1e-6 for c in own)
        return f"all {what} tokens ran all layers in {len(own)} passes".replace("  ", " ") if full else None


@state_check
def _trained_on(method: Method, model: nn.Module) -> None:
    """Refuses trained weights that are not of this model."""
    tuned = trained_weights(method)
    own = dict(model.named_parameters()) if tuned else {}
    for name, tensor in tuned.items():
        has = sized(tuple(own[name].shape)) if name in own else "no such parameter"
        if has != sized(tuple(tensor.shape)):
            raise Error(
                f"method = {method.name!r}: was trained on another model: weight.{name} is "
                f"{sized(tuple(tensor.shape))}, {type(model).__name__} has {has}"
            )


@contextlib.contextmanager
def _tuned(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """The model with the weights a method was trained to, by reference; the old tensors come back afterwards."""
    own = dict(model.named_parameters())
    old = {k: own[k].data for k in weights}
    try:
        for k, v in weights.items():
            own[k].data = v.to(old[k])
        yield
    finally:
        for k, v in old.items():
            own[k].data = v


def attach(
    model: nn.Module,
    *methods: Method,
    prompt: int | Tensor | None = None,
    trace: bool = False,
    warn: bool = True,
) -> Run:
    """Methods on a live model for the time of a `with` block; through forward, generate and everything built on them.

    No weights are copied, no modelling code replaced, the attention implementation stays. Leaving the block restores
    the model bit for bit, also after an exception or Ctrl-C. Runs may be nested on different axes.

    Args:
        model: any transformers decoder, vision-language or MoE model.
        methods: at most one an axis.
        prompt: see `Run.prompt`.
        trace: also count FLOPs and bytes (slow; not for timing).
        warn: warn on leaving where a method was asked to leave something out and everything ran; see `Run.inert`.

    Raises:
        Error: two methods on one axis (names both), a method the model has nothing for or that needs calibration.

    >>> import sparing, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
    ...                    num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaForCausalLM(tiny).eval()
    >>> with sparing.attach(model, sparing.parse("unified-layer-skipping:S=2")) as run:
    ...     out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    >>> run.trace.share("depth", phase="decode")
    0.5
    """
    return Run(model, methods, prompt, trace, warn)

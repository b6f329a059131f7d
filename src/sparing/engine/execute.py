"""Runs each decoder layer on exactly the rows that methods left alive: really smaller GEMMs, not masks."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.cache_utils import Cache, DynamicCache

from sparing.engine.calls import (
    Cut,
    cache_in,
    cache_parameter,
    is_rotary,
    mask_in,
    mask_parameter,
    named,
    needed_cache_parameter,
    rotary_in,
    split,
)
from sparing.engine.prompt import Columns, Generation, said
from sparing.engine.ragged import RaggedLayer, Tap, check_dynamic, ragged
from sparing.engine.routing import Routing, RoutingMethod, run_experts
from sparing.engine.stream import Stream, StreamMethod, pack, take
from sparing.engine.view import View, adds_residual
from sparing.grid.method import Error
from sparing.grid.trace import Cells

if TYPE_CHECKING:
    from sparing.engine.attach import Run


class Pass:
    """One forward pass through the decoder: what came in, and the stream that runs through the layers."""

    def __init__(self, executor: Executor, inputs: dict[str, Any], cache: Cache | None, size: Tensor) -> None:
        """`size`: any tensor (B, T, …) of the pass."""
        self.executor = executor
        self.run: Run = executor.run
        self.view: View = executor.view
        self.inputs = inputs
        self.cache = cache
        self.kwargs: dict[str, Any] = {}
        self.stream: Stream | None = None
        self.batch, self.width = size.shape[:2]
        self.device = size.device
        self.past = int(cache.get_seq_length()) if cache is not None else 0
        self.memory: dict[str, Any] = self._recalled(cache)
        self.columns = self._columns()
        self.phase = "decode" if self.past and self.columns.generated is True else "prefill"
        self.methods: list[StreamMethod] = []
        self.routers: list[RoutingMethod] = []
        self.readers: list[StreamMethod] = []
        self.cells: Cells | None = None
        self.reading = False  # only reads the prompt: no method acts
        self.read = self.phase == "decode"  # the prompt has been read, by a pass of its own or before decoding

    # ---- what came in

    def start(self, hidden_BTD: Tensor) -> None:
        if hidden_BTD.ndim != 3 or hidden_BTD.shape[:2] != (self.batch, self.width):
            raise Error(
                f"{type(self.view.decoder).__name__}: its layers are handed {tuple(hidden_BTD.shape)} for a batch of "
                f"{self.batch} x {self.width}; only states (B, T, D) can be followed"
            )
        self.methods = [m for m in self.run.streams if self.phase == "prefill" or m.card.phase != "prefill"]
        self.routers = [m for m in self.run.routers if m.card.phase in ("both", "static", self.phase)]
        self.device = hidden_BTD.device
        self.stream = Stream(self, self.view, hidden_BTD)
        if self.reading:
            self.methods, self.routers = [], []
            return
        self._check_parts()
        self.readers = [m for m in self.methods if m.defines("read_prompt")] if not self.read else []
        if self.run.keeps_trace:
            visual = int(self.visual_BT.sum()) if self.phase == "prefill" and self.run.sees_visual else 0
            generated = self.generated_BT
            told = int(generated.sum()) if isinstance(generated, Tensor) else self.batch * self.width * generated
            self.cells = Cells(self.phase, self.batch * self.width, visual, self.batch, [], [], generated=told)

    def _recalled(self, cache: Cache | None) -> dict[str, Any]:
        """What was noted of these sequences, kept on their cache; a pass without past begins afresh."""
        if cache is None:
            return {}
        notes: dict[int, dict[str, Any]] = vars(cache).setdefault("sparing", {})
        if not self.past:
            notes[self.run.number] = {}
        return notes.setdefault(self.run.number, {})

    def _columns(self) -> Columns:
        generation = self.executor.generation
        start = self.memory.get("start")
        where = said(self.run.prompt, generation, self.past, self.width, start)
        if generation is not None:
            generation.check(self.past, self.width)
        if where is None:
            cares = [m.name for m in self.run.streams if m.card.phase != "prefill" or m.defines("read_prompt")]
            if cares:
                raise Error(
                    f"{cares[0]}: {self.width} columns behind a cache of {self.past} may be prompt (a chunk, a further "
                    "turn) or generated (drafts): call generate, which says it, or sparing.attach(…, prompt=N) with "
                    "the columns of the prompt"
                )
        columns = Columns(self.past, self.width, self.batch, self.device, where)
        self.memory["start"] = columns.start
        return columns

    def _check_parts(self) -> None:
        """A method that decides by the whole prompt gets it in one pass, or refuses."""
        if self.columns.generated is True:
            self.memory.pop("decided", None)
            return
        for method in self.methods:
            visual = method.card.visual
            if not (visual or method.whole_prompt):
                continue
            if self.past and method.name in self.memory.get("decided", ()):
                raise Error(
                    f"{method.name}: decided by a prompt of {self.past} columns, and more of it follows, so that its "
                    "choice would differ from that by the whole prompt: hand it over in one pass, without a kept prefix"
                )
            if visual and not bool(self.visual_BT.any()):
                continue
            if self.past and method.whole_prompt:
                raise Error(
                    f"{method.name}: ranks the tokens of a prompt against each other and needs all in one pass: "
                    f"{self.past} columns are in the cache already (a kept prefix, a chunk, an earlier turn); start "
                    "without a cache"
                )
            if not self.columns.ends_prompt:
                raise Error(
                    f"{method.name}: decides by the whole prompt, and this pass ends at column "
                    f"{self.past + self.width} of {self.columns.said}: leave prefill_chunk_size out"
                )
            self.memory["decided"] = {*self.memory.get("decided", ()), method.name}

    @functools.cached_property
    def step_BT(self) -> Tensor:
        """(B, T) long: generated tokens before each column, below 0 in the prompt."""
        start = self.columns.start
        if isinstance(start, Tensor) and len(start) != self.batch:
            raise Error(f"KV cache: holds {len(start)} sequences, this pass has {self.batch}")
        return self.columns.step

    @functools.cached_property
    def mask2d(self) -> Tensor | None:
        """(B, past + T) bool of unpadded columns; None if nothing is padded."""
        mask = self.inputs.get("attention_mask")
        if isinstance(mask, dict):
            mask = mask.get("full_attention", next(iter(mask.values())))
        if not isinstance(mask, Tensor):
            return None
        if mask.ndim == 4:  # the last query of a causal mask sees every unpadded column
            last = mask[:, 0, -1]
            mask = last if last.dtype == torch.bool else last == 0
            mask = mask.expand(self.batch, -1)
        mask = mask.to(self.device).bool()
        return None if bool(mask.all()) else mask

    @functools.cached_property
    def pad_BT(self) -> Tensor | None:
        """(B, T) bool of unpadded columns of this pass, None if nothing is padded."""
        return None if self.mask2d is None else self.mask2d[:, -self.width :]

    @functools.cached_property
    def visual_BT(self) -> Tensor:
        given = self.run.visual
        none = torch.zeros(self.batch, self.width, dtype=torch.bool, device=self.device)
        if self.phase == "decode":
            return none
        if given is not None:
            visual = given.to(self.device).expand(self.batch, -1)
            if visual.shape[1] != self.width:
                visual = visual[:, self.past : self.past + self.width]
            if visual.shape[1] != self.width:
                raise Error(f"run.visual: (B, {given.shape[-1]}) for columns {self.past} to {self.past + self.width}")
        else:
            ids = self.inputs.get("input_ids")
            if self.view.image_token_id is None:
                return none
            if ids is None:
                raise Error(
                    "input_ids: needed to find the visual tokens (image_token_id); when calling with inputs_embeds, "
                    "set run.visual to a bool mask (B, T)"
                )
            config: Any = self.view.model.config
            tokens = [self.view.image_token_id, getattr(config, "video_token_id", None)]
            visual = torch.isin(ids.to(self.device), torch.tensor([t for t in tokens if t is not None]).to(self.device))
        generated = self.generated_BT
        return visual if isinstance(generated, bool) else visual & ~generated

    @property
    def generated_BT(self) -> Tensor | bool:
        """Generated rows, see `sparing.engine.prompt`."""
        return self.columns.generated

    @functools.cached_property
    def prompt_BT(self) -> Tensor:
        """(B, T) bool: unpadded prompt columns."""
        here = torch.ones(self.batch, self.width, dtype=torch.bool, device=self.device)
        if self.pad_BT is not None:
            here = here & self.pad_BT
        return here if isinstance(self.generated_BT, bool) else here & ~self.generated_BT

    @functools.cached_property
    def queries_BT(self) -> Tensor:
        labels = self.inputs.get("labels")
        if labels is not None and torch.is_grad_enabled():
            answer = labels.to(self.device) != -100
            before = torch.zeros_like(answer)
            before[:, :-1] = answer[:, 1:] & ~answer[:, :-1]
            if bool(before.any(1).all()):
                return before
        columns = torch.arange(self.width, device=self.device)
        last_B = torch.where(self.prompt_BT, columns, -1).max(1).values
        return columns[None, :] == last_B[:, None]

    @functools.cached_property
    def last_column(self) -> bool:
        """The asking row is the last column in every sample, so it sees everything unpadded."""
        return self.pad_BT is None and isinstance(self.generated_BT, bool) and self.inputs.get("labels") is None

    # ---- positions

    def check_rotary(self) -> None:
        """Whether positions can be renumbered."""
        rotary = self.view.rotary
        parameters: Any = getattr(self.view.config, "rope_parameters", None) or {}
        if rotary is None or "mrope_section" in parameters or hasattr(rotary, "mrope_section"):
            raise Error(
                f"compact positions: {type(self.view.decoder).__name__} has no one-dimensional rotary positions; keep "
                "the original ones (the default)"
            )

    def rotate(self, hidden: Tensor, ids_BN: Tensor) -> tuple[Tensor, Tensor]:
        rotary: Any = self.view.rotary
        kinds = getattr(self.view.config, "layer_types", None)
        if kinds and "layer_type" in inspect.signature(rotary.forward).parameters:
            assert self.stream is not None
            return rotary(hidden, ids_BN, kinds[self.stream.layer])
        return rotary(hidden, position_ids=ids_BN)

    def patch_sublayers(self, layer: int) -> None:
        self.executor.patch_sublayers(layer)

    # ---- a layer

    def layer(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run layer `index` on the rows that are alive; gives back what the layer would, with fewer rows."""
        hidden, kwargs = split(forward, args, kwargs)  # by name, so that they can be cut to the rows that run
        cache = self._cache_of(forward, kwargs, index)
        if self.stream is None:
            if self.cache is None and cache is not None:  # the model made itself one
                self.cache = cache
                vars(cache).setdefault("sparing", {})[self.run.number] = self.memory
            self.start(hidden)
        stream = self.stream
        assert stream is not None
        stream.layer, stream.hidden, self.kwargs, self._forward = index, hidden, kwargs, forward
        if self.reading:
            self._read(stream, index)
            return forward(hidden, **kwargs)
        stream.bypassed = stream.bypassed_attention = stream.bypassed_mlp = False
        stream.frees_cache = stream._watches_mlp = False
        stream._mlp_share = 1.0
        stream._watch = stream._replaced = stream._blend = None
        if self.readers:
            self._read(stream, index)
        if self.methods:
            self._decide(stream, index)
        stream._mlp_input = None
        counter = self.run.trace.counter
        if counter is not None:
            counter.layer = index
        try:
            if stream._replaced is not None:
                stream.frees_cache = True
                self._skip(stream, index, cache)
                out = self._formed(index, forward, stream._replaced(stream.hidden))
            else:
                out = self._run(stream, index, forward, cache, kwargs)
        finally:
            if counter is not None:
                counter.layer = None
        if stream._mlp_share != 1 and self.cells is not None:
            attention, mlp = self.executor.weights(index)
            self.cells.rows[-1] *= attention + mlp * stream._mlp_share
        keys = self._tap.keys
        stream._watched = (stream._watch, keys) if stream._watch is not None and keys is not None else None
        if isinstance(out, tuple):
            stream.hidden, rest = out[0], out[1:]
        else:
            stream.hidden, rest = out, None
        if stream._blend is not None:
            weight = stream._blend[0][..., None].to(hidden.dtype)
            stream.hidden = torch.lerp(hidden, stream.hidden, weight)  # exact at 0 and at 1
        if isinstance(stream._mlp_input, tuple):  # a parallel MLP: its state is what the layer gives without it
            stream._mlp_input = stream.hidden - stream._mlp_input[0]
        if index == len(self.view) - 1:
            result = stream.result()
        else:
            result = stream.hidden
        return result if rest is None else (result, *rest)

    def _cache_of(self, forward: Callable[..., Any], kwargs: dict[str, Any], index: int) -> Cache | None:
        """The KV cache among a layer's arguments.

        Raises:
            Error: the decoder was handed one that does not reach the layer, or one of another kind than transformers'.
        """
        self._cache_name = cache_parameter(forward)
        cache = kwargs.get(self._cache_name) if self._cache_name is not None else None
        if not isinstance(cache, Cache):
            if cache is not None:
                raise Error(
                    f"{self._cache_name}: {type(cache).__name__} is no KV cache that can be followed (a Cache is)"
                )
            name, cache = cache_in(kwargs)
            self._cache_name = name or self._cache_name
        if cache is None and self.cache is not None and not self.reading:
            raise Error(
                f"layer {index} ({forward.__qualname__}): the model was handed a KV cache of {self.past} tokens and "
                "none reaches the layer, so what is generated could not be told from the prompt; looked for an "
                f"argument that is a Cache among {', '.join(kwargs) or 'none'}"
            )
        return cache

    def _decide(self, stream: Stream, index: int) -> None:
        def where() -> str:
            return f"before layer {index} of {stream.layers}, alive rows (B, N, D) = {tuple(stream.hidden.shape)}"

        self._ask([(m.name, m.before_layer) for m in self.methods], stream, index, where)

    def _read(self, stream: Stream, index: int) -> None:
        def where() -> str:
            return f"reading the prompt before layer {index} of {stream.layers}"

        readers = self.run.readers if self.reading else self.readers
        self._ask([(m.name, m.read_prompt) for m in readers], stream, index, where)  # type: ignore[attr-defined]

    def _ask(self, verbs: list[tuple[str, Callable[..., None]]], of: Any, index: int, where: Callable[[], str]) -> None:
        """Let methods decide; their time counts as deciding, and what they raise says where."""
        clock = self._clock() if self.run.time_decisions else 0.0
        for name, verb in verbs:
            try:
                verb(of, index)
            except Exception as error:
                error.add_note(f"in {name} {where()}")
                raise
        if self.run.time_decisions:
            self.run.trace.seconds_deciding += self._clock() - clock

    def _clock(self) -> float:
        """Seconds; on an accelerator once the work given to it is done, so that a decision pays for itself only."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _run(self, stream: Stream, index: int, forward: Callable[..., Any], cache: Any, kwargs: dict[str, Any]) -> Any:
        hidden = stream.hidden
        entry = cache.layers[index] if cache is not None and len(cache.layers) > index else None
        bypassed = stream.bypassed
        if isinstance(bypassed, Tensor):
            run_BN = stream._alive(~bypassed)
            count = int(run_BN.sum())
            if count == run_BN.numel():
                bypassed = False
            elif count == 0:
                bypassed = True
        if bypassed is True or hidden.shape[1] == 0:
            self._skip(stream, index, cache)
            return self._formed(index, forward, hidden)
        if isinstance(entry, RaggedLayer) and entry.skipped and self.columns.generated is not True and self.past:
            raise Error(
                f"layer {index}: tokens generated before skipped it and left no keys there, so that the prompt tokens "
                "of this pass would attend without them; start a further turn without the cache, or, if this goes "
                "on with the same answer, say sparing.attach(…, prompt=N) with the columns of its prompt"
            )
        slot: Tensor | None = None
        valid = stream.valid
        if bypassed is not False:
            slot, valid = pack(run_BN)
        sub = stream.bypassed_attention is not False or stream.bypassed_mlp is not False
        self._tap = Tap(cache, stream._weight if slot is None else None)
        if stream._weight is not None:
            kwargs[self._cache_argument(forward)] = self._tap
        if stream._watch is not None:
            if entry is not None:
                check_dynamic(entry)
            kwargs[self._cache_argument(forward)] = self._tap
        if stream._blend is not None and stream._blend[1]:
            if cache is not None or bypassed is not False or sub:
                raise Error("blend: hide = True: needs a pass without cache (use_cache=False), and nothing bypassed")
            kwargs[mask_parameter(forward)] = self._native(self._hiding(stream, stream._blend[0]), None)
        whole = stream.whole and slot is None and not stream._compact
        if whole and not sub and not isinstance(entry, RaggedLayer):
            self._record(stream, hidden.shape[1], None)
            return self._called(forward, hidden, kwargs)

        x = hidden if slot is None else take(hidden, slot)
        columns = stream.index if slot is None else take(stream.index, slot)
        if sub:
            attn_BN = self._sublayer_rows(stream.bypassed_attention, slot, valid, x)
            mlp_BN = self._sublayer_rows(stream.bypassed_mlp, slot, valid, x)
            attn = None if attn_BN is None else pack(attn_BN)
            self.executor.sublayer = (attn, mlp_BN)
            if attn is not None:
                columns = take(columns, attn[0])
                valid = attn[1] if valid is None or attn[1] is not None else None
        try:
            self._arguments(stream, index, cache, kwargs, columns, valid)
            share = 1.0
            if sub and self.cells is not None:
                weight = self.executor.weights(index)
                ran = [m if m is None else float(m.sum()) / max(m.numel(), 1) for m in (attn_BN, mlp_BN)]
                share = sum(w * (1.0 if r is None else r) for w, r in zip(weight, ran))
            self._record(stream, x.shape[1], columns, share)
            stream._running = None if slot is None else take(stream.index, slot)
            out = self._called(forward, x, kwargs)
        finally:
            self.executor.sublayer = stream._running = None
        if slot is None:
            return out
        rows, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        at = torch.arange(self.batch, device=self.device)[:, None].expand_as(slot)
        if valid is not None and not sub:
            at, slot, rows = at[valid], slot[valid], rows[valid]
        elif sub and isinstance(bypassed, Tensor):
            ok = pack(run_BN)[1]
            if ok is not None:
                at, slot, rows = at[ok], slot[ok], rows[ok]
        joined = hidden.index_put((at, slot), rows)
        return joined if rest is None else (joined, *rest)

    def _called(self, forward: Callable[..., Any], x: Tensor, kwargs: dict[str, Any]) -> Any:
        out = forward(x, **kwargs)
        self.executor.returns = len(out) if isinstance(out, tuple) else 0
        return out

    def _formed(self, index: int, forward: Callable[..., Any], hidden: Tensor) -> Any:
        """The state in the form that a layer gives it back in: alone, or first of a tuple.

        Where no layer has run yet, this one does, for one row and without a trace.
        """
        if self.executor.returns is None:
            kwargs = self._alone(torch.zeros(self.batch, 1, dtype=torch.long, device=self.device))
            row = hidden.detach()[:, :1] if hidden.shape[1] else hidden.new_zeros(self.batch, 1, hidden.shape[-1])
            self._dry(forward, row, kwargs)
        return (hidden, *[None] * (self.executor.returns - 1)) if self.executor.returns else hidden

    def _cache_argument(self, forward: Callable[..., Any]) -> str:
        return self._cache_name or needed_cache_parameter(forward)

    def _sublayer_rows(
        self, bypassed: Tensor | bool, slot: Tensor | None, valid: Tensor | None, x: Tensor
    ) -> Tensor | None:
        """Which of the layer's rows run a sub-layer, bool (B, N); None if all do."""
        if bypassed is False:
            return None
        if bypassed is True:
            return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        run = ~(bypassed if slot is None else take(bypassed, slot))
        return run if valid is None else run & valid

    def _hiding(self, stream: Stream, weight_BN: Tensor) -> Tensor:
        """(B, 1, N, N) bool: what rows see where rows of weight 0 are no keys; every row sees itself."""
        N = weight_BN.shape[1]
        slots = torch.arange(N, device=weight_BN.device)
        seen = stream._visible(slots.expand(self.batch, -1), None)
        if seen is None:
            seen = (slots[None, :] <= slots[:, None]).expand(self.batch, -1, -1)
        own = torch.eye(N, dtype=torch.bool, device=weight_BN.device)
        return ((seen & (weight_BN > 0)[:, None, :]) | own)[:, None]

    def _skip(self, stream: Stream, index: int, cache: Any) -> None:
        """No row runs this layer: keep its cache's logical length in step."""
        self._tap = Tap(None)
        if cache is not None and (len(cache.layers) > index or getattr(cache, "layer_class_to_replicate", None)):
            entry = ragged(cache, index, self.batch, self.device, self.mask2d)
            entry.skipped = True
            if stream.frees_cache:
                entry.free()
            entry.seen = self.past + self.width
        self._record(stream, 0, stream.index[:, :0])

    def _arguments(
        self, stream: Stream, index: int, cache: Any, kwargs: dict[str, Any], columns: Tensor, valid: Tensor | None
    ) -> None:
        """Replace mask, positions and cache entry by those of the rows that run."""
        rope_name, _ = rotary_in(kwargs)
        mask_name = mask_in(kwargs)
        everything = columns.shape[1] == self.width and valid is None and stream.whole
        entry = None
        if cache is not None:
            entry = ragged(cache, index, self.batch, self.device, self.mask2d)
            visible = valid
            if self.pad_BT is not None:
                unpadded = take(self.pad_BT, columns)
                visible = unpadded if valid is None else unpadded & valid
            entry.extend(self.past + columns, visible, self.past + self.width)
            entry.skipped |= stream.bypassed is not False or stream.bypassed_attention is not False
            if self.run.checks_cache:
                self._check_cache(entry, index, columns, valid)
        complete = entry is None or entry.complete
        keys = None if complete or entry is None else entry.columns
        if keys is None and not everything and not self.past:
            keys = columns
        cut = Cut(columns, keys, self.past, self.width)
        for name, value in kwargs.items():
            if name == mask_name or (name == rope_name and self._turned(stream, entry)):
                continue
            if not everything or keys is not None:
                kwargs[name] = self._memoised(stream, cut, name, value)
        if rope_name is not None and stream._compact:
            rope = stream.rope()
            if not torch.equal(columns, stream.index):
                at = torch.searchsorted(stream.index.contiguous(), columns.contiguous())
                rope = stream._rope_of(rope, at.clamp(max=stream.index.shape[1] - 1))
            if entry is not None:
                entry.shift = self._gap(stream, self.inputs.get("position_ids"))
            kwargs[rope_name] = rope
        elif rope_name is not None and entry is not None and entry.shift is not None:
            ids = self.inputs.get("position_ids")
            ids = cut("position_ids", ids) if isinstance(ids, Tensor) else self.past + columns
            kwargs[rope_name] = self.rotate(stream.hidden, ids - entry.shift[:, None])
        if mask_name is not None:
            kwargs[mask_name] = self._mask(entry, kwargs[mask_name], columns, valid, everything, complete)

    @staticmethod
    def _turned(stream: Stream, entry: RaggedLayer | None) -> bool:
        """Whether positions are renumbered and so not cut."""
        return stream._compact or (entry is not None and entry.shift is not None)

    @staticmethod
    def _memoised(stream: Stream, cut: Cut, name: str, value: Any) -> Any:
        """Layers are handed the same positions: cut once for as long as the same rows run."""
        if cut.columns is not stream._index or not is_rotary(value):
            return cut(name, value)
        return stream._memo(stream._rope_key(value), lambda: cut(name, value))

    def turns(self, index: int) -> bool:
        """Whether layer `index` turns its keys by their positions; found by running two rows through it, once.

        Raises:
            Error: the keys that scores would be computed from are not those that the layer attends to.
        """
        if index not in self.executor.turned:
            self.executor.turned[index] = self._probed(index)
        return self.executor.turned[index]

    def _probed(self, index: int) -> bool:
        stream, layer = self.stream, self.view.layers[index]
        assert stream is not None
        ends = torch.tensor([0, stream.hidden.shape[1] - 1], device=self.device).expand(self.batch, -1)
        rows, kwargs = take(stream.hidden, ends).detach(), self._alone(take(stream.index, ends))
        held: Any = DynamicCache()
        kwargs[self._cache_argument(self._forward)] = held
        self._dry(self._forward, rows, kwargs)
        with torch.no_grad(), _disable_current_modes():
            found = next(entry.keys for entry in held.layers if entry.is_initialized)
            rope = rotary_in(kwargs)[1]
            for turned in (True, False) if rope is not None else (False,):
                gap = layer.keys(rows, rope if turned else None) - found
                if float(gap.abs().max()) <= 0.05 * float(found.abs().max()):
                    return turned
        raise Error(
            f"layer {index}: attention scores for {type(layer.attention).__name__} would be wrong: the keys computed "
            "from its norm, k_proj and position embedding are not those that it attends to"
        )

    def _dry(self, forward: Callable[..., Any], rows: Tensor, kwargs: dict[str, Any]) -> None:
        """Run a layer to look at it: no method acts, nothing is counted."""
        reading, self.reading = self.reading, True
        try:
            with torch.no_grad(), _disable_current_modes():
                self._called(forward, rows, kwargs)
        finally:
            self.reading = reading

    def _alone(self, columns: Tensor) -> dict[str, Any]:
        """What the layer is handed for these columns by themselves, without cache and mask."""
        cut = Cut(columns, None, self.past, self.width)
        kwargs = {name: cut(name, value) for name, value in self.kwargs.items()}
        kwargs[self._cache_argument(self._forward)] = None
        mask = mask_in(kwargs)
        return kwargs if mask is None else {**kwargs, mask: None}

    def _check_cache(self, entry: RaggedLayer, index: int, columns: Tensor, valid: Tensor | None) -> None:
        """Every row that runs finds the keys of all unpadded columns before it."""
        query = self.past + columns
        there = entry.columns[:, None, :] <= query[:, :, None]
        if entry.visible is not None:
            there = there & entry.visible[:, None, :]
        if self.mask2d is None:
            wanted = query + 1
        else:
            wanted = self.mask2d.cumsum(1).gather(1, query)
        missing = wanted - there.sum(2)
        if valid is not None:
            missing = missing.masked_fill(~valid, 0)
        if self.pad_BT is not None:
            missing = missing.masked_fill(~take(self.pad_BT, columns), 0)
        if bool((missing > 0).any()):
            row = int((missing > 0).any(1).nonzero()[0])
            raise Error(f"cache: layer {index} would attend without {int(missing[row].max())} keys of sequence {row}")

    def _gap(self, stream: Stream, ids: Tensor | None) -> Tensor:
        """(B,) how far positions after the pass lie below the original ones."""
        compact = stream.compact_ids()
        last = compact.max(1).values
        if ids is not None and ids.ndim == 2:
            return ids.max(1).values.expand(self.batch) - last
        full = torch.full_like(last, self.width - 1)
        return full - last

    def _mask(
        self,
        entry: RaggedLayer | None,
        mask: Any,
        columns: Tensor,
        valid: Tensor | None,
        everything: bool,
        complete: bool,
    ) -> Any:
        """The layer's mask for the rows that run.

        Args:
            everything: these are all columns of the pass.
            complete: no key is missing in the cache.
        """
        if self.past and entry is not None and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
            return self._native(entry.mask(self.past + columns), entry)
        if mask is None:  # causal order holds among the rows, fill-up rows come last: the plain causal kernel is right
            return None
        if not isinstance(mask, Tensor):
            raise Error(
                f"attention_mask: {type(mask).__name__} cannot be cut to the alive rows; use sdpa, eager or flash"
            )
        if mask.ndim == 2:
            here = mask if everything else take(mask, columns)
            return here if valid is None else here * valid
        if everything and complete and (entry is None or mask.shape[-1] == entry.columns.shape[1]):
            return mask
        mask = mask.expand(self.batch, *mask.shape[1:])
        first = self.past + self.width - mask.shape[-1]  # column of its first key: a window leaves older ones out
        keys = columns if entry is None else entry.columns - first
        seen = valid if entry is None else entry.visible
        rows = torch.arange(self.batch, device=mask.device)[:, None, None]
        cut = mask.transpose(1, 2)[rows, columns[:, :, None], :, keys.clamp(min=0)[:, None, :]].permute(0, 3, 1, 2)
        hidden = None if seen is None else ~seen[:, None, None, :]
        if first > 0:
            beyond = (keys < 0)[:, None, None, :]
            hidden = beyond if hidden is None else hidden | beyond
        # Rows that nobody reads see something, lest softmax has nothing to share out.
        fill = None if valid is None else ~valid[:, None, :, None]
        if cut.dtype == torch.bool:
            cut = cut if hidden is None else cut & ~hidden
            return cut if fill is None else cut | fill
        cut = cut if hidden is None else cut.masked_fill(hidden, torch.finfo(cut.dtype).min)
        return cut if fill is None else cut.masked_fill(fill, 0)

    def _native(self, mask: Tensor | None, entry: RaggedLayer | None) -> Any:
        """A bool mask in the form the model's attention takes."""
        kind = self.view.config._attn_implementation
        if mask is None or kind == "sdpa":
            return mask
        if "flash" in str(kind):
            if entry is None:
                raise Error("attn_implementation: flash attention takes no mask of single keys; train under sdpa")
            return entry.visible
        dtype = next(self.view.decoder.parameters()).dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    # ---- experts

    def route(self, index: int, forward: Callable[..., Any], logits: Tensor, given: Any) -> Tensor:
        """Run layer `index`'s experts on the pairs that methods left."""
        hidden, chosen, weight = given
        routing = Routing(hidden, logits, chosen, weight, index, self.phase)

        def where() -> str:
            return f"at the experts of layer {index}, (N, K) = {tuple(chosen.shape)}"

        self._ask([(m.name, m.route) for m in self.routers], routing, index, where)
        out, pairs = run_experts(forward, routing, chosen)
        if self.cells is not None:
            self.cells.pairs.append(pairs)
            self.cells.all_pairs.append(chosen.numel())
        return out

    # ---- trace

    def _record(self, stream: Stream, rows: int, columns: Tensor | None, share: float = 1.0) -> None:
        """`share`: of the layer's work that these rows do, where they skip sub-layers."""
        cells = self.cells
        if cells is None:
            return
        cells.rows.append(self.batch * rows * share)
        if not cells.visual or not rows:
            cells.visual_rows.append(0)
        elif stream.whole and columns is None:
            cells.visual_rows.append(cells.visual)
        elif columns is stream._index:
            cells.visual_rows.append(stream._memo("visual_count", lambda: int(stream.visual.sum())))
        else:
            cells.visual_rows.append(int(take(self.visual_BT, columns if columns is not None else stream.index).sum()))
        if self.run.keeps_index:
            if columns is None:
                cells.index.append(None)
            else:
                shown = (
                    columns
                    if stream.valid is None or columns is not stream._index
                    else columns.masked_fill(~stream.valid, -1)
                )
                cells.index.append(shown.cpu())


class _Local(threading.local):
    """What belongs to one thread: several may run one attached model."""

    def __init__(self) -> None:
        self.now: Pass | None = None
        self.sublayer: tuple[Any, Any] | None = None
        self.seen: dict[str, Any] = {}
        self.logits: Any = None
        self.generations: list[Generation] = []


def _copied(*args: Any, **kwargs: Any) -> Any:
    raise Error(
        "model: this is a deepcopy made inside a `with sparing.attach(…)` block, which holds parts of the block and "
        "not of the methods; copy the model before the block or behind it"
    )


class Hook:
    """A hook of ours; in a deepcopy of the model it says what happened."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return _copied


class Replaced(Hook):
    """A method of a module, replaced by `around(original, …)`."""

    def __init__(self, original: Callable[..., Any], around: Callable[..., Any]) -> None:
        super().__init__(functools.partial(around, original))
        functools.update_wrapper(self, original)


class Executor:
    """Installs the stream on a model and takes it off again without a trace.

    Layers get an instance attribute `forward` (deleted on removal), the model and its decoder a pre-hook each.
    """

    def __init__(self, view: View, run: Run) -> None:
        self.view = view
        self.run = run
        self.returns: int | None = None  # what layers give back: a tuple of so many, 0 for the state alone
        self.turned: dict[int, bool] = {}  # whether a layer turns its keys by their positions
        self._mlp_returns: dict[type, int] = {}  # class of an MLP -> what it gives back beside the states
        self._local = _Local()
        self._lock = threading.RLock()
        self._thread = threading.get_ident()
        self._weights: dict[int, tuple[float, float]] = {}
        self._patched: list[tuple[nn.Module, str]] = []
        self._hooks: list[Any] = []

    @property
    def now(self) -> Pass | None:
        """The pass that this thread is in."""
        return self._local.now

    @property
    def sublayer(self) -> tuple[Any, Any] | None:
        return self._local.sublayer

    @sublayer.setter
    def sublayer(self, rows: tuple[Any, Any] | None) -> None:
        self._local.sublayer = rows

    @property
    def generation(self) -> Generation | None:
        """The innermost call of `generate` that this thread is in."""
        return self._local.generations[-1] if self._local.generations else None

    def install(self) -> None:
        model, decoder = self.view.model, self.view.decoder
        if model is not decoder:
            self._hooks.append(model.register_forward_pre_hook(Hook(self._outside), with_kwargs=True))
        self._hooks.append(decoder.register_forward_pre_hook(Hook(self._begin), with_kwargs=True))
        self._hooks.append(decoder.register_forward_hook(Hook(self._end), always_call=True))
        if hasattr(model, "generate"):
            self._patch(model, self._generate, "generate")
        wraps = any(m.defines("attend") or m.defines("feed_forward") for m in self.run.streams)
        for layer in self.view.layers:
            self._patch(layer.module, functools.partial(self._layer, layer.index))
            if layer.mlp is not None and not layer.neurons:
                self._hooks.append(layer.mlp.register_forward_hook(Hook(self._shown)))
            if wraps:
                self.patch_sublayers(layer.index)
            if self.run.routers and layer.experts is not None:
                self._hooks.append(layer.experts.router.register_forward_hook(Hook(self._routed)))
                self._patch(layer.experts.module, functools.partial(self._experts, layer.index))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, name in self._patched:
            module.__dict__.pop(name, None)
        self._hooks.clear()
        self._patched.clear()
        self._local = _Local()

    def _patch(self, module: nn.Module, around: Callable[..., Any], name: str = "forward") -> None:
        if name in module.__dict__:
            raise Error(
                f"{type(module).__name__}: its {name} is replaced already (by another library, or a run not left yet)"
            )
        setattr(module, name, Replaced(getattr(module, name), around))
        self._patched.append((module, name))

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._local.generations.append(Generation.of(generate, args, kwargs))
        try:
            return generate(*args, **kwargs)
        finally:
            self._local.generations.pop()

    def _outside(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = named(module.forward, args, kwargs)
        self._local.seen = {k: given[k] for k in ("input_ids", "labels") if given.get(k) is not None}

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.run.trace.counter is not None and threading.get_ident() != self._thread:
            raise Error("trace = True: FLOPs are counted in the thread that attached, and another one runs the model")
        given = named(module.forward, args, kwargs)
        inputs = {k: given.get(k) for k in ("attention_mask", "position_ids", "input_ids")}
        inputs.update({k: v for k, v in self._local.seen.items() if inputs.get(k) is None})
        size = next((given[k] for k in ("inputs_embeds", "input_ids") if isinstance(given.get(k), Tensor)), None)
        if size is None:
            raise Error(
                f"{type(module).__name__}: was handed neither input_ids nor inputs_embeds, but {', '.join(given)}"
            )
        work = Pass(self, inputs, cache_in(given)[1], size)
        if work.columns.mixed and self.run.readers:
            self._look_ahead(module, given, work, size)
        self._local.now = work

    def _look_ahead(self, module: nn.Module, given: dict[str, Any], work: Pass, size: Tensor) -> None:
        """What methods note of a prompt that shares its pass with generated tokens: read it in a pass of its own.

        Causal layers let the prompt see nothing behind it, so the rest of the columns may stay.
        """
        name, cache = cache_in(given)
        past = copy.deepcopy(cache) if work.past else None  # the pass itself is still to come
        ahead = Pass(self, work.inputs, past, size)
        ahead.reading, self._local.now = True, ahead
        with torch.no_grad():
            module.forward(**{**given, **({name: past} if name else {}), "use_cache": past is not None})
        work.memory.update(ahead.memory)
        work.read = True

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        work, self._local.now = self._local.now, None
        self._local.seen = {}
        if work is not None and work.cells is not None and len(work.cells.rows) == len(self.view):
            self.run.trace.cells.append(work.cells)

    def _layer(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.now is None:
            raise Error(
                f"layer {index}: runs outside a pass of its decoder while methods are attached, where they cannot act "
                "(gradient checkpointing recomputes it so: turn that off)"
            )
        return self.now.layer(index, forward, args, kwargs)

    # ---- experts, wrapped only where a routing method is attached

    def _routed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._local.logits = output[0]

    def _experts(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.now is None or len(args) != 3:
            return forward(*args, **kwargs)
        return self.now.route(index, forward, self._local.logits, args)

    # ---- sub-layers, wrapped only where a method asks for it

    def patch_sublayers(self, index: int) -> None:
        layer = self.view.layers[index]
        for which, module in enumerate((layer.attention, layer.mlp)):
            if module is not None and (why := adds_residual(module)) is not None:
                raise Error(f"layer {index} ({type(layer.module).__name__}) {why}")
            with self._lock:
                if module is not None and (module, "forward") not in self._patched:
                    self._patch(module, functools.partial(self._sublayer, which, index))

    def weights(self, index: int) -> tuple[float, float]:
        """Shares of a layer's work in its attention and its MLP: weights that a token meets."""
        if index not in self._weights:
            layer = self.view.layers[index]
            sizes = [
                sum(p.numel() for p in m.parameters()) if m is not None else 0 for m in (layer.attention, layer.mlp)
            ]
            experts = layer.experts
            if experts is not None:
                idle = sum(p.numel() for p in experts.module.parameters()) * (1 - experts.top_k / experts.count)
                sizes[1] = round(sizes[1] - idle)
            self._weights[index] = (sizes[0] / sum(sizes), sizes[1] / sum(sizes))
        return self._weights[index]

    def watch_mlp(self, index: int) -> None:
        self.patch_sublayers(index)
        layer = self.view.layers[index]
        norm = layer.mlp_norm
        with self._lock:
            watched = norm is None or isinstance(layer.norm, nn.Identity) or (norm, "forward") in self._patched
            if norm is not None and not watched:
                self._patch(norm, self._before_norm)

    def _before_norm(self, forward: Callable[..., Any], x: Tensor) -> Tensor:
        """Notes the state that enters an MLP behind its norm, unless attention and MLP run side by side."""
        stream = self.now.stream if self.now is not None else None
        if stream is not None and stream._watches_mlp and x is not stream.hidden:
            stream._mlp_input = x
        return forward(x)

    def _sublayer(self, which: int, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Attention (0) or MLP (1) of layer `index` on the rows that run it, by the method that runs it its own way."""
        work, stream = self.now, self.now.stream if self.now is not None else None
        if work is None or stream is None or work.reading:
            return forward(*args, **kwargs)
        x, kwargs = split(forward, args, kwargs)
        rest: list[Any] = []

        def own(x_BND: Tensor) -> Tensor:
            out = forward(x_BND, **kwargs)
            rest[:] = out[1:] if isinstance(out, tuple) else ()
            return (out[0] if isinstance(out, tuple) else out).reshape(x_BND.shape)  # Llama 4's experts flatten it

        run = own
        for method in work.methods:
            if method.defines(("attend", "feed_forward")[which]):
                verb = getattr(method, ("attend", "feed_forward")[which])
                run = functools.partial(verb, stream, self.view.layers[index], forward=run)
        out = self._on_rows(which, run, x)
        if which == 1 and not rest:
            rest[:] = [None] * self._beside(index, functools.partial(forward, x[:, :1], **kwargs))
        if which == 1 and stream._watches_mlp and stream._mlp_input is None:
            after = isinstance(self.view.layers[index].norm, nn.Identity)  # a post-norm layer's MLP reads the state
            stream._mlp_input = x if after else (out,)  # type: ignore[assignment]
        return (out, *(rest or (None,))) if which == 0 else (out, *rest) if rest else out

    def _beside(self, index: int, on_a_row: Callable[[], Any]) -> int:
        """How many things a layer's MLP gives back beside the states: blocks of experts may hand on their router's.

        A plain MLP none. Others showed it when one of their class ran; where none has yet, this one does, for a row.
        """
        layer = self.view.layers[index]
        if layer.neurons:
            return 0
        if type(layer.mlp) not in self._mlp_returns:
            with torch.no_grad(), _disable_current_modes():
                self._shown(layer.mlp, (), on_a_row())
        return self._mlp_returns[type(layer.mlp)]

    def _shown(self, module: nn.Module | None, args: tuple[Any, ...], output: Any) -> None:
        self._mlp_returns[type(module)] = len(output) - 1 if isinstance(output, tuple) else 0

    def _on_rows(self, which: int, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        rows = self.sublayer[which] if self.sublayer is not None else None
        if rows is None:
            return run(x)
        if which == 1:  # tokens are alone in an MLP: one gathered batch of all rows that run it
            if not bool(rows.any()):
                return torch.zeros_like(x)
            return torch.zeros_like(x).index_put((rows,), run(x[rows][None])[0].to(x.dtype))
        slot, valid = rows
        if slot.shape[1] == 0:
            return torch.zeros_like(x)
        part = run(take(x, slot))
        if valid is not None:
            part = part * valid[..., None]
        at = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(slot)
        return torch.zeros_like(x).index_put((at, slot), part.to(x.dtype), accumulate=True)

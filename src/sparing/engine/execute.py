"""Runs each decoder layer on exactly the rows that methods left alive: really smaller GEMMs, not masks."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparing.engine.calls import cache_in, cache_parameter
from sparing.engine.ragged import RaggedLayer, Tap, check_dynamic, ragged
from sparing.engine.routing import Routing, RoutingMethod, run_experts
from sparing.engine.stream import Stream, StreamMethod, pack, take
from sparing.engine.view import View
from sparing.grid.method import Error
from sparing.grid.trace import Cells

if TYPE_CHECKING:
    from sparing.engine.attach import Run


class Pass:
    """One forward pass through the decoder: what came in, and the stream that runs through the layers."""

    def __init__(self, executor: Executor, inputs: dict[str, Any]) -> None:
        self.executor = executor
        self.run: Run = executor.run
        self.view: View = executor.view
        self.inputs = inputs
        self.kwargs: dict[str, Any] = {}
        self.stream: Stream | None = None
        self.past = 0
        self.phase = "prefill"
        self.methods: list[StreamMethod] = []
        self.routers: list[RoutingMethod] = []
        self.readers: list[StreamMethod] = []
        self.cells: Cells | None = None
        self.memory: dict[str, Any] = {}
        self.reading = False  # only reads the prompt: no method acts

    # ---- what came in

    def start(self, hidden_BTD: Tensor, cache: Any) -> None:
        self.past = int(cache.get_seq_length()) if cache is not None else 0
        self.phase = "decode" if self.past else "prefill"
        self.methods = [m for m in self.run.streams if self.phase == "prefill" or m.card.phase != "prefill"]
        self.routers = [m for m in self.run.routers if m.card.phase in ("both", "static", self.phase)]
        self.batch, self.width = hidden_BTD.shape[:2]
        self.device = hidden_BTD.device
        self.stream = Stream(self, self.view, hidden_BTD)
        self._recall(cache)
        if self.reading:
            self.methods, self.routers = [], []
            return
        self.readers = [m for m in self.methods if m.defines("read_prompt")] if not self.read else []
        if self.run.keeps_trace:
            visual = int(self.visual_BT.sum()) if self.phase == "prefill" and self.run.sees_visual else 0
            self.cells = Cells(self.phase, self.batch * self.width, visual, self.batch, [], [])

    @property
    def read(self) -> bool:
        """Whether the prompt has been read already, by a pass of its own or before decoding."""
        return self.phase == "decode" or "read" in self.memory

    def _recall(self, cache: Any) -> None:
        """What was noted of these sequences; a pass without past begins afresh."""
        if cache is not None:
            if self.phase == "prefill":
                self.run.memories[cache] = self.memory
            else:
                self.memory = self.run.memories.setdefault(cache, self.memory)
        if "start" not in self.memory:  # column of the first generated token, of each row or of all
            generated = self.generated_BT
            if isinstance(generated, Tensor):
                first_B = generated.int().argmax(1)
                self.memory["start"] = torch.where(generated.any(1), first_B, self.width)
            else:
                self.memory["start"] = self.past if generated else self.width

    @functools.cached_property
    def step_BT(self) -> Tensor:
        """(B, T) long: generated tokens before each column, below 0 in the prompt."""
        start = self.memory["start"]
        if isinstance(start, Tensor) and len(start) != self.batch:
            raise Error(f"past_key_values: holds {len(start)} sequences, this pass has {self.batch}")
        columns = self.past + torch.arange(self.width, device=self.device)
        return (columns - (start[:, None] if isinstance(start, Tensor) else start)).expand(self.batch, -1)

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

    @functools.cached_property
    def generated_BT(self) -> Tensor | bool:
        """Generated rows: everything in a pass with past; behind the prompt in one without."""
        if self.phase == "decode":
            return True
        prompt = self.run.prompt
        if prompt is None:
            return False
        columns = torch.arange(self.width, device=self.device)
        if isinstance(prompt, int):
            return False if prompt >= self.width else (columns >= prompt).expand(self.batch, -1)
        prompt = prompt.to(self.device)
        if prompt.dtype == torch.bool:
            return ~prompt
        return columns[None, :] >= prompt.reshape(-1, 1)

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
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if len(args) > 1:  # by name, so that they can be cut to the rows that run
            kwargs.update(zip(list(inspect.signature(forward).parameters)[1:], args[1:]))
        name, cache = cache_in(kwargs)
        self._cache_name = name or cache_parameter(forward)
        if self.stream is None:
            self.start(hidden, cache)
        stream = self.stream
        assert stream is not None
        stream.layer, stream.hidden, self.kwargs = index, hidden, kwargs
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
                out = stream._replaced(stream.hidden)
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
            return hidden
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
            kwargs["attention_mask"] = self._native(self._hiding(stream, stream._blend[0]), None)
        whole = stream.whole and slot is None and not stream._compact
        if whole and not sub and not isinstance(entry, RaggedLayer):
            self._record(stream, hidden.shape[1], None)
            return forward(hidden, **kwargs)

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
            out = forward(x, **kwargs)
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

    def _cache_argument(self, forward: Callable[..., Any]) -> str:
        if self._cache_name is None:
            raise Error(f"{forward.__qualname__}: no parameter takes a KV cache (looked for one annotated Cache)")
        return self._cache_name

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
            if stream.frees_cache:
                entry.free()
            entry.seen = self.past + self.width
        self._record(stream, 0, stream.index[:, :0])

    def _arguments(
        self, stream: Stream, index: int, cache: Any, kwargs: dict[str, Any], columns: Tensor, valid: Tensor | None
    ) -> None:
        """Replace mask, positions and cache entry by those of the rows that run."""
        full = kwargs.get("position_embeddings")
        everything = columns.shape[1] == self.width and valid is None and stream.whole
        if isinstance(kwargs.get("position_ids"), Tensor) and not everything:
            ids = kwargs["position_ids"]
            kwargs["position_ids"] = take(ids, columns) if ids.ndim == 2 else ids[..., :0]
        entry = None
        if cache is not None:
            entry = ragged(cache, index, self.batch, self.device, self.mask2d)
            visible = valid
            if self.pad_BT is not None:
                unpadded = take(self.pad_BT, columns)
                visible = unpadded if valid is None else unpadded & valid
            entry.extend(self.past + columns, visible, self.past + self.width)
            if self.run.checks_cache:
                self._check_cache(entry, index, columns, valid)
        if full is not None:
            if stream._compact:
                rope = stream.rope()
                assert rope is not None
                if not torch.equal(columns, stream.index):
                    at = torch.searchsorted(stream.index.contiguous(), columns.contiguous())
                    rope = stream._rope_of(rope, at.clamp(max=stream.index.shape[1] - 1))
                if entry is not None:
                    ids = self.inputs.get("position_ids")
                    entry.shift = self._gap(stream, ids)
                kwargs["position_embeddings"] = rope
            elif entry is not None and entry.shift is not None:
                ids = kwargs.get("position_ids")
                ids = self.past + columns if not isinstance(ids, Tensor) else ids
                kwargs["position_embeddings"] = self.rotate(stream.hidden, ids - entry.shift[:, None])
            elif not everything:
                key = f"rope{id(full[0])}"
                same = columns is stream._index
                kwargs["position_embeddings"] = (
                    stream._memo(key, lambda: tuple(take(x, columns) for x in full))
                    if same
                    else tuple(take(x, columns) for x in full)
                )
        kwargs["attention_mask"] = self._mask(stream, entry, kwargs.get("attention_mask"), columns, valid)

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

    def _mask(self, stream: Stream, entry: RaggedLayer | None, mask: Any, columns: Tensor, valid: Tensor | None) -> Any:
        if self.past and entry is not None:
            return self._native(entry.mask(self.past + columns), entry)
        if mask is None or (columns.shape[1] == self.width and valid is None and stream.whole):
            return (
                mask  # causal order holds among the rows, and fill-up rows come last: the plain causal kernel is right
            )
        if not isinstance(mask, Tensor):
            raise Error(
                f"attention_mask: {type(mask).__name__} cannot be cut to the alive rows; use sdpa, eager or flash"
            )
        if mask.ndim == 2:
            here = take(mask, columns)
            return here if valid is None else here * valid
        rows = torch.arange(self.batch, device=mask.device)[:, None, None]
        mask = mask.expand(self.batch, *mask.shape[1:])
        cut = mask.transpose(1, 2)[rows, columns[:, :, None], :, columns[:, None, :]].permute(0, 3, 1, 2)
        if valid is not None:  # fill-up columns are hidden; fill-up rows see something, so that no row is empty
            hidden = ~valid[:, None, None, :] & valid[:, None, :, None]
            if cut.dtype == torch.bool:
                cut = (cut & ~hidden) | ~valid[:, None, :, None]
            else:
                cut = cut.masked_fill(hidden, torch.finfo(cut.dtype).min).masked_fill(~valid[:, None, :, None], 0)
        return cut

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


class Executor:
    """Installs the stream on a model and takes it off again without a trace.

    Layers get an instance attribute `forward` (deleted on removal), the model and its decoder a pre-hook each.
    """

    def __init__(self, view: View, run: Run) -> None:
        self.view = view
        self.run = run
        self.now: Pass | None = None
        self.sublayer: tuple[Any, Any] | None = None
        self._seen: dict[str, Any] = {}
        self._logits: Any = None
        self._weights: dict[int, tuple[float, float]] = {}
        self._patched: list[nn.Module] = []
        self._hooks: list[Any] = []
        self._signature = inspect.signature(view.decoder.forward)
        self._outer = inspect.signature(view.model.forward)

    def install(self) -> None:
        model, decoder = self.view.model, self.view.decoder
        if model is not decoder:
            self._hooks.append(model.register_forward_pre_hook(self._outside, with_kwargs=True))
        self._hooks.append(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(decoder.register_forward_hook(self._end, always_call=True))
        wraps = any(m.defines("attend") or m.defines("feed_forward") for m in self.run.streams)
        for layer in self.view.layers:
            self._patch(layer.module, functools.partial(self._layer, layer.index))
            if wraps:
                self.patch_sublayers(layer.index)
            if self.run.routers and layer.experts is not None:
                self._hooks.append(layer.experts.router.register_forward_hook(self._routed))
                self._patch(layer.experts.module, functools.partial(self._experts, layer.index))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self._patched:
            module.__dict__.pop("forward", None)
        self._hooks.clear()
        self._patched.clear()
        self._seen.clear()
        self.now = self.sublayer = self._logits = None

    def _patch(self, module: nn.Module, around: Callable[..., Any]) -> None:
        if "forward" in module.__dict__:
            raise Error(
                f"{type(module).__name__}: its forward is replaced already (by another library, or a run not left yet)"
            )
        original = module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        module.forward = forward
        self._patched.append(module)

    def _outside(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._outer.bind_partial(*args, **kwargs).arguments if args else kwargs
        self._seen = {k: given[k] for k in ("input_ids", "labels") if given.get(k) is not None}

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        inputs = {k: given.get(k) for k in ("attention_mask", "position_ids", "input_ids")}
        inputs.update({k: v for k, v in self._seen.items() if inputs.get(k) is None})
        memory = self._look_ahead(module, args, kwargs, inputs)
        self.now = Pass(self, inputs)
        self.now.memory = memory

    def _look_ahead(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """What methods note of a prompt that shares its pass with generated tokens: read it in a pass of its own.

        Causal layers let the prompt see nothing behind it, so the rest of the columns may stay.
        """
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        name, cache = cache_in(given)
        columns = next(given[k].shape[1] for k in ("input_ids", "inputs_embeds") if given.get(k) is not None)
        prompt = self.run.prompt
        alone = prompt is None or (isinstance(prompt, int) and prompt >= columns)
        if alone or not self.run.readers or (cache is not None and cache.get_seq_length()):
            return {}
        self.now = ahead = Pass(self, inputs)
        ahead.reading = True
        with torch.no_grad():
            module.forward(**{**given, **({name: None} if name else {}), "use_cache": False})
        ahead.memory["read"] = True
        return ahead.memory

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        work, self.now = self.now, None
        self._seen = {}
        if work is not None and work.cells is not None and len(work.cells.rows) == len(self.view):
            self.run.trace.cells.append(work.cells)

    def _layer(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.now is None:
            return forward(*args, **kwargs)
        return self.now.layer(index, forward, args, kwargs)

    # ---- experts, wrapped only where a routing method is attached

    def _routed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._logits = output[0]

    def _experts(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.now is None or len(args) != 3:
            return forward(*args, **kwargs)
        return self.now.route(index, forward, self._logits, args)

    # ---- sub-layers, wrapped only where a method asks for it

    def patch_sublayers(self, index: int) -> None:
        layer = self.view.layers[index]
        for which, module in enumerate((layer.attention, layer.mlp)):
            if module is not None and module not in self._patched:
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
        if norm is not None and not isinstance(layer.norm, nn.Identity) and norm not in self._patched:
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
        x = args[0] if args else kwargs.pop("hidden_states")
        rest: list[Any] = []

        def own(x_BND: Tensor) -> Tensor:
            out = forward(x_BND, *args[1:], **kwargs)
            rest[:] = out[1:] if isinstance(out, tuple) else ()
            return out[0] if isinstance(out, tuple) else out

        run = own
        for method in work.methods:
            if method.defines(("attend", "feed_forward")[which]):
                verb = getattr(method, ("attend", "feed_forward")[which])
                run = functools.partial(verb, stream, self.view.layers[index], forward=run)
        out = self._on_rows(which, run, x)
        if which == 1 and stream._watches_mlp and stream._mlp_input is None:
            after = isinstance(self.view.layers[index].norm, nn.Identity)  # a post-norm layer's MLP reads the state
            stream._mlp_input = x if after else (out,)  # type: ignore[assignment]
        return (out, *(rest or (None,))) if which == 0 else (out, *rest) if rest else out

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

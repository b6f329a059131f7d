"""The checks, one function each. What a check says it saw names the number and what it should have been.

A check runs on a model that nobody else has, so it may leave anything behind but must find everything itself.
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparing.bench.timing import peak_memory
from sparing.engine.attach import attach
from sparing.engine.checkpoint import save_pretrained
from sparing.engine.surgery import prune
from sparing.engine.view import View
from sparing.grid.method import Card, Error, Method
from sparing.grid.trace import count
from sparing.testing.models import IMAGE, VISION, VOCAB, single
from sparing.testing.situations import SITUATIONS, Differs, outcome
from sparing.testing.suite import KEEP, Subject, check, expect

_CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def _surgery(card: Card) -> bool:
    return card.kind == "surgery"


def _trains(card: Card) -> bool:
    return card.trains or card.needs == "training"


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**_placed(model, batch)).logits


def _placed(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """With positions where the model would count padding; `generate` hands them over too."""
    if model.config.model_type != "gpt2":
        return batch
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def _generate(model: Any, batch: dict[str, Tensor], tokens: int = 4, **options: Any) -> Any:
    with torch.no_grad():
        return model.generate(**batch, max_new_tokens=tokens, do_sample=False, **options)


def _same(a: Tensor, b: Tensor, what: str) -> None:
    """Bit for bit."""
    expect(a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
    expect(
        torch.equal(a, b), f"{what}: differ by up to {(a.float() - b.float()).abs().max():.3g}, must be equal bitwise"
    )


def _near(a: Tensor, b: Tensor, what: str, rtol: float = 2e-4, atol: float = 2e-4) -> None:
    expect(a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
    gap = (a - b).abs().max()
    expect(
        torch.allclose(a, b, rtol=rtol, atol=atol), f"{what}: differ by up to {gap:.3g}, at most about {atol:g} allowed"
    )


# --------------------------------------------------------------------------- budgets


@check("full-budget")
def full_budget(s: Subject) -> None:
    """At full budget the method is the dense model, in a pass and in generation; one that tunes it runs all of it."""
    if s.card.tunes:
        with s.attach(s.at("full")) as run:
            _generate(s.model, s.prompt())
        share = run.trace.share(s.card.axis)
        expect(share == 1, f"the trace shows a share of {share:.3g} of the {s.card.axis} at full budget")
        return
    batch = s.prompt()
    dense, long = _logits(s.model, batch), _generate(s.model, batch)
    method = s.at("full")
    with s.attach(method):
        now, again = _logits(s.model, batch), _generate(s.model, batch)
    if s.card.bitwise:
        _same(now, dense, "logits at full budget and dense")
    else:
        _near(now, dense, "logits at full budget and dense")
    _same(again, long, "tokens generated at full budget and dense")


@check("effect", lambda card: card.saves != "nothing")
def effect(s: Subject) -> None:
    """Below full budget less is executed: at the matrix products, in the trace, in the FLOPs; and the output differs.

    Methods that act while the model runs: fewer rows reach the layers' matrices. Cuts: the matrices are smaller.
    """
    batch, dense = s.prompt((9, 9)), _Work.of(s.model, s.prompt((9, 9)))
    cut = s.at("cut")
    if _surgery(s.card):
        small = prune(s.model, cut)
        weights = [sum(p.numel() for p in m.parameters()) for m in (s.model, small)]
        expect(weights[1] < weights[0], f"{weights[1]} parameters after the cut, {weights[0]} before: nothing was cut")
        if s.card.saves == "flops":
            done = _Work.of(small, batch)
            expect(
                done.products < dense.products,
                f"{done.products} multiplications after the cut, {dense.products} before",
            )
    else:
        with s.attach(cut, trace=True) as run:
            done = _Work.of(s.model, batch)
            share, flops = run.trace.share(s.card.axis), run.trace.flops
        expect(
            done.products < dense.products, f"{done.products} multiplications in the layers, dense has {dense.products}"
        )
        expect(share < 1, f"the trace shows a share of {share:.3g} of the {s.card.axis}, below 1 expected")
        expect(flops < dense.flops, f"{flops} FLOPs executed, dense has {dense.flops}")
    before = _generate(s.model, batch, output_logits=True, return_dict_in_generate=True).logits
    with s.attach(cut):
        after = _generate(s.model, batch, output_logits=True, return_dict_in_generate=True).logits
    expect(not torch.equal(torch.stack(after), torch.stack(before)), "the output is that of the dense model")


@check("budget-order", lambda card: card.saves == "flops")
def budget_order(s: Subject) -> None:
    """Executed FLOPs fall as the budget falls."""
    batch = s.prompt((9, 9))
    seen = {}
    for budget in KEEP:
        method = s.at(budget)
        if _surgery(s.card):
            seen[budget] = _Work.of(prune(s.model, method), batch).flops
        else:
            with s.attach(method):
                seen[budget] = _Work.of(s.model, batch).flops
    expect(seen["full"] > seen["mid"] > seen["cut"], f"FLOPs {seen}: must fall from full over mid to cut")


@check("nested-parameters", lambda card: card.saves == "memory")
def parameters_fall(s: Subject) -> None:
    """Parameters fall as the budget falls, and nothing more is executed."""
    seen = {b: sum(p.numel() for p in prune(s.model, s.at(b)).parameters()) for b in KEEP}
    expect(seen["full"] > seen["mid"] > seen["cut"], f"parameters {seen}: must fall from full over mid to cut")
    batch = s.prompt((9, 9))
    flops = [_Work.of(m, batch).flops for m in (s.model, prune(s.model, s.at("cut")))]
    expect(flops[1] <= flops[0], f"{flops[1]} FLOPs after the cut, {flops[0]} before")


class _Work:
    """What a generation multiplied inside the decoder layers, counted at the modules and, beside it, by the counter.

    Attributes:
        products: rows x inputs x outputs of every linear layer, pairs x size of every expert.
        flops: as `sparing.count` counts all that ran.
    """

    def __init__(self) -> None:
        self.products = 0
        self.flops = 0

    @classmethod
    def of(cls, model: Any, batch: dict[str, Tensor]) -> _Work:
        work, handles = cls(), []
        for layer in View(model).layers:
            experts = layer.experts
            for module in layer.module.modules():
                if isinstance(module, (nn.Linear, Conv1D)):
                    handles.append(module.register_forward_pre_hook(work._linear))
            if experts is not None:
                handles.append(experts.module.register_forward_pre_hook(work._experts))
        try:
            work.flops, _ = count(lambda: _generate(model, batch))
        finally:
            for handle in handles:
                handle.remove()
        return work

    def _linear(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.products += args[0].shape[:-1].numel() * module.weight.numel()

    def _experts(self, module: Any, args: tuple[Tensor, ...]) -> None:
        each = sum(w[0].numel() for w in module.parameters(recurse=False))
        self.products += int((args[1] < module.num_experts).sum()) * each


# --------------------------------------------------------------------------- batches, padding, cache


def _batch(s: Subject, lengths: tuple[int, ...], side: str) -> None:
    batch = s.prompt(lengths, side=side)
    with s.attach(s.at("cut")) as run, torch.no_grad():
        run.prompt = _prompt_columns(batch, 2)
        together = s.model(**_placed(s.model, batch)).logits
        for row in range(len(lengths)):
            alone = single(s.architecture, batch, row)
            run.prompt = alone["input_ids"].shape[1] - 2
            expected = s.model(**alone).logits[0]
            got = together[row][batch["attention_mask"][row].bool()]
            _near(got, expected, f"sample {row} in a batch and alone")


def _prompt_columns(batch: dict[str, Tensor], generated: int) -> Tensor:
    """Bool (B, T): all but the last `generated` real tokens of each sample."""
    real = batch["attention_mask"].bool()
    behind = real.flip(1).cumsum(1).flip(1)
    return ~(real & (behind <= generated))


@check("batch")
def batch(s: Subject) -> None:
    """A batch gives what its samples give one by one."""
    _batch(s, (7, 7, 7), "none")


@check("left-padding")
def left_padding(s: Subject) -> None:
    """… also where shorter samples are padded on the left."""
    _batch(s, (7, 4, 6), "left")


@check("right-padding")
def right_padding(s: Subject) -> None:
    """… or on the right."""
    _batch(s, (7, 4, 6), "right")


def _cached(s: Subject, beams: int) -> None:
    batch = s.prompt()
    options: dict[str, Any] = {"num_beams": beams, "return_dict_in_generate": True}
    if s.architecture in VISION:  # a random model might write an image token
        options["suppress_tokens"] = [IMAGE, VOCAB - 1, VOCAB - 3]
    with s.attach(s.at("cut")) as run:
        out = _generate(s.model, batch, 5, **options, output_logits=True, output_scores=True)
        width = batch["input_ids"].shape[1]
        run.prompt = width
        grown = out.sequences.shape[1] - width
        full = {**batch, "input_ids": out.sequences}
        full["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(len(out.sequences), grown)], 1).long()
        if "mm_token_type_ids" in batch:
            zeros = torch.zeros(len(out.sequences), grown, dtype=torch.int)
            full["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], zeros], 1)
        again = _logits(s.model, full)[:, width - 1 : -1]
    if beams == 1:
        _near(torch.stack(out.logits, 1), again, "logits with a cache and recomputed in one pass")
    else:  # the score of the chosen beam, summed over steps, from the recomputed logits
        scores = again.log_softmax(-1).gather(-1, out.sequences[:, width:, None])[..., 0].sum(1)
        _near(out.sequences_scores * grown, scores, "scores of beams with a cache and recomputed", 1e-3, 1e-3)


@check("cache-greedy")
def cache_greedy(s: Subject) -> None:
    """Generation with a KV cache gives what recomputing everything in one pass gives."""
    _cached(s, 1)


@check("cache-beams")
def cache_beams(s: Subject) -> None:
    """… also where beams are reordered on the way."""
    _cached(s, 3)


@check("situations", lambda card: card.kind == "stream")
def situations(s: Subject) -> None:
    """Chunks, a kept prefix, a second turn, no cache, drafts: as plain cached generation, or refused in words."""
    method = s.at("cut")
    for name in SITUATIONS:
        try:
            said = outcome(name, s.model, method, s.architecture)
        except Differs as other:
            expect(False, f"{name}: {other}")
        expect(said == "equal" or len(said.split()) > 8, f"{name}: the refusal says too little: {said}")


# --------------------------------------------------------------------------- nothing is left behind


def _hooks(module: nn.Module) -> list[Any]:
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that attaching may touch: attributes, classes, hooks, flags and the place of every weight."""
    modules = [
        (name, type(m), sorted(k for k in vars(m) if not k.startswith("_")), m.training, *map(len, _hooks(m)))
        for name, m in model.named_modules()
    ]
    weights = [(name, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()]
    return [*modules, *weights, str(model.config)]


def _restored(s: Subject, around: Callable[[Callable[[], Any]], None]) -> None:
    batch = s.prompt()
    dense = _logits(s.model, batch)  # first: transformers adds hooks of its own in its first pass
    before, marks = copy.deepcopy(s.model.state_dict()), fingerprint(s.model)
    around(lambda: _generate(s.model, batch))
    for mark, now in zip(marks, fingerprint(s.model), strict=True):
        expect(mark == now, f"left behind: {now}, was {mark}")
    for name, tensor in s.model.state_dict().items():
        _same(tensor, before[name], f"weight {name} before and after")
    _same(_logits(s.model, batch), dense, "dense logits before and after")


@check("restored")
def restored(s: Subject) -> None:
    """Leaving the block gives the model back bit for bit."""

    def around(work: Callable[[], Any]) -> None:
        with s.attach(s.at("cut")):
            work()

    _restored(s, around)


@check("restored-after-error")
def restored_after_error(s: Subject) -> None:
    """… also where an exception comes out of the middle of a pass."""

    class Stop(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Stop

    def around(work: Callable[[], Any]) -> None:
        last = View(s.model).layers[-1].module
        handle = last.register_forward_hook(fail)
        inner = View(s.model).decoder.register_forward_hook(fail)  # where the last layer is skipped
        try:
            with s.attach(s.at("cut")):
                work()
        except Stop:
            return
        finally:
            handle.remove()
            inner.remove()
        expect(False, "the exception did not come out of the block")

    _restored(s, around)


@check("inputs-unchanged")
def inputs_unchanged(s: Subject) -> None:
    """What was handed in is as it was."""
    batch = s.prompt()
    before = {k: v.clone() for k, v in batch.items()}
    with s.attach(s.at("cut")):
        _logits(s.model, batch)
    for name, tensor in batch.items():
        _same(tensor, before[name], f"input {name} before and after")


# --------------------------------------------------------------------------- number types, gradients, chance


@check("bfloat16")
def bfloat16(s: Subject) -> None:
    """Runs in bfloat16, finite, in the model's own number type, in a pass and in sampled generation."""
    method = s.at("cut")
    s.model.bfloat16()
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in s.prompt().items()}
    with s.attach(method), torch.no_grad():
        out = s.model(**batch).logits
        expect(out.dtype == torch.bfloat16, f"logits are {out.dtype}")
        expect(torch.isfinite(out).all(), f"{int((~torch.isfinite(out)).sum())} logits are not finite")
        expect(s.model(**batch, logits_to_keep=1).logits.shape[:2] == (2, 1), "logits_to_keep=1 gives other columns")
        ids = s.model.generate(**batch, max_new_tokens=4, do_sample=True)
        expect(ids.shape[1] == batch["input_ids"].shape[1] + 4, f"generated {tuple(ids.shape)}")


@check("gradients", _trains)
def gradients(s: Subject) -> None:
    """A method that trains lets gradients through to the first and the last layer that run."""
    batch = s.prompt((9, 9), side="none")
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    s.model.train()
    with s.attach(s.at("cut")) as run:
        run.prompt = labels == -100
        s.model(**batch, labels=labels, use_cache=False).loss.backward()
        ran = [layer for layer, rows in zip(View(s.model).layers, run.trace.cells[-1].rows) if rows]
    for layer in (ran[0], ran[-1]):
        found = [p.grad for p in layer.module.parameters() if p.grad is not None]
        total = sum(float(g.abs().sum()) for g in found)
        expect(found and total > 0, f"no gradient reaches layer {layer.index}")
        expect(all(torch.isfinite(g).all() for g in found), f"gradients of layer {layer.index} are not finite")


@check("deterministic")
def deterministic(s: Subject) -> None:
    """The same method gives the same output twice, draws nothing from torch's own generator, and copies agree."""
    batch, method = s.prompt(), s.at("cut")
    _logits(s.model, batch)  # the model is built by now, which seeds the generator
    state = torch.get_rng_state()
    with s.attach(method):
        first = _logits(s.model, batch)
    expect(torch.equal(state, torch.get_rng_state()), "draws from (or seeds) torch's global generator")
    torch.manual_seed(99)
    with s.attach(method):
        _same(_logits(s.model, batch), first, "logits of two runs")
    twin = method.replace().with_state(method.state)
    with s.attach(twin):
        _same(_logits(s.model, batch), first, "logits of two equal methods")


@check("seeded", lambda card: card.is_control)
def seeded(s: Subject) -> None:
    """A method with a seed does something else under another one."""
    method = s.at("cut")
    if "seed" not in method.fields():
        return  # chooses without chance
    batch, seen = s.prompt((9, 9)), []
    for seed in range(8):
        with s.attach(method.replace(seed=seed)):
            seen.append(_generate(s.model, batch, output_logits=True, return_dict_in_generate=True).logits)
    kinds = {torch.stack(logits).sum().item() for logits in seen}
    expect(len(kinds) > 1, "eight seeds give one output")


# --------------------------------------------------------------------------- fused attention, memory


@check("fused-attention")
def fused_attention(s: Subject) -> None:
    """SDPA stays SDPA: every layer that runs attention runs the fused kernel, under the user's own setting."""
    batch, method, calls = s.prompt(), s.at("cut"), []  # the method first: fitting it runs a model too
    own = torch.nn.functional.scaled_dot_product_attention
    setting = s.model.config._attn_implementation

    @functools.wraps(own)
    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape)
        return own(query, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = spy
    try:
        _logits(s.model, batch)
        dense = len(calls)
        calls.clear()
        with s.attach(method) as run:
            _logits(s.model, batch)  # in its first pass the engine looks whether layers turn their keys
            calls.clear()
            run.trace.reset()
            _logits(s.model, batch)
            inside = s.model.config._attn_implementation
    finally:
        torch.nn.functional.scaled_dot_product_attention = own
    ran = sum(rows > 0 for cells in run.trace.cells for rows in cells.rows)
    layers = len(View(s.model))
    wanted = dense - layers + ran if dense else 0  # gpt-oss has sinks, which the fused kernel does not know
    expect(inside == setting, f"attn_implementation is {inside!r} inside the block, the user's is {setting!r}")
    expect(len(calls) == wanted, f"{len(calls)} fused calls, {dense} dense, {ran} of {layers} layers ran")


@check("memory")
def memory(s: Subject) -> None:
    """Peak memory grows by no T x T matrix, not even of bools."""
    T = 1024
    s.model.config.get_text_config().max_position_embeddings = 2 * T
    if s.architecture in ("opt", "gpt2", "gptj"):  # as many positions as their table has
        T = 200
    batch = s.prompt((T,), side="none")
    method = s.at("cut")

    def once() -> None:
        with torch.no_grad():
            s.model(**batch, use_cache=False, logits_to_keep=1)

    once()
    dense = peak_memory(once)
    with attach(s.model, method) as run:
        run.oracle, run.keeps_trace = torch.arange(16) % 3, False
        once()
        grown = peak_memory(once) - dense
    expect(grown < T * T, f"peak memory grows by {grown} bytes, a {T} x {T} matrix of bools has {T * T}")


# --------------------------------------------------------------------------- cuts


@check("cut-equals-mask", _surgery)
def cut_equals_mask(s: Subject) -> None:
    """The really cut model computes what the attached mask computes."""
    batch, method = s.prompt((7, 5)), s.at("cut")
    with s.attach(method):
        live, long = _logits(s.model, batch), _generate(s.model, batch)
    small = prune(s.model, method)
    real = batch["attention_mask"].bool()
    _near(_logits(small, batch)[real], live[real], "logits of the cut and of the masked model")
    _same(_generate(small, batch), long, "tokens generated by the cut and by the masked model")


# --------------------------------------------------------------------------- saving


class _Fresh:
    """Another process that has seen nothing but folders."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "sparing.testing.fresh", str(torch.get_num_threads())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self._end)

    def _end(self) -> None:
        self._process.communicate()  # closes its input, at which it ends

    def ask(self, **request: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        expect(answer, "the fresh process ended")
        said = json.loads(answer)
        expect(said["ok"], f"in a fresh process: {said.get('error')}")


@functools.cache
def _fresh() -> _Fresh:
    return _Fresh()


@check("save-load")
def save_load(s: Subject) -> None:
    """Saved and loaded in a fresh process the method gives the same output; so does a cut checkpoint."""
    batch, method = s.prompt(), s.at("cut")
    with s.attach(method):
        here = _logits(s.model, batch)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        method.save(folder / "method")
        s.model.save_pretrained(folder / "model")
        save_file(_placed(s.model, batch), folder / "batch.safetensors")
        own = {"module": s.method.__module__, "name": s.method.__qualname__}
        _fresh().ask(folder=place, model="model", method="method", **own)
        # not bitwise: a loaded tensor may lie elsewhere, and some kernels round by alignment
        _near(load_file(folder / "out.safetensors")["logits"], here, "logits here and after loading", 1e-5, 1e-5)
        if _surgery(s.card):
            small = prune(s.model, method)
            save_pretrained(small, folder / "small")
            _fresh().ask(folder=place, model="small", method="")
            again = load_file(folder / "out.safetensors")["logits"]
            _near(again, _logits(small, batch), "logits of the cut model here and after loading", 1e-5, 1e-5)


# --------------------------------------------------------------------------- mistakes


@check("wrong-fields")
def wrong_fields(s: Subject) -> None:
    """Every wrong hyper-parameter is refused at construction, naming the field, the value and what is allowed."""
    method = s.at("cut")
    for field in dataclasses.fields(method):
        rule = field.metadata.get("rule")
        expect(rule, f"field {field.name} has no rule: use share(…), integer(…) and the like")
        assert rule is not None
        for wrong in rule.wrong:
            try:
                method.replace(**{field.name: wrong})
            except Error as problem:
                text = str(problem)
                expect(
                    f"{field.name} = {wrong!r}" in text and "must be" in text,
                    f"the error for {field.name} = {wrong!r} does not say so: {text}",
                )
            else:
                expect(False, f"{field.name} = {wrong!r} is accepted, allowed is {rule.allowed}")


@check("refusal", refused=True)
def refusal(s: Subject) -> None:
    """On a model that it has nothing to work on the method says so, and changes nothing."""
    before = copy.deepcopy(s.model.state_dict())
    marks = fingerprint(s.model)
    for act in (_attached, prune) if _surgery(s.card) else (_attached,):
        try:
            method: Method = s.method()
            if s.needs_state(method):
                method = method.fit(s.model, [s.prompt((9, 9), side="none")])
            act(s.model, method)
        except Error as problem:
            text = str(problem)
            named = s.method.name in text or type(s.model).__name__ in text or "layer" in text
            expect(named, f"the error names neither the method nor the model: {text}")
        else:
            expect(False, f"{type(s.model).__name__} is accepted, though the method has nothing to work on there")
    expect(marks == fingerprint(s.model), "something is left behind on the model")
    for name, tensor in s.model.state_dict().items():
        _same(tensor, before[name], f"weight {name} before and after")


def _attached(model: nn.Module, method: Method) -> None:
    with attach(model, method):
        pass

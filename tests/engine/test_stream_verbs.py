"""What a stream method may do beside choosing rows: read the prompt, run sub-layers its own way, replace and blend.

References are layer loops written out, hooks on the modules, or the same rows really gathered.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparing
from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.view import LayerView
from sparing.grid.method import Card, Error
from sparing.testing.models import LAYERS, VOCAB, build, prompt

CARD = Card("", 2026, "test", "stream", "both")
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@dataclass(frozen=True)
class Act(StreamMethod):
    """A method made of one function."""

    act: Callable[[Stream, int], None]

    name = "act"
    card = CARD

    def before_layer(self, stream: Stream, layer: int) -> None:
        self.act(stream, layer)


def _greedy(model: Any, batch: dict[str, Tensor], tokens: int = 4) -> Any:
    options: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if batch.keys() & {"pixel_values"}:
        options["suppress_tokens"] = list(range(VOCAB - 3, VOCAB))  # no images without pixels
    with torch.no_grad():
        return model.generate(**batch, max_new_tokens=tokens, **options)


def _logits(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **options).logits


def _one_pass(model: Any, batch: dict[str, Tensor], out: Any) -> dict[str, Tensor]:
    """Prompt and what was generated behind it, as one uncached batch."""
    longer = out.sequences.shape[1] - batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(len(out.sequences), longer)], 1)
    return {**batch, "input_ids": out.sequences, "attention_mask": mask}


def _layers(model: Any, ids: Tensor, step: Callable[[int, Any, Tensor, Tensor, Any], Tensor]) -> Tensor:
    """Logits of a Llama whose layers are `step(index, layer, hidden, mask, rope)`."""
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    rope = decoder.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1])[None])
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    for index, layer in enumerate(decoder.layers):
        hidden = step(index, layer, hidden, mask, rope)
    return model.lm_head(decoder.norm(hidden))


def _whole(layer: Any, hidden: Tensor, mask: Tensor, rope: Any) -> Tensor:
    return layer(hidden, attention_mask=mask, position_embeddings=rope)


# --------------------------------------------------------------------------- reading the prompt


@dataclass(frozen=True)
class Reader(StreamMethod):
    """Notes the prompt's mean state before each layer; generated rows skip layers that the prompt's sign tells."""

    calls: deque[tuple[str, int, str]] = field(default_factory=deque)
    seen: deque[dict[str, Any]] = field(default_factory=deque)

    name = "reader"
    card = CARD

    def read_prompt(self, stream: Stream, layer: int) -> None:
        self.calls.append(("read", layer, stream.phase))
        here = stream.prompt[..., None]
        mean_BD = (stream.hidden * here).sum(1) / here.sum(1)
        stream.memory[f"reader.{layer}"] = mean_BD

    def before_layer(self, stream: Stream, layer: int) -> None:
        self.calls.append(("act", layer, stream.phase))
        if layer == 0:
            self.seen.append(dict(stream.memory))
        skips_B1 = stream.memory[f"reader.{layer}"][:, :1] > 0
        generated = stream.generated
        if isinstance(generated, Tensor):
            stream.bypass(skips_B1 & generated)
        elif generated:
            stream.bypass(skips_B1.expand(-1, stream.hidden.shape[1]))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "qwen3-moe", "llava", "qwen2.5-vl"])
def test_the_prompt_is_read_alike_before_decoding_and_in_one_pass(name: str) -> None:
    """The same memory, and so the same logits, whether generated tokens come one by one or with their prompt."""
    model, batch = build(name), prompt(name, (7, 5))
    width = batch["input_ids"].shape[1]
    cached, mixed = Reader(), Reader()
    with sparing.attach(model, cached):
        out = _greedy(model, batch)
    together = _one_pass(model, batch, out)
    if "mm_token_type_ids" in batch:
        together["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 4))
    with sparing.attach(model, mixed, prompt=width) as run:
        got = _logits(model, together, use_cache=False)[:, width - 1 : -1]
        assert run.trace.cells[0].rows != [2 * got.shape[1]] * LAYERS and len(run.trace.cells) == 1
    noted, again = cached.seen[-1], mixed.seen[0]
    for layer in range(LAYERS):
        torch.testing.assert_close(noted[f"reader.{layer}"], again[f"reader.{layer}"], **CLOSE)
    skips = torch.stack([noted[f"reader.{layer}"][:, 0] > 0 for layer in range(LAYERS)])
    assert skips.any()
    torch.testing.assert_close(got, torch.stack(out.logits, 1), **CLOSE)


def test_the_prompt_is_read_before_anything_generated_runs(llama: PreTrainedModel) -> None:
    order = range(LAYERS)
    method, batch = Reader(), prompt("llama")
    with sparing.attach(llama, method):
        _greedy(llama, batch, 2)
    prefill = [(what, layer, "prefill") for layer in order for what in ("read", "act")]
    assert list(method.calls) == [*prefill, *(("act", layer, "decode") for layer in order)]
    method.calls.clear()
    with sparing.attach(llama, method, prompt=4):
        _logits(llama, batch)
    assert [what for what, _, _ in method.calls] == ["read"] * LAYERS + ["act"] * LAYERS
    assert [layer for _, layer, _ in method.calls] == [*order, *order]
    method.calls.clear()
    with sparing.attach(llama, method, prompt=7):  # all of it is prompt: no pass of its own
        _logits(llama, batch)
    assert list(method.calls) == prefill


def test_what_stands_behind_the_prompt_is_not_read(llama: PreTrainedModel) -> None:
    batch, other = prompt("llama", (9, 9), side="none"), prompt("llama", (9, 9), side="none")
    other["input_ids"][:, 5:] = 3
    seen = []
    for each in (batch, other):
        method = Reader()
        with sparing.attach(llama, method, prompt=torch.tensor([5, 4])):
            _logits(llama, each)
        seen.append(method.seen[0])
    for layer in range(LAYERS):
        assert torch.equal(seen[0][f"reader.{layer}"][0], seen[1][f"reader.{layer}"][0])
    assert torch.equal(seen[0]["start"], torch.tensor([5, 4]))


def test_reading_leaves_no_trace_and_no_gradient(llama: PreTrainedModel) -> None:
    method = Reader()
    with sparing.attach(llama, method, prompt=4) as run:
        out = llama(**prompt("llama"))
        assert out.past_key_values.get_seq_length() == 7  # the reading pass wrote nothing
        assert len(run.trace.cells) == 1
    assert not any(method.seen[0][f"reader.{layer}"].requires_grad for layer in range(LAYERS))


# --------------------------------------------------------------------------- sub-layers run by the method


@dataclass(frozen=True)
class Wrapper(StreamMethod):
    """Runs attention and MLP as they are, times a factor for generated rows."""

    factor: float = 1.0
    before: Callable[[Stream, int], None] = lambda stream, layer: None
    log: deque[tuple[str, int, Any, Any]] = field(default_factory=deque)

    name = "wrapper"
    card = CARD

    def before_layer(self, stream: Stream, layer: int) -> None:
        self.before(stream, layer)

    def _run(self, what: str, stream: Stream, layer: LayerView, x_BND: Tensor, forward: Any) -> Tensor:
        self.log.append((what, layer.index, tuple(x_BND.shape), stream.generated))
        out = forward(x_BND)
        assert isinstance(out, Tensor) and out.shape == x_BND.shape
        if self.factor == 1:
            return out
        generated = torch.as_tensor(stream.generated).expand(x_BND.shape[:2])
        return torch.where(generated[..., None], self.factor * out, out)

    def attend(self, stream: Stream, layer: LayerView, x_BND: Tensor, forward: Any) -> Tensor:
        return self._run("attend", stream, layer, x_BND, forward)

    def feed_forward(self, stream: Stream, layer: LayerView, x_BND: Tensor, forward: Any) -> Tensor:
        return self._run("feed_forward", stream, layer, x_BND, forward)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt-neox", "opt", "qwen3-moe", "deepseek-v3", "llava"])
def test_sublayers_run_as_they_are_are_dense_bit_for_bit(name: str) -> None:
    model, batch = build(name), prompt(name, (7, 5))
    dense, long = _logits(model, batch), _greedy(model, batch)
    method = Wrapper()
    with sparing.attach(model, method):
        assert torch.equal(_logits(model, batch), dense)
        method.log.clear()
        out = _greedy(model, batch)
    assert torch.equal(out.sequences, long.sequences) and torch.equal(out.logits[-1], long.logits[-1])
    verbs = ["attend"] if name == "opt" else ["attend", "feed_forward"]  # whose MLP is no module
    wide, passes = (2, batch["input_ids"].shape[1], 32), 4
    expected = [(v, i, (2, 1, 32) if p else wide, bool(p)) for p in range(passes) for i in range(LAYERS) for v in verbs]
    assert list(method.log) == expected


@pytest.mark.parametrize("factor", [2.0, 0.0])
def test_what_comes_back_goes_into_the_residual_add(llama: PreTrainedModel, factor: float) -> None:
    """Generated rows get another multiple of both sub-layers: a loop written out, and cached decoding."""
    ids = torch.randint(2, 99, (2, 5))
    with sparing.attach(llama, Wrapper(factor)):
        out = _greedy(llama, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    times = torch.where(torch.arange(9) >= 5, factor, 1.0)[None, :, None]

    def step(index: int, layer: Any, hidden: Tensor, mask: Tensor, rope: Any) -> Tensor:
        attended = layer.self_attn(layer.input_layernorm(hidden), attention_mask=mask, position_embeddings=rope)[0]
        hidden = hidden + times * attended
        return hidden + times * layer.mlp(layer.post_attention_layernorm(hidden))

    with torch.no_grad():
        expected = _layers(llama, out.sequences, step)
        with sparing.attach(llama, Wrapper(factor), prompt=5):
            torch.testing.assert_close(_logits(llama, {"input_ids": out.sequences}), expected, **CLOSE)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected[:, 4:-1], **CLOSE)


def test_generated_tells_the_rows_that_the_layer_runs(llama: PreTrainedModel) -> None:
    """Where rows skip the layer, x holds the others, and `generated` is theirs."""
    gone = torch.tensor([[0, 1, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0, 0, 0, 0]]).bool()
    method = Wrapper(before=lambda s, i: s.bypass(gone) if i == 2 else None)
    batch = prompt("llama", (9, 9), side="none")
    with sparing.attach(llama, method, prompt=torch.tensor([4, 6])):
        _logits(llama, batch)
    behind = torch.arange(9)[None] >= torch.tensor([[4], [6]])
    for what, layer, shape, generated in method.log:
        assert isinstance(generated, Tensor), what
        if layer != 2:
            assert shape == (2, 9, 32) and torch.equal(generated, behind)
            continue
        assert shape == (2, 7, 32)
        assert generated[0, :6].tolist() == behind[0][~gone[0]].tolist()
        assert generated[1].tolist() == behind[1][~gone[1]].tolist()


def test_the_share_of_an_mlp_that_ran_is_in_the_trace(llama: PreTrainedModel) -> None:
    @dataclass(frozen=True)
    class Part(Wrapper):
        def feed_forward(self, stream: Stream, layer: LayerView, x_BND: Tensor, forward: Any) -> Tensor:
            if layer.index in (1, 4):
                stream.mlp_share(0.25)
            return forward(x_BND)

    module = llama.model.layers[1]
    mlp, attention = (sum(p.numel() for p in m.parameters()) for m in (module.mlp, module.self_attn))
    share = (attention + 0.25 * mlp) / (attention + mlp)
    with sparing.attach(llama, Part()) as run:
        _logits(llama, prompt("llama", (9, 9), side="none"))
    assert run.trace.cells[0].rows == pytest.approx([18, 18 * share, 18, 18, 18 * share, 18])
    assert run.trace.share("depth") == pytest.approx((4 + 2 * share) / 6)


# --------------------------------------------------------------------------- rows of the MLP


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "phi3"])
def test_bypassed_rows_do_not_reach_the_mlp(name: str) -> None:
    """One gathered batch of the rows of all samples: counted at the down projection, or at the experts."""
    model = build(name)
    skips = torch.rand(3, 9) < torch.tensor([[0.2], [0.9], [0.5]])
    skips[1] = True  # a sample of which nothing runs
    layer = model.model.layers[2]
    module = layer.mlp.gate if name == "qwen3-moe" else layer.mlp.down_proj
    rows: list[int] = []
    hook = module.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[:-1].numel()))
    batch = prompt(name, (9, 9, 9), side="none")
    with sparing.attach(model, Act(lambda s, i: s.bypass_mlp(skips) if i == 2 else None)) as run:
        got = _logits(model, batch)
    assert rows == [int((~skips).sum())]
    mlp, attention = (sum(p.numel() for p in m.parameters()) for m in (layer.mlp, layer.self_attn))
    if name != "qwen3-moe":
        share = (attention + mlp * float((~skips).float().mean())) / (attention + mlp)
        assert run.trace.cells[0].rows[2] == pytest.approx(27 * share)
    rows.clear()
    zero = layer.mlp.register_forward_hook(lambda m, args, out: out.masked_fill(skips[..., None], 0))
    torch.testing.assert_close(got, _logits(model, batch), **CLOSE)
    zero.remove()
    rows.clear()
    with sparing.attach(model, Act(lambda s, i: s.bypass_mlp() if i == 2 else None)):
        _logits(model, batch)
    assert rows == []
    hook.remove()


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_skip_the_layer_and_rows_that_skip_its_mlp(llama: PreTrainedModel, side: str) -> None:
    """Both at once, padded and of unequal counts: each sample as when it is alone."""
    batch = prompt("llama", (9, 6, 8), side=side)
    generator = torch.Generator().manual_seed(1)
    out, thin = (torch.rand(3, 9, generator=generator) < share for share in (0.3, 0.4))
    rows: list[int] = []

    def act(pick: slice) -> Act:
        def both(stream: Stream, layer: int) -> None:
            if layer in (1, 3):
                stream.bypass(out[pick][:, where])
                stream.bypass_mlp(thin[pick][:, where])

        return Act(both)

    where = torch.arange(9)
    with sparing.attach(llama, act(slice(None))):
        hook = llama.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, a, o: rows.append(a[0].shape[1]))
        together = _logits(llama, batch)
        hook.remove()
    assert rows == [int((~out & ~thin).sum())]
    for row in range(3):
        where = batch["attention_mask"][row].bool().nonzero()[:, 0]
        with sparing.attach(llama, act(slice(row, row + 1))):
            alone = _logits(llama, {"input_ids": batch["input_ids"][row : row + 1, where]})
        torch.testing.assert_close(together[row, where], alone[0], **CLOSE)


# --------------------------------------------------------------------------- replaced layers


def test_a_replaced_layer_is_the_function_and_leaves_no_keys(llama: PreTrainedModel) -> None:
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 6
    function = lambda x_BND: x_BND + torch.tanh(x_BND @ matrix)  # noqa: E731
    method = Act(lambda s, i: s.replace(function) if i in (2, 5) else None)
    ids = torch.randint(2, 99, (2, 6))

    def step(index: int, layer: Any, hidden: Tensor, mask: Tensor, rope: Any) -> Tensor:
        return function(hidden) if index in (2, 5) else _whole(layer, hidden, mask, rope)

    ran: list[int] = []
    hooks = [m.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(llama.model.layers)]
    with sparing.attach(llama, method) as run:
        got = _logits(llama, {"input_ids": ids})
        out = _greedy(llama, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 3, 4] * 5
    with torch.no_grad():
        torch.testing.assert_close(got, _layers(llama, ids, step), **CLOSE)
        expected = _layers(llama, out.sequences, step)[:, 5:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, **CLOSE)
    assert run.trace.cells[0].rows == [12, 12, 0, 12, 12, 0]
    held = out.past_key_values.layers
    assert [getattr(layer, "is_initialized", True) and bool(layer.keys.numel()) for layer in held] == [
        *(True, True, False),
        *(True, True, False),
    ]
    assert out.past_key_values.get_seq_length() == 9


def test_a_replaced_layer_has_a_gradient(llama: PreTrainedModel) -> None:
    ids = torch.randint(2, 99, (1, 6))
    scale = torch.full((32,), 0.9, requires_grad=True)
    with sparing.attach(llama, Act(lambda s, i: s.replace(lambda x: x * scale) if i == 3 else None)):
        here = torch.autograd.grad(llama(ids, use_cache=False).logits.square().mean(), scale)[0]

    def step(index: int, layer: Any, hidden: Tensor, mask: Tensor, rope: Any) -> Tensor:
        return hidden * scale if index == 3 else _whole(layer, hidden, mask, rope)

    expected = torch.autograd.grad(_layers(llama, ids, step).square().mean(), scale)[0]
    torch.testing.assert_close(here, expected, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------- blended layers


def test_blend_adds_a_part_of_what_the_layer_does(llama: PreTrainedModel) -> None:
    """h + w (F(h) - h), by hand; and its gradient with respect to w."""
    ids = torch.randint(2, 99, (2, 7))
    found = []
    for written_out in (False, True):
        weight = torch.rand(2, 7, generator=torch.Generator().manual_seed(2)).requires_grad_()

        def step(index: int, layer: Any, h: Tensor, mask: Tensor, rope: Any, w: Tensor = weight) -> Tensor:
            full = _whole(layer, h, mask, rope)
            return h + w[..., None] * (full - h) if index in (1, 4) else full

        if written_out:
            logits = _layers(llama, ids, step)
        else:
            with sparing.attach(llama, Act(lambda s, i, w=weight: s.blend(w) if i in (1, 4) else None)) as run:
                logits = llama(ids, use_cache=False).logits
        found.append((logits.detach(), torch.autograd.grad(logits.square().mean(), weight)[0]))
    torch.testing.assert_close(found[0][0], found[1][0], **CLOSE)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)
    assert found[0][1].abs().min() > 0
    assert run.trace.cells[0].rows == [14] * LAYERS  # every row runs


def test_blend_of_ones_is_dense_and_of_zeros_is_nothing(llama: PreTrainedModel) -> None:
    batch = prompt("llama")
    ones = torch.ones(2, 7)
    with sparing.attach(llama, Act(lambda s, i: s.blend(ones))):
        torch.testing.assert_close(_logits(llama, batch), _logits(llama, batch), **CLOSE)
        full = _logits(llama, batch)
    torch.testing.assert_close(full, _logits(llama, batch), **CLOSE)
    with sparing.attach(llama, Act(lambda s, i: s.blend(0 * ones))):
        nothing = _logits(llama, batch)
    with torch.no_grad():
        expected = llama.lm_head(llama.model.norm(llama.model.embed_tokens(batch["input_ids"])))
    assert torch.equal(nothing, expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt-neox", "qwen3-moe"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_rows_of_weight_zero_are_as_if_they_had_not_run(name: str, side: str) -> None:
    """Hard weights, other ones a layer: the same as really gathering the rows of weight one."""
    model, batch = build(name), prompt(name, (12, 7), side=side)
    weights = (torch.rand(LAYERS, 2, 12, generator=torch.Generator().manual_seed(4)) < 0.6).float()
    weights[2, 0] = 0  # a sample that skips a layer altogether
    real = batch["attention_mask"].bool()
    with sparing.attach(model, Act(lambda s, i: s.bypass(weights[i] == 0))):
        gathered = _logits(model, batch, use_cache=False)[real]
    with sparing.attach(model, Act(lambda s, i: s.blend(weights[i], hide=True))):
        torch.testing.assert_close(_logits(model, batch, use_cache=False)[real], gathered, **CLOSE)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(_logits(model, batch, use_cache=False)[real], gathered, **CLOSE)
    with sparing.attach(model, Act(lambda s, i: s.blend(weights[i]))):  # seen by others, it is something else
        assert (_logits(model, batch, use_cache=False)[real] - gathered).abs().max() > 1e-2


def test_hiding_needs_a_pass_without_cache(llama: PreTrainedModel) -> None:
    ones = torch.ones(2, 7)
    with sparing.attach(llama, Act(lambda s, i: s.blend(ones, hide=True))):
        with pytest.raises(Error, match=r"blend: hide = True: needs a pass without cache \(use_cache=False\)"):
            _logits(llama, prompt("llama"))

    def both(stream: Stream, layer: int) -> None:
        stream.bypass(torch.arange(7).expand(2, -1) == 3)
        stream.blend(ones, hide=True)

    with sparing.attach(llama, Act(both)), pytest.raises(Error, match="nothing bypassed"):
        _logits(llama, prompt("llama"), use_cache=False)


# --------------------------------------------------------------------------- steps


def _steps(model: Any, run: Callable[[], Any], **options: Any) -> list[tuple[str, list[list[int]], int | None]]:
    """Phase, step and common step of every pass."""
    seen: list[tuple[str, list[list[int]], int | None]] = []

    def act(stream: Stream, layer: int) -> None:
        if layer == 1:
            seen.append((stream.phase, stream.step.tolist(), stream.common_step))

    with torch.no_grad(), sparing.attach(model, Act(act), **options):
        run()
    return seen


def test_steps_of_generation_count_from_the_first_generated_token(llama: PreTrainedModel) -> None:
    """Padded on the left, every sample is at the same step."""
    batch = prompt("llama", (7, 5))
    seen = _steps(llama, lambda: _greedy(llama, batch))
    assert seen[0] == ("prefill", [list(range(-7, 0))] * 2, None)
    assert seen[1:] == [("decode", [[step]] * 2, step) for step in range(3)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["number", "long", "bool"])
def test_steps_behind_a_prompt_in_one_pass(llama: PreTrainedModel, side: str, kind: str) -> None:
    batch = prompt("llama", (7, 5), side=side)
    starts = {"number": [4, 4], "long": [4, 3], "bool": [4, 3]}[kind]
    given: Any = 4
    if kind != "number":
        given = torch.tensor(starts)
    if kind == "bool":
        given = torch.arange(7)[None] < given[:, None]
    seen = _steps(llama, lambda: _logits(llama, batch), prompt=given)
    assert seen == [("prefill", [list(range(-start, 7 - start)) for start in starts], None)]


def test_steps_go_on_in_the_cache_of_a_pass_that_held_generated_tokens(llama: PreTrainedModel) -> None:
    ids = torch.randint(2, 99, (2, 7))

    def run() -> None:
        cache = llama(ids).past_key_values
        llama(ids[:, :1], past_key_values=cache)
        llama(ids[:, :2], past_key_values=cache)  # two rows at once have no common step

    seen = _steps(llama, run, prompt=4)
    assert [step for _, step, _ in seen] == [[[*range(-4, 3)]] * 2, [[3]] * 2, [[4, 5]] * 2]
    assert [common for _, _, common in seen] == [None, 3, None]
    seen = _steps(llama, run, prompt=torch.tensor([4, 6]))
    assert [step for _, step, _ in seen[1:]] == [[[3], [1]], [[4, 5], [2, 3]]]
    with pytest.raises(Error, match=r"2 columns behind a cache of 8 may be prompt .* or generated"):
        _steps(llama, run)


def test_steps_follow_rows_that_leave(llama: PreTrainedModel) -> None:
    seen: list[Any] = []

    def act(stream: Stream, layer: int) -> None:
        if layer == 2:
            stream.drop(torch.isin(stream.index, torch.tensor([1, 5])))
            seen.append(stream.step.tolist())

    with sparing.attach(llama, Act(act), prompt=4):
        _logits(llama, {"input_ids": torch.randint(2, 99, (1, 7))})
    assert seen == [[[-4, -2, -1, 0, 2]]]


# --------------------------------------------------------------------------- memory


class Counts(list[int]):
    """A list that can be referred to weakly."""


def test_memory_lives_as_long_as_its_cache(llama: PreTrainedModel) -> None:
    """Two generations taking turns on one model keep two memories; a new prompt begins with none."""
    seen: list[tuple[str, list[int]]] = []

    def act(stream: Stream, layer: int) -> None:
        if layer:
            return
        if stream.phase == "prefill":
            assert not {k for k in stream.memory if k.startswith("test.")}
            stream.memory["test.counts"] = Counts()
        counts = stream.memory["test.counts"]
        counts.append(int(stream.width))
        seen.append((stream.phase, list(counts)))

    with torch.no_grad(), sparing.attach(llama, Act(act)) as run:
        one = llama(torch.randint(2, 99, (1, 5))).past_key_values
        two = llama(torch.randint(2, 99, (1, 7))).past_key_values
        for cache in (one, two, two, one):
            llama(torch.tensor([[3]]), past_key_values=cache)
        llama(torch.randint(2, 99, (1, 4)), use_cache=False)
        assert [counts for _, counts in seen] == [[5], [7], [5, 1], [7, 1], [7, 1, 1], [5, 1, 1], [4]]
        notes = [weakref.ref(vars(kept)["sparing"][run.number]["test.counts"]) for kept in (one, two)]
        copied = copy.deepcopy(two)
        llama(torch.tensor([[3]]), past_key_values=copied)
        assert [counts for _, counts in seen][-1] == [7, 1, 1, 1]
        assert vars(two)["sparing"][run.number]["test.counts"] == [7, 1, 1]
        del cache, one
        gc.collect()
        assert [note() is None for note in notes] == [True, False]


# --------------------------------------------------------------------------- the state that enters an MLP


def _watching(model: Any, batch: dict[str, Tensor], watched: tuple[int, ...]) -> dict[int, tuple[Tensor, Tensor]]:
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def act(stream: Stream, layer: int) -> None:
        if layer - 1 in watched:
            found[layer - 1] = stream.watched_mlp()
            assert found[layer - 1][1] is stream.hidden
        if layer in watched:
            stream.watch_mlp()

    with sparing.attach(model, Act(act)):
        logits = _logits(model, batch)
    assert torch.equal(logits, _logits(model, batch))  # looking changes nothing
    return found


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("llama", "post_attention_layernorm"),
        ("qwen3-moe", "post_attention_layernorm"),
        ("gemma3", "pre_feedforward_layernorm"),
        ("gpt-neox", ""),
    ],
)
def test_watched_mlp_is_the_state_before_its_norm_and_after_the_layer(name: str, norm: str) -> None:
    """Held against hooks; where attention and MLP run side by side it is the state with the attention's part."""
    model, batch = build(name), prompt(name, (7, 5))
    layers = sparing.engine.view.View(model).layers
    seen: dict[tuple[str, int], Tensor] = {}
    hooks = []
    for view in layers:
        note = lambda m, args, out, i=view.index: seen.update({("out", i): out[0] if isinstance(out, tuple) else out})  # noqa: E731
        hooks.append(view.module.register_forward_hook(note))
        inner = view.attention if name == "gpt-neox" else getattr(view.module, norm)
        hooks.append(
            inner.register_forward_hook(
                lambda m, args, out, i=view.index: seen.update({("in", i): out[0] if name == "gpt-neox" else args[0]})
            )
        )
    model(**batch)
    for hook in hooks:
        hook.remove()
    if name == "gpt-neox":
        for i in (1, 4):
            seen["in", i] = seen["out", i - 1] + seen["in", i]
    found = _watching(model, batch, (1, 4))
    assert set(found) == {1, 4}
    for i, (entered, left) in found.items():
        torch.testing.assert_close(entered, seen["in", i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left, seen["out", i], rtol=1e-5, atol=1e-5)
        assert (entered - left).abs().max() > 1e-2


def test_only_the_layer_before_can_be_asked_for(llama: PreTrainedModel) -> None:
    def act(stream: Stream, layer: int) -> None:
        if layer == 1:
            stream.watch_mlp()
        if layer == 3:
            stream.watched_mlp()

    with sparing.attach(llama, Act(act)), pytest.raises(Error, match="the layer before this one was not watched"):
        _logits(llama, prompt("llama"))
    assert "forward" not in vars(llama.model.layers[1].mlp)
    assert "forward" not in vars(llama.model.layers[1].post_attention_layernorm)


def test_watched_mlp_in_decoding(llama: PreTrainedModel) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def act(stream: Stream, layer: int) -> None:
        if layer == 3:
            stream.watch_mlp()
        if layer == 4:
            seen.append(stream.watched_mlp())

    with sparing.attach(llama, Act(act)):
        out = _greedy(llama, prompt("llama", (7, 7), side="none"))
        _logits(llama, {"input_ids": out.sequences[:, :-1]})
    steps, whole = torch.cat([x for x, _ in seen[:-1]], 1), seen[-1][0]
    torch.testing.assert_close(steps, whole, **CLOSE)


# --------------------------------------------------------------------------- missing keys


def _skips(*layers_of_step: tuple[int, ...]) -> Act:
    """At each step of generation, the layers that its token skips."""

    def act(stream: Stream, layer: int) -> None:
        step = stream.common_step
        if step is not None and layer in layers_of_step[min(step, len(layers_of_step) - 1)]:
            stream.bypass()

    return Act(act)


def test_a_layer_that_comes_back_finds_keys_missing(llama: PreTrainedModel) -> None:
    batch = prompt("llama", (7, 5))
    with sparing.attach(llama, _skips((), (3,), (3, 2))) as run:
        run.checks_cache = True
        _greedy(llama, batch, 5)  # what was left stays left
    with sparing.attach(llama, _skips((3,), (3, 2), (2,))) as run:
        _greedy(llama, batch, 5)  # not looked at, it runs
        run.checks_cache = True
        with pytest.raises(Error, match="cache: layer 3 would attend without 2 keys of sequence 0"):
            _greedy(llama, batch, 5)


def test_rows_that_come_back_are_found_one_by_one(llama: PreTrainedModel) -> None:
    """Of a batch, the sequence that misses its keys."""
    late = torch.tensor([[False], [True]])

    def act(stream: Stream, layer: int) -> None:
        if stream.phase == "decode" and layer == 2:
            stream.bypass(late & (stream.step == 0))

    with sparing.attach(llama, Act(act)) as run:
        run.checks_cache = True
        with pytest.raises(Error, match="layer 2 would attend without 1 keys of sequence 1"):
            _greedy(llama, prompt("llama", (7, 5)))

"""Stream: every act against a dense model whose attention mask forbids what the act removed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import sparing
from sparing.engine.stream import Stream, StreamMethod, pack
from sparing.grid.method import Card
from sparing.testing.models import ARCHITECTURES, LAYERS, build, prompt


class Act(StreamMethod):
    """A method made of one function."""

    name = "act"
    card = Card("", 2026, "test", "stream", "both")

    def __init__(self, act: Callable[[Stream, int], None]) -> None:
        object.__setattr__(self, "act", act)

    def before_layer(self, stream: Stream, layer: int) -> None:
        self.act(stream, layer)  # type: ignore[attr-defined]


def columns(stream: Stream, *which: int) -> torch.Tensor:
    """Bool (B, N) of rows that came from these columns."""
    return torch.isin(stream.index, torch.tensor(which))


def manual(model: PreTrainedModel, ids: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """Reference: layer i runs on the columns rows[i] of one sample, everything else keeps its state."""
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    rope = decoder.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1])[None])
    for layer, keep in zip(decoder.layers, rows):
        if keep:
            part = layer(
                hidden[:, keep],
                attention_mask=torch.ones(len(keep), len(keep), dtype=torch.bool).tril()[None, None],
                position_embeddings=tuple(r[:, keep] for r in rope),
            )
            hidden = hidden.clone()
            hidden[:, keep] = part
    return model.lm_head(decoder.norm(hidden))


ALL = list(range(9))
WITHOUT = [0, 1, 3, 4, 6, 7, 8]


@pytest.mark.parametrize(
    ("act", "rows"),
    [
        (lambda s, i: s.drop(columns(s, 2, 5)) if i == 2 else None, [ALL] * 2 + [WITHOUT] * 4),
        (lambda s, i: s.exit(columns(s, 2, 5)) if i == 5 else None, [ALL] * 5 + [WITHOUT]),
        (lambda s, i: s.exit(columns(s, *ALL)) if i == 4 else None, [ALL] * 4 + [[]] * 2),
        (lambda s, i: s.bypass(columns(s, 2, 5)) if i in (1, 3) else None, [ALL, WITHOUT, ALL, WITHOUT, ALL, ALL]),
        (lambda s, i: s.bypass() if i == 3 else None, [ALL] * 3 + [[]] + [ALL] * 2),
        (
            lambda s, i: s.hold(columns(s, 2, 5)) if i == 0 else s.release() if i == 4 else None,
            [WITHOUT] * 4 + [ALL] * 2,
        ),
        (lambda s, i: s.hold(columns(s, 2, 5)) if i == 1 else None, [ALL] + [WITHOUT] * 5),
    ],
)
def test_acts(llama: PreTrainedModel, act: Callable[[Stream, int], None], rows: list[list[int]]) -> None:
    ids = torch.randint(2, 99, (1, 9))
    with torch.no_grad():
        with sparing.attach(llama, Act(act)) as run:
            got = llama(ids).logits
        torch.testing.assert_close(got, manual(llama, ids, rows), rtol=1e-4, atol=1e-4)
    assert run.trace.cells[0].rows == [len(r) for r in rows]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])  # its plain pass counts padding
@pytest.mark.parametrize("side", ["left", "right"])
def test_unequal_counts_in_a_batch(name: str, side: str) -> None:
    """Each sample loses another number of tokens: a batch equals its samples, cached and not."""
    model, batch = build(name), prompt(name, (7, 5, 7), side=side)
    starts = batch["attention_mask"].int().argmax(1)

    def act(stream: Stream, layer: int) -> None:
        if stream.phase == "prefill" and layer in (1, 3):
            place = stream.index - starts[alone if alone is not None else slice(None)].reshape(-1, 1) * (alone is None)
            own = torch.tensor([1, 2, 4]) if alone is None else torch.tensor([1, 2, 4])[alone : alone + 1]
            stream.drop((place >= layer) & (place < layer + own[:, None]))

    from sparing.testing.models import single

    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if side == "right":
        options["max_new_tokens"] = 1  # decoding after right padding is nobody's use
    alone: int | None = None
    with torch.no_grad(), sparing.attach(model, Act(act)):
        together = model(**batch).logits
        out = model.generate(**batch, **options)
        for row in range(3):
            alone = row
            one = single(name, batch, row)
            mask = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][mask], model(**one).logits[0], rtol=2e-4, atol=2e-4)
            if side == "left":
                got = model.generate(**one, **options)
                torch.testing.assert_close(
                    torch.stack(out.logits, 1)[row], torch.stack(got.logits, 1)[0], rtol=2e-4, atol=2e-4
                )
            alone = None


@pytest.mark.parametrize("which", ["attention", "mlp"])
def test_bypassed_sublayers(llama: PreTrainedModel, which: str) -> None:
    ids = torch.randint(2, 99, (1, 9))
    out = [2, 5]

    def act(stream: Stream, layer: int) -> None:
        if layer == 2:
            (stream.bypass_attention if which == "attention" else stream.bypass_mlp)(columns(stream, *out))

    decoder = llama.model
    with torch.no_grad():
        hidden = decoder.embed_tokens(ids)
        rope = decoder.rotary_emb(hidden, position_ids=torch.arange(9)[None])
        causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
        for i, layer in enumerate(decoder.layers):
            x = layer.input_layernorm(hidden)
            if i == 2 and which == "attention":
                part = layer.self_attn(
                    x[:, WITHOUT],
                    attention_mask=causal[..., :7, :7],
                    position_embeddings=tuple(r[:, WITHOUT] for r in rope),
                )[0]
                hidden = hidden.clone()
                hidden[:, WITHOUT] += part
            else:
                hidden = hidden + layer.self_attn(x, attention_mask=causal, position_embeddings=rope)[0]
            y = layer.mlp(layer.post_attention_layernorm(hidden))
            if i == 2 and which == "mlp":
                y[:, out] = 0
            hidden = hidden + y
        expected = llama.lm_head(decoder.norm(hidden))
        with sparing.attach(llama, Act(act)):
            torch.testing.assert_close(llama(ids).logits, expected, rtol=1e-4, atol=1e-4)
            with pytest.raises(sparing.Error, match="must be"):
                with sparing.attach(llama, sparing.parse("uniform-depth:R=0")):
                    pass
    assert "forward" not in vars(decoder.layers[2].mlp)


def test_whole_sublayers_bypassed_with_cache(llama: PreTrainedModel) -> None:
    """Without its attention a layer writes no keys; decoding goes on right."""

    def act(stream: Stream, layer: int) -> None:
        if layer in (1, 4):
            stream.bypass_attention(True)
        if layer == 2:
            stream.bypass_mlp(True)

    ids = torch.randint(2, 99, (2, 7))
    with torch.no_grad(), sparing.attach(llama, Act(act)):
        out = llama.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        again = llama(out.sequences).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), again, rtol=1e-4, atol=1e-4)
    assert [layer.columns.shape[1] if hasattr(layer, "columns") else 10 for layer in out.past_key_values.layers] == [
        10,
        0,
        10,
        10,
        0,
        10,
    ]


def test_merge_averages_and_copies_back(llama: PreTrainedModel) -> None:
    ids = torch.randint(2, 99, (2, 9))
    seen: dict[str, torch.Tensor] = {}

    def act(stream: Stream, layer: int) -> None:
        if layer == 3:
            before = stream.hidden.clone()
            owner = torch.arange(9).repeat(2, 1)
            owner[:, 2] = owner[:, 5] = 1
            stream.merge(owner, torch.arange(1.0, 10).repeat(2, 1))
            w = torch.tensor([2.0, 3.0, 6.0])
            expected = (before[:, [1, 2, 5]] * w[None, :, None]).sum(1) / w.sum()
            torch.testing.assert_close(stream.hidden[:, 1], expected)
            assert stream.index[0].tolist() == [0, 1, 3, 4, 6, 7, 8]
            seen["merged"] = expected

    with torch.no_grad(), sparing.attach(llama, Act(act)):
        logits = llama(ids).logits
    torch.testing.assert_close(logits[:, 2], logits[:, 1])
    torch.testing.assert_close(logits[:, 5], logits[:, 1])
    assert "merged" in seen


def test_visual_rows_need_input_ids(llava: PreTrainedModel) -> None:
    batch = prompt("llava", (6, 6), side="none")
    with torch.no_grad():
        embeds = torch.randn(2, 22, 32)
        with sparing.attach(llava, sparing.parse("random-tokens:schedule=0.5")) as run:
            with pytest.raises(sparing.Error, match="input_ids: needed to find the visual tokens"):
                llava(inputs_embeds=embeds)
            run.visual = batch["input_ids"] == llava.config.image_token_id
            llava(inputs_embeds=embeds)
            assert run.trace.share() == 0.5


def test_several_images_and_none(llava: PreTrainedModel) -> None:
    """Samples with two, one and no image in one batch: each keeps its own share."""
    image = llava.config.image_token_id
    ids = torch.randint(2, 99, (3, 40))
    ids[0, 1:17] = image
    ids[0, 20:36] = image
    ids[1, 5:21] = image
    mask = torch.ones_like(ids)
    pixels = torch.randn(3, 3, 32, 32)
    with (
        torch.no_grad(),
        sparing.attach(llava, sparing.parse("uniform-tokens:schedule=1/1/0.25/0.25/0.25/0.25"), trace=True) as run,
    ):
        logits = llava(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        index = run.trace.cells[0].index[3]
        assert index is not None
        for b, kept in enumerate((8, 4, 0)):
            row = index[b][index[b] >= 0]
            assert int((ids[b, row] == image).sum()) == kept
            assert len(row) == int((ids[b] != image).sum()) + kept
        alone = llava(input_ids=ids[1:2], pixel_values=pixels[2:]).logits
    torch.testing.assert_close(logits[1], alone[0], rtol=2e-4, atol=2e-4)


def test_gradients_flow_through_gather_and_scatter(llama: PreTrainedModel) -> None:
    model = build("llama")
    ids = torch.randint(2, 99, (1, 9))
    rows = [ALL] * 2 + [WITHOUT] * 4
    manual(model, ids, rows).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with sparing.attach(model, Act(lambda s, i: s.drop(columns(s, 2, 5)) if i == 2 else None)):
        model(ids, use_cache=False).logits.square().sum().backward()
    for name, p in model.named_parameters():
        if name in expected:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-2)


def test_pack() -> None:
    slot, valid = pack(torch.tensor([[True, False, True], [False, False, True]]))
    assert slot.tolist() == [[0, 2], [2, 0]] and valid is not None and valid.tolist() == [[True, True], [True, False]]
    slot, valid = pack(torch.tensor([[True, False, True], [False, True, True]]))
    assert slot.tolist() == [[0, 2], [1, 2]] and valid is None


def test_eager_attention_gets_additive_masks() -> None:
    model = build("llama")
    ids = prompt("llama", (7, 5))
    act = Act(lambda s, i: s.drop(columns(s, 3, 4)) if i == 2 and s.phase == "prefill" else None)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), sparing.attach(model, act):
        fused = torch.stack(model.generate(**ids, **options).logits)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(torch.stack(model.generate(**ids, **options).logits), fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3"])
def test_sliding_windows_count_original_positions(name: str) -> None:
    """Dropping tokens does not let a window reach further back: it is measured in columns, not in rows."""
    model = build(name)
    ids = torch.randint(2, 99, (1, 20))
    act = Act(lambda s, i: s.drop(columns(s, 6, 9, 12, 13)) if i == 1 and s.phase == "prefill" else None)
    decoder = model.model
    with torch.no_grad():
        hidden = decoder.embed_tokens(ids)
        position = torch.arange(20)[None]
        alive = list(range(20))
        for i, layer in enumerate(decoder.layers):
            if i == 1:
                alive = [c for c in alive if c not in (6, 9, 12, 13)]
            kind = model.config.layer_types[i]
            at = torch.tensor(alive)
            mask = at[:, None] >= at[None]
            if kind == "sliding_attention":
                mask = mask & (at[:, None] - at[None] < 8)
            rope = tuple(r[:, alive] for r in decoder.rotary_emb(hidden, position, kind))
            hidden = hidden.clone()
            hidden[:, alive] = layer(hidden[:, alive], attention_mask=mask[None, None], position_embeddings=rope)
        expected = model.lm_head(decoder.norm(hidden))
        with sparing.attach(model, act):
            torch.testing.assert_close(model(ids).logits, expected, rtol=2e-4, atol=2e-4)


def test_every_layer_count_matches_hooks_on_the_gemms() -> None:
    model = build("llama")
    widths: list[int] = []
    hooks = [
        layer.mlp.up_proj.register_forward_hook(lambda m, a, o: widths.append(o.shape[1]))
        for layer in model.model.layers
    ]
    with torch.no_grad(), sparing.attach(model, Act(lambda s, i: s.drop(columns(s, i)))):
        model(torch.randint(2, 99, (1, 9)))
    assert widths == [9 - i - 1 for i in range(LAYERS)]
    for hook in hooks:
        hook.remove()


def test_a_layer_that_one_sample_runs_whole_and_another_in_part() -> None:
    """The packed rows then fill the width of the pass, but stand at other places than their columns."""

    # padding leaves layer 1, and the longest sample has none
    partly = Act(lambda stream, layer: stream.bypass(~stream.prompt) if layer == 1 else None)
    model, batch = build("llama"), prompt("llama", (7, 4, 6), side="left")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        dense = model(**batch).logits[real]
        with sparing.attach(model, partly):
            torch.testing.assert_close(model(**batch).logits[real], dense, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model(**batch, use_cache=False).logits[real], dense, rtol=1e-4, atol=1e-4)

"""What is prompt and what is generated, whichever way a model is run; what happens to caches, threads and copies."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

import sparing
from sparing.engine.calls import cache_in, with_cache
from sparing.engine.prompt import Columns, Generation, said
from sparing.engine.stream import Stream, StreamMethod
from sparing.grid.method import Card
from sparing.testing.models import IMAGE, build, prompt
from sparing.testing.situations import SITUATIONS, outcome

SKIP = sparing.parse("unified-layer-skipping:S=3")
SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
CPU = torch.device("cpu")


# --------------------------------------------------------------------------- the definition, on numbers


def test_who_says_where_the_prompt_ends() -> None:
    call = Generation(prompt=9, drafts=False)
    assert said(4, call, past=5, width=3, start=None) == 4  # what the user says comes first
    assert said(None, call, past=5, width=3, start=2) == 9
    assert said(None, None, past=0, width=7, start=None) == 7  # a bare pass is all prompt
    assert said(None, None, past=7, width=1, start=5) == 5  # a step goes on with the answer that has begun
    assert said(None, None, past=7, width=1, start=None) == 7
    assert said(None, None, past=7, width=2, start=7) is None


def test_columns_before_at_and_behind_the_end() -> None:
    def made(past: int, width: int, where: Any) -> Columns:
        return Columns(past, width, 2, CPU, where)

    assert made(0, 4, 4).generated is False and made(4, 2, 4).generated is True
    assert made(3, 3, 4).generated.tolist() == [[False, True, True]] * 2  # type: ignore[union-attr]
    assert made(3, 3, torch.tensor([4, 5])).generated.tolist() == [[False, True, True], [False, False, True]]
    assert made(3, 3, torch.tensor([4, 5])).step.tolist() == [[-1, 0, 1], [-2, -1, 0]]
    assert made(3, 3, 5).ends_prompt and not made(0, 4, 5).ends_prompt
    turns = torch.tensor([[True, False, False, True, False]]).expand(2, -1)  # two answers: each counts its own steps
    assert made(0, 5, turns).step.tolist() == [[-1, 0, 1, -1, 0]] * 2
    assert made(5, 1, turns).step.tolist() == [[1]] * 2 and made(5, 1, turns).generated is True


@pytest.mark.parametrize(
    ("past", "width", "mask", "prompt_"), [(0, 9, 9, 9), (5, 9, 9, 9), (5, 4, 9, 9), (5, 4, None, 9)]
)
def test_generate_is_handed_the_whole_or_what_follows_a_cache(
    llama: PreTrainedModel, past: int, width: int, mask: int | None, prompt_: int
) -> None:
    cache = DynamicCache(config=llama.config)
    if past:
        with torch.no_grad():
            llama(torch.randint(2, 99, (1, past)), use_cache=True, **with_cache(llama, cache))
    given: dict[str, Any] = {"input_ids": torch.ones(1, width).long(), "cache": cache}
    given |= {} if mask is None else {"attention_mask": torch.ones(1, mask)}
    assert Generation.of(llama.generate, (), given).prompt == prompt_


# --------------------------------------------------------------------------- the same tokens, or a refusal


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "bloom", "llama4"])
def test_layer_skipping_in_every_situation(situation: str, architecture: str) -> None:
    found = outcome(situation, build(architecture), SKIP, architecture)
    if situation == "second turn":
        assert "skipped it and left no keys there" in found and "prompt=N" in found
    else:
        assert found == "equal"


@pytest.mark.parametrize("spec", ["fastv:K=2,R=0.6", "hidrop:inject=2,filters=3,keeps=5,of=16,exit=5"])
def test_pruned_pictures_in_every_situation(spec: str) -> None:
    model = build("llava")
    found = {name: outcome(name, model, sparing.parse(spec), "llava") for name in SITUATIONS}
    assert "decided by a prompt of 21 columns, and more of it follows" in found.pop("kept prefix")
    assert set(found.values()) == {"equal"}


def test_a_picture_behind_a_kept_prefix_is_pruned_as_in_one_pass() -> None:
    """Text first, the picture behind it: the whole attention row counts, cached keys among it."""
    model, batch = build("llava"), prompt("llava", (9, 9), side="none")
    for spec in ("fastv:K=2,R=0.6", "hidrop:inject=2,filters=3,keeps=5,of=16,exit=5"):
        with sparing.attach(model, sparing.parse(spec)), torch.no_grad():
            wanted = model(**batch, use_cache=True)
            first = model(batch["input_ids"][:, :2], use_cache=True)
            cache = cache_in(first)[1]
            rest = model(
                input_ids=batch["input_ids"][:, 2:],
                attention_mask=batch["attention_mask"],
                pixel_values=batch["pixel_values"],
                **with_cache(model, cache),
            )
        torch.testing.assert_close(rest.logits[:, -1], wanted.logits[:, -1], rtol=2e-4, atol=2e-4)


def test_a_picture_in_chunks_is_refused() -> None:
    model, batch = build("llava"), prompt("llava", (9,), side="none")
    with sparing.attach(model, sparing.parse("fastv:K=2,R=0.6"), prompt=25), torch.no_grad():
        with pytest.raises(sparing.Error, match=r"fastv: decides by the whole prompt, and this pass ends at column 20"):
            model(batch["input_ids"][:, :20], pixel_values=batch["pixel_values"])


def test_tokens_of_a_prompt_in_parts_are_not_ranked(llama: PreTrainedModel) -> None:
    ids = torch.randint(2, 99, (1, 9))
    with sparing.attach(llama, sparing.parse("ftp:s=0.4,profile=uniform,router=static")):
        with pytest.raises(sparing.Error, match="ftp: decides by the whole prompt"):
            llama.generate(ids, prefill_chunk_size=4, **SETTINGS)


def test_columns_that_may_be_either_are_refused_where_it_matters(llama: PreTrainedModel) -> None:
    ids = torch.randint(2, 99, (1, 6))
    with torch.no_grad(), sparing.attach(llama, SKIP, warn=False):
        cache = cache_in(llama(ids, use_cache=True))[1]
        with pytest.raises(sparing.Error, match=r"3 columns behind a cache of 6 may be prompt"):
            llama(ids[:, :3], **with_cache(llama, cache))


def test_threads_do_not_see_each_other() -> None:
    model, found = build("qwen3"), {}
    prompts = [torch.randint(2, 110, (2, 7 + i)) for i in range(3)]
    with sparing.attach(model, SKIP):
        wanted = [model.generate(ids, **SETTINGS) for ids in prompts]

        def work(i: int) -> None:
            found[i] = [torch.equal(model.generate(prompts[i], **SETTINGS), wanted[i]) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {i: [True] * 3 for i in range(3)}


def test_flops_of_another_thread_are_refused(llama: PreTrainedModel) -> None:
    said_: list[str] = []

    def work() -> None:
        try:
            llama(torch.randint(2, 99, (1, 4)))
        except sparing.Error as refusal:
            said_.append(str(refusal))

    with sparing.attach(llama, SKIP, trace=True, warn=False):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert said_ and "trace = True" in said_[0]


# --------------------------------------------------------------------------- caches and copies


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_cache_that_misses_tokens_says_so_outside_its_block(architecture: str) -> None:
    model, ids = build(architecture), torch.randint(2, 110, (1, 9))
    with sparing.attach(model, SKIP):
        out = model.generate(ids, return_dict_in_generate=True, **SETTINGS)
    cache = cache_in(out)[1]
    with torch.no_grad(), pytest.raises(sparing.Error, match=r"holds 0 of 14 tokens.*start with a new cache"):
        model(out.sequences[:, -1:], **with_cache(model, cache))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral"])
def test_a_cache_that_has_all_tokens_goes_on_dense(architecture: str) -> None:
    """Only MLPs were skipped: every layer has every key, beyond the window too."""
    model, batch = build(architecture), prompt(architecture, (11, 8))

    class Half(StreamMethod):
        name, card = "half", Card("", 2026, "test", "stream", "decode")

        def before_layer(self, stream: Stream, layer: int) -> None:
            if layer == 2:
                stream.bypass_mlp()

    with sparing.attach(model, Half()):
        out = model.generate(**batch, return_dict_in_generate=True, **SETTINGS)
        one = copy.deepcopy(cache_in(out)[1])
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 6)], 1).long()
    cache = cache_in(out)[1]
    last = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    with torch.no_grad():
        dense = model(out.sequences[:, -1:], **last, **with_cache(model, cache)).logits

        class Nothing(Half):
            def before_layer(self, stream: Stream, layer: int) -> None:
                stream.bypass_mlp(False)

        with sparing.attach(model, Nothing(), warn=False):
            wanted = model(out.sequences[:, -1:], **last, **with_cache(model, one)).logits
    torch.testing.assert_close(dense, wanted, rtol=2e-4, atol=2e-4)


def test_a_copy_made_inside_the_block_says_what_happened(llama: PreTrainedModel) -> None:
    with sparing.attach(llama, SKIP, warn=False):
        twin = copy.deepcopy(llama)
    for act in (lambda: twin(torch.tensor([[2, 3]])), lambda: twin.generate(torch.tensor([[2, 3]]), **SETTINGS)):
        with pytest.raises(sparing.Error, match="a deepcopy made inside"):
            act()
    copy.deepcopy(llama)(torch.tensor([[2, 3]]))


def test_a_cache_that_does_not_reach_the_layers_is_an_error() -> None:
    model = build("llama")
    decoder, own = model.model, model.model.layers[0].forward

    class Hides(torch.nn.Module):
        """As a version of transformers that hands the cache over in another way."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.self_attn, self.mlp, self.inner = inner.self_attn, inner.mlp, inner

        def forward(self, hidden_states: torch.Tensor, box: Any = None) -> Any:
            return own(hidden_states)

    decoder.layers[0] = Hides(decoder.layers[0])
    decoder.forward = lambda input_ids=None, cache=None, **kw: decoder.layers[0](
        decoder.embed_tokens(input_ids), box=[cache]
    )
    with sparing.attach(model, SKIP, warn=False), torch.no_grad():
        with pytest.raises(sparing.Error, match="handed a KV cache of 0 tokens and none reaches the layer"):
            decoder(input_ids=torch.tensor([[2, 3]]), cache=DynamicCache())


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip


def test_hybrid_and_shared_caches_are_refused_before_any_work() -> None:
    hf: Any = transformers
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    hybrid = hf.Lfm2ForCausalLM(hf.Lfm2Config(**SIZES, layer_types=kinds))
    with pytest.raises(sparing.Error, match=r"Lfm2ForCausalLM has others.*: 0 \(.*\), 2 \("):
        sparing.attach(hybrid, SKIP)
    shared = hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(
            **SIZES, head_dim=8, num_kv_shared_layers=1, layer_types=["sliding_attention", "full_attention"] * 2,
            vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        )
    )  # fmt: skip
    with pytest.raises(sparing.Error, match=r"Gemma3nForCausalLM has others.*: 3 \("):
        sparing.attach(shared, sparing.parse("skipdecode"))


# --------------------------------------------------------------------------- a method that does nothing


@pytest.mark.parametrize(
    ("spec", "words"), [("fastv:K=6,R=0.5", "1 of 1 passes"), ("fastv:K=2,R=0.02", "1 of 1 passes")]
)
def test_a_method_that_does_nothing_says_so(llava: PreTrainedModel, spec: str, words: str) -> None:
    with pytest.warns(UserWarning, match=rf"fastv did nothing: all visual tokens ran all layers in {words}"):
        with sparing.attach(llava, sparing.parse(spec)) as run, torch.no_grad():
            llava(**prompt("llava"))
    assert list(run.inert()) == ["fastv"]


def test_full_budget_and_nothing_to_act_on_are_no_offence(llava: PreTrainedModel) -> None:
    text = {k: v for k, v in prompt("llava").items() if k in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].where(text["input_ids"] != IMAGE, 5)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for spec, batch in (("fastv:R=0", prompt("llava")), ("fastv", text), ("unified-layer-skipping:S=3", text)):
            with sparing.attach(llava, sparing.parse(spec)):
                llava(**batch)


def test_a_second_picture_that_runs_whole_is_noticed(llava: PreTrainedModel) -> None:
    class First(StreamMethod):
        name, card = "first-only", Card("", 2026, "tokens", "stream", "prefill", visual=True)

        def before_layer(self, stream: Stream, layer: int) -> None:
            if layer == 1 and stream.batch == 2:
                stream.drop_visual()

        def at(self, keep: float, shape: Any) -> Any:
            raise sparing.Error("no full budget")

    with pytest.warns(UserWarning, match="in 1 of 2 passes that have any"):
        with sparing.attach(llava, First()), torch.no_grad():
            llava(**prompt("llava", (7, 7)))
            llava(**prompt("llava", (7,)))


def test_a_cut_that_cuts_nothing_is_noticed(llama: PreTrainedModel) -> None:
    method = sparing.parse("magnitude-sp:p=0.001")
    with pytest.warns(UserWarning, match="its plan cuts no head, neuron, expert or layer"):
        with sparing.attach(llama, method):
            pass

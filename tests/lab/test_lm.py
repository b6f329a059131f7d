"""The embedded language model: what it is, what it costs, how well it reads."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparing.lab import lm, pretrain
from sparing.lab.text import heldout_text

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small runs no faster on two cores, and far slower where another program uses one of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return lm.load()


def test_loads_as_an_ordinary_checkpoint_under_15_mb() -> None:
    model, info = AutoModelForCausalLM.from_pretrained(lm.WEIGHTS, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.to_diff_dict().keys() >= {"head_dim", "num_key_value_heads"}
    assert 5.5e6 < model.num_parameters() < 7e6
    assert sum(path.stat().st_size for path in lm.WEIGHTS.iterdir()) < 15e6


def test_committed_config_is_the_one_that_is_built(loaded: Loaded) -> None:
    built, kept = lm.build().config.to_dict(), loaded[0].config.to_dict()
    same = built.keys() - {"architectures", "dtype", "_name_or_path", "transformers_version"}
    assert {key: kept.get(key) for key in same} == {key: built[key] for key in same}


def test_tokenizer_gives_the_heldout_text_back(loaded: Loaded) -> None:
    tokenizer = loaded[1]
    ids = tokenizer(heldout_text(), verbose=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and max(ids) < lm.VOCABULARY
    assert tokenizer.decode(ids[1:]) == heldout_text()
    assert len(heldout_text()) / len(ids) > 3.3  # characters a token


@pytest.mark.parametrize("text", ["", " ", "\r\n\t x \n\n   y", "  f'{é}' 中文 🙂\x00", "<bos", "a" * 300])
def test_tokenizer_gives_any_text_back(loaded: Loaded, text: str) -> None:
    tokenizer = loaded[1]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_special_tokens_survive_saving(loaded: Loaded) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lm.WEIGHTS)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == lm.SPECIAL
    assert tokenizer.convert_tokens_to_ids(list(lm.SPECIAL)) == [0, 1, 2]


def test_tokenizer_training_is_deterministic() -> None:
    texts = [heldout_text()[:50_000]]
    first, second = (lm.build_tokenizer(texts).get_vocab() for _ in range(2))
    assert first == second


def test_reads_heldout_source(loaded: Loaded) -> None:
    text = heldout_text()
    middle = len(text) // 2  # a slice from inside, not the docstring every module opens with
    result = lm.evaluate(*loaded, text=text[middle : middle + 60_000], stride=768)
    assert result["bits_per_byte"] <= 1.75
    assert result["bytes"] >= 60_000


def test_reads_on_past_the_training_length(loaded: Loaded) -> None:
    """The last 256 of 1,024 tokens are as hard as with half the context, within 0.05 nats: positions up to 1,023 work.

    Most training windows had 512 tokens; the second half of the context neither helps nor harms (3.49 against 3.46).
    """
    model, tokenizer = loaded
    ids_BT = torch.tensor(tokenizer(heldout_text(), verbose=False)["input_ids"])[: 4 * 1024].view(4, 1024)
    with torch.no_grad():
        long = model(ids_BT).logits[:, -257:-1]
        short = model(ids_BT[:, -512:]).logits[:, -257:-1]
    target = ids_BT[:, -256:].flatten()
    assert F.cross_entropy(long.flatten(0, 1), target) < F.cross_entropy(short.flatten(0, 1), target) + 0.05


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 32), (33, 7), (4096, 512)])
def test_evaluate_equals_scoring_one_token_at_a_time(loaded: Loaded, window: int, stride: int) -> None:
    model, tokenizer = loaded
    text = heldout_text()[5_000:5_240]
    ids = tokenizer(text)["input_ids"]
    bits = 0.0
    for t in range(1, len(ids)):
        if t <= window:
            start = 0
        else:  # the end of the first window that reaches t
            end = window + stride * math.ceil((t - window) / stride)
            start = min(end, len(ids) - 1) - window
        with torch.no_grad():
            chance = model(torch.tensor([ids[start:t]])).logits[0, -1].double().softmax(-1)
        bits -= math.log2(chance[ids[t]])
    result = lm.evaluate(model, tokenizer, text=text, window=window, stride=stride)
    assert result["tokens"] == len(ids) - 1 and result["bytes"] == len(text.encode())
    assert result["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert result["perplexity"] == pytest.approx(2 ** (bits / (len(ids) - 1)), rel=1e-4)


def test_limit_counts_bytes_and_never_splits_a_character(loaded: Loaded) -> None:
    assert lm.evaluate(*loaded, text="é" * 40, limit_bytes=31)["bytes"] == 30


def test_wrong_arguments_are_named(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="stride"):
        lm.evaluate(*loaded, text="x", window=8, stride=9)
    with pytest.raises(ValueError, match="text"):
        lm.evaluate(*loaded, text="")


@pytest.mark.parametrize("length", [100, 128, 300])
def test_causal_blocks_is_causal_attention(length: int) -> None:
    query, key, value = torch.randn(2, 6, length, 8), torch.randn(2, 3, length, 8), torch.randn(2, 3, length, 8)
    ours, _ = pretrain.causal_blocks(None, query, key, value, None, 0.4)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(ours.transpose(1, 2), theirs)


def test_loss_is_cross_entropy() -> None:
    logits, ids = torch.randn(5, 11, requires_grad=True), torch.randint(0, 11, (5,))
    ours, theirs = pretrain.Loss.apply(logits, ids), F.cross_entropy(logits, ids)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(3 * loss, logits) for loss in (ours, theirs)))


def test_schedule_warms_up_and_ends_at_zero() -> None:
    assert pretrain.schedule(0.0, 0) == pytest.approx(1 / 60)
    assert pretrain.schedule(0.3, 500) == 1.0
    assert pretrain.schedule(0.75, 900) == 0.5
    assert pretrain.schedule(1.0, 1500) == 0.0


def test_windows_are_repeatable_and_follow_the_share() -> None:
    rows = [torch.arange(10_000), -torch.arange(1, 10_001)]
    first = pretrain.windows(rows, 128, shares=[0.75, 0.25], seed=3)
    assert first.shape == (pretrain.BATCH // 128, 129)
    assert torch.equal(first, pretrain.windows(rows, 128, shares=[0.75, 0.25], seed=3))
    assert (first.diff().abs() == 1).all()
    assert (pretrain.windows(rows, 128, shares=[1.0, 0.0], seed=4) >= 0).all()
    assert (pretrain.windows(rows, 128, shares=[0.0, 1.0], seed=4) < 0).all()


def test_training_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of one step each on a toy corpus: the second goes on where the first stopped."""
    own, other = tmp_path / "own.py", tmp_path / "other.py"
    own.write_text(heldout_text()[:20_000])
    other.write_text(heldout_text()[20_000:40_000])
    monkeypatch.setattr(lm, "train_files", lambda: (own, other))
    monkeypatch.setattr(lm, "is_stdlib", lambda path: path == own)
    lm.train(tmp_path / "out", minutes=1e-6)
    first = json.loads((tmp_path / "out" / "progress.json").read_text())
    model, _ = lm.train(tmp_path / "out", minutes=first["seconds"] / 60 + 1e-6)
    second = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert (first["steps"], second["steps"]) == (1, 2)
    assert second["tokens"] == 2 * pretrain.BATCH and second["seconds"] > first["seconds"]
    assert not torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight))
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(kept.lm_head.weight, model.lm_head.weight.bfloat16())

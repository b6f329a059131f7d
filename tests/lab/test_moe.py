"""The embedded mixture of experts: what it is, how well it reads, and that its experts have taken sides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparing.lab import lm, moe, pretrain
from sparing.lab.text import heldout_domain, heldout_text, split, train_text

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return moe.load()


def test_loads_as_an_ordinary_checkpoint_under_15_mb(loaded: Loaded) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(moe.WEIGHTS, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert (model.config.model_type, model.config.num_experts, model.config.num_experts_per_tok) == ("qwen3_moe", 16, 4)
    assert sum(path.stat().st_size for path in moe.WEIGHTS.iterdir()) < 15e6
    built, kept = moe.build().config.to_dict(), loaded[0].config.to_dict()
    same = built.keys() - {"architectures", "dtype", "_name_or_path", "transformers_version"}
    assert {key: kept.get(key) for key in same} == {key: built[key] for key in same}


def test_tokenizer_is_that_of_lab_lm(loaded: Loaded) -> None:
    assert loaded[1].get_vocab() == lm.load()[1].get_vocab()


def test_reads_heldout_source(loaded: Loaded) -> None:
    text = heldout_text()
    middle = len(text) // 2
    result = lm.evaluate(*loaded, text=text[middle : middle + 40_000], stride=768)
    assert result["bits_per_byte"] <= 1.75


def test_experts_differ_by_domain(loaded: Loaded) -> None:
    """More than a tenth of all choices would have to move to make code and prose alike; within a domain, hardly any."""
    code = heldout_domain("code")
    one, other, prose = (
        moe.expert_load(*loaded, text, windows=8) for text in (code[:60_000], code[200_000:], heldout_domain("prose"))
    )
    torch.testing.assert_close(one.sum(1), torch.ones(6))
    between, within = (0.5 * (one - x).abs().sum(1) for x in (prose, other))
    assert between.mean() > 0.2 and between.mean() > 2 * within.mean()


def test_split_takes_source_apart() -> None:
    source = '"""Top."""\nx = "#1"  # one\n\n\nclass A:\n    \'\'\'Two\n      lines.\'\'\'\n\n    # three\n    y = 2\n'
    code, prose = split(source)
    assert code == 'x = "#1"\n\n\nclass A:\n\n    y = 2\n'
    assert prose == "Top.\none\nTwo\nlines.\nthree\n"
    assert split("def (:\n") == ("", "")
    compile(code, "x", "exec")


def test_domains_hold_what_their_names_say() -> None:
    assert heldout_domain("files") == heldout_text()
    code, prose = heldout_domain("code"), heldout_domain("prose")
    assert '"""' not in prose[:1000] and len(code) + len(prose) < len(heldout_text())
    assert len(train_text(10_000, "prose")) > 10_000 and "import " in train_text(20_000, "code")


def test_expert_loop_is_the_library_s_own_up_to_bfloat16(loaded: Loaded) -> None:
    model = loaded[0]
    experts = model.model.layers[1].mlp.experts
    hidden, index = torch.randn(50, 192), torch.stack([torch.randperm(16)[:4] for _ in range(50)])
    weight = torch.rand(50, 4)
    with torch.no_grad():
        theirs = experts(hidden, index, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = pretrain.expert_loop(experts, hidden, index, weight)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_balance_is_one_for_even_use_and_more_otherwise() -> None:
    even = torch.eye(8).repeat(10, 1) * 9
    assert pretrain.balance((even,), 1) == pytest.approx(1.0, abs=1e-4)
    assert pretrain.balance((even, even[:1].repeat(80, 1)), 1) > 3


def test_muon_treats_every_expert_by_itself() -> None:
    """One step on a stack equals a step on each of its matrices alone."""
    model = moe.build()
    stack = model.model.layers[0].mlp.experts.down_proj
    alone = torch.nn.Parameter(stack.data[3].clone())
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    alone.grad = stack.grad[3].clone()
    optimizer = torch.optim.Muon([alone], lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer.step()
    pretrain.Optimizers(model).step(1.0)
    torch.testing.assert_close(stack.data[3], alone.data)


def test_training_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [heldout_text()[:40_000]], [heldout_text()[40_000:90_000]]
    monkeypatch.setattr(lm, "corpus", lambda: texts)
    monkeypatch.setattr(moe, "split", lambda text: (text, text))
    moe.train(tmp_path, minutes=1e-6)
    first = json.loads((tmp_path / "progress.json").read_text())
    model, _ = moe.train(tmp_path, minutes=first["seconds"] / 60 + 1e-6)
    second = json.loads((tmp_path / "progress.json").read_text())
    assert (first["steps"], second["steps"]) == (1, 2)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(kept.lm_head.weight, model.lm_head.weight.bfloat16())
    assert model.config._experts_implementation == "grouped_mm" and not model.training

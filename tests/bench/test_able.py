"""What is refused before any work: models that no asked method can run on, encoders, texts that hold nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparing.bench import able, tasks
from sparing.bench.causal import check_causal
from sparing.bench.compare import compare
from sparing.bench.models import Loaded
from sparing.bench.sweep import prepare
from sparing.engine.surgery import LayerCut, Plan, cut
from sparing.grid.method import Error, parse
from sparing.testing.models import ARCHITECTURES, build

hf: Any = transformers
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(30))
SIZES = dict(vocab_size=258, hidden_size=32, num_hidden_layers=3)
HEADS = dict(num_attention_heads=4, intermediate_size=48)


def model(name: str) -> Any:
    torch.manual_seed(0)
    made = {
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, **HEADS)),
        "bert-decoder": lambda: hf.BertLMHeadModel(hf.BertConfig(**SIZES, **HEADS, is_decoder=True)),
        "classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**SIZES, **HEADS, pad_token_id=0)),
        "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**SIZES)),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=258, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ),
    }
    return made[name]().eval()


# --------------------------------------------------------------------------- causality


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoders_are_causal(name: str, dtype: torch.dtype) -> None:
    check_causal(Loaded(name, build(name, dtype)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bert", "BertForMaskedLM is not causal"),
        ("classifier", r"LlamaForSequenceClassification gives \(2, 2\) for two rows of 8 tokens, and its vocabulary"),
        ("t5", "T5ForConditionalGeneration cannot run on text alone"),
    ],
)
def test_text_is_scored_with_decoders_alone(reader: Loaded, name: str, said: str) -> None:
    with pytest.raises(Error, match=f"model = '{name}': {said}.*; text is scored with a decoder"):
        tasks.Text(Loaded(name, model(name), None, reader.tokenizer), TEXT)


def test_what_a_model_does_counts_and_not_its_name() -> None:
    check_causal(Loaded("bert-decoder", model("bert-decoder")))
    trained = model("bert-decoder").train()  # dropout is no sight of the future
    check_causal(Loaded("bert-decoder", trained))
    assert trained.training


# --------------------------------------------------------------------------- methods


def asked(loaded: Loaded, methods: list[str], monkeypatch: pytest.MonkeyPatch, **more: Any) -> str:
    """What a refused comparison says; nothing may have been evaluated."""
    monkeypatch.setattr(tasks.Text, "evaluate", lambda *_: pytest.fail("work was done"))
    with pytest.raises(Error) as refused:
        compare(loaded, tasks.Text(loaded, TEXT), methods, 0.5, repeats=0, limit=1, progress=False, **more)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_model_without_layers_of_a_decoder(reader: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    said = asked(Loaded("mamba", model("mamba"), None, reader.tokenizer), ["flap", "first"], monkeypatch)
    assert "no method can run on MambaForCausalLM" in said and "neither attention (self_attn" in said
    assert "such as Llama" in said


@pytest.fixture(scope="module")
def mixture(reader: Loaded) -> Loaded:
    torch.manual_seed(0)
    experts = dict(num_local_experts=4, num_key_value_heads=2)
    return Loaded(
        "moe", hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, **HEADS, **experts)).eval(), None, reader.given
    )


def test_width_on_experts_says_what_to_use(mixture: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    said = asked(mixture, ["flap", "wanda-sp"], monkeypatch)
    assert "'flap': cannot cut MixtralForCausalLM" in said and "'wanda-sp': cannot cut MixtralForCausalLM" in said
    can = said.partition("on moe can run ")[2]
    assert "easy-ep (experts)" in can and "unified-layer-skipping" in can and "(depth)" in can
    assert not {"flap", "wanda-sp", "fastv", "duo-llm"} & set(can.replace(";", ",").replace(" (", ", (").split(", "))


def test_a_sweep_refuses_the_same(mixture: Loaded) -> None:
    with pytest.raises(Error, match=r"'flap': cannot cut .*easy-ep \(experts\)"):
        prepare(mixture, tasks.Text(mixture, TEXT), ["flap"], [0.5], [8])


def test_where_one_can_run_the_other_is_a_row(mixture: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs neither its controls nor a fit."""
    monkeypatch.setattr(type(parse("flap")), "fit", lambda *_: pytest.fail("fitted"))
    rows = compare(
        mixture, tasks.Text(mixture, TEXT), ["flap", "unified-layer-skipping"], 0.67, repeats=0, limit=1, progress=False
    )
    mine = [row for row in rows if row["spec"] == "flap"]
    assert [(row["control"], row["status"]) for row in mine] == [(None, "failed")]
    assert "has experts in place of an MLP" in mine[0]["note"] and rows[-1]["status"] == "ok"


def test_one_method_and_one_budget_need_no_list(reader: Loaded) -> None:
    task = tasks.Text(reader, TEXT)
    rows = compare(reader, task, "unified-layer-skipping", 0.5, repeats=0, limit=1, controls=False, progress=False)
    assert [row["method"] for row in rows] == ["dense", "unified-layer-skipping"]


def test_a_cut_model_can_be_cut_again(reader: Loaded) -> None:
    """What an earlier cut removed has nothing more to cut, and is no reason to refuse."""
    cuts = (LayerCut(attention=False), LayerCut(mlp=False), *[LayerCut()] * 4)
    small = cut(reader.model, Plan(cuts))
    assert able.cannot(parse("flap"), Loaded("small", small)) is None


# --------------------------------------------------------------------------- calibration


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("\n", 1), ("x" * 511, 511)])
def test_a_text_that_holds_nothing_to_fit_on(reader: Loaded, tmp_path: Path, text: str, tokens: int) -> None:
    for name, content in (("text", TEXT), ("other", text)):
        (tmp_path / f"{name}.txt").write_text(content)
    spec = f"ppl:{tmp_path}/text.txt,calibration={tmp_path}/other.txt"
    with pytest.raises(Error, match=f"the calibration text has {tokens} tokens; at least 512"):
        tasks.parse(spec, reader)
    (tmp_path / "other.txt").write_text("x" * 512)
    assert tasks.parse(spec, reader).calibrates


def test_questions_to_fit_on_are_read_at_once(viewer: Loaded, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "q", "answer": "a"}\n')
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(Error, match=r"none.jsonl': holds no questions"):
        tasks.parse(f"vqa:{tmp_path}/q.jsonl,calibration={tmp_path}/none.jsonl", viewer)


def test_pieces_to_fit_on_start_as_windows_do(reader: Loaded) -> None:
    """With `<bos>`, which counts: 512 columns are 511 of the text."""
    bos = reader.tokenizer.bos_token_id
    text = "".join(chr(97 + i % 26) for i in range(3 * 511))
    batch = next(tasks.text_batches(reader, text, 1))
    ids = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert batch["input_ids"].shape == (3, 512) and (batch["input_ids"][:, 0] == bos).all()
    assert batch["input_ids"][:, 1:].flatten().tolist() == ids
    window = tasks.Text(reader, TEXT).inputs()["input_ids"]
    assert (window[:, 0] == bos).all()


def test_a_tokenizer_without_a_beginning(reader: Loaded) -> None:
    """One that knows a `<bos>` and puts it nowhere."""
    import copy

    from tokenizers import processors

    plain = copy.deepcopy(reader.tokenizer)
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert tasks.start_of(plain) == [] and tasks.start_of(reader.tokenizer) == [plain.bos_token_id]
    batch = next(tasks.text_batches(Loaded("plain", reader.model, None, plain), "x" * 512, 1))
    assert batch["input_ids"].shape == (1, 512) and batch["input_ids"].unique().numel() == 1

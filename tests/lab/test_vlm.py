"""`lab:vlm`: an ordinary checkpoint that answers, and a training loop that resumes exactly."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from sparing.lab import vlm
from sparing.lab.digits import COLOURS, PATCHES, TOKEN, Scene, scene, scenes


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: threads that wait for each other on a busy machine cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained() -> LlavaForConditionalGeneration:
    return vlm.load()


@pytest.fixture(scope="module")
def asked() -> list[Scene]:
    return scenes("test", 3)


def test_build_is_seeded_and_small():
    before = torch.get_rng_state()
    one, same, other = vlm.build(3), vlm.build(3), vlm.build(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(p.numel() for p in one.parameters()) < 3_000_000
    for (name, a), b in zip(one.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_checkpoint_is_an_ordinary_folder_and_small(trained):
    assert type(AutoModelForImageTextToText.from_pretrained(vlm.WEIGHTS)) is type(trained)
    assert (vlm.WEIGHTS / "model.safetensors").stat().st_size < 15_000_000
    assert trained.config.image_token_id == TOKEN["<image>"]
    assert not trained.training


def test_answers_held_out_scenes(trained):
    result = vlm.evaluate(trained, 200)
    assert result["n"] == 200
    assert result["accuracy"] >= 0.95


def test_processor_round_trip(asked):
    processor = AutoProcessor.from_pretrained(vlm.WEIGHTS)
    inputs = processor(images=Image.fromarray(asked[0].image), text=asked[0].prompt("red"), return_tensors="pt")
    assert (inputs["input_ids"] == TOKEN["<image>"]).sum() == PATCHES
    assert torch.equal(inputs["input_ids"][0], asked[0].prompt_ids("red"))
    assert_close(inputs["pixel_values"], vlm.pixels(asked[0].image[None]), rtol=0, atol=1e-6)


def test_generates_the_answers_through_the_processor(trained, asked):
    processor = AutoProcessor.from_pretrained(vlm.WEIGHTS)
    pictures = [Image.fromarray(s.image) for s in asked]
    # unequal lengths: the second question follows a question and its answer, so the others are padded on the left
    texts = [
        asked[0].prompt("red"),
        f"{asked[1].prompt('blue')} {asked[1].answer('blue')} green",
        asked[2].prompt("yellow"),
    ]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    tokens = trained.generate(**inputs, max_new_tokens=1, do_sample=False)
    said = processor.batch_decode(tokens[:, -1:])
    assert said == [asked[0].answer("red"), asked[1].answer("green"), asked[2].answer("yellow")]


def test_training_attention_equals_sdpa(asked):
    model = vlm.build().eval()
    inputs = {
        "input_ids": torch.stack([s.prompt_ids("red") for s in asked]),
        "pixel_values": vlm.pixels(np.stack([s.image for s in asked])),
    }
    with torch.no_grad():
        expected = model(**inputs).logits
        vlm._use_training_attention(model)
        assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)


def test_lessons_name_each_colour_once_before_its_digit():
    lesson = scenes("train", 4)
    for s, line in zip(lesson, vlm._lines(lesson, np.random.default_rng(0)).tolist(), strict=True):
        assert line[: 1 + PATCHES] == s.prompt_ids("red").tolist()[:-1]
        pairs = dict(zip(line[1 + PATCHES :: 2], line[2 + PATCHES :: 2], strict=True))
        assert pairs == {TOKEN[c]: TOKEN[s.answer(c)] for c in COLOURS}


def test_training_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vlm, "evaluate", lambda model, limit: {"accuracy": 0.0})
    steps = {"read_steps": 1, "ask_steps": 2, "batch": 2, "save_every": 2}
    through = vlm.train(tmp_path / "through", **steps)
    # stop where the data run out, then go on from the checkpoint
    real, calls = vlm.scenes, []

    def stopping(*args: object) -> list[Scene]:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(vlm, "scenes", stopping)
    with pytest.raises(KeyboardInterrupt):
        vlm.train(tmp_path / "stopped", **steps)
    monkeypatch.setattr(vlm, "scenes", real)
    resumed = vlm.train(tmp_path / "stopped", **steps)
    for (name, a), b in zip(through.named_parameters(), resumed.parameters(), strict=True):
        assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.equal(through.lm_head.weight, vlm.build().lm_head.weight)


def test_evaluate_leaves_the_mode_alone():
    model = vlm.build().train()
    assert vlm.evaluate(model, 3, batch=2)["n"] == 3
    assert model.training


def test_scene_and_processor_share_a_vocabulary():
    tokenizer = vlm.processor().tokenizer
    assert tokenizer.get_vocab() == TOKEN
    assert tokenizer.encode(scene("test", 0).prompt("green")) == [TOKEN["<bos>"], TOKEN["<image>"], TOKEN["green"]]

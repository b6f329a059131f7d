"""Tasks: every token scored once and right, find-digit as the lab measures it, vqa's files, what is refused."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sparing.bench import tasks
from sparing.bench.models import Loaded
from sparing.grid.method import Error
from sparing.lab import digits, vlm

TEXT = "".join(f"def f{i}(x):\n    return x + {i}  # plus grün\n" for i in range(7))


def naive(loaded: Loaded, text: str, window: int, stride: int) -> float:
    """Bits per byte, one token at a time, by the definition in `tasks.Text`."""
    data = text.encode()  # a token a byte
    ids = [loaded.tokenizer.convert_tokens_to_ids(t) for t in loaded.tokenizer.tokenize(text)]
    assert len(ids) == len(data)
    context, bits = window - stride - 1, 0.0  # one place is <bos>'s
    for at in range(context, len(ids)):
        start = (at - context) // stride * stride
        with torch.no_grad():
            logits = loaded.model(torch.tensor([[0, *ids[start:at]]])).logits[0, -1]
        bits -= torch.log_softmax(logits.double(), -1)[ids[at]].item() / math.log(2)
    return bits / (len(ids) - context)


@pytest.mark.parametrize("window, stride", [(64, 32), (48, 17), (33, 31)])
def test_bits_per_byte_equal_a_naive_count(reader: Loaded, window: int, stride: int) -> None:
    task = tasks.Text(reader, TEXT, window=window, stride=stride, batch=3)
    assert task.evaluate(reader.model) == pytest.approx(naive(reader, TEXT, window, stride), rel=1e-5)


def test_a_short_text_is_one_window(reader: Loaded) -> None:
    task = tasks.Text(reader, "abcdefg")
    assert task._spans(None) == [(3, 7)]
    assert task.evaluate(reader.model) > 0
    with pytest.raises(Error, match="1 tokens"):
        tasks.Text(reader, "a")


def test_every_byte_is_counted_once(reader: Loaded) -> None:
    task = tasks.Text(reader, TEXT, window=64, stride=32)
    spans = task._spans(None)
    assert [b for _, b in spans[:-1]] == [a for a, _ in spans[1:]]
    assert sum(task._size(*span) for span in spans) == len(TEXT.encode()) - 31
    assert task.details(2.0)["perplexity"] == pytest.approx(4.0)  # a byte is a token here


def test_a_limit_takes_windows_from_everywhere(reader: Loaded) -> None:
    task = tasks.Text(reader, TEXT, window=64, stride=32)
    spans = task._spans(None)
    assert task._spans(4) == [spans[i * len(spans) // 4] for i in range(4)]
    seen: list[tuple[int, int]] = []
    task.evaluate(reader.model, limit=5, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)


def test_the_context_is_the_prompt(reader: Loaded) -> None:
    run = SimpleNamespace(prompt=None, oracle=None)
    tasks.Text(reader, TEXT, window=64, stride=32).evaluate(reader.model, run, limit=1)
    assert run.prompt == 32


def test_evaluation_repeats_bit_for_bit(reader: Loaded) -> None:
    assert len({tasks.Text(reader, TEXT, window=64).evaluate(reader.model) for _ in range(3)}) == 1


def test_text_calibration_is_apart(reader: Loaded, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("b" * 4096)
    task = tasks.parse(f"ppl:{tmp_path}/a.txt,calibration={tmp_path}/b.txt", reader)
    batches = list(task.batches(4))
    b = reader.tokenizer.convert_tokens_to_ids("b")
    assert len(batches) == 1 and batches[0]["input_ids"].shape == (8, 512)
    bos = reader.tokenizer.bos_token_id
    assert (batches[0]["input_ids"][:, 1:] == b).all() and (batches[0]["input_ids"][:, 0] == bos).all()
    assert (batches[0]["labels"][:, :256] == -100).all() and (batches[0]["labels"][:, 256:] == b).all()


def test_loss_counts_what_is_worse(reader: Loaded, viewer: Loaded) -> None:
    assert tasks.Text(reader, TEXT).loss(2.2, 2.0) == pytest.approx(10.0)
    assert tasks.FindDigit(viewer).loss(0.45, 0.9) == pytest.approx(50.0)


def test_find_digit_is_what_the_lab_measures(viewer: Loaded) -> None:
    mine = tasks.FindDigit(viewer, batch=8).evaluate(viewer.model, limit=20)
    assert mine == vlm.evaluate(viewer.model, 20, batch=20)["accuracy"]


def test_find_digit_tells_the_truth(viewer: Loaded) -> None:
    run = SimpleNamespace(prompt=None, oracle=None)
    tasks.FindDigit(viewer, batch=2).evaluate(viewer.model, run, limit=2)
    expected = [digits.scene("test", i).oracle(digits.COLOURS[i]) for i in range(2)]
    assert torch.equal(run.oracle, torch.stack(expected))


def test_find_digit_trains_on_other_scenes(viewer: Loaded) -> None:
    batch = next(iter(tasks.FindDigit(viewer, batch=2).batches(1)))
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 259)
    assert (batch["labels"] != -100).sum() == 2
    expected = vlm.pixels(np.stack([digits.scene("train", i).image for i in range(2)]))
    assert torch.equal(batch["pixel_values"], expected)
    assert torch.isfinite(viewer.model(**batch).loss)


def test_find_digit_offers_no_smaller_pictures(viewer: Loaded) -> None:
    """lab:vlm knows one size; on others it guesses, and a rival that guesses makes any method look good."""
    task = tasks.FindDigit(viewer)
    assert task.truth and all(task.downsampled(keep) is None for keep in (0.1, 0.5, 1.0))


def test_any_size_leaves_no_trace(viewer: Loaded) -> None:
    with tasks.any_size(viewer.model):
        pass
    assert not any(module._forward_pre_hooks for module in viewer.model.modules())


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    lines = []
    for index in range(5):
        colour = digits.COLOURS[index % 4]
        scene = digits.scene("test", index)
        Image.fromarray(scene.image).save(tmp_path / f"{index}.png")
        lines.append({"image": f"{index}.png", "question": colour, "answer": scene.answer(colour)})
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return file


def test_vqa_prompts_are_the_labs(viewer: Loaded, questions: Path) -> None:
    task = tasks.parse(f"vqa:{questions}", viewer)
    batch = task.inputs()
    asked, _, _ = tasks.FindDigit(viewer)._asked("test", 0, 4)
    assert torch.equal(batch["input_ids"], asked["input_ids"])
    assert torch.allclose(batch["pixel_values"], asked["pixel_values"], atol=1e-6)


def test_vqa_counts_equal_answers(viewer: Loaded, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.parse(f"vqa:{questions}", viewer)
    answers = [json.loads(line)["answer"] for line in questions.read_text().splitlines()]
    said = iter([*answers[:2], "no", *answers[3:]])

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        tail = [viewer.tokenizer(next(said), add_special_tokens=False)["input_ids"] for _ in input_ids]
        return torch.cat([input_ids, torch.tensor(tail)], 1)

    monkeypatch.setattr(viewer.model, "generate", generate)
    assert task.evaluate(viewer.model) == pytest.approx(4 / 5)


def test_vqa_generates(viewer: Loaded, questions: Path) -> None:
    task = tasks.Vqa(viewer, questions, tokens=2)
    assert 0 <= task.evaluate(viewer.model, limit=2) <= 1
    small = task.downsampled(0.25)
    assert small is not None and (small._visual_tokens(), task._visual_tokens()) == (64, 256)
    assert 0 <= small.evaluate(viewer.model, limit=2) <= 1


def test_vqa_fits_on_another_file(viewer: Loaded, questions: Path) -> None:
    assert not tasks.parse(f"vqa:{questions}", viewer).calibrates
    task = tasks.parse(f"vqa:{questions},calibration={questions}", viewer)
    batch = next(iter(task.batches(1)))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (1, 260)
    assert (batch["labels"][0] != -100).nonzero().flatten().tolist() == [258, 259]  # the digit and <eos>


@pytest.mark.parametrize("answer, said", [("Cat", " cat. "), ("a cat", "A CAT"), ("7", "7\n")])
def test_answers_are_compared_plainly(answer: str, said: str) -> None:
    assert tasks._plain(answer) == tasks._plain(said)


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "line 2: not JSON"),
        ('{"image": "0.png"}', "line 2: an object with image, question and answer"),
        ("[1]", "line 2: an object"),
        ('{"image": "none.png", "question": "q", "answer": "a"}', "line 2: none.png cannot be opened"),
    ],
)
def test_a_broken_line_is_named(viewer: Loaded, questions: Path, line: str, complaint: str) -> None:
    lines = questions.read_text().splitlines()
    questions.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(Error, match=complaint):
        tasks.parse(f"vqa:{questions}", viewer)


def test_what_cannot_be_asked(reader: Loaded, viewer: Loaded, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match="tiny reads text only"):
        tasks.parse(f"vqa:{questions}", reader)
    with pytest.raises(Error, match="tiny does not know"):
        tasks.parse("find-digit", reader)
    with pytest.raises(Error, match="'perplexity': must be ppl"):
        tasks.parse("perplexity", reader)
    with pytest.raises(Error, match=r"nothing\.txt': there is no such file"):
        tasks.parse("ppl:nothing.txt", reader)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(Error, match="UTF-8"):
        tasks.parse(f"ppl:{tmp_path}/bytes", reader)
    with pytest.raises(Error, match="stride = 64"):
        tasks.Text(reader, TEXT, window=64, stride=64)

"""Sweeps: what the command line takes, prompts of the asked size, complete rows, resuming, and where a method pays."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner, Result

from sparing import cli
from sparing.bench import bounds, pictures, report, tasks, timing
from sparing.bench import sweep as module
from sparing.bench.compare import Subject, compare
from sparing.bench.models import Loaded
from sparing.bench.summary import Row, breakevens, experiments
from sparing.bench.sweep import BLANK, axes, prepare, sweep, timed
from sparing.depth.unified_layer_skipping import UnifiedLayerSkipping
from sparing.grid.method import Error
from sparing.lab import digits
from sparing.width.flap import Flap

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(30))
SKIP = "unified-layer-skipping"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Peaks from a moment's measurement, and four decode steps a generation."""
    decode, generation = timing.decode, timing.generation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "STEPS", 4)
        patch.setattr(timing, "decode", lambda model, inputs, out, steps=4: decode(model, inputs, out, steps))
        patch.setattr(timing, "generation", lambda model, inputs, steps=16: generation(model, inputs, 4))
        patch.setattr(bounds, "SECONDS", 0.0)
        patch.setitem(bounds.COPY, "cpu", 1 << 22)
        patch.setitem(bounds.MATRIX, "cpu", 128)
        yield


@pytest.fixture
def text(reader: Loaded) -> tasks.Text:
    return tasks.Text(reader, TEXT)


def small(reader: Loaded, text: tasks.Task, out: Path | None = None, **changes: Any) -> list[Row]:
    given = {"methods": [SKIP], "keep": [0.5], "contexts": [8, 24], "batches": [1, 2], "repeats": 1}
    return sweep(reader, text, out=out, progress=False, **(given | changes))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    "texts, found",
    [
        (["context=512,2048,8192", "batch=1,8"], ([512, 2048, 8192], [1, 8])),
        (["batch=8,1 context=2048,512,512"], ([512, 2048], [1, 8])),
        (["context=64"], ([64], [1])),
    ],
)
def test_axes(texts: list[str], found: tuple[list[int], list[int]]) -> None:
    assert axes(texts) == found


@pytest.mark.parametrize(
    "texts, words",
    [
        (["width=3"], ("width", "context and batch")),
        (["context=512,many"], ("context", "'many'", "whole number of at least 1")),
        (["context=1.5"], ("context = '1.5'", "whole number")),
        (["context=0"], ("context = '0'", "at least 1")),
        (["context=-4"], ("context = '-4'", "at least 1")),
        (["context="], ("context = ''", "at least 1")),
        (["context=1,"], ("context = ''",)),
        ([""], ("''", "NAME=NUMBERS")),
        (["512"], ("'512'", "NAME=NUMBERS", "context, batch")),
        (["context=1", "context=2"], ("context is there already",)),
        (["batch=1,8"], ("names no context",)),
    ],
)
def test_wrong_axes_are_named(texts: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(Error) as refused:
        axes(texts)
    for word in ("sweep = ", *words):
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"contexts": []}, "contexts = "),
        ({"contexts": [1]}, "context = 1: ppl needs at least 2 tokens"),
        ({"contexts": [2.5]}, "context = 2.5: must be a whole number"),
        ({"batches": [0]}, "batch = 0: must be a whole number"),
        ({"tokens": 0}, "tokens = 0"),
        ({"repeats": 0}, "repeats = 0"),
        ({"keep": [0]}, "keep = 0"),
        ({"methods": ["fastv"]}, "reads text only"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    reader: Loaded, text: tasks.Task, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(Error, match=words):
        small(reader, text, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_beyond_the_trained_length(reader: Loaded, text: tasks.Task) -> None:
    """Rotary positions go on, learned ones do not."""
    given = ([SKIP], [0.5], [150])
    assert "longer than the 128 positions" in prepare(reader, text, *given).remark
    assert prepare(reader, text, [SKIP], [0.5], [124]).remark == ""
    row = small(reader, text, contexts=[150], batches=[1])[0]
    assert row["status"] == "ok" and row["length"] == 150 and "128 positions" in row["note"]
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    loaded = Loaded("learned", learned, None, reader.given)
    other = tasks.Text(loaded, TEXT)
    with pytest.raises(Error, match=r"context = 61: learned has 64 positions.* 4 tokens are generated; at most 60"):
        prepare(loaded, other, [SKIP], [0.5], [16, 61])
    assert prepare(loaded, other, [SKIP], [0.5], [60]).remark == ""


def test_a_task_without_prompts_of_a_size_says_so(reader: Loaded) -> None:
    class Mine(tasks.Task):
        name = "mine"

    with pytest.raises(Error, match=r"task = 'mine': makes no prompts of a given length"):
        prepare(reader, Mine(), [SKIP], [0.5], [16])


# -------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("context, batch", [(2, 1), (17, 3), (900, 2), (3000, 4)])
def test_text_prompts_have_exactly_the_size(text: tasks.Text, context: int, batch: int) -> None:
    ids = text.sized(context, batch)["input_ids"]
    assert ids.shape == (batch, context)
    assert (ids[:, 0] == 0).all() and (ids[:, 1:] != 0).all()  # one <bos>, then text
    if context > 2:
        assert len({tuple(row.tolist()) for row in ids}) == batch
    for row in ids:  # real text, begun again where it ends
        assert "".join(text._loaded.tokenizer.decode(row[1:].tolist())) in TEXT * 5


def test_a_text_shorter_than_the_batch(reader: Loaded) -> None:
    ids = tasks.Text(reader, "abc").sized(4, 5)["input_ids"]
    words = ["".join(reader.tokenizer.decode(row[1:].tolist())) for row in ids]
    assert words == ["abc", "bca", "cab", "abc", "bca"]


@pytest.mark.parametrize("context, batch, images", [(258, 1, 1), (513, 3, 1), (514, 1, 2), (1000, 2, 3)])
def test_visual_prompts_hold_whole_pictures(viewer: Loaded, context: int, batch: int, images: int) -> None:
    inputs = tasks.FindDigit(viewer).sized(context, batch)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    assert ids.shape == inputs["attention_mask"].shape == (batch, 256 * images + 2)
    assert context - 256 < ids.shape[1] <= context
    assert ((ids == digits.TOKEN["<image>"]).sum(1) == 256 * images).all()
    assert ids[:, 0].tolist() == [digits.TOKEN["<bos>"]] * batch
    assert ids[:, -1].tolist() == [digits.TOKEN[digits.COLOURS[row]] for row in range(batch)]
    assert pixels.shape == (batch * images, 3, 96, 96)
    assert len({image.numpy().tobytes() for image in pixels}) == batch * images  # all scenes differ
    with torch.no_grad():
        assert torch.isfinite(viewer.model(**inputs).logits).all()


def test_too_little_room_for_a_picture(viewer: Loaded) -> None:
    with pytest.raises(Error, match="context = 257: one image and a question take 258 tokens"):
        prepare(viewer, tasks.FindDigit(viewer), ["fastv"], [0.5], [257, 512])


def test_vqa_repeats_the_picture(viewer: Loaded, tmp_path: Path) -> None:
    for index in range(3):
        Image.fromarray(digits.scene("test", index).image).save(tmp_path / f"{index}.png")
    questions = ("red", "blue", "red blue")  # the last one is longer: it cannot stand in the same batch
    lines = [{"image": f"{i}.png", "question": question, "answer": "1"} for i, question in enumerate(questions)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = tasks.Vqa(viewer, tmp_path / "q.jsonl")
    inputs = task.sized(800, 3)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    assert ids.shape == (3, 3 * 256 + 2) and inputs["attention_mask"].all()
    assert ((ids == digits.TOKEN["<image>"]).sum(1) == 3 * 256).all()
    assert ids[:, -1].tolist() == [digits.TOKEN[colour] for colour in ("red", "blue", "red")]
    rows = pixels.unflatten(0, (3, 3))
    assert (rows == rows[:, :1]).all()  # three times the same one
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    one = task.inputs()
    assert torch.equal(one["pixel_values"][0], rows[0, 0])
    with pytest.raises(Error, match="context = 200: one image and the question take 258 tokens"):
        task.sized(200, 1)


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def rows(reader: Loaded) -> list[Row]:
    given = ([SKIP], [0.5, 0.1], [8, 24], [1, 2])
    return sweep(reader, tasks.Text(reader, TEXT), *given, repeats=2, tokens=10, progress=False)


def test_rows_are_complete_and_plain(rows: list[Row]) -> None:
    assert [(row["keep"], row["context"], row["batch"]) for row in rows] == [
        (keep, context, batch) for keep in (0.5, 0.1) for context in (8, 24) for batch in (1, 2)
    ]
    for row in rows:
        assert row.keys() == BLANK.keys()
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert (row["method"], row["axis"], row["tokens"], row["model"]) == (SKIP, "depth", 10, "tiny")
    for row in rows[:4]:
        assert (row["status"], row["length"], row["visual"], row["pairs"]) == ("ok", row["context"], 0, 2)
        assert row["fields"]["S"] == 2
        for stage in ("prefill", "decode", "total"):
            low, middle, high = (row[f"{stage}_speedup{end}"] for end in ("_low", "", "_high"))
            assert 0 < low <= middle <= high
            assert row[f"{stage}_ms"] > 0 and row[f"dense_{stage}_ms"] > 0
        assert row["prefill_bound"] == 1 and 1.3 < row["decode_bound"] < 2
        assert 1 < row["total_bound"] < row["decode_bound"]
    for row in rows[4:]:
        assert row["status"] == "unreachable" and "keeps at least 2 of 6 layers" in row["note"]
        assert row["total_speedup"] is None


def test_the_total_is_that_of_each_pair(reader: Loaded, text: tasks.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token comes from the prefill, the others from as many steps."""
    seconds = iter([(10.0, 1.0), (5.0, 1.0), (2.0, 4.0), (4.0, 1.0)])  # dense, method | method, dense
    monkeypatch.setattr(Subject, "cost", lambda *_: {phase: bounds.Cost(8, 8) for phase in ("prefill", "decode")})
    monkeypatch.setattr(timing, "time_stages", lambda a, b, repeats: timing_of([a(), b()], [b(), a()][::-1]))

    def timing_of(*pairs: list[timing.Stages]) -> dict[str, timing.Ratio]:
        return {k: timing.Ratio.of([p[0][k] for p in pairs], [p[1][k] for p in pairs]) for k in pairs[0][0]}

    monkeypatch.setattr(Subject, "generation", lambda *_: dict(zip(("prefill", "decode"), next(seconds), strict=True)))
    row = small(reader, text, contexts=[8], batches=[1], tokens=3, repeats=2)[0]
    ratios = [(10 + 2 * 1) / (5 + 2 * 1), (4 + 2 * 1) / (2 + 2 * 4)]
    assert row["total_speedup"] == pytest.approx(np.median(ratios))
    assert row["total_speedup_low"] == pytest.approx(np.percentile(ratios, 20))
    assert row["dense_total_ms"] == pytest.approx(1000 * (12 + 6) / 2) and row["total_bound"] == 1


@pytest.mark.parametrize("each, runs, pairs", [(0.01, 2 + 30, 30), (0.2, 2 + 8, 8), (1.0, 2 + 3, 3), (4.0, 3, 3)])
def test_long_runs_have_few_pairs(each: float, runs: int, pairs: int) -> None:
    now = [0.0]
    count = {"dense": 0, "other": 0}

    def run(side: str) -> dict[str, float]:
        now[0] += each
        count[side] += 1
        return {"": each * (2 if side == "dense" else 1)}

    found = timed(lambda: run("dense"), lambda: run("other"), seconds=1.5, clock=lambda: now[0])[""]
    assert count == {"dense": runs, "other": runs}
    assert (found.n, found.median, found.dense) == (pairs, 2.0, 2 * each)


def test_a_cut_is_made_once_a_budget(reader: Loaded, text: tasks.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    fits, cuts = [], []
    fit, subject = Flap.fit, module._Sweep.subject
    monkeypatch.setattr(Flap, "fit", lambda self, *a: fits.append(0) or fit(self, *a))
    monkeypatch.setattr(module._Sweep, "subject", lambda self, m: cuts.append(m) or subject(self, m))
    monkeypatch.setattr(text, "batches", lambda n: tasks.text_batches(reader, TEXT, 2, length=64), raising=False)
    found = small(reader, text, methods=["flap:multiple=1"], keep=[0.8, 0.5], contexts=[8, 16])
    assert [row["status"] for row in found] == ["ok"] * 8
    assert (len(fits), len(cuts)) == (1, 2)
    assert found[0]["prefill_bound"] < found[4]["prefill_bound"]  # half is less than four fifths


def test_a_cell_that_fails_is_a_row(reader: Loaded, text: tasks.Task, tmp_path: Path, monkeypatch: Any) -> None:
    whole = UnifiedLayerSkipping.before_layer

    def broken(self: UnifiedLayerSkipping, stream: Any, layer: int) -> None:
        if stream.batch > 1:
            raise RuntimeError("no room\nfor two")
        whole(self, stream, layer)

    monkeypatch.setattr(UnifiedLayerSkipping, "before_layer", broken)
    found = small(reader, text, tmp_path / "out", contexts=[8])
    assert [(row["status"], row["note"]) for row in found] == [("ok", ""), ("failed", "RuntimeError: no room")]
    assert "for two" in (tmp_path / "out" / "errors.log").read_text()


def test_a_visual_method_saves_more_in_longer_prompts(viewer: Loaded) -> None:
    given = (["fastv:K=2"], [0.5], [258, 700], [1])
    found = sweep(viewer, tasks.FindDigit(viewer), *given, repeats=1, progress=False)
    assert [(row["context"], row["length"], row["visual"]) for row in found] == [(258, 258, 256), (700, 514, 512)]
    assert 1.2 < found[0]["prefill_bound"] < found[1]["prefill_bound"]
    assert "512 positions" in found[1]["note"] and not found[0]["note"]


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def finished(reader: Loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    out = tmp_path_factory.mktemp("sweeps") / "out"
    return out, small(reader, tasks.Text(reader, TEXT), out)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is prepared, counted or timed from now on."""
    made: list[str] = []
    for name in ("generation", "cost"):
        real = getattr(Subject, name)
        monkeypatch.setattr(Subject, name, lambda self, inputs, r=real, n=name: made.append(n) or r(self, inputs))
    return made


def test_resuming_a_finished_sweep_computes_nothing(
    reader: Loaded, text: tasks.Task, finished: tuple[Path, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = finished
    made = calls(monkeypatch)
    monkeypatch.setattr(UnifiedLayerSkipping, "at", lambda *_: pytest.fail("prepared again"))
    assert small(reader, text, out, resume=True) == rows
    assert made == []
    assert sorted(path.name for path in out.iterdir()) == ["sweep.json", "sweep.jsonl"]


@pytest.mark.parametrize("lines, torn", [(3, 50), (2, 0), (0, 1)])
def test_a_torn_file_is_mended(
    reader: Loaded,
    text: tasks.Task,
    finished: tuple[Path, list[Row]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: int,
    torn: int,
) -> None:
    out, rows = finished
    whole = (out / "sweep.jsonl").read_bytes().splitlines(keepends=True)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "sweep.json").write_text((out / "sweep.json").read_text())
    (copy / "sweep.jsonl").write_bytes(b"".join(whole[:lines]) + whole[lines][:torn])
    made = calls(monkeypatch)
    again = small(reader, text, copy, resume=True)
    assert again[:lines] == rows[:lines]
    assert [(row["context"], row["batch"]) for row in again] == [(row["context"], row["batch"]) for row in rows]
    assert made.count("generation") == 4 * (4 - lines)  # a pair to warm up, a pair to time
    assert [json.loads(line) for line in (copy / "sweep.jsonl").read_text().splitlines()] == again


def test_a_folder_of_another_sweep_is_refused(
    reader: Loaded, text: tasks.Task, finished: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    out, _ = finished
    with pytest.raises(Error, match=r"holds this sweep already; pass --resume"):
        small(reader, text, out)
    with pytest.raises(Error, match=r"another sweep \(contexts \[8, 24\], now \[8, 32\]\)"):
        small(reader, text, out, contexts=[8, 32], resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Error, match="not empty"):
        small(reader, text, tmp_path)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{}", "row 2 is none of a sweep (method = None)"),
        ("5", "line 2"),
        ('{"torn', "line 2"),
        ({"context": "long"}, "row 2 is none of a sweep (context = 'long')"),
        ({"total_speedup": None}, "(total_speedup = None)"),
        ({"prefill_ms": -1.0}, "(prefill_ms = -1.0)"),
        ({"extra": 1}, "(other columns)"),
    ],
)
def test_a_damaged_line_is_named(
    reader: Loaded, text: tasks.Task, finished: tuple[Path, list[Row]], tmp_path: Path, line: Any, words: str
) -> None:
    out, rows = finished
    (tmp_path / "sweep.json").write_text((out / "sweep.json").read_text())
    bad = line if isinstance(line, str) else json.dumps({**rows[1], **line})
    (tmp_path / "sweep.jsonl").write_text("\n".join([json.dumps(rows[0]), bad, json.dumps(rows[2])]) + "\n")
    with pytest.raises(Error, match=re.escape(words)):
        small(reader, text, tmp_path, resume=True)
    with pytest.raises(Error, match=re.escape(words)):
        report.gather([(tmp_path, [])], tmp_path / "out")


def test_beside_a_comparison(reader: Loaded, text: tasks.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep takes what the comparison fitted; one of another seed is refused."""
    out = tmp_path / "out"
    monkeypatch.setattr(text, "batches", lambda n: tasks.text_batches(reader, TEXT, 2, length=64), raising=False)
    given = {"methods": ["flap:multiple=1"], "keep": [0.6]}
    compare(reader, text, **given, out=out, limit=1, repeats=0, controls=False, progress=False)  # type: ignore[arg-type]
    monkeypatch.setattr(Flap, "fit", lambda *_: pytest.fail("fitted again"))
    with pytest.raises(Error, match=r"another run \(seed 0, now 1\)"):
        small(reader, text, out, contexts=[8], seed=1, **given)
    assert [row["status"] for row in small(reader, text, out, contexts=[8], **given)] == ["ok", "ok"]
    assert {"run.json", "results.jsonl", "sweep.json", "sweep.jsonl"} < {path.name for path in out.iterdir()}


# ------------------------------------------------------------------------------------------------- where it pays


def cell(context: int, batch: int, speed: float | None, spread: float = 0.01, **more: Any) -> Row:
    """A row of a sweep; `more` overwrites."""
    given = {"method": "m", "spec": "m", "axis": "tokens", "keep": 0.5, "context": context, "batch": batch}
    given |= {"length": context, "tokens": 64, "model": "lab:lm", "task": "ppl", "device": "cpu", "dtype": "float32"}
    if speed is not None:
        for stage in ("prefill", "decode", "total"):
            given |= {f"{stage}_speedup": speed, f"{stage}_speedup_low": speed - spread}
            given |= {f"{stage}_speedup_high": speed + spread}
    return BLANK | given | more


def said(speeds: dict[tuple[int, int], float | None], **more: Any) -> str:
    found = breakevens([cell(context, batch, speed, **more) for (context, batch), speed in speeds.items()])
    assert len(found) == 1
    return found[0].sentence


def test_where_it_starts_to_pay() -> None:
    one = {(512, 1): 0.9, (2048, 1): 1.2, (8192, 1): 1.5}
    assert said(one) == "pays from context 2,048 at batch 1"
    assert said(one | {(512, 8): 1.1, (2048, 8): 1.2, (8192, 8): 2.0}) == (
        "pays from context 2,048 at batch 1, always at batch 8"
    )
    assert said(one | {(512, 8): 0.8, (2048, 8): 1.2, (8192, 8): 2.0}) == "pays from context 2,048 at batch 1 and 8"
    assert said(one | {(512, 8): 0.8, (2048, 8): 0.7, (8192, 8): 0.6}) == (
        "pays from context 2,048 at batch 1, never at batch 8"
    )
    assert said({(512, 1): 0.9, (2048, 1): 0.8, (512, 8): 1.2, (2048, 8): 1.3}) == (
        "always pays at batch 8, never at batch 1"
    )
    assert said({(512, 1): 1.3, (2048, 1): 1.1, (8192, 1): 0.9}) == "pays up to context 2,048 at batch 1"
    assert said({(512, 1): 0.9, (2048, 1): 1.1, (8192, 1): 0.9}) == "pays at context 2,048 alone at batch 1"
    assert said({(512, 1): 1.3, (2048, 8): 1.1}) == "always pays"
    assert said({(512, 1): 0.3, (2048, 8): 0.1}) == "never pays"


def test_what_is_not_sure_does_not_pay() -> None:
    """A median of 1.02 whose 20th percentile lies below 1 is undecided."""
    assert said({(512, 1): 1.02, (2048, 1): 0.98}, spread=0.05) == "never pays; undecided in 2 of 2 cells"
    assert said({(512, 1): 1.02, (2048, 1): 1.2}, spread=0.05) == (
        "pays from context 2,048 at batch 1; undecided in 1 of 2 cells"
    )
    found = [cell(8, 1, 1.2), cell(16, 1, None, status="failed", note="OutOfMemoryError: x")]
    assert breakevens(found)[0].sentence == "always pays; not measured in 1 of 2 cells"
    assert breakevens([found[1]])[0].sentence == "failed: OutOfMemoryError: x"


def test_maps_are_told_apart() -> None:
    found = [cell(8, 1, 1.2), cell(8, 1, 1.2, keep=0.25), cell(8, 1, 1.2, spec="m:K=2"), cell(8, 1, 1.2, model="b/c")]
    labels = [mine.label for mine in breakevens(found)]
    assert labels == ["m at 50 % · lab:lm", "m at 25 % · lab:lm", "m:K=2 at 50 % · lab:lm", "m at 50 % · b/c"]
    assert experiments(found) == []  # nothing for the tables of a comparison


# ------------------------------------------------------------------------------------------------------------- pictures

MAP = [
    cell(512, 1, 0.8),
    cell(2048, 1, 1.02, 0.05),
    cell(8192, 1, 1.6),
    cell(512, 8, 1.2),
    cell(2048, 8, None, status="failed", note="RuntimeError: no room"),
    cell(8192, 8, 1.9),
]


def test_the_picture_shows_cells_hatching_and_the_line(tmp_path: Path) -> None:
    figure = pictures.breakeven(MAP)
    assert figure is not None
    ax = figure.axes[0]
    words = {label.get_text() for label in ax.texts}
    assert {"0.80×", "1.02×", "1.60×", "1.20×", "1.90×", "0.97–1.07", "failed"} <= words
    assert ax.get_title(loc="left") == "m at 50 %"
    hatched = [patch.get_xy() for patch in ax.patches if patch.get_hatch()]
    assert hatched == [(0.5, -0.5)]
    lines = {tuple(map(tuple, line.get_xydata().tolist())) for line in ax.lines}  # type: ignore[union-attr]
    # between 2048 and 8192 at batch 1, and between the batches at 512; nothing beside the failed cell
    assert lines == {((1.5, -0.5), (1.5, 0.5)), ((-0.5, 0.5), (0.5, 0.5))}
    pictures.save(figure, tmp_path / "breakeven.png")
    image = np.asarray(Image.open(tmp_path / "breakeven.png").convert("RGB")).astype(int)
    blue, orange = image[..., 2] - image[..., 0] > 40, image[..., 0] - image[..., 2] > 20
    assert blue.mean() > 0.05 and orange.mean() > 0.02
    assert (image.sum(-1) < 150).mean() > 0.002  # numbers and the line
    assert pictures.breakeven([]) is None


def test_the_map_has_a_panel_for_each_method_and_budget() -> None:
    figure = pictures.breakeven([*MAP, cell(512, 1, 1.1, keep=0.25), cell(512, 1, 1.1, spec="n", method="n")])
    assert figure is not None
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()]
    assert titles == ["m at 50 %", "m at 25 %", "n at 50 %"]


def test_markdown_and_terminal() -> None:
    page = report.breakeven([*MAP, cell(700, 1, 1.1, length=514, note="longer")])
    assert (
        "- **m at 50 %**: pays at context 700 and 8,192 alone at batch 1, always at batch 8; undecided in 1 of 6"
        in page
    )
    assert "| m at 50 % | 700 (514) | 1 | 1.10× [1.09–1.11] |" in page
    assert page.count("\n| m at 50 %") == 7 and page.endswith("m at 50 %: longer.\n")
    for width in (80, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(report.terminal(MAP))
        text = console.export_text()
        assert "undecided" in text and "failed" in text and "1.90×" in text
        assert max(map(len, text.splitlines())) <= width
        assert ("FLOP bound" in text) == (width == 200)


def test_the_report_has_the_map(tmp_path: Path) -> None:
    row = {"method": "dense", "axis": None, "keep": 1.0, "control": None, "metric": "accuracy", "quality": 0.9}
    dense = row | {"quality_loss_pct": 0.0, "model": "lab:lm", "task": "ppl", "seconds": 1.0}
    without = report.write([dense], tmp_path / "without").read_text()
    assert "start to pay" not in without and not (tmp_path / "without" / "breakeven.md").exists()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "sweep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MAP) + '{"torn')
    out = tmp_path / "both"
    rows = report.gather([(folder, [dense])], out)
    assert rows == [dense, *MAP]
    page = report.write(rows, out).read_text()
    section = page[page.index('<section id="breakeven">') :].partition("</section>")[0]
    assert "pays from context 8,192 at batch 1" in section and "<svg" in section and "RuntimeError" not in section
    assert re.search(r"1\.60×<small>1\.59–1\.61</small>", section)
    assert (out / "breakeven.png").stat().st_size > 5000
    assert "| m at 50 % |" in (out / "breakeven.md").read_text()


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(reader: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny text model as a checkpoint, with a text beside it."""
    path = tmp_path_factory.mktemp("tiny")
    reader.model.save_pretrained(path)
    reader.tokenizer.save_pretrained(path)
    (path / "text.txt").write_text(TEXT)
    return path


def run(folder: Path, out: Path, *more: str) -> Result:
    given = [str(folder), "--task", f"ppl:{folder}/text.txt", "--method", SKIP, "--keep", "0.5", "--limit", "1"]
    return CliRunner().invoke(
        cli.app,
        ["compare", *given, "--repeats", "1", "--no-controls", "--out", str(out), *more],
        env={"COLUMNS": "200"},
    )


def test_the_command_measures_both(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    done = run(folder, out, "--sweep", "context=8,24", "batch=1,2")
    assert done.exit_code == 0, done.output
    assert f"{SKIP} at 50 %: " in done.stdout and "Where does it start to pay?" in done.stdout
    rows = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [(row["context"], row["batch"]) for row in rows] == [(8, 1), (8, 2), (24, 1), (24, 2)]
    assert len((out / "results.jsonl").read_text().splitlines()) == 2
    names = {path.name for path in out.iterdir()}
    assert {"breakeven.png", "breakeven.md", "report.html"} <= names
    assert '<section id="breakeven">' in (out / "report.html").read_text()
    # another sweep is refused before anything runs, the same one in other words is finished
    made = calls(monkeypatch)
    other = run(folder, out, "--resume", "--sweep", "context=8,32", "--sweep", "batch=1,2")
    assert other.exit_code == 2 and "another sweep" in other.stderr
    same = run(folder, out, "--resume", "--sweep=batch=2,1", "context=24,8")
    assert same.exit_code == 0 and made == []
    assert [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()] == rows


def planned(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *more: str) -> tuple[Result, list[Any]]:
    """The command up to the point where work would begin, and the axes it has read."""
    found: list[Any] = []

    def stop(loaded: Loaded, task: object, methods: object, keep: object, *axes: object, **_: object) -> None:
        found.append(axes)
        raise Error("enough")

    monkeypatch.setattr(module, "prepare", stop)
    return run(folder, out, *more), found


@pytest.mark.parametrize(
    "words",
    [
        ["--sweep", "context=512,2048", "batch=1,8"],
        ["--sweep", "batch=1,8", "context=512,2048"],
        ["--sweep", "context=512,2048", "--sweep", "batch=1,8"],
        ["--sweep=context=512,2048", "batch=1,8"],
        ["--sweep", "context=512,2048 batch=1,8"],
        ["--sweep", "context=512,2048", "batch=1,8", "--seed", "3"],
    ],
)
def test_one_option_takes_several_words(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    result, found = planned(monkeypatch, folder, tmp_path / "out", *words)
    assert found == [([512, 2048], [1, 8])], result.output


def test_the_model_may_stand_behind_the_sweep(tmp_path: Path) -> None:
    given = ["--task", "ppl", "--method", SKIP, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, ["compare", *given, "--sweep", "context=8", "batch=1", "./no-such-place"])
    assert result.exit_code == 2 and "no-such-place" in result.stderr


@pytest.mark.parametrize(
    "words, told",
    [
        (["--sweep", "context=0"], "context = '0'"),
        (["--sweep", "context=8", "depth=2"], "no axis 'depth'"),
        (["--sweep", "context=8", "context=9"], "context is there already"),
        (["--sweep", ""], "NAME=NUMBERS"),
        (["--sweep", "context=1"], "context = 1: ppl"),
        (["--sweep", "context=8", "surplus"], "surplus"),
        (["context=8"], "context=8"),  # without --sweep it is a word too many, as ever
    ],
)
def test_mistakes_cost_one_line(folder: Path, tmp_path: Path, words: list[str], told: str) -> None:
    result = run(folder, tmp_path / "out", *words)
    assert result.exit_code == 2 and told in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_without_a_sweep_nothing_changes(folder: Path, tmp_path: Path) -> None:
    done = run(folder, tmp_path / "out")
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in names if "sweep" in name or "breakeven" in name]
    assert "start to pay" not in done.stdout

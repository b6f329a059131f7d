"""Comparisons: the rows, what beats what, and that a killed run ends in the same table."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sparing.bench import compare as module
from sparing.bench import tasks
from sparing.bench.compare import BLANK, Store, compare
from sparing.bench.models import Loaded, load_model
from sparing.depth.unified_layer_skipping import UnifiedLayerSkipping
from sparing.grid.method import Error, parse
from sparing.lab import digits
from sparing.width.flap import Flap

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(30))
QUALITY = (
    "method",
    "axis",
    "keep",
    "fields",
    "control",
    "of",
    "quality",
    "quality_dense",
    "quality_loss_pct",
    "beats_control",
    "status",
)

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def quick(request: pytest.FixtureRequest) -> Any:
    """Peaks from a moment's measurement."""
    from sparing.bench import bounds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "SECONDS", 0.0)
        patch.setitem(bounds.COPY, "cpu", 1 << 22)
        patch.setitem(bounds.MATRIX, "cpu", 128)
        yield


@pytest.fixture(scope="module")
def folder(reader: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny text model as a checkpoint, with a text beside it."""
    path = tmp_path_factory.mktemp("tiny")
    reader.model.save_pretrained(path)
    reader.tokenizer.save_pretrained(path)
    (path / "text.txt").write_text(TEXT)
    return path


def run(folder: Path, out: Path | None = None, **changes: Any) -> Rows:
    given = {"methods": ["unified-layer-skipping"], "keep": (0.5,), "limit": 3, "repeats": 1, "progress": False}
    return compare(str(folder), f"ppl:{folder}/text.txt", out=out, **(given | changes))


def table(rows: Rows) -> list[dict[str, Any]]:
    return [{key: row[key] for key in QUALITY} for row in rows]


@pytest.fixture(scope="module")
def rows(folder: Path) -> Rows:
    return run(folder, keep=(0.7, 0.5, 0.1))


def test_rows_are_complete_and_plain(rows: Rows) -> None:
    for row in rows:
        assert row.keys() == BLANK.keys()
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert (
            row["model"]
            and row["task"].startswith("ppl:")
            and row["versions"].keys() >= {"torch", "transformers", "sparing"}
        )
        assert (row["device"], row["dtype"], row["metric"]) == ("cpu", "float32", "bits_per_byte")
        assert row["seconds"] >= 0


def test_rows_come_dense_first_and_controls_before_their_method(rows: Rows) -> None:
    kinds = [(row["method"], row["control"], row["keep"]) for row in rows]
    one = [("random-depth", "random", 0.0)] * 3 + [
        ("uniform-depth", "uniform", 0.0),
        ("unified-layer-skipping", None, 0.0),
    ]
    expected = [(a, b, keep) for keep in (0.7, 0.5) for a, b, _ in one]
    assert kinds == [("dense", None, 1.0), *expected, ("unified-layer-skipping", None, 0.1)]
    assert [row["seed"] for row in rows[1:4]] == [0, 1, 2]
    assert all(row["of"] == "unified-layer-skipping" for row in rows if row["control"])


def test_a_method_row_says_everything(rows: Rows) -> None:
    dense, row = rows[0], next(row for row in rows if row["method"] == "unified-layer-skipping" and row["keep"] == 0.5)
    assert row["quality_dense"] == dense["quality"]
    assert row["quality_loss_pct"] == pytest.approx(100 * (row["quality"] / dense["quality"] - 1))
    assert row["details"]["perplexity"] == pytest.approx(2 ** row["quality"])  # a byte is a token
    assert row["cells"] == pytest.approx(0.5)
    assert row["phase"] == "decode" and row["bound"] == row["roofline"]
    assert 1 < row["flop_bound"] < 2 and row["flops_ratio"] == pytest.approx(1 / row["flop_bound"])
    assert row["efficiency"] == pytest.approx(row["decode_speedup"] / row["bound"])
    assert row["prefill_flops"] == dense["prefill_flops"] and row["decode_flops"] < dense["decode_flops"]
    assert row["prefill_speedup_low"] <= row["prefill_speedup"] <= row["prefill_speedup_high"]
    assert 0 <= row["decision_share"] < 1 and row["peak_memory_mb"] > 0
    assert row["beats_control"] in (True, False) and row["slower_than_dense"] in (True, False)


def test_a_budget_out_of_reach_is_a_row(rows: Rows) -> None:
    row = rows[-1]
    assert row["status"] == "unreachable" and "keeps at least 2 of 6 layers" in row["note"]
    assert row["quality"] is None and row["prefill_speedup"] is None


def test_controls_have_quality_only(rows: Rows) -> None:
    control = rows[1]
    assert control["quality"] > 0 and control["cells"] is not None
    assert control["prefill_speedup"] is None and control["beats_control"] is None


def test_full_budget_equals_dense(folder: Path) -> None:
    dense, *_, row = run(folder, keep=(1.0,), repeats=0)
    assert row["quality"] == dense["quality"] and row["quality_loss_pct"] == 0
    assert row["beats_control"] is False  # so do its controls
    assert row["prefill_speedup"] is None


@pytest.mark.parametrize(
    "random, uniform, quality, beats",
    [
        ((3.0, 3.2, 3.4), (3.1,), 2.9, True),
        ((3.0, 3.2, 3.4), (3.1,), 3.05, False),  # inside the spread of 0.2
        ((3.0, 3.2, 3.4), (2.8,), 2.9, False),  # uniform is better
        ((3.0, 3.2, 3.4), (2.9,), 2.9, True),  # uniform is as good
        ((3.0, 3.0, 3.0), (), 3.0, False),
        ((), (2.0,), 1.0, None),
    ],
)
def test_beating_a_control(
    reader: Loaded, random: tuple[float, ...], uniform: tuple[float, ...], quality: float, beats: bool | None
) -> None:
    store = Store(None, {})
    for kind, values in (("random", random), ("uniform", uniform)):
        for value in values:
            store.add(BLANK | {"spec": "m", "keep": 0.5, "control": kind, "quality": value})
    store.add(BLANK | {"spec": "m", "keep": 0.5, "control": "random", "status": "failed"})
    store.add(BLANK | {"spec": "m", "keep": 0.25, "control": "random", "quality": 0.0})
    comparison = module._Comparison(reader, tasks.Text(reader, TEXT), store, None, {})  # type: ignore[arg-type]
    assert comparison._beats(BLANK | {"spec": "m", "keep": 0.5, "quality": quality}) is beats


def test_a_failing_method_is_a_row_and_the_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = UnifiedLayerSkipping.before_layer

    def broken(self: UnifiedLayerSkipping, stream: Any, layer: int) -> None:
        if self.S == 1.5:
            raise RuntimeError("a fault\nin two lines")
        whole(self, stream, layer)

    monkeypatch.setattr(UnifiedLayerSkipping, "before_layer", broken)
    rows = run(
        folder, tmp_path / "out", methods=["unified-layer-skipping"], keep=(2 / 3, 0.5), controls=False, repeats=0
    )
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert rows[1]["note"] == "RuntimeError: a fault" and rows[1]["quality"] is None
    assert "in two lines" in (tmp_path / "out" / "errors.log").read_text()


def test_a_number_that_is_none_is_a_failure(folder: Path, reader: Loaded) -> None:
    task = tasks.Text(reader, TEXT)
    task.evaluate = lambda model, run=None, limit=None, progress=None: math.nan if run else 2.0  # type: ignore[method-assign]
    rows = compare(
        reader.model,
        task,
        ["unified-layer-skipping"],
        [0.5],
        repeats=1,
        processor=reader.tokenizer,
        controls=False,
        progress=False,
    )
    assert rows[1]["status"] == "failed" and "bits_per_byte is nan" in rows[1]["note"]


def test_the_model_is_left_as_it_was(reader: Loaded) -> None:
    before = {key: value.clone() for key, value in reader.model.state_dict().items()}
    reader.model.train()
    compare(
        reader.model,
        tasks.Text(reader, TEXT),
        [parse("unified-layer-skipping:S=2")],
        [0.5],
        limit=1,
        repeats=1,
        processor=reader.tokenizer,
        progress=False,
    )
    reader.model.eval()
    assert all(torch.equal(value, before[key]) for key, value in reader.model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------- images


def test_visual_methods_have_the_oracle_beside_them(viewer: Loaded) -> None:
    rows = compare(
        viewer.model,
        tasks.FindDigit(viewer, batch=4),
        ["fastv:K=2"],
        [0.5],
        limit=4,
        repeats=1,
        processor=viewer.given,
        progress=False,
    )
    kinds = [row["control"] for row in rows]
    assert kinds == [None, "random", "random", "random", "uniform", "oracle", None]
    row = rows[-1]
    assert all(row["cells"] == pytest.approx(0.5, abs=0.01) for row in (*rows[1:6], row))
    assert row["phase"] == "prefill" and row["bound"] == row["flop_bound"] > 1.2
    assert row["status"] == "ok" and row["peak_memory_mb"] < rows[0]["peak_memory_mb"]


def test_down_sampling_is_measured_once_a_budget(
    viewer: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model that may see pictures of any size: a smaller one is a rival of dropped tokens."""
    lines = []
    for index in range(2):
        scene, colour = digits.scene("test", index), digits.COLOURS[index]
        Image.fromarray(scene.image).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "question": colour, "answer": scene.answer(colour)}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    asked = []
    original = tasks.Vqa.downsampled
    monkeypatch.setattr(tasks.Vqa, "downsampled", lambda self, keep: asked.append(keep) or original(self, keep))
    rows = compare(
        viewer.model,
        f"vqa:{tmp_path}/questions.jsonl",
        ["fastv:K=2", "fastv:K=3"],
        [0.5],
        limit=2,
        repeats=0,
        processor=viewer.given,
        progress=False,
    )
    small = [row for row in rows if row["control"] == "downsample"]
    assert len(small) == 2 and small[0]["quality"] == small[1]["quality"] and asked.count(0.5) == 1
    assert all(row["status"] == "ok" for row in rows)


# ------------------------------------------------------------------------------------------------------------ surgery


@pytest.fixture(scope="module")
def cut(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    (folder / "other.txt").write_text(TEXT[::-1] * 5)
    out = tmp_path_factory.mktemp("cut") / "out"
    task = f"ppl:{folder}/text.txt,calibration={folder}/other.txt"
    return out, compare(str(folder), task, ["flap:multiple=1"], [0.6], out=out, limit=3, repeats=1, progress=False)


def test_a_surgery_row_is_about_the_cut_model(cut: tuple[Path, Rows]) -> None:
    _, rows = cut
    row = rows[-1]
    assert [r["status"] for r in rows] == ["ok"] * 6
    assert all(r["cells"] == pytest.approx(0.6, abs=0.1) for r in rows[1:])
    assert row["size_mb"] < 0.9 * row["size_dense_mb"]
    assert row["prefill_flops"] < rows[0]["prefill_flops"] and row["decision_share"] == 0
    assert row["peak_memory_mb"] < rows[0]["peak_memory_mb"]


def test_what_was_fitted_is_kept(cut: tuple[Path, Rows], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rows = cut
    whole = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    (out / "results.jsonl").write_bytes(b"".join(whole[:3]))
    monkeypatch.setattr(Flap, "fit", lambda *_: pytest.fail("fitted again"))
    task = f"ppl:{folder}/text.txt,calibration={folder}/other.txt"
    again = compare(
        str(folder), task, ["flap:multiple=1"], [0.6], out=out, resume=True, limit=3, repeats=1, progress=False
    )
    assert table(again) == table(rows)
    assert sorted(path.name for path in out.iterdir()) == ["fitted", "results.jsonl", "run.json"]


def test_a_fitted_folder_is_a_method(cut: tuple[Path, Rows], folder: Path) -> None:
    out, rows = cut
    fitted = out / "fitted" / "flap_multiple=1"
    again = run(folder, methods=[str(fitted)], keep=[0.6], repeats=0)
    named = run(folder, methods=["flap:multiple=1"], keep=[0.6], repeats=0, fitted={"flap": fitted})
    assert again[-1]["quality"] == named[-1]["quality"] == rows[-1]["quality"]


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    out = tmp_path_factory.mktemp("runs") / "out"
    return out, run(folder, out, repeats=0)


def test_the_file_holds_the_rows(finished: tuple[Path, Rows]) -> None:
    out, rows = finished
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == rows


def test_resuming_a_finished_run_computes_nothing(
    folder: Path, finished: tuple[Path, Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = finished
    monkeypatch.setattr(tasks.Text, "evaluate", lambda *_: pytest.fail("evaluated again"))
    assert run(folder, out, repeats=0, resume=True) == rows


@pytest.mark.parametrize("lines, torn", [(0, 0), (1, 0), (2, 20), (5, 1), (5, 100)])
def test_a_torn_file_is_mended(
    folder: Path, finished: tuple[Path, Rows], tmp_path: Path, lines: int, torn: int
) -> None:
    out, rows = finished
    whole = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "run.json").write_text((out / "run.json").read_text())
    (copy / "results.jsonl").write_bytes(b"".join(whole[:lines]) + whole[lines][:torn])
    again = run(folder, copy, repeats=0, resume=True)
    assert again[:lines] == rows[:lines] and table(again) == table(rows)
    assert [json.loads(line) for line in (copy / "results.jsonl").read_text().splitlines()] == again


def test_a_killed_run_ends_in_the_same_table(folder: Path, finished: tuple[Path, Rows], tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import sys, torch; from sparing.bench.compare import compare; f, out = sys.argv[1:]\n"
        "torch.set_num_threads(1)\n"
        "given = dict(out=out, limit=3, repeats=0, progress=False)\n"
        "compare(f, f'ppl:{f}/text.txt', ['unified-layer-skipping'], (0.5,), **given)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(folder), str(out)])
    file = out / "results.jsonl"
    end = time.monotonic() + 240
    while (not file.exists() or file.read_bytes().count(b"\n") < 2) and child.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = file.read_bytes().count(b"\n")
    rows = run(folder, out, repeats=0, resume=True)
    assert before >= 2 and table(rows) == table(finished[1])


def test_a_folder_of_another_run_is_refused(folder: Path, finished: tuple[Path, Rows], tmp_path: Path) -> None:
    out, _ = finished
    with pytest.raises(Error, match="pass --resume"):
        run(folder, out, repeats=0)
    with pytest.raises(Error, match=r"another run \(limit 3, now 2\)"):
        run(folder, out, repeats=0, limit=2, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Error, match="not empty"):
        run(folder, tmp_path)


def test_what_cannot_be_is_refused_before_any_work(
    folder: Path, finished: tuple[Path, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.Text, "evaluate", lambda *_: pytest.fail("work was done"))
    for share in (0, 1.5, -0.1, math.nan):
        with pytest.raises(Error, match=f"keep = {share}"):
            run(folder, keep=[0.5, share])
    with pytest.raises(Error, match=r"fastv.*reads text only"):
        run(folder, methods=["fastv"])
    with pytest.raises(Error, match="unified-layer-skipping"):
        run(folder, methods=["unified-layer-skiping"])
    with pytest.raises(Error, match="no field 'T'"):
        run(folder, methods=["unified-layer-skipping:T=2"])
    with pytest.raises(Error, match="cannot be written"):
        run(folder, finished[0] / "results.jsonl" / "below")
    with pytest.raises(Error, match="control_seeds = 2"):
        run(folder, control_seeds=2)
    with pytest.raises(Error, match="limit = 0"):
        run(folder, limit=0)
    with pytest.raises(Error, match="methods = "):
        run(folder, methods=[])
    with pytest.raises(Error, match="no checkpoint there"):
        run(tmp_path)


def test_models_that_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match="dtype = 'int3'"):
        load_model(str(folder), dtype="int3")
    with pytest.raises(Error, match="device = 'warp'"):
        load_model(str(folder), device="warp")
    assert load_model(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(Error):
        load_model(str(tmp_path))

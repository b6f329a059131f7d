"""Where the commands write: nothing of somebody's is lost, and `--overwrite` replaces all or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import sparing
from sparing import cli
from sparing.engine import checkpoint as checkpoints
from sparing.testing.models import build
from tests.grid.test_folders import tree
from tests.test_cli import checkpoint, refused, run, text  # noqa: F401  fixtures

ULS = "unified-layer-skipping"


@pytest.fixture
def sharded(checkpoint: Path, tmp_path: Path) -> Path:  # noqa: F811
    """Somebody's only copy of a model: in several files, with an index and notes beside them."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "mine" / "model"))
    (folder / "model.safetensors").unlink()
    build("llama").save_pretrained(folder, max_shard_size="60KB")
    (folder / "notes.txt").write_text("years of work")
    return folder


COMMANDS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "compare": lambda model, data, out: ["compare", model, "-t", f"ppl:{data}", "-m", ULS, "-k", 0.5, "-o", out],
    "fit": lambda model, data, out: ["fit", model, "-m", "flap", "-d", data, "-o", out],
    "fit --keep": lambda model, data, out: ["fit", model, "-m", ULS, "-d", data, "-k", 0.5, "-o", out],
    "prune": lambda model, data, out: ["prune", model, "-m", "magnitude-sp", "-k", 0.5, "-o", out],
    "search": lambda model, data, out: ["search", model, "-d", data, "--params", 0.7, "-o", out],
    "lab train": lambda model, data, out: ["lab", "train", "lm", "--minutes", 0, "-o", out],
    "lab train --fresh": lambda model, data, out: ["lab", "train", "lm", "--minutes", 0, "--fresh", "-o", out],
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for a search."""
    file = tmp_path_factory.mktemp("words") / "words.txt"
    file.write_text(" ".join(f"w{(7 * i * i) % 100}" for i in range(8300)))
    return file


@pytest.mark.parametrize("command", COMMANDS)
def test_nobody_writes_into_a_checkpoint(command: str, sharded: Path, words: Path, tmp_path: Path) -> None:
    """Neither MODEL itself nor another folder."""
    before = tree(tmp_path)
    result = run(*COMMANDS[command](sharded, words, sharded))
    refused(result, str(sharded), "a checkpoint (config.json,", "take another folder")
    assert tree(tmp_path) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("all of it")
    refused(run(*COMMANDS[command](sharded, words, tmp_path / "other")), "thesis.txt", "take another folder")
    assert tree(tmp_path) == before | {"other/thesis.txt": b"all of it"}


@pytest.mark.parametrize("command", ["fit", "fit --keep", "prune"])
def test_it_is_refused_before_the_model_is_loaded(command: str, sharded: Path, words: Path) -> None:
    result = run(*COMMANDS[command](Path("no/such-model"), words, sharded))
    refused(result, "a checkpoint", "or --overwrite to replace all that it holds")
    assert "no/such-model" not in result.stderr


# --------------------------------------------------------------------------- prune


def test_prune_in_place_with_overwrite(sharded: Path) -> None:
    """All that was there is gone, the index too, and what is there is whole."""
    result = run("prune", sharded, "-m", "magnitude-sp", "-k", 0.5, "-o", sharded, "--overwrite")
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in sharded.iterdir())
    assert [name for name in names if "index" in name or "notes" in name or "-0000" in name] == []
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    model = sparing.from_pretrained(sharded)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, model.config.vocab_size)
    assert [path.name for path in sharded.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_prune_leaves_the_old_model(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    before = tree(sharded)

    def card(*_: Any) -> str:
        raise problem

    monkeypatch.setattr(checkpoints, "_model_card", card)
    result = run("prune", sharded, "-m", "magnitude-sp", "-k", 0.5, "-o", sharded, "--overwrite")
    assert result.exit_code == (130 if isinstance(problem, KeyboardInterrupt) else 2), result.output
    assert tree(sharded) == before and [path.name for path in sharded.parent.iterdir()] == ["model"]
    assert "--resume" not in result.stderr  # which prune has not


def test_overwrite_takes_no_input_away(sharded: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    prune = ["prune", sharded, "-m", "magnitude-sp", "-k", 0.5, "--overwrite"]
    refused(run(*prune, "-o", sharded.parent), f"--out {sharded.parent}: to replace it would take {sharded} away")
    fitted = sparing.parse("magnitude-sp").save(tmp_path / "fits" / "method")
    (tmp_path / "fits" / "data.txt").write_text("w1 w2")
    prune[3] = fitted
    refused(run(*prune, "-o", fitted.parent), f"would take {fitted} away")
    prune[3:4] = ["flap", "-d", fitted.parent / "data.txt"]
    refused(run(*prune, "-o", fitted.parent), "data.txt away")
    assert {name for name in tree(tmp_path) if not name.startswith("fits")} == set(before)


def test_prune_says_what_it_counts(checkpoint: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    result = run("prune", checkpoint, "-m", "magnitude-sp", "-k", 0.5, "-o", tmp_path / "small")
    assert result.exit_code == 0, result.output
    dense, small = (sparing.from_pretrained(folder) for folder in (checkpoint, tmp_path / "small"))
    counts = [[sum(p.numel() for p in part.parameters()) for part in (m.model.layers, m)] for m in (dense, small)]
    for place, name in enumerate(("parameters of the layers", "all parameters")):
        was, now = counts[0][place], counts[1][place]
        assert f"{name}".ljust(24) + f"  {was:,}" in result.stdout and f"{now:,}" in result.stdout
        assert f"{now / was:.1%}" in result.stdout
    assert "--keep 0.5 is of the parameters of the layers; embeddings, head and vision tower stay" in result.stdout
    assert "keep = 0.5 of the parameters of the layers" in (tmp_path / "small" / "README.md").read_text()
    result = run("prune", checkpoint, "-m", "shortgpt", "-d", text, "-k", 0.5, "-o", tmp_path / "few")
    assert result.exit_code == 0 and "--keep 0.5 is of the layers;" in result.stdout, result.output
    assert "keep = 0.5 of the layers" in (tmp_path / "few" / "README.md").read_text()


# --------------------------------------------------------------------------- fit


def test_a_fit_is_not_lost_to_another(checkpoint: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    fit = ["fit", checkpoint, "-d", text, "--batches", 1, "-o", tmp_path / "m", "-m"]
    assert run(*fit, "flap").exit_code == 0
    before = tree(tmp_path)
    refused(run(*fit, "flap"), "holds a fitted method (method.json, state.safetensors)", "--overwrite")
    refused(run(*fit, "wanda-sp"), "holds a fitted method", "--overwrite")
    refused(run(*fit, "wanda-sp", "--resume"), "holds a fitted method", "--overwrite")
    refused(run(*fit, ULS, "--keep", 0.5), "holds a fitted method", "--overwrite")
    again = run(*fit, "flap", "--resume")  # finished
    assert again.exit_code == 0 and "fitted numbers" not in again.stdout
    assert tree(tmp_path) == before
    assert run(*fit, "wanda-sp", "--overwrite").exit_code == 0
    assert sparing.load(tmp_path / "m").name == "wanda-sp"


def test_fits_by_budget(checkpoint: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "m"
    fit = ["fit", checkpoint, "-d", text, "--batches", 1, "-o", out, "-m"]
    assert run(*fit, ULS, "--keep", "0.5").exit_code == 0
    first = tree(out)
    refused(
        run(*fit, ULS, "--keep", "0.75,0.5"), f"holds {ULS} fitted at keep = 0.5 already", "--resume", "--overwrite"
    )
    refused(run(*fit, "skipdecode", "--keep", "0.75"), "keep-0.5", "--overwrite")
    refused(run(*fit, ULS), "keep-0.5", "--overwrite")  # would hide them: one fit for all budgets
    assert tree(out) == first
    assert run(*fit, ULS, "--keep", "0.75").exit_code == 0
    assert tree(out).items() > first.items()
    assert run(*fit, ULS, "--keep", "0.75", "--lr", 0.1, "--overwrite").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["keep-0.5", "keep-0.75"]
    (out / "notes.txt").write_text("mine")
    refused(run(*fit, ULS, "--keep", "1"), "holds notes.txt; take another folder, or --overwrite")
    assert run(*fit, ULS, "--keep", "1", "--overwrite").exit_code == 0
    assert sorted(tree(out)) == ["keep-1/method.json", "keep-1/state.safetensors"]


# --------------------------------------------------------------------------- report, show


@pytest.fixture(scope="module")
def compared(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--task", f"ppl:{text}", "-m", ULS, "-k", 0.5, "--repeats", 0, "--limit", 1, "--no-controls"]
    result = run("compare", checkpoint, *arguments, "-o", out)
    assert result.exit_code == 0, result.output
    return out


def _report(run_: Path, out: Path, *more: object) -> Result:
    return run("report", run_, "-o", out, *more)


def test_a_report_goes_to_its_own_folder(compared: Path, tmp_path: Path, sharded: Path) -> None:
    """A new one, that of an earlier report, that of a run, or one that holds runs; nowhere else."""
    here = Path(shutil.copytree(compared, tmp_path / "demo" / "run"))
    for out in (tmp_path / "demo", tmp_path / "demo", here, tmp_path / "new", tmp_path / "new"):
        assert _report(here, out).exit_code == 0
        assert (out / "report.html").is_file() and (here / "results.jsonl").is_file()
    before = tree(tmp_path)
    refused(_report(here, sharded), "holds a checkpoint", "--overwrite")
    searched = tmp_path / "searched"
    searched.mkdir()
    for name, content in (("search.json", "{}"), ("report.html", "<title>sparing: x</title>")):
        (searched / name).write_text(content)
    refused(_report(here, searched), "holds a search")
    (searched / "search.json").unlink()
    (searched / "report.html").write_text("<title>My holidays</title>")
    refused(_report(here, searched), "holds report.html")
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("searched")} == before
    (searched / "diary.txt").write_text("mine")
    result = _report(here, searched, "--overwrite")
    assert result.exit_code == 0 and not (searched / "diary.txt").exists(), result.output
    assert result.stdout.splitlines()[-1].endswith(str(searched / "report.html"))
    assert "holidays" not in (searched / "report.html").read_text()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    (tmp_path / "demo" / "report.html").unlink()
    refused(_report(here, tmp_path / "demo", "--overwrite"), f"would take {here} away")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture_replaces_a_picture_of_ours_and_no_other(checkpoint: Path, tmp_path: Path, suffix: str) -> None:  # noqa: F811
    out = tmp_path / f"map{suffix}"
    show = ["show", checkpoint, "-m", ULS, "-t", f"ppl:{__file__}", "-o", out]
    out.write_bytes(b"a photograph")
    refused(run(*show), f"--out {out}: is there and no picture of sparing's; take another name, or --overwrite")
    assert out.read_bytes() == b"a photograph"
    for more in (["--overwrite"], [], ["--keep", 0.5]):
        before = out.read_bytes()
        result = run(*show, *more)
        assert result.exit_code == 0, result.output
    assert out.read_bytes() != before and [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_second_picture_is_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "map-kept.png").write_bytes(b"a photograph")
    show = ["show", "lab:vlm", "-m", "fastv", "-o", tmp_path / "map.png"]
    refused(run(*show), "map-kept.png: is there and no picture of sparing's")
    assert [path.name for path in tmp_path.iterdir()] == ["map-kept.png"]


# --------------------------------------------------------------------------- lab train


def test_a_training_of_the_lab_goes_on_in_its_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(
        cli, "_lab", lambda name: type("Lab", (), {"train": staticmethod(lambda out, *, resume: calls.append(out))})
    )
    for name in ("checkpoint.pt", "progress.json"):
        (tmp_path / name).write_text(json.dumps({}))
    assert run("lab", "train", "lm", "-o", tmp_path).exit_code == 0 and calls == [tmp_path]
    (tmp_path / "checkpoint.pt").unlink()
    refused(
        run("lab", "train", "lm", "-o", tmp_path),
        "holds no training of a lab model; take another folder: this one holds progress.json",
    )

"""`sparing fit` and `sparing search` end to end: fits by budget, unfinished trainings, and mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import Result

import sparing
from sparing.bench.compare import compare
from sparing.depth.unified_layer_skipping import UnifiedLayerSkipping
from sparing.engine import train
from sparing.grid.method import load_fits
from sparing.testing.models import build
from tests.test_cli import WORDS, refused, run

ULS = "unified-layer-skipping"


@pytest.fixture(scope="module", autouse=True)
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text model with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("checkpoint")
    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<unk>", *WORDS])}
    coded = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    coded.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    build("llama").save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=coded, pad_token="<pad>", bos_token="<bos>").save_pretrained(folder)
    return folder


def _text(folder: Path, words: int) -> Path:
    file = folder / f"{words}.txt"
    file.write_text(" ".join(WORDS[(7 * i * i) % 100] for i in range(words)))
    return file


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One batch of two pieces of 512 words."""
    return _text(tmp_path_factory.mktemp("text"), 1100)


@pytest.fixture(scope="module")
def fitted(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Trained at two budgets, and what the command said."""
    out = tmp_path_factory.mktemp("fitted") / "uls"
    return out, _fit(checkpoint, text, out, "--keep", "0.75,0.5")


def _fit(checkpoint: Path, text: Path, out: Path, *more: object) -> Result:
    return run("fit", checkpoint, "--method", ULS, "--data", text, "--out", out, "--epochs", 2, "--lr", 1e-3, *more)


# --------------------------------------------------------------------------- fits by budget


def test_every_budget_has_a_fit_of_its_own(fitted: tuple[Path, Result]) -> None:
    out, result = fitted
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["keep-0.5", "keep-0.75"]
    fits: dict[float, Any] = load_fits(out)
    assert set(fits) == {0.5, 0.75}
    assert [len(fits[keep].layer_set(6)) for keep in (0.5, 0.75)] == [3, 4]
    name = "weight.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(fits[0.5].state[name], fits[0.75].state[name])
    lines = result.stdout.splitlines()
    assert [f"{ULS} at keep = {keep}" in line for keep, line in zip(("0.75", "0.5"), lines)] == [True, True]
    assert all(line.endswith(f"--method {out}") for line in lines[:2]) and lines[2:] == [str(out)]


def test_compare_runs_each_budget_with_its_own_fit(
    fitted: tuple[Path, Result], checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a budget without a fit becomes a row that says the command that makes one."""
    from sparing.bench import compare as comparing

    used = []
    real = comparing.Work.ready

    def ready(self: Any, spec: str, method: Any, keep: float) -> Any:
        used.append(real(self, spec, method, keep))
        return used[-1]

    monkeypatch.setattr(comparing.Work, "ready", ready)
    out, _ = fitted
    rows = compare(
        str(checkpoint), f"ppl:{text}", [out], (0.75, 0.5, 0.25), repeats=0, limit=1, controls=False, progress=False
    )
    fits = load_fits(out)
    assert [method.fields() for method in used] == [fits[keep].fields() for keep in (0.75, 0.5)]
    for method, keep in zip(used, (0.75, 0.5)):
        assert all(torch.equal(method.state[k], v) for k, v in fits[keep].state.items())
    got = {row["keep"]: row for row in rows if row["method"] == ULS}
    assert [got[keep]["status"] for keep in (0.75, 0.5, 0.25)] == ["ok", "ok", "unreachable"]
    assert got[0.25]["note"] == f"keep = 0.25: {out} was fitted at 0.5, 0.75; sparing fit --keep 0.25 adds it"
    assert got[0.75]["quality"] != got[0.5]["quality"]


def test_the_command_takes_the_folder(
    fitted: tuple[Path, Result], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ["--task", f"ppl:{text}", "--method", fitted[0], "--keep", "0.5,0.25", "--repeats", 0, "--limit", 1]
    result = run("compare", checkpoint, *arguments, "--no-controls", "--out", tmp_path / "c")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "c" / "results.jsonl").read_text().splitlines()]
    assert {(row["keep"], row["status"]) for row in rows if row["method"] == ULS} == {
        (0.5, "ok"),
        (0.25, "unreachable"),
    }
    assert "sparing fit --keep 0.25 adds it" in (tmp_path / "c" / "report.html").read_text()
    assert "No pictures" not in result.stderr and any((tmp_path / "c").glob("map-*.svg"))


def test_lots_that_had_to_be_trained_are_not_run_twice(
    fitted: tuple[Path, Result], checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UnifiedLayerSkipping, "draws", 1)
    rows = compare(str(checkpoint), f"ppl:{text}", [fitted[0]], (0.5,), repeats=0, limit=1, progress=False)
    assert [row["seed"] for row in rows if row["control"] == "random"] == [0]
    assert len([row for row in rows if row["control"] == "uniform"]) == 1


def test_resume_fits_what_is_missing_and_nothing_else(
    fitted: tuple[Path, Result], checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = fitted
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    kept: list[float] = []
    real = train.finetune
    monkeypatch.setattr(
        "sparing.depth.unified_layer_skipping.finetune",
        lambda model, method, *args, **more: kept.append(method.S) or real(model, method, *args, **more),
    )
    result = _fit(checkpoint, text, out, "--keep", "0.75,1,0.5", "--resume")
    assert result.exit_code == 0, result.output
    assert kept == [1.0] and set(load_fits(out)) == {0.5, 0.75, 1.0}
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_budget_out_of_reach_costs_no_training(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = _fit(checkpoint, text, tmp_path / "out", "--keep", "0.75,0.1")
    refused(result, "keep = 0.1", "at least 2 of 6 layers")
    assert list((tmp_path / "out").iterdir()) == []


# --------------------------------------------------------------------------- unfinished trainings


@pytest.fixture
def stopped(checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ctrl-C in the third step of the second budget's training."""
    real, left = train._Finetuning.forward, [5]

    def forward(self: Any, batch: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(self, batch)

    out, save = tmp_path / "stopped", train._Checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(train._Finetuning, "forward", forward)
        patch.setattr(train._Checkpoint, "save", lambda self, *what, **_: save(self, *what, now=True))
        result = _fit(checkpoint, text, out, "--keep", "0.75,0.5", "--epochs", 3)
    assert result.exit_code == 130 and "--resume" in result.stderr
    return out


def test_an_unfinished_training_is_neither_overwritten_nor_lost(
    stopped: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    assert sorted(path.name for path in stopped.iterdir()) == ["keep-0.75", "training"]
    before = next((stopped / "training").rglob("*.pt")).read_bytes()
    refused(_fit(checkpoint, text, stopped, "--keep", "0.75,0.5", "--epochs", 3), "unfinished training", "--resume")
    assert next((stopped / "training").rglob("*.pt")).read_bytes() == before
    other = _fit(checkpoint, text, stopped, "--keep", "0.5", "--epochs", 4, "--resume")
    refused(other, "is of another training (steps 3, now 4)")
    result = _fit(checkpoint, text, stopped, "--keep", "0.75,0.5", "--epochs", 3, "--resume")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in stopped.iterdir()) == ["keep-0.5", "keep-0.75"]
    whole = tmp_path / "whole"
    assert _fit(checkpoint, text, whole, "--keep", "0.75,0.5", "--epochs", 3).exit_code == 0
    for keep, fit in load_fits(whole).items():
        resumed = load_fits(stopped)[keep].state
        assert all(torch.equal(resumed[name], tensor) for name, tensor in fit.state.items())


def test_a_text_that_is_too_short_is_refused_and_one_that_gives_less_is_named(checkpoint: Path, tmp_path: Path) -> None:
    def fitted(words: int) -> Result:
        return run("fit", checkpoint, "--method", "flap", "--data", _text(tmp_path, words), "--out", tmp_path / "o")

    refused(fitted(500), "500.txt", "500 tokens", "at least 512")
    result = fitted(1100)
    assert result.exit_code == 0 and "enough for 1 of 32 batches" in result.stderr, result.output
    assert "enough for" not in run("fit", checkpoint, "--method", "flap", "--data", _text(tmp_path, 4100), "--out",
                                  tmp_path / "p", "--batches", 1).stderr  # fmt: skip


def test_a_folder_of_the_users_is_not_taken_for_a_training(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Something else that is called training stays, whatever is fitted beside it."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "data.txt").write_text("years of work")
    flap = run("fit", checkpoint, "--method", "flap", "--data", text, "--out", tmp_path)
    refused(flap, f"--out {tmp_path}: holds training; take another folder, or --overwrite")
    refused(_fit(checkpoint, text, tmp_path, "--keep", "0.5"), "unfinished training")
    assert _fit(checkpoint, text, tmp_path, "--keep", "0.5", "--resume").exit_code == 0
    assert _fit(checkpoint, text, tmp_path, "--keep", "0.5", "--resume", "--overwrite").exit_code == 0
    assert (tmp_path / "training" / "data.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keep-0.5", "training"]
    (tmp_path / "keep-0.5").rename(tmp_path.parent / "elsewhere")
    assert _fit(checkpoint, text, tmp_path, "--resume").exit_code == 0
    assert (tmp_path / "method.json").is_file() and (tmp_path / "training" / "data.txt").is_file()


# --------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes(checkpoint: Path, tmp_path: Path) -> None:
    """Three batches, one and one for each process; the command starts its processes itself."""
    text, out = _text(tmp_path, 9000), tmp_path / "out"
    words = [sys.executable, "-m", "sparing", "fit", checkpoint, "--method", f"{ULS}:S=2", "--data", text]
    words += ["--out", out, "--lr", "1e-3", "--processes", "2"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        list(map(str, words)), env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out) and done.stdout.count("fitted numbers") == 1
    assert sorted(path.name for path in out.iterdir()) == ["method.json", "state.safetensors"]
    one, state = build("llama"), sparing.load(out).state
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(state[f"weight.{name}"], dict(one.named_parameters())[name])
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_mistakes_are_found_before_processes_start(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def start(words: list[str], **options: Any) -> None:
        started.append((words, options))

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.delenv("RANK", raising=False)
    two = ("--processes", 2)
    refused(_fit(checkpoint, tmp_path / "gone.txt", tmp_path / "o", *two), "gone.txt", "no such file")
    refused(_fit(checkpoint, text, tmp_path / "o", *two, "--keep", "2"), "--keep 2")
    refused(_fit(checkpoint, text, Path("/proc/nowhere"), *two), "cannot be written to")
    refused(_fit(checkpoint, text, tmp_path / "o", "--processes", 0), "--processes 0: must be at least 1")
    flap = run("fit", checkpoint, "--method", "flap", "--data", text, "--out", tmp_path / "o", *two)
    refused(flap, "--processes 2: flap is calibrated, in one process")
    (tmp_path / "u" / "training").mkdir(parents=True)
    refused(_fit(checkpoint, text, tmp_path / "u", *two), "holds an unfinished training")
    assert not started
    assert _fit(checkpoint, text, tmp_path / "o", *two).exit_code == 0
    (words, options), = started  # fmt: skip
    assert "torch.distributed.run" in words and words[words.index("--nproc_per_node") + 1] == "2"
    assert options["env"]["ACCELERATE_USE_CPU"] == "true"


# --------------------------------------------------------------------------- search


@pytest.fixture(scope="module")
def searched(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path, Result]:
    folder = tmp_path_factory.mktemp("searched")
    arguments: list[object] = ["search", checkpoint, "--data", _text(folder, 8300), "--generations", 1]
    arguments += ["--axes", "depth,width", "--out", folder / "out", "--params", 0.7]
    return arguments, folder / "out", run(*arguments)


def test_search_saves_a_model_and_says_what_it_is(searched: tuple[list[object], Path, Result]) -> None:
    _, out, result = searched
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    for words in ("Target 70% of the params", "Cost by the table", "KL to dense", "Generations 1,"):
        assert words in said
    assert result.stdout.splitlines()[-2:] == [f"Report: {out / 'report.html'}", str(out / "model")]
    model, dense = sparing.from_pretrained(out / "model"), build("llama")
    share = [sum(p.numel() for p in m.model.layers.parameters()) for m in (model, dense)]
    assert 0.6 < share[0] / share[1] <= 0.7
    assert PreTrainedTokenizerFast.from_pretrained(out / "model").vocab_size == 103


def test_a_finished_search_is_not_done_again(
    searched: tuple[list[object], Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparing.grid.search import Evolution

    arguments, out, first = searched
    monkeypatch.setattr(Evolution, "step", lambda self: pytest.fail("searched again"))
    weights = (out / "model" / "model.safetensors").read_bytes()
    again = run(*arguments, "--resume")
    assert again.exit_code == 0, again.output
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    kl = [next(line.split() for line in r.stdout.splitlines() if "KL" in line) for r in (first, again)]
    assert kl[0] == kl[1]
    refused(run(*arguments), str(out), "holds this search already; pass --resume")
    refused(run(*arguments, "--resume", "--seed", 3), "holds another search", "seed 0, now 3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ("--speedup, --flops, --params: give one target, not none of them",)),
        (["--speedup", 1.5, "--params", 0.5], ("give one target, not --speedup 1.5, --params 0.5",)),
        (["--speedup", 0.5], ("speedup = 0.5: must be at least 1",)),
        (["--speedup", "nan"], ("speedup = nan: must be at least 1",)),
        (["--speedup", "fast"], ("--speedup", "search --help")),
        (["--params", 0], ("params = 0: must be in (0, 1]",)),
        (["--flops", 2], ("flops = 2: must be in (0, 1]",)),
        (["--params", 0.5, "--generations", -1], ("--generations -1: must be at least 0",)),
        (["--params", 0.5, "--batches", 0], ("--batches 0: must be at least 1",)),
        (["--params", 0.5, "--costs", "gone.json"], ("--costs gone.json: there is no such file",)),
        (["--params", 0.5, "--costs", __file__], ("is not JSON",)),
        (["--params", 0.5, "--data", "gone.txt"], ("--data gone.txt: there is no such file",)),
        (["--params", 0.5, "--data", "/dev"], ("--data /dev: there is no such file",)),
    ],
)
def test_mistakes_of_search_are_found_before_a_model_is_loaded(
    tmp_path: Path, words: list[object], said: tuple[str, ...]
) -> None:
    refused(run("search", "lab:no-such-model", "--out", tmp_path / "out", *words), *said)
    assert not (tmp_path / "out").exists()


def test_other_mistakes_of_search(
    checkpoint: Path, text: Path, searched: tuple[list[object], Path, Result], tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "out"]
    refused(run("search", checkpoint, "--params", 0.5, *out), f"--data: name a text file to judge {checkpoint} on")
    refused(run("search", "lab:lm", "--params", 0.5, "--axes", "experts", "--batches", 1, *out), "experts", "has none")
    refused(run("search", "lab:lm", "--params", 0.5, "--axes", "depth", "--batches", 1, *out), "has 4,096 tokens")
    refused(run("search", "lab:vlm", "--params", 0.5, *out), "--data: name a text file or a .jsonl of questions")
    mine = ["search", checkpoint, "--params", 0.5, *out]
    refused(run(*mine, "--data", text), "calibration data: has 1,024 tokens, the search evaluates on 8,192")
    (tmp_path / "empty.txt").write_text("")
    refused(run(*mine, "--data", tmp_path / "empty.txt"), "has 0 tokens")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    refused(run(*mine, "--data", tmp_path / "bytes.txt"), "cannot be read as UTF-8 text")
    refused(run(*mine, "--data", text, "--axes", "depth,smell"), "axes = 'smell'", "depth, width, experts")
    refused(run(*mine, "--data", text, "--axes", ""), "axes = []")
    refused(run(*mine, "--data", text, "--dtype", "float7"), "float7")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    long = ["--data", searched[0][3]]
    refused(run(*mine, *long), "is not empty and holds no search")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_out_of_reach_and_costs_of_another_model(
    searched: tuple[list[object], Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparing.bench import costs

    arguments, done, _ = searched
    model, data = arguments[1], ["--data", arguments[3]]
    table = done / "costs.json"
    refused(run("search", model, *data, "--params", 0.001, "--out", tmp_path / "a"), "out of reach", "the least is 0.")
    monkeypatch.setattr(costs, "PAIRS", 1)
    monkeypatch.setattr(costs, "CAREFUL", 1)
    fast = run("search", model, *data, "--speedup", 99, "--axes", "depth", "--out", tmp_path / "b")
    refused(fast, "speedup = 99: out of reach on these axes, the largest is ")
    given = ["--costs", table, "--axes", "depth,width"]
    refused(
        run("search", model, *data, "--flops", 0.5, *given, "--out", tmp_path / "c"), "kind = 'params', now 'flops'"
    )
    lab = run("search", "lab:lm", "--batches", 2, "--params", 0.5, *given, "--out", tmp_path / "d")
    refused(lab, "the table has 12 units", "profile this model again")
    assert not (tmp_path / "d").exists()
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(json.loads(table.read_text()) | {"kind": "joules"}))
    refused(run("search", model, *data, "--params", 0.5, "--costs", broken, "--out", tmp_path / "e"), "damaged")
    wider = tmp_path / "wider"  # as many units and levels, another model
    twin: Any = build("llama")
    config = type(twin.config)(**{**twin.config.to_dict(), "hidden_size": 64, "head_dim": 16})
    type(twin)(config).save_pretrained(wider)
    PreTrainedTokenizerFast.from_pretrained(model).save_pretrained(wider)
    refused(
        run("search", wider, *data, "--params", 0.5, *given, "--out", tmp_path / "f"), "measured with parameters = "
    )

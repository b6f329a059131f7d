"""The command line: what it offers, that it works end to end, and that a mistake costs one line and no traceback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.main import get_command
from typer.testing import CliRunner, Result

import sparing
from sparing import cli, lab
from sparing.testing.models import build

WORDS = [f"w{i}" for i in range(100)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread only waits, and on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text model with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("checkpoint")
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<pad>", "<bos>", "<unk>", *WORDS])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    build("llama").save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(WORDS[(7 * i * i) % 100] for i in range(1500)))
    return file


# --------------------------------------------------------------------------- what it offers


def test_the_command_line_is_pinned() -> None:
    """Scripts depend on these: adding is fine, renaming is a breaking change."""

    def options(command: Any) -> set[str]:
        return {name for p in command.params for name in p.opts if name.startswith("--") and name != "--help"}

    root: Any = get_command(cli.app)
    found = {name: options(command) for name, command in root.commands.items() if name != "lab"}
    found |= {f"lab {name}": options(command) for name, command in root.commands["lab"].commands.items()}
    where = {"--device", "--dtype"}
    assert found == {
        "methods": {"--axis", "--json"},
        "compare": {
            "--out",
            "--task",
            "--method",
            "--keep",
            "--sweep",
            "--resume",
            "--seed",
            "--repeats",
            "--limit",
            "--no-controls",
            *where,
        },
        "report": {"--out", "--overwrite"},
        "show": {"--method", "--keep", "--sample", "--task", "--out", "--overwrite", *where},
        "fit": {
            *("--method", "--data", "--out", "--batches", "--epochs", "--lr", "--keep", "--resume", "--processes"),
            *("--seed", "--overwrite", *where),
        },
        "prune": {"--method", "--keep", "--data", "--out", "--batches", "--portable", "--overwrite", "--seed", *where},
        "search": {
            *("--out", "--axes", "--speedup", "--flops", "--params", "--data", "--generations", "--batches"),
            *("--portable", "--costs", "--resume", "--seed", *where),
        },
        "lab list": set(),
        "lab train": {"--out", "--minutes", "--threads", "--fresh"},
        "lab eval": {"--json", "--limit"},
    }


def test_version_and_help() -> None:
    assert run("--version").stdout == f"sparing {sparing.__version__}\n"
    assert run("--help").exit_code == run("compare", "--help").exit_code == 0


def test_methods() -> None:
    everything = json.loads(run("methods", "--json").stdout)
    assert {entry["name"] for entry in everything} == set(sparing.methods())
    fastv = next(entry for entry in everything if entry["name"] == "fastv")
    assert (fastv["axis"], fastv["year"], fastv["arxiv"], fastv["control"]) == ("tokens", 2024, "2403.06764", False)
    table = run("methods", "--axis", "tokens").stdout
    assert "fastv" in table and "2403.06764" in table and "unified-layer-skipping" not in table


# --------------------------------------------------------------------------- mistakes


def refused(result: Result, *words: str) -> None:
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output + said
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--method": "fastvv"}, ("'fastvv'", "did you mean fastv")),
        ({"--method": "fastv:Z=1"}, ("no field 'Z'", "K, R")),
        ({"--method": "fastv:K=0"}, ("K = 0", ">= 1")),
        ({"--keep": "1.5"}, ("--keep 1.5", "(0, 1]")),
        ({"--keep": "0.5,0"}, ("--keep 0", "(0, 1]")),
        ({"--keep": "half"}, ("--keep half", "(0, 1]")),
        ({"--keep": ""}, ("--keep", "(0, 1]")),
        ({"--out": "/proc/nowhere/out"}, ("--out /proc/nowhere/out", "cannot be written")),
        ({"--task": "riddles"}, ("riddles", "find-digit")),
        ({"--task": "ppl:missing.txt"}, ("missing.txt",)),
        ({"--method": "fastv"}, ("fastv", "visual tokens", "text only")),
        ({"--device": "abacus"}, ("abacus",)),
        ({"--dtype": "float7"}, ("float7", "bfloat16")),
        ({"--method": "zzzz"}, ("'zzzz'", "sparing methods")),
        ({"--method": "out/gone"}, ("--method out/gone", "no such folder")),
        ({"--method": "fastv:R=" + "9" * 400}, ("R = 999", "…: must be a number in [0, 1]")),
        ({"--out": f"{__file__}/below"}, (f"--out {__file__}/below", "cannot be written", "Not a directory")),
        ({"--seed": "-1"}, ("--seed -1", "at least 0")),
        ({"--seed": "99999999999"}, ("--seed 99999999999", "at most 4294967295")),
        ({"--limit": "0"}, ("limit = 0", "at least 1")),
        ({"--limit": "few"}, ("--limit", "compare --help")),
        ({"--repeats": "-1"}, ("repeats = -1", "at least 0")),
    ],
)
def test_mistakes_of_compare(checkpoint: Path, tmp_path: Path, changes: dict[str, str], words: tuple[str, ...]) -> None:
    options = {
        "--task": "ppl",
        "--method": "unified-layer-skipping",
        "--keep": "0.5",
        "--out": str(tmp_path / "out"),
    } | changes
    refused(run("compare", checkpoint, *(part for pair in options.items() for part in pair)), *words)


def test_mistakes_are_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    for options in (["--method", "fastvv"], ["--method", "fastv", "--keep", "0"]):
        result = run("compare", "no/such-model", "--task", "ppl", "--out", tmp_path / "out", *options)
        refused(result)
        assert "no/such-model" not in result.stderr


def test_other_mistakes(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    refused(run("compare", empty, "--task", "ppl", "--method", "unified-layer-skipping", "--out", out), "no checkpoint")
    refused(run("methods", "--axis", "smell"), "smell", "tokens")
    refused(
        run("prune", checkpoint, "--method", "flap", "--keep", 0.5, "--out", out), "--data", "flap needs calibration"
    )
    refused(run("prune", checkpoint, "--method", "fastv", "--keep", 0.5, "--out", out), "fastv", "cuts nothing")
    refused(run("fit", checkpoint, "--method", "fastv", "--data", text, "--out", out), "nothing to fit")
    refused(run("fit", checkpoint, "--method", "flap", "--data", "gone.txt", "--out", out), "gone.txt")
    refused(
        run("fit", checkpoint, "--method", "flap", "--epochs", 2, "--data", text, "--out", out),
        "--epochs",
        "calibrated",
    )
    refused(run("show", checkpoint, "--method", "unified-layer-skipping", "-o", tmp_path / "map.gif"), ".png")
    refused(run("show", checkpoint, "--method", empty, "-o", tmp_path / "map.png"), "method.json is missing")
    refused(run("report", empty, "--out", out), "results.jsonl is missing")
    refused(run("lab", "eval", "zebra"), "zebra", *lab.names())


def test_typer_refuses_what_is_missing() -> None:
    refused(run("compare", "lab:lm"), "Missing option '--out'", "compare --help")
    refused(run("compare", "--bogus"), "--bogus")
    refused(run("bogus"), "'bogus'")
    refused(run("lab", "eval", "lm", "--limit", 0), "--limit 0: must be at least 1")
    assert "Usage" in run().output


def test_messages_hold_no_control_characters(tmp_path: Path) -> None:
    (tmp_path / "method.json").write_text('{"method": "\\u001b[2J", "fields": {}}')
    for method in (tmp_path, "\x1b[2Jfastv", "fastv:\x1b[2J=1"):
        result = run("show", "lab:lm", "--method", method, "-o", tmp_path / "map.png")
        refused(result, "[2J")
        assert "\x1b" not in result.stderr


@pytest.mark.slow
def test_a_real_process_shows_one_line_and_no_traceback() -> None:
    command = [
        sys.executable,
        "-m",
        "sparing",
        "compare",
        "lab:lm",
        "--task",
        "ppl",
        "--method",
        "flop",
        "--out",
        os.devnull,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "did you mean flap" in done.stderr and len(done.stderr.splitlines()) == 1


def test_faults_of_the_library_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(axis: str | None) -> None:
        raise ValueError("not the user's fault")

    monkeypatch.setattr(sparing, "methods", broken)
    result = run("methods")
    assert isinstance(result.exception, ValueError) and "not the user's fault" in str(result.exception)


def test_an_interrupt_says_how_to_go_on(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparing.bench import compare

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare", interrupted)
    result = run("compare", checkpoint, "--task", "ppl", "--method", "unified-layer-skipping", "--out", tmp_path)
    assert result.exit_code == 130
    assert "--resume" in result.stderr and "Traceback" not in result.output


# --------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def compared(
    checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], Path, Result]:
    out = tmp_path_factory.mktemp("compared")
    arguments: list[object] = [
        "compare",
        checkpoint,
        "--task",
        f"ppl:{text},calibration={text}",
        "--keep",
        "0.5",
        "--out",
        out,
    ]
    arguments += ["--method", "unified-layer-skipping", "--repeats", 1, "--limit", 2]
    return arguments, out, run(*arguments)


def test_compare_prints_the_table_and_the_path_of_the_report(compared: tuple[list[object], Path, Result]) -> None:
    _, out, result = compared
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith(str(out / "report.html"))
    for word in ("dense", "unified-layer-skipping", "50 %", "verdict"):
        assert word in result.stdout
    page = (out / "report.html").read_text()
    assert "Compute map of unified-layer-skipping" in page and "Budget of each layer" in page
    for name in ("pareto", "controls", "bounds", "map-unified-layer-skipping"):
        assert (out / f"{name}.png").is_file()
    assert (out / "machine.txt").read_text().strip() in page


def test_resume_computes_nothing_and_draws_nothing_again(
    compared: tuple[list[object], Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparing.bench import capture

    arguments, out, first = compared
    before = (out / "results.jsonl").read_bytes()
    monkeypatch.setattr(capture, "_drawn", lambda *_: pytest.fail("drawn again"))
    again = run(*arguments, "--resume")
    assert again.exit_code == 0 and again.stdout == first.stdout and again.stderr == ""
    assert (out / "results.jsonl").read_bytes() == before
    refused(run(*arguments), "--resume")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"method": "dense", "ke', "is not JSON"),
        (b"5", "must hold a JSON object, holds int"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"{}", "keep = None: must be a number"),
        (b'{"method": "x", "keep": 0.5, "quality": "good"}', "quality = 'good': must be a number"),
        (b'{"method": "x", "keep": NaN, "status": "failed"}', "keep = nan: must be a number"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_a_damaged_run_is_named_by_its_line(
    compared: tuple[list[object], Path, Result], tmp_path: Path, line: bytes, complaint: str
) -> None:
    arguments, out, _ = compared
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    again = [copy if part == out else part for part in arguments]
    rows = (out / "results.jsonl").read_bytes().splitlines()
    file = copy / "results.jsonl"
    file.write_bytes(b"\n".join([rows[0], line, *rows[2:]]) + b"\n")
    for result in (run("report", copy, "--out", tmp_path / "r"), run(*again, "--resume")):
        refused(result, f"{file}: line 2: {complaint}", "damaged")
    if line == b"{}":
        file.write_bytes(b"\n".join([*rows, line]))  # what a kill left
        assert run("report", copy, "--out", tmp_path / "r").exit_code == 0
    file.write_bytes(line)
    refused(run("report", copy, "--out", tmp_path / "r"), "no finished row")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_run_json(compared: tuple[list[object], Path, Result], tmp_path: Path, content: bytes) -> None:
    arguments, out, _ = compared
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    (copy / "run.json").write_bytes(content)
    (copy / "machine.txt").write_bytes(b"\xff")
    again = [copy if part == out else part for part in arguments]
    refused(run(*again, "--resume"), str(copy), "run.json", "damaged", "another folder")
    if content == b"{":  # the report reads the rows
        assert run("report", copy, "--out", tmp_path / "r").exit_code == 0


def test_the_folder_of_another_run(compared: tuple[list[object], Path, Result]) -> None:
    arguments, out, _ = compared
    refused(run(*arguments, "--seed", 3, "--resume"), str(out), "holds another run", "seed 0, now 3")
    refused(run(*arguments[:-2], "--limit", 9), str(out), "holds another run", "limit 2, now 9")


def test_a_comparison_without_a_result_ends_in_1(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """What failed or did nothing is named in one line beside the report; what is out of reach is no fault."""
    about = ["-t", f"ppl:{text}", "--repeats", 0, "--limit", 1, "--no-controls"]
    mine = ["compare", checkpoint, *about, "-m", "unified-layer-skipping"]
    result = run(*mine, "-k", "0.95,0.5", "-o", tmp_path / "a")
    assert result.exit_code == 1 and result.stdout.splitlines()[-1].endswith("report.html")
    assert result.stderr == "Exit code 1: inert, which is no result: unified-layer-skipping at 95 %.\n"
    assert (tmp_path / "a" / "map-unified-layer-skipping.svg").read_text().count("keep 95 %") == 0
    again = run(*mine, "-k", "0.95,0.5", "-o", tmp_path / "a", "--resume")
    assert (again.exit_code, again.stderr) == (1, result.stderr)
    assert run(*mine, "-k", "0.5,0.1", "-o", tmp_path / "b").exit_code == 0
    result = run(*mine, "-k", "0.1", "-o", tmp_path / "c")
    assert result.exit_code == 1 and "nothing but the dense model was measured" in result.stderr
    assert run("report", tmp_path / "a", "-o", tmp_path / "d").exit_code == 0


def test_an_empty_calibration_text(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    told = "0 tokens; at least 512, one piece of text, are needed"
    task = f"ppl:{text},calibration={empty}"
    refused(run("compare", checkpoint, "-t", task, "-m", "flap", "-o", tmp_path / "a"), "calibration text has", told)
    refused(run("prune", checkpoint, "-m", "flap", "-k", 0.5, "-d", empty, "-o", tmp_path / "b"), str(empty), told)


def test_report_gathers_runs(compared: tuple[list[object], Path, Result], tmp_path: Path) -> None:
    result = run("report", compared[1], "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Compute map of unified-layer-skipping" in (tmp_path / "report.html").read_text()


def test_show(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    result = run(
        "show", checkpoint, "--method", "unified-layer-skipping", "--keep", 0.5, "--task", f"ppl:{__file__}", "-o", out
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(out)]
    assert out.read_bytes().startswith(b"\x89PNG")
    refused(
        run("show", checkpoint, "-m", "unified-layer-skipping", "--sample", 99, "-t", f"ppl:{__file__}", "-o", out),
        "sample: 99",
    )


def test_fit_then_show_and_prune(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    fitted, small = tmp_path / "fitted", tmp_path / "small"
    result = run("fit", checkpoint, "--method", "flap", "--data", text, "--batches", 2, "--out", fitted)
    assert result.exit_code == 0, result.output
    assert sparing.load(fitted).state
    result = run(
        "show", checkpoint, "--method", fitted, "--keep", 0.5, "--task", f"ppl:{text}", "-o", tmp_path / "map.svg"
    )
    assert result.exit_code == 0, result.output
    assert "50 %" in (tmp_path / "map.svg").read_text()
    result = run("prune", checkpoint, "--method", fitted, "--keep", 0.5, "--out", small)
    assert result.exit_code == 0, result.output
    assert "parameters" in result.stdout and result.stdout.splitlines()[-1] == str(small)
    card = (small / "README.md").read_text()
    for word in ("flap", "2312.11983", "keep = 0.5", str(fitted)):
        assert word in card
    model = sparing.from_pretrained(small)
    dense = build("llama")
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, dense.config.vocab_size)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ("line 2: not JSON",)),
        ("[" * 100_000, ("line 2: not JSON",)),
        ('{"image": "a.png"}', ("line 2", "no question and no answer")),
        ('{"image": 1, "question": "q", "answer": "a"}', ("line 2: image = 1: must be text",)),
        ('{"image": "a.png", "question": "q", "answer": []}', ("line 2: answer = []: must be text or a list",)),
        ('{"image": "gone.png", "question": "q", "answer": "a"}', ("line 2: gone.png", "no such file")),
        (
            '{"image": "q.jsonl", "question": "q", "answer": "a"}',
            ("line 2: q.jsonl", "opened as an image (it is none)"),
        ),
        ('{"image": ".", "question": "q", "answer": "a"}', ("line 2: .", "no such file")),
        ('{"image": "a\\u0000", "question": "q", "answer": "a"}', ("line 2", "cannot be opened")),
    ],
)
def test_a_broken_line_of_questions(tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "q.jsonl"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = json.dumps({"image": str(tmp_path / "a.png"), "question": "one\u2028line", "answer": ["a", 7]})
    file.write_text(f"{good}\n{line}\n", encoding="utf-8")
    result = run("show", "lab:vlm", "--method", "fastv", "--task", f"vqa:{file}", "-o", tmp_path / "map.png")
    refused(result, str(file), *words)


def test_folders_from_strangers(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Each is refused by its own words in tests/test_hostile.py; here: one line, and every command."""
    fitted, broken, out = tmp_path / "fitted", tmp_path / "broken", tmp_path / "out"
    state = {f"weight.{name}": tensor for name, tensor in build("llama").named_parameters()}
    sparing.parse("unified-layer-skipping").with_state(state).save(fitted)
    (fitted / "state.safetensors").write_bytes((fitted / "state.safetensors").read_bytes()[:-9])
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    task, method, picture = f"ppl:{text}", "unified-layer-skipping", tmp_path / "map.png"
    for model, chosen, word in ((checkpoint, fitted, "state.safetensors"), (broken, method, "pytorch_model.bin")):
        refused(run("compare", model, "--task", task, "--method", chosen, "--out", out), word)
        refused(run("show", model, "--task", task, "--method", chosen, "-o", picture), word)
        refused(run("fit", model, "--method", chosen, "--data", text, "--out", out), word)
    refused(run("prune", broken, "--method", "flap", "--keep", 0.5, "--data", text, "--out", out), "pytorch_model.bin")
    sparing.parse(method).with_state({"weight.model.norm.weight": torch.ones(7)}).save(fitted)
    result = run("show", checkpoint, "--task", task, "--method", fitted, "-o", picture)
    refused(result, "trained on another model", "weight.model.norm.weight is 7", "has 32")


# --------------------------------------------------------------------------- lab


def test_lab_list() -> None:
    shown = run("lab", "list").stdout
    assert "lab:lm" in shown and "lab:vlm" in shown


def test_lab_eval_measures_the_real_models() -> None:
    result = json.loads(run("lab", "eval", "moe", "--json", "--limit", 3000).stdout)
    assert result.keys() == {"bits_per_byte", "bits_per_byte_code", "bits_per_byte_prose", "apart"}
    assert json.loads(run("lab", "eval", "lm", "--json", "--limit", 3000).stdout)["bytes"] == 3000


def test_several_domains_are_for_experts(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    data = ["--data", tmp_path / "one.txt", "--data", tmp_path / "two.txt", "--batches", 1]
    fit = ["fit", "lab:moe", "--method", "easy-ep:samples=2,calibration=as-given", *data, "--out", tmp_path / "m"]
    assert run(*fit).exit_code == 0
    assert set(sparing.load(tmp_path / "m").state) >= {"one.score", "two.score"}
    refused(run("fit", "lab:lm", "--method", "flap", *data, "--out", tmp_path / "n"), "only methods on experts mix")
    refused(run(*fit, "--data", tmp_path / "one.txt"), "two domains are called one")


def test_lab_eval_prints_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(model: str, limit: int = 7) -> dict[str, float]:
        print("chatter")
        return {"accuracy": 0.5, "n": limit}

    monkeypatch.setattr(cli, "_lab", lambda name: SimpleNamespace(load=lambda: "model", evaluate=evaluate))
    result = run("lab", "eval", "vlm", "--json", "--limit", 3)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"accuracy": 0.5, "n": 3}


def test_lab_train_passes_on_what_the_model_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def train(out: Path, *, resume: bool = True, minutes: float = 60) -> None:
        calls.append((out, resume, minutes))

    monkeypatch.setattr(cli, "_lab", lambda name: SimpleNamespace(train=train))
    assert run("lab", "train", "lm", "--out", tmp_path, "--minutes", 2, "--fresh").exit_code == 0
    assert calls == [(tmp_path, False, 2.0)]
    refused(run("lab", "train", "lm", "--out", tmp_path, "--threads", 1), "--threads")

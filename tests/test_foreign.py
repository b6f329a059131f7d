"""Checkpoints that were made elsewhere, in the hub's layout, go through the command line as they are."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner, Result

from sparing import cli
from sparing.bench import capture, tasks, timing
from sparing.bench.models import Loaded, load_model
from sparing.testing.models import build, prompt

SCRIPT = Path(__file__).parent.parent / "examples" / "foreign.py"
QUICK = ("--repeats", "0", "--no-controls", "--limit", "2")


@dataclass
class Made:
    """What the example wrote: its folder, and the commands that it printed."""

    folder: Path
    commands: list[list[str]]

    @property
    def vlm(self) -> Path:
        return self.folder / "qwen2.5-vl"

    @property
    def asked(self) -> str:
        return f"vqa:{self.folder / 'questions.jsonl'}"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("foreign")
    ran = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in ran.stdout.splitlines() if line.startswith("sparing ")]
    return Made(folder, [words[1:] for words in lines])


@pytest.fixture(scope="module")
def viewer(made: Made) -> Loaded:
    return load_model(str(made.vlm))


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a run by method; every one went well."""
    found = {row["method"]: row for row in map(json.loads, (folder / "results.jsonl").read_text().splitlines())}
    assert [row["status"] for row in found.values()] == ["ok"] * len(found), found
    return found


def cut(made: Made, method: str, out: Path) -> Path:
    """The text model, cut in half."""
    data = made.folder / "other-notes.txt"
    words = ("--method", method, "--keep", "0.5", "--data", data, "--batches", "4", "--out", out)
    run("prune", made.folder / "llama", *words)
    return out


def test_the_example_knows_nothing_of_this_library(made: Made) -> None:
    assert "import sparing" not in SCRIPT.read_text() and "from sparing" not in SCRIPT.read_text()
    for name in ("llama", "qwen2.5-vl"):
        held = {path.name for path in (made.folder / name).iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"} <= held
        assert "model.safetensors" not in held
    assert len(made.commands) == 2


@pytest.mark.parametrize(
    ("at", "methods"), [(0, {"unified-layer-skipping", "flap"}), (1, {"fastv", "hidrop"})], ids=["text", "pictures"]
)
def test_the_printed_commands_run(made: Made, at: int, methods: set[str]) -> None:
    words = made.commands[at]
    run(*words, *QUICK)
    found = rows(Path(words[-1]))
    assert found.keys() == {"dense", *methods}
    assert all(row["dtype"] == "bfloat16" for row in found.values())
    for name in methods:
        assert found[name]["cells"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1], ids=["text", "pictures"])
def test_the_printed_commands_run_whole(made: Made, at: int, tmp_path: Path) -> None:
    run(*made.commands[at][:-1], tmp_path / "run")
    found = rows(tmp_path / "run")
    assert all(row["prefill_speedup"] and row["decode_speedup"] for row in found.values() if not row["control"])


def test_text_alone_on_the_model_that_sees(made: Made, tmp_path: Path) -> None:
    notes = f"ppl:{made.folder / 'notes.txt'}"
    words = ("--task", notes, "--method", "unified-layer-skipping", "--keep", "0.5", "--out", tmp_path / "run")
    run("compare", made.vlm, *words, *QUICK)
    found = rows(tmp_path / "run")
    assert found["dense"]["quality"] > 1 and found["unified-layer-skipping"]["cells"] == 0.5


def test_a_cut_text_model_goes_on(made: Made, tmp_path: Path) -> None:
    data, small = made.folder / "other-notes.txt", tmp_path / "small"
    run(
        "prune",
        made.folder / "llama",
        "--method",
        "flap",
        "--keep",
        "0.5",
        "--data",
        data,
        "--batches",
        "4",
        "--out",
        small,
    )
    notes = f"ppl:{made.folder / 'notes.txt'}"
    words = ("--task", notes, "--method", "unified-layer-skipping", "--keep", "0.5", "--out", tmp_path / "run")
    run("compare", small, *words, *QUICK)
    assert rows(tmp_path / "run")["dense"]["dtype"] == "bfloat16"


def test_an_even_cut_loads_in_plain_transformers(made: Made, tmp_path: Path) -> None:
    data, small = made.folder / "other-notes.txt", tmp_path / "small"
    method = "flap:structure=UL-UM,compensate=false"
    run(
        "prune",
        made.folder / "llama",
        "--method",
        method,
        "--keep",
        "0.5",
        "--data",
        data,
        "--batches",
        "4",
        "--out",
        small,
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(small, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.num_key_value_heads, model.config.intermediate_size) == (2, 352)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    ids = tokenizer("def read(", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_model(str(small)).model(ids).logits)


def test_a_cut_model_that_sees_goes_on(made: Made, tmp_path: Path) -> None:
    """Its processor is saved beside it, in files from which one for videos can be made as well."""
    data, small = made.folder / "questions.jsonl", tmp_path / "small"
    run("prune", made.vlm, "--method", "flap", "--keep", "0.5", "--data", data, "--batches", "2", "--out", small)
    run("compare", small, "--task", made.asked, "--method", "fastv", "--keep", "0.5", "--out", tmp_path / "run", *QUICK)
    assert rows(tmp_path / "run")["fastv"]["cells"] == pytest.approx(0.5, abs=0.02)
    assert json.loads((small / "processor_config.json").read_text())["processor_class"] == "Qwen2_5_VLProcessor"
    assert json.loads((small / "preprocessor_config.json").read_text())["patch_size"] == 14


def test_show_draws_the_map_and_the_picture(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    run("show", made.vlm, "--method", "fastv", "--keep", "0.5", "--task", made.asked, "--out", out)
    assert {path.name for path in tmp_path.iterdir()} == {"map.png", "map-kept.png"}


# --------------------------------------------------------------------------- what had to be right for it


def test_the_prompt_is_the_chat_template(made: Made, viewer: Loaded) -> None:
    inputs = tasks.parse(made.asked, viewer).inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    counts = inputs["image_grid_thw"].prod(1) // 4
    assert (ids == viewer.view.image_token_id).sum(1).tolist() == counts.tolist() == [48, 48, 49, 45]
    before, after = viewer.tokenizer.decode(ids[3][mask[3]]).split("<|image_pad|>" * 45)
    assert before.startswith("<|im_start|>system\n") and before.endswith("<|im_start|>user\n<|vision_start|>")
    assert after.startswith("<|vision_end|>What colour is the square?") and after.endswith("<|im_start|>assistant\n")


def test_pictures_are_read_off_the_patches(made: Made, viewer: Loaded) -> None:
    """Their sizes are whole tokens, so nothing was resized: what comes back is the file, up to bfloat16."""
    inputs = tasks.parse(made.asked, viewer).inputs()
    for sample in range(4):
        picture = capture._picture(viewer, inputs, sample)
        file = np.asarray(Image.open(made.folder / f"picture-{sample}.png").convert("RGB")).astype(int)
        assert picture is not None and picture.shape == file.shape
        assert np.abs(picture - file).max() <= 2


def test_a_processor_without_its_part_for_videos(made: Made, viewer: Loaded, tmp_path: Path) -> None:
    """Also from a folder that has all parts in one file."""
    folder = Path(shutil.copytree(made.vlm, tmp_path / "all-in-one"))
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    parts = {
        "image_processor": pictures,
        "video_processor": pictures | {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor", **parts}))
    again = tasks.parse(made.asked, Loaded("again", viewer.model, str(folder))).inputs()
    for key, value in tasks.parse(made.asked, viewer).inputs().items():
        assert torch.equal(again[key], value), key


@pytest.mark.parametrize("side", ["left", "none"])
def test_decode_steps_say_what_generate_says(side: str) -> None:
    """Positions of generated tokens go on behind the picture's, also in a row with padding."""
    model, inputs = build("qwen2.5-vl"), prompt("qwen2.5-vl", (9, 5), side=side)
    plain = {key: inputs[key][:, -4:] for key in ("input_ids", "attention_mask")}
    for batch in (inputs, plain):  # without a picture nothing of the earlier one may be left
        said = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
        model(**inputs)
        assert torch.equal(timing.decode(model, batch, timing.prefill(model, batch), 8), said)

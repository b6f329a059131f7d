"""Folders that are written to: refused, replaced whole, or as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparing
from sparing.engine import checkpoint
from sparing.grid import folders
from sparing.grid.folders import content, refuse_content, refuse_loss, whole
from sparing.testing.models import build


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with something of everything in it."""
    folder = tmp_path / "box" / "model"
    (folder / "deep").mkdir(parents=True)
    for name in ("config.json", "model-1.safetensors", "model.safetensors.index.json", "deep/notes.txt", ".hidden"):
        (folder / name).write_text(f"old {name}")
    return folder


# --------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["thesis.txt"], "holds thesis.txt; take another folder, or --overwrite to replace all that it holds"),
        (["config.json", "b"], "holds a checkpoint (b, config.json); take"),
        (["method.json", "a", "b", "c", "d"], "holds a fitted method (a, b, c and 2 more); take"),
        ([".gitignore"], "holds .gitignore; take"),
        (["unfinished.txt"], "holds unfinished.txt; take"),
    ],
)
def test_what_is_there_is_said(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(sparing.Error) as caught:
        refuse_content(tmp_path, "--out X", way="--overwrite")
    assert str(caught.value).startswith(f"--out X: {said}")


def test_what_may_be_there(tmp_path: Path) -> None:
    refuse_content(tmp_path, "out")
    refuse_content(tmp_path / "missing", "out")
    (tmp_path / "mine").write_text("")
    refuse_content(tmp_path / "mine" / "below", "out")  # writing there says what is wrong
    refuse_content(tmp_path, "out", but="mine".__eq__)
    (tmp_path / "yours").write_text("")
    with pytest.raises(
        sparing.Error, match=r"^out: is not empty and holds no run; take another folder: this one holds yours$"
    ):
        refuse_content(tmp_path, "out", but="mine".__eq__, lacks="run")


def test_a_folder_around_what_is_needed_is_not_replaced(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = old.parent
    refuse_loss(old, "out", [old, box])  # an input itself may go, one around it stays
    with pytest.raises(sparing.Error, match=r"would take .*model away"):
        refuse_loss(box, "out", ["lab:lm", old])
    monkeypatch.setenv("HOME", str(old / "deep"))
    with pytest.raises(sparing.Error, match="would take your home away"):
        refuse_loss(old, "out")
    monkeypatch.chdir(old / "deep")
    before = tree(old)
    for folder in (old, Path(".."), Path(".")):
        with pytest.raises(sparing.Error, match="would take the current folder away"), whole(folder, "out"):
            pytest.fail("written")
    assert tree(old) == before


# --------------------------------------------------------------------------- written


def test_a_folder_is_replaced_with_nothing_of_the_old_left(old: Path) -> None:
    os.chmod(old, 0o750)
    with whole(old, "out") as new:
        (new / "config.json").write_text("new")
        assert (old / "config.json").read_text() == "old config.json"
    assert tree(old) == {"config.json": b"new"}
    assert [path.name for path in old.parent.iterdir()] == ["model"] and old.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder_gets_the_usual_rights_and_an_empty_one_stays_the_same(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "a" / "b"
    if there:
        folder.mkdir(parents=True)
        (folder / "unfinished-x").mkdir()  # what a kill left
    inode = folder.stat().st_ino if there else None
    with whole(folder, "out") as new:
        (new / "sub").mkdir()
        (new / "sub" / "file").write_text("new")
        assert content(folder) == []
    assert tree(folder) == {"sub/file": b"new"} and content(folder) == ["sub"]
    assert inode in (None, folder.stat().st_ino)
    (tmp_path / "usual").mkdir()
    assert (folder / "sub").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_what_may_stand_beside_stays(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "step.pt").write_text("kept")
    with whole(tmp_path, "out", beside=("training",)) as new:
        (new / "a").write_text("new")
    assert tree(tmp_path) == {"a": b"new", "training/step.pt": b"kept"}
    with whole(tmp_path, "out", beside=("training",)) as new:
        (new / "b").write_text("newer")
    assert tree(tmp_path) == {"b": b"newer"}


def test_a_link_leads_to_what_is_replaced(old: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(old)
    with whole(tmp_path / "link", "out") as new:
        (new / "a").write_text("new")
    assert (tmp_path / "link").is_symlink() and tree(old) == {"a": b"new"}


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), RuntimeError("no"), OSError(28, "No space left on device")])
def test_a_failure_leaves_all_as_it_was(old: Path, tmp_path: Path, problem: BaseException) -> None:
    before = tree(old)
    (tmp_path / "empty").mkdir()
    for folder in (old, tmp_path / "empty"):
        expected = sparing.Error if isinstance(problem, OSError) else type(problem)
        with pytest.raises(expected), whole(folder, "out") as new:
            (new / "config.json").write_text("half")
            raise problem
    assert tree(old) == before and list((tmp_path / "empty").iterdir()) == []
    assert [path.name for path in old.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("fails", [1, 2])
@pytest.mark.parametrize("empty", [False, True])
def test_a_failure_while_they_are_exchanged(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int, empty: bool
) -> None:
    folder = tmp_path / "empty" if empty else old
    before = tree(folder)
    real: Callable[..., Any] = Path.rename
    calls = 0

    def rename(self: Path, target: Path) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt), whole(folder, "out") as new:
        for name in ("config.json", "weights"):
            (new / name).write_text("new")
    assert tree(folder) == before and not list(tmp_path.rglob("*unfinished*"))


def test_the_old_folder_is_never_removed_before_the_new_one_stands(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it cannot be put back: then it lies beside."""
    before = tree(old)
    real: Callable[..., Any] = Path.rename

    def rename(self: Path, target: Path) -> Any:
        if target == old:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(sparing.Error, match=r"cannot be written to \(Input/output error\)"), whole(old, "out") as new:
        (new / "a").write_text("new")
    (aside,) = old.parent.iterdir()
    assert aside.name.startswith("model.unfinished-") and tree(aside / "old") == before


def test_a_kill_leaves_the_old_folder_whole(old: Path) -> None:
    before = tree(old)
    program = """
import os, signal, sys
from pathlib import Path
from sparing.grid.folders import whole
with whole(Path(sys.argv[1]), "out") as new:
    (new / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, str(old)], check=False)
    assert done.returncode == -signal.SIGKILL and tree(old) == before
    assert content(old.parent) == ["model"]  # the rest is known for what it is


def test_what_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        with pytest.raises(sparing.Error, match=rf"^out: cannot be written to \({why}\)"), whole(folder, "out"):
            pytest.fail("written")


# --------------------------------------------------------------------------- checkpoints and methods


def test_a_checkpoint_is_not_written_over(tmp_path: Path) -> None:
    """Nor into a folder of shards, whose index would name what is no longer there."""
    model = build("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    before = tree(tmp_path / "model")
    assert "model.safetensors.index.json" in before
    with pytest.raises(sparing.Error, match=r"holds a checkpoint .*overwrite = True to replace all"):
        sparing.save_pretrained(model, tmp_path / "model")
    assert tree(tmp_path / "model") == before
    sparing.save_pretrained(model, tmp_path / "model", overwrite=True)
    assert sorted(tree(tmp_path / "model")) == ["config.json", "generation_config.json", "model.safetensors"]
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(sparing.from_pretrained(tmp_path / "model")(ids).logits, model(ids).logits)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    sparing.save_pretrained(model, tmp_path / "model")
    before = tree(tmp_path / "model")

    def card(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_model_card", card)
    with pytest.raises(sparing.Error, match=r"model': cannot be written to \(No space left on device\)"):
        sparing.save_pretrained(model, tmp_path / "model", card={"a": "b"}, overwrite=True)
    assert tree(tmp_path / "model") == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_method_replaces_a_method_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (sparing.parse("first").with_state({"a": torch.full((2,), float(i))}) for i in (1, 2))
    first.save(tmp_path / "m")
    second.save(tmp_path / "m")
    assert torch.equal(sparing.load(tmp_path / "m").state["a"], second.state["a"])
    (tmp_path / "m" / "config.json").write_text("{}")
    before = tree(tmp_path / "m")
    with pytest.raises(sparing.Error, match=r"holds a checkpoint \(config.json\)"):
        first.save(tmp_path / "m")
    assert tree(tmp_path / "m") == before

    def broken(tensors: Any, file: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sparing.grid.method.save_file", broken)
        with pytest.raises(sparing.Error, match="No space left"):
            first.save(tmp_path / "m", overwrite=True)
    assert tree(tmp_path / "m") == before
    sparing.parse("fastv").save(tmp_path / "m", overwrite=True)
    assert sorted(tree(tmp_path / "m")) == ["method.json"]


def test_the_marks_are_those_of_the_files_that_are_written() -> None:
    from sparing.bench.compare import Store
    from sparing.bench.sweep import SweepStore
    from sparing.grid import method

    assert {Store.files[0], SweepStore.files[0], method._METHOD, "search.json"} <= folders._KINDS.keys()

"""Folders that are written to: what is somebody's stays, and what is written is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparing.grid.method import Error

_KINDS = {  # a file by which a folder is known
    "config.json": "a checkpoint",
    "model.safetensors": "a checkpoint",
    "model.safetensors.index.json": "a checkpoint",
    "adapter_config.json": "an adapter",
    "method.json": "a fitted method",
    "run.json": "a run of sparing compare",
    "sweep.json": "a sweep",
    "search.json": "a search",
}
_ASIDE = "unfinished-"  # begins the names of folders that are gone when a writing ends, unless the process was killed


def content(folder: Path) -> list[str]:
    """Names of what a folder holds, sorted; none where there is no folder. What a kill left half-written is nothing.

    Raises:
        Error: the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as problem:
        raise Error(f"{folder}: cannot be read ({problem.strerror or problem})") from problem
    return sorted(name for name in names if not name.rpartition(".")[2].startswith(_ASIDE))


def kind_of(names: Iterable[str]) -> str:
    """What a folder with these names in it is, in words; "" if that is not known.

    >>> kind_of(["config.json", "model.safetensors"]), kind_of(["thesis.txt"])
    ('a checkpoint', '')
    """
    names = set(names)
    return next((words for name, words in _KINDS.items() if name in names), "")


def refuse_content(
    folder: Path, where: str, *, but: Callable[[str], bool] = lambda name: False, lacks: str = "", way: str = ""
) -> None:
    """Refuses a folder that holds something which must not be written over or between.

    Args:
        folder: to write to; a missing or empty one is right.
        where: begins the message: the argument and its value.
        but: which names may be there.
        lacks: what would be right to find there, in words.
        way: how the user says that all of it may go, "" where that cannot be said.

    Raises:
        Error: says what is there.
    """
    names = [name for name in content(folder) if not but(name)]
    if not names:
        return
    there = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    what = kind_of(names)
    there = f"{what} ({there})" if what else there
    if lacks:
        raise Error(f"{where}: is not empty and holds no {lacks}; take another folder: this one holds {there}")
    raise Error(
        f"{where}: holds {there}; take another folder" + (f", or {way} to replace all that it holds" if way else "")
    )


def refuse_loss(folder: Path, where: str, inputs: Iterable[str | Path] = ()) -> None:
    """Refuses to replace a folder in which the user stands or lives, or one around an input; an input itself may go.

    Raises:
        Error: says what would be lost.
    """
    real = folder.resolve()
    if not content(real):
        return
    for place, words in ((Path.cwd(), "the current folder"), (Path(os.path.expanduser("~")), "your home")):
        if place.resolve().is_relative_to(real):
            raise Error(f"{where}: to replace it would take {words} away; take another folder")
    for place in map(Path, inputs):
        if place.resolve() != real and place.resolve().is_relative_to(real):
            raise Error(f"{where}: to replace it would take {place} away; take another folder")


@contextmanager
def whole(folder: Path, where: str, *, beside: Sequence[str] = ()) -> Iterator[Path]:
    """A new, empty folder to write to; when the block ends, what it holds is what `folder` holds.

    Where the block fails or is interrupted, `folder` is as it was. One that holds something is replaced: old and new
    lie side by side until two renamings exchange them, and only then the old one goes. What is written lies in a
    folder `…unfinished-…` until then; a kill leaves that, nothing else.

    Args:
        folder: made if missing; of a link, what it leads to.
        where: begins the message of an error.
        beside: names that may stand in `folder` and stay; with anything else there, all is replaced.

    Raises:
        Error: the folder cannot be written to or replaced.
    """
    try:
        real = folder.resolve()
        real.mkdir(parents=True, exist_ok=True)
        replaces = not set(content(real)) <= set(beside)
        if replaces:
            refuse_loss(real, where)
            aside = Path(tempfile.mkdtemp(prefix=f"{real.name[:80]}.{_ASIDE}", dir=real.parent))
        else:  # in it: who may write here need not be allowed to beside it
            aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=real))
        new = aside / "new"  # with the usual rights, which `aside` has not
        try:
            new.mkdir()
            yield new
            if replaces:
                _exchange(real, new, aside / "old")
            else:
                _move_into(real, new)
        finally:
            if os.path.lexists(real):  # else it holds the old one
                shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as problem:
        why = getattr(problem, "strerror", None) or problem
        raise Error(f"{where}: cannot be written to ({why})") from problem


def _move_into(folder: Path, new: Path) -> None:
    """All that `new` holds, or nothing."""
    moved = []
    try:
        for path in sorted(new.iterdir()):
            moved.append(path)
            path.rename(folder / path.name)
    except BaseException:
        for path in moved:
            if not path.exists():
                (folder / path.name).rename(path)
        raise


def _exchange(folder: Path, new: Path, old: Path) -> None:
    """`new` in the place of `folder`, which becomes `old`; on the disk before anything goes."""
    shutil.copymode(folder, new)
    for path in new.rglob("*"):
        if path.is_file():
            with open(path, "rb") as opened:
                os.fsync(opened.fileno())
    try:
        folder.rename(old)
        new.rename(folder)
    except BaseException:
        if not os.path.lexists(folder):
            old.rename(folder)
        raise

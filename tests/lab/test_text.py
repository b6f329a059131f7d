"""The corpus is fixed, and what is held out is really held out."""

import lzma
from pathlib import Path

from sparing.lab import text


def test_lists_are_deterministic(tmp_path: Path) -> None:
    """The order is the names' and not the file system's; the standard library comes first."""
    for name in ("b.py", "a/z.py", "a.py", "c.txt", "tests/t.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in text.sources(tmp_path)] == ["a.py", "z.py", "b.py"]
    files = text.train_files()
    assert len(set(files)) == len(files) > 400
    own = [path for path in files if text.is_stdlib(path)]
    assert list(files[: len(own)]) == own == sorted(own, key=lambda path: path.relative_to(text.stdlib()).as_posix())


def test_heldout_is_whole_and_mostly_of_medium_size() -> None:
    names = {path.stem for path in text.heldout_files()} | {path.parent.name for path in text.heldout_files()}
    assert set(text.HELDOUT) <= names
    assert 400_000 < len(text.heldout_text().encode()) < 900_000
    assert text.heldout_text() == "".join(path.read_text(encoding="utf-8") for path in text.heldout_files())


def test_no_heldout_module_is_trained_on() -> None:
    train, held = set(text.train_files()), text.heldout_files()
    assert train.isdisjoint(held)
    assert {path.stem for path in train}.isdisjoint(text.HELDOUT)


def test_no_copy_of_a_heldout_module_is_trained_on() -> None:
    """Independent of `runs`: long lines of the held-out files must hardly occur in the training files."""
    long = {line for line in text.heldout_text().splitlines() if len(line.strip()) > 60}
    for path in text.train_files():
        shared = sum(line in long for line in text.read(path).splitlines())
        assert shared < 12, f"{path} repeats {shared} long lines of the held-out text"


def test_runs_see_through_blank_lines_and_indentation() -> None:
    lines = [f"line {i}" for i in range(text.RUN)]
    assert text.runs("\n".join(lines)) == text.runs("\n\n".join("    " + line for line in lines))
    assert not text.runs("\n".join(lines[1:]))


def test_xz_counts_bits_of_the_heldout_bytes() -> None:
    bits = text.xz_bits_per_byte()
    data = text.heldout_text().encode()
    assert bits["archive"] == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    assert 1.2 < bits["archive"] < bits["files"] < 2.5

"""The tool that makes one-line faults, on a made-up method of seven lines."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = '''"""Keeps the best."""


def best(scores: list[int], k: int) -> list[int]:
    order = sorted(scores, reverse=True)
    if k > len(order):
        raise ValueError("k")
    return order[:k]
'''
TESTS = """from sparing.room.tiny import best


def test_best():
    assert best([1, 3, 2], 2) == [3, 2]
"""
FAULTS = """
- order = sorted(scores, reverse=True)
+ order = sorted(scores)

- if k > len(order):
+ if k >= len(order):

- return order[:k]
+
"""


@pytest.fixture(scope="module")
def mutants() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        module = importlib.import_module("mutants")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "PRELOADED", [])  # nothing here needs torch
            yield module
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working tree with one method, its tests and its faults."""
    for name, text in {
        "src/sparing/__init__.py": "",
        "src/sparing/room/__init__.py": "",
        "src/sparing/room/tiny.py": SOURCE,
        "tests/room/test_tiny.py": TESTS,
        "tools/mutations/tiny.txt": FAULTS,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def snapshot(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


def test_what_survives_is_named_and_the_tree_is_left_alone(
    mutants: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tree)
    assert mutants.main([], tree) == 1
    said = capsys.readouterr().out
    assert "tiny: 2 of 3 killed" in said
    assert "survived src/sparing/room/tiny.py:6: if k > len(order):  ->  if k >= len(order):" in said
    assert snapshot(tree) == before
    (tree / "tests/room/test_tiny.py").write_text(TESTS + "    assert best([1], 1) == [1]\n")
    assert mutants.main(["--only", "tiny"], tree) == 0
    assert capsys.readouterr().out == "tiny: 3 of 3 killed\n"


@pytest.mark.parametrize(("survivors", "code"), [(0, 0), (1, 0), (2, 1)])
def test_nine_of_ten_are_enough(
    mutants: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch, survivors: int, code: int
) -> None:
    (tree / "tools/mutations/tiny.txt").write_text("- return order[:k]\n+ return order\n\n" * 10)
    monkeypatch.setattr(mutants, "judge", lambda plan, copy, tick: [(8, m) for m in plan.mutations[:survivors]])
    assert mutants.main([], tree) == code


def test_a_fault_that_hangs_is_noticed(
    mutants: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutants, "LEAST", 1.0)
    monkeypatch.setattr(mutants, "SLOWER", 0.0)
    (tree / "tools/mutations/tiny.txt").write_text("- return order[:k]\n+ while True: k += 1\n")
    assert mutants.main([], tree) == 0 and "tiny: 1 of 1 killed" in capsys.readouterr().out


def test_tests_that_fail_anyway_prove_nothing(
    mutants: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "tests/room/test_tiny.py").write_text(TESTS.replace("[3, 2]", "[3, 1]"))
    assert mutants.main([], tree) == 2
    assert "tiny: its tests do not pass without a fault (pytest ended with 1)" in capsys.readouterr().err
    (tree / "tools/mutations/tiny.txt").write_text("tests: tests/room/test_tiny.py -k nothing\n" + FAULTS)
    assert mutants.main([], tree) == 2 and "pytest ended with 5" in capsys.readouterr().err


def test_equal_lines_are_told_apart(mutants: ModuleType) -> None:
    text = "if a:\n    x = 1\nelse:\n    x = 1\n"
    source = Path("a.py")
    assert mutants.Mutation(source, "x = 1", "x = 2", 2).apply(text) == ("if a:\n    x = 1\nelse:\n    x = 2\n", 4)
    assert mutants.Mutation(source, "x = 1", "pass", 1).apply(text)[1] == 2
    for old, place, complaint in (
        ("x = 1", 0, r"a.py: has 2 lines `x = 1`; choose one by @1, @2"),
        ("x = 1", 3, r"a.py: has no line `x = 1` number 3"),
        ("x =", 0, r"a.py: has no line `x =`"),
    ):
        with pytest.raises(mutants.Wrong, match=complaint):
            mutants.Mutation(source, old, "pass", place).apply(text)
    with pytest.raises(mutants.Wrong, match="`x = ` instead of `x = 1` is no Python"):
        mutants.Mutation(source, "x = 1", "x = ", 1).apply(text)


def test_a_file_says_what_is_changed_and_what_is_run(mutants: ModuleType, tree: Path) -> None:
    file = tree / "tools/mutations/tiny.txt"
    plan = mutants.read(file, tree)
    own = Path("src/sparing/room/tiny.py")
    assert (plan.name, plan.tests) == ("tiny", ["tests/room/test_tiny.py"])
    assert [(m.source, m.new, m.place) for m in plan.mutations] == [
        (own, "order = sorted(scores)", 0),
        (own, "if k >= len(order):", 0),
        (own, "", 0),
    ]
    other = file.with_name("room_tiny.txt")
    other.write_text(
        'tests: tests/a.py tests/b.py -k "x or y"\n- a @2\n+ b\n\nsource: src/sparing/c.py\n- x - y\n+ x + y\n'
    )
    plan = mutants.read(other, tree)
    assert plan.tests == ["tests/a.py", "tests/b.py", "-k", "x or y"]
    assert [(m.source, m.old, m.new, m.place) for m in plan.mutations] == [
        (own, "a", "b", 2),
        (Path("src/sparing/c.py"), "x - y", "x + y", 0),
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no mutations"),
        ("- a\n", "its last `-` has no `\\+`"),
        ("+ a\n", "line 1: expected"),
        ("- a\n- b\n+ c\n", "line 2: expected"),
        ("tests: t.py\nfault: a\n", "line 2: expected"),
        ("- a\n+ b\n", "many.txt: 0 files match src/sparing/\\*/many.py; say which in a line `source: PATH`"),
        ("source: a.py\n- a\n+ b\n", "0 files match tests/\\*/test_many.py; say which in a line `tests: PATH`"),
    ],
)
def test_files_that_say_too_little_are_refused(mutants: ModuleType, tree: Path, text: str, complaint: str) -> None:
    file = tree / "tools/mutations/many.txt"
    file.write_text(text)
    with pytest.raises(mutants.Wrong, match=complaint):
        mutants.read(file, tree)


def test_an_unknown_name_is_refused(mutants: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mutants.main(["--only", "none"], tree)
    assert "--only none: there is no" in capsys.readouterr().err


def test_every_file_of_faults_can_be_applied(mutants: ModuleType) -> None:
    """Sources move on; a fault whose line is gone is noticed here, long before anybody runs them all."""
    for file in sorted((ROOT / "tools" / "mutations").glob("*.txt")):
        plan = mutants.read(file)
        assert len(plan.mutations) >= 10, file.name
        for mutation in plan.mutations:
            mutation.apply((ROOT / mutation.source).read_text())
        assert (ROOT / plan.tests[0]).is_file(), file.name

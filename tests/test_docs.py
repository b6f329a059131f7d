"""What the documents show runs, and what is generated is up to date."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import pytest

import sparing

ROOT = Path(__file__).parent.parent
MODULES = [
    m.name
    for m in pkgutil.walk_packages(sparing.__path__, "sparing.")
    if not m.name.endswith("__main__") and ".cli" not in m.name
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_the_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(blocks[0], "README.md", "exec"), {"__name__": "readme"})
    out = capsys.readouterr().out
    assert "is right: True" in out
    share = int(re.search(r"(\d+)% of the visual-token-layers ran", out)[1])  # type: ignore[index]
    assert share == round(100 * (5 + 3 * 0.1) / 8)


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_run(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_tables_are_generated_from_the_registry() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        tables = importlib.import_module("tables")
    finally:
        sys.path.remove(str(ROOT / "tools"))
    for path, text in tables.pages().items():
        assert path.read_text() == text, f"{path.name} is out of date: make docs"


def test_the_walk_names_files_that_exist() -> None:
    for page in ("walk.md", "adding.md"):
        for name in re.findall(r"`((?:[a-z_]+/)+\w+\.py)", (ROOT / "docs" / page).read_text()):
            assert (ROOT / "src" / "sparing" / name).exists() or (ROOT / name).exists(), name


def test_cards_are_complete() -> None:
    for name, cls in sparing.methods(controls=False).items():
        card = cls.card
        assert card.title and card.summary and card.arxiv and 1990 < card.year < 2100, name
        assert card.axis in ("tokens", "depth", "width", "experts") and card.controls

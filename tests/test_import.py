"""The package as it is imported: what it offers, and that it fetches nothing before it is used."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import sparing
from sparing.grid import method

SOURCE = Path(sparing.__file__).parent
HEAVY = "torch|transformers|numpy|scipy|sklearn|matplotlib|safetensors"
LIGHT = f"import sys; print(sorted(set({HEAVY!r}.split('|')) & set(sys.modules)))"


def fresh(program: str) -> str:
    """What a program prints in a new process, in which nothing has been imported."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


HELP = """
import sys
from sparing import cli
sys.argv = ["sparing", *{words!r}]
try:
    cli.main()
except SystemExit as end:
    assert end.code == 0
"""


@pytest.mark.parametrize(
    "program",
    [
        "import sparing",
        "import sparing; sparing.__version__, dir(sparing), sparing.__all__",
        HELP.format(words=["--help"]),
        HELP.format(words=["compare", "--help"]),
        HELP.format(words=["--version"]),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(program: str) -> None:
    assert fresh(f"{program}\n{LIGHT}") == "[]"


@pytest.mark.parametrize("words", [["-c", "import sparing"], ["-m", "sparing", "--help"]])
def test_it_takes_less_than_a_second_of_the_processor(words: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_the_public_names_are_pinned() -> None:
    """Programs depend on these: adding is fine, taking away or renaming is a breaking change."""
    assert sparing.__all__ == [
        *("BudgetError", "Card", "Error", "Method", "Run", "Shape", "Trace", "View"),
        *("attach", "compare", "count", "depth", "experts", "from_pretrained", "get", "lab", "load", "methods"),
        *("parse", "prune", "save_pretrained", "shape", "tokens", "view", "width"),
    ]
    assert {*sparing._HOME, *sparing._PACKAGES, "view"} == set(sparing.__all__) <= set(dir(sparing))
    for name in sparing.__all__:
        assert getattr(sparing, name) is not None and name in vars(sparing)
    assert sparing.view is sparing.View
    with pytest.raises(AttributeError, match="has no attribute 'prunes'"):
        sparing.prunes  # type: ignore[attr-defined]  # noqa: B018


def test_a_type_checker_sees_the_same_names() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            seen |= {alias.name: str(node.module).removeprefix("sparing").removeprefix(".") for alias in node.names}
    assert seen == sparing._HOME | dict.fromkeys(sparing._PACKAGES, "")


@pytest.mark.parametrize(
    "program",
    [
        "from sparing import *\nprint(parse('fastv').name)",
        "from sparing.grid.method import parse\nprint(parse('fastv').name)",
        "from sparing.grid import method\nprint(method.get('fastv').name)",
        "from sparing.grid.method import methods\nprint(next(name for name in methods('tokens')))",
        "import sparing.depth.das\nprint(sparing.get('fastv').name)",
        "import sparing\nprint(sparing.tokens.fastv.FastV.name)",
        "import sparing\nsparing.engine.view.View, sparing.bench.tasks, sparing.grid.budget\nprint('fastv')",
    ],
)
def test_the_methods_are_found_whichever_way_one_comes_in(program: str) -> None:
    assert fresh(program) == "fastv"


def test_rooms_are_found_by_several_threads_at_once() -> None:
    program = """
from concurrent.futures import ThreadPoolExecutor
from sparing.grid import method
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda _: len(method.methods()), range(8)))
print(len(set(found)) == 1 and found[0] == len(method.methods()))
"""
    assert fresh(program) == "True"


def test_a_name_that_is_taken_is_refused_when_it_is_given() -> None:
    program = """
import sparing.grid.method as m
try:
    m.register("flap", m.Card("mine", year=2026, axis="width", kind="surgery", phase="static"))(type("Mine", (), {}))
except m.Error as problem:
    print(problem)
"""
    assert fresh(program) == "name = 'flap': already registered by sparing.width.flap"


def test_a_method_is_held_against_a_model_before_any_room_was_asked_for() -> None:
    """The checks of a state are known to the engines, which come with the rooms."""
    program = """
import torch
from sparing.grid import method
class Mine(method.Method):
    name, card = "mine", method.Card("mine", year=2026, axis="width", kind="surgery", phase="static")
try:
    Mine().with_state({"weight.a": torch.zeros(1)}).check_model(torch.nn.Linear(1, 1))
except method.Error as problem:
    print(problem)
"""
    assert "weight.a" in fresh(program)


def test_every_room_is_named() -> None:
    """A package that looks for methods in itself is one that `get` and `methods` know of."""
    rooms = [file.parent.name for file in SOURCE.glob("*/__init__.py") if "discover(__name__" in file.read_text()]
    assert sorted(rooms) == sorted(method.ROOMS)

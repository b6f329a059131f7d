"""One-line faults in method files: which of them do that method's own tests notice?

    python tools/mutants.py [--only NAME …]

`tools/mutations/NAME.txt` holds the faults of one method, blocks with a blank line between them:

    source: src/sparing/tokens/fastv.py
    tests: tests/tokens/test_fastv.py -k "not slow"

    - if layer == self.K - 1 and self.R > 0:
    + if layer == self.K and self.R > 0:

`-` is a whole line of the source without its indent, `- … @2` the second of equal ones; `+` stands in its place,
nothing behind it removes the line. `source:` holds for the faults below it, `tests:` is what pytest is given; without
them NAME says where: `fastv` is `src/sparing/*/fastv.py` and `tests/*/test_fastv.py`, `width_random` is
`src/sparing/width/random.py`. The working tree is never touched: everything runs in a copy. Ends with 1 where fewer
than nine faults of ten were noticed.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
COPIED = ("src", "tests", "pyproject.toml")
PRELOADED = ["torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "pytest"]
WANTED = 0.9  # of the faults of a file
PASSED, NOT_RUN = 0, (3, 4, 5)  # exit codes of pytest: its own error, wrong arguments, no test
LEAST, SLOWER = 60.0, 10.0  # seconds, and times the clean run: a fault that hangs is noticed too


class Wrong(Exception):
    """A file of mutations that cannot be applied, or tests that fail without any fault."""


@dataclass(frozen=True)
class Mutation:
    """One line of a source instead of another; `place` counts from 1 among equal lines, 0 where there is but one."""

    source: Path
    old: str
    new: str
    place: int = 0

    def apply(self, text: str) -> tuple[str, int]:
        """The text with the fault, and the number of its line."""
        lines = text.splitlines(keepends=True)
        found = [i for i, line in enumerate(lines) if line.strip() == self.old]
        if not found or (self.place and len(found) < self.place):
            raise Wrong(f"{self.source}: has no line `{self.old}`" + (f" number {self.place}" if found else ""))
        if len(found) > 1 and not self.place:
            raise Wrong(f"{self.source}: has {len(found)} lines `{self.old}`; choose one by @1, @2, …")
        at = found[max(self.place, 1) - 1]
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines[at] = f"{indent}{self.new}\n" if self.new else ""
        changed = "".join(lines)
        try:
            compile(changed, str(self.source), "exec")
        except SyntaxError as problem:
            raise Wrong(f"{self.source}: `{self.new}` instead of `{self.old}` is no Python: {problem}") from problem
        return changed, at + 1


@dataclass
class Plan:
    """The faults of one method, and the arguments of pytest that run its tests."""

    name: str
    tests: list[str] = field(default_factory=list)
    mutations: list[Mutation] = field(default_factory=list)


def read(file: Path, root: Path = ROOT) -> Plan:
    """A file of mutations."""
    plan, source, old = Plan(file.stem), None, None
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        sign, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if sign == "source:":
            source = Path(rest)
        elif sign == "tests:":
            plan.tests = shlex.split(rest)
        elif sign == "-" and rest and old is None:
            old = rest
        elif sign == "+" and old is not None:
            numbered = re.fullmatch(r"(.*\S) @(\d+)", old)
            text, place = (numbered[1], int(numbered[2])) if numbered else (old, 0)
            source = source or _source(file.stem, root)
            plan.mutations.append(Mutation(source, text, rest, place))
            old = None
        elif sign:
            raise Wrong(f"{file.name}: line {number}: expected source:, tests:, or `- OLD` followed by `+ NEW`")
    if old is not None or not plan.mutations:
        raise Wrong(f"{file.name}: " + ("its last `-` has no `+`" if old else "holds no mutations"))
    plan.tests = plan.tests or [str(_only(root, f"tests/*/test_{file.stem}.py", "tests:", file.stem))]
    return plan


def _source(name: str, root: Path) -> Path:
    room, _, stem = name.partition("_")
    inside = Path("src/sparing") / room / f"{stem}.py"
    return inside if (root / inside).is_file() else _only(root, f"src/sparing/*/{name}.py", "source:", name)


def _only(root: Path, pattern: str, key: str, name: str) -> Path:
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        raise Wrong(f"{name}.txt: {len(found)} files match {pattern}; say which in a line `{key} PATH`")
    return found[0].relative_to(root)


@dataclass
class Copy:
    """A copy of the sources and tests, in which faults are made and tests are run."""

    root: Path

    @classmethod
    def of(cls, root: Path, folder: Path) -> Copy:
        """The copy of a working tree in an empty folder."""
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (root / name).exists():
                shutil.copy(root / name, folder / name)
        return cls(folder)

    def run(self, tests: Sequence[str], timeout: float | None = None) -> int | None:
        """Exit code of pytest, None where time ran out; what it printed is in `said`."""
        context = multiprocessing.get_context("forkserver")  # has imported torch before any test is run
        context.set_forkserver_preload(PRELOADED)
        process = context.Process(target=_pytest, args=(str(self.root), list(tests)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            return None
        return process.exitcode

    @property
    def said(self) -> str:
        """The end of what the last run printed."""
        return (self.root / "said.txt").read_text(errors="replace")[-2000:]

    def write(self, source: Path, text: str) -> None:
        """A source, without what Python has compiled of it: two writes in one second look alike to it."""
        (self.root / source).write_text(text, encoding="utf-8")
        Path(importlib.util.cache_from_source(str(self.root / source))).unlink(missing_ok=True)


def _pytest(root: str, tests: list[str]) -> None:
    """In a process of its own: the tests of a copy, up to the first that fails."""
    os.chdir(root)
    output = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path.insert(0, os.path.join(root, "src"))
    os.environ["PYTHONPATH"] = os.path.join(root, "src")  # for the commands that tests start
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins complain where torch has loaded them already
    import pytest

    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def judge(plan: Plan, copy: Copy, tick: Callable[[], object] = lambda: None) -> list[tuple[int, Mutation]]:
    """The faults that the tests let through, each with the number of its line; `tick` is called after every fault.

    Raises:
        Wrong: the tests fail without a fault, or pytest could not run them.
    """
    clean = {m.source: (copy.root / m.source).read_text(encoding="utf-8") for m in plan.mutations}
    faults = [(m, *m.apply(clean[m.source])) for m in plan.mutations]
    start = time.monotonic()
    code = copy.run(plan.tests)
    if code != PASSED:
        raise Wrong(f"{plan.name}: its tests do not pass without a fault (pytest ended with {code}):\n{copy.said}")
    patience = max(LEAST, SLOWER * (time.monotonic() - start))
    survived = []
    for mutation, text, line in faults:
        copy.write(mutation.source, text)
        code = copy.run(plan.tests, patience)
        copy.write(mutation.source, clean[mutation.source])
        if code == PASSED:
            survived.append((line, mutation))
        elif code in NOT_RUN:
            raise Wrong(f"{plan.name}: line {line}: pytest ended with {code}:\n{copy.said}")
        tick()
    return survived


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Judges the asked files and prints a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="files of tools/mutations, without .txt")
    only = parser.parse_args(arguments).only
    folder = root / "tools" / "mutations"
    files = [folder / f"{name}.txt" for name in only] if only else sorted(folder.glob("*.txt"))
    if missing := [file.stem for file in files if not file.is_file()]:
        parser.error(f"--only {missing[0]}: there is no {folder / missing[0]}.txt")
    enough = True
    try:
        plans = [read(file, root) for file in files]
        with (
            tempfile.TemporaryDirectory(prefix="mutants-") as scratch,
            tqdm(total=sum(len(plan.mutations) for plan in plans), disable=None, unit="fault") as bar,
        ):
            copy = Copy.of(root, Path(scratch))
            for plan in plans:
                bar.set_description(plan.name)
                survived = judge(plan, copy, bar.update)
                total = len(plan.mutations)
                enough = enough and total - len(survived) >= WANTED * total
                bar.write(f"{plan.name}: {total - len(survived)} of {total} killed", file=sys.stdout)
                for line, mutation in survived:
                    where = f"{mutation.source}:{line}"
                    bar.write(f"  survived {where}: {mutation.old}  ->  {mutation.new or '(removed)'}", file=sys.stdout)
                sys.stdout.flush()
    except Wrong as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())

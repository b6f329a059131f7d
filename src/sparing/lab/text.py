"""The text of `lab:lm` and `lab:moe`: Python source that every installation of `sparing` already holds.

Train on the standard library and on the library's own dependencies; test on 28 standard-library modules that
neither the model nor its tokenizer has seen. No download, no licence question, and anyone can repeat the numbers.
"""

import ast
import inspect
import io
import lzma
import sysconfig
import tokenize
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# fmt: off
HELDOUT = (
    "argparse", "bisect", "calendar", "cmd", "colorsys", "configparser", "copy", "csv", "difflib", "fnmatch",
    "fractions", "gettext", "graphlib", "heapq", "linecache", "netrc", "plistlib", "pprint", "queue", "sched",
    "shelve", "shlex", "statistics", "string", "tarfile", "textwrap", "timeit", "zipfile",
)
"""Standard-library modules (or packages, in newer Pythons) that stay out of training."""

DEPENDENCIES = (
    "accelerate", "huggingface_hub", "jinja2", "matplotlib", "numpy", "peft", "rich", "scipy", "sklearn", "torch",
    "tqdm", "transformers", "typer",
)
"""Importable names of installed packages that training reads as well; a missing one is skipped."""

# Tests repeat themselves, tables are not language, and idlelib, lib2to3 and the like are programs of their own.
SKIPPED = frozenset((
    "test", "tests", "testing", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "turtledemo",
    "encodings", "pydoc_data", "ensurepip", "__pycache__", "_vendor", "externals",
))
# fmt: on

SHORTEST, LONGEST = 200, 400_000  # bytes of a training file: shorter ones are empty packages, longer ones generated
RUN = 8  # consecutive equal lines that make a training file a copy of a held-out one


def stdlib() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_stdlib(path: Path) -> bool:
    """Whether a file belongs to the standard library; installed packages may lie in a folder inside it."""
    return path.is_relative_to(stdlib()) and not {"site-packages", "dist-packages"} & set(path.parts)


def sources(root: Path) -> list[Path]:
    """All Python files below `root` in a fixed order, without tests, tables and vendored packages."""
    found = (path for path in root.rglob("*.py") if SKIPPED.isdisjoint(path.relative_to(root).parts))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def read(path: Path) -> str:
    """The file's text with `\\n` line ends; empty if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def split(text: str) -> tuple[str, str]:
    """Python source as two kinds of text: the code alone, and its docstrings and comments alone.

    Both in the order of the file; a docstring loses its indentation and quotes, a comment its sign, and lines that
    are left empty go. Source that does not parse gives two empty strings.

    >>> split("x = 1  # one\\n\\ndef f():\\n    \'\'\'Two.\'\'\'\\n    return 2\\n")
    ('x = 1\\n\\ndef f():\\n    return 2\\n', 'one\\nTwo.\\n')
    """
    with warnings.catch_warnings():  # odd escapes in old sources
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text)
            comments = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
        except (SyntaxError, ValueError, tokenize.TokenError):
            return "", ""
    lines = text.splitlines(keepends=True)
    said: list[tuple[int, str]] = []
    gone = set[int]()  # numbers of lines that held nothing else
    for token in comments:
        row, column = token.start
        rest = lines[row - 1][:column].rstrip()
        lines[row - 1] = rest + "\n"
        gone |= set() if rest else {row}
        said.append((row, token.string.lstrip("#!: ").rstrip()))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                alone = not lines[first.lineno - 1].encode()[: first.col_offset].strip()
                if isinstance(first.value.value, str) and alone and first.end_lineno:
                    gone |= set(range(first.lineno, first.end_lineno + 1))
                    said.append((first.lineno, inspect.cleandoc(first.value.value)))
    code = "".join(line for number, line in enumerate(lines, 1) if number not in gone)
    return code, "".join(f"{words}\n" for _, words in sorted(said) if words)


def runs(text: str) -> set[int]:
    """Hashes of all runs of `RUN` consecutive lines, blank lines and indentation aside."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {hash(tuple(lines[i : i + RUN])) for i in range(len(lines) - RUN + 1)}


@cache
def heldout_files() -> tuple[Path, ...]:
    """The files of the held-out modules, in the order of `HELDOUT`."""
    root = stdlib()
    return tuple(
        path
        for name in HELDOUT
        for path in ([root / f"{name}.py"] if (root / f"{name}.py").exists() else sources(root / name))
    )


@cache
def heldout_text() -> str:
    """All held-out files after each other, as one string."""
    return "".join(map(read, heldout_files()))


def of_domain(path: Path, domain: str) -> str:
    """A file as it is (`files`), without docstrings and comments (`code`), or those alone (`prose`)."""
    text = read(path)
    return text if domain == "files" else split(text)[("code", "prose").index(domain)]


@cache
def heldout_domain(domain: str) -> str:
    """All held-out files as `of_domain` gives them, as one string."""
    return "".join(of_domain(path, domain) for path in heldout_files())


@cache
def train_text(size: int, domain: str = "files") -> str:
    """At least `size` characters (if there are as many) of the training files, the standard library first."""
    text = ""
    for path in train_files():
        text += of_domain(path, domain)
        if len(text) > size:
            break
    return text


@cache
def train_files() -> tuple[Path, ...]:
    """Files to train on: the standard library first, then the dependencies, in a fixed order.

    Left out: everything named like a held-out module, and everything that shares `RUN` consecutive lines with one,
    wherever it lies (packages like to carry copies of standard modules).
    """
    secret = set[int]().union(*(runs(read(path)) for path in heldout_files()))
    specs = filter(None, map(find_spec, DEPENDENCIES))
    roots = [stdlib(), *(Path(spec.origin).parent for spec in specs if spec.origin)]
    files = []
    for root in roots:
        for path in sources(root):
            named = {path.stem, path.stem.lstrip("_"), *path.relative_to(root).parts[:-1]}
            if SHORTEST <= path.stat().st_size <= LONGEST and named.isdisjoint(HELDOUT):
                text = read(path)
                if text and secret.isdisjoint(runs(text)):
                    files.append(path)
    return tuple(files)


def xz_bits_per_byte() -> dict[str, float]:
    """What `xz -9e` makes of the held-out text, in bits per byte: as one archive, and file by file.

    The yardstick of a language model that has not seen the text: a general compressor has not either.
    """

    def bits(data: bytes) -> int:
        return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    files = [read(path).encode() for path in heldout_files()]
    size = sum(map(len, files))
    return {"archive": bits(b"".join(files)) / size, "files": sum(map(bits, files)) / size}

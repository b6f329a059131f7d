"""Versions: the exact ones of `make lock`, and the lowest that pyproject.toml admits for `make test-oldest`.

python tools/lock.py freeze PYTHON   exact versions of everything in that environment but torch and sparing itself
python tools/lock.py oldest          requirements that pin every range of pyproject.toml to its lower bound
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = (
    "# Exact versions of everything that `make` installs, written by `make lock`; torch is TORCH in the Makefile.\n"
    "# Delete a line, or leave `-c constraints.txt` out, to take newer ones: `make test-newest` tests those.\n"
)


def freeze(python: str) -> str:
    listed = subprocess.run([python, "-m", "pip", "freeze", "--exclude-editable"], capture_output=True, text=True)
    if listed.returncode:
        raise SystemExit(listed.stderr)
    lines = [line for line in listed.stdout.splitlines() if re.match(r"(?!torch==|sparing\b)[\w.\-]+==", line)]
    return HEAD + "\n".join(sorted(lines, key=str.lower)) + "\n"


def oldest() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    ranges += project["optional-dependencies"]["peft"]
    pinned = []
    for line in ranges:
        name, bound = re.fullmatch(r"([\w.\-]+)>=([\w.]+)(?:,.*)?", line).groups()  # type: ignore[union-attr]
        pinned.append(f"{name}=={bound}")
    return pinned


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["freeze", python]:
            sys.stdout.write(freeze(python))
        case ["oldest"]:
            print("\n".join(oldest()))
        case _:
            raise SystemExit(__doc__)

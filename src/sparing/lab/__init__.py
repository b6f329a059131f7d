"""Small trained models on data that any installation has: the embedded default of `sparing compare`.

`lab:lm` writes Python, `lab:vlm` finds coloured digits on photographs. Each is an ordinary checkpoint folder.
"""

from __future__ import annotations

from pathlib import Path

from sparing.grid.method import Error

_WEIGHTS = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """The lab models, without their `lab:`."""
    return tuple(sorted(folder.name for folder in _WEIGHTS.iterdir() if (folder / "config.json").is_file()))


def folder(name: str) -> Path:
    """Checkpoint folder of `lab:NAME`.

    Raises:
        Error: there is no such lab model.

    >>> folder("vlm").name
    'vlm'
    """
    if name not in names():
        raise Error(
            f"model = 'lab:{name}': there is no such lab model; there are {', '.join('lab:' + n for n in names())}"
        )
    return _WEIGHTS / name

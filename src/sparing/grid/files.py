"""Folders are data: JSON and safetensors only, never from outside the folder, sizes checked before memory is taken.

Every function refuses with an `Error` that names the file and, where there is one, the tensor.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparing.grid.method import Error

JSON_CAP = 8 << 20  #: bytes of a JSON file
HEADER_CAP = 16 << 20  #: bytes of a safetensors header
DEPTH_CAP = 48  #: lists and objects inside each other
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")  #: never opened

_PLAIN = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "F16": 16, "BF16": 16, "I32": 32, "F32": 32, "I64": 64, "F64": 64}
_RARE = {4: ("F4",), 6: ("F6_E2M3", "F6_E3M2"), 16: ("U16",), 32: ("U32",), 64: ("U64", "C64")}
_RARE[8] = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_BITS = _PLAIN | {dtype: bits for bits, dtypes in _RARE.items() for dtype in dtypes}


class Entry(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def sized(shape: tuple[int, ...]) -> str:
    """A shape in words.

    >>> sized((4, 8)), sized(())
    ('4x8', 'one number')
    """
    return "x".join(map(str, shape)) or "one number"


# --------------------------------------------------------------------------- where a file lies


def inside(folder: Path, name: str) -> Path:
    """The regular file `name` of a folder; refused if the name or a link leads out of it, or nothing is there."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise Error(f"{short(name)} is no plain file name in {folder}; nothing outside the folder is read")
    _stays(folder, folder / name)
    if not (folder / name).is_file():
        there = os.path.lexists(folder / name)
        raise Error(f"{folder / name}: {'is not a regular file' if there else 'is missing'}")
    return folder / name


def no_way_out(folder: Path) -> None:
    """Refuses a folder that holds links out of it. In the hub's cache, the blobs of the same repository are inside."""
    for path in (*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")):
        _stays(folder, path)


def _stays(folder: Path, path: Path) -> None:
    try:
        root, end = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as problem:  # a loop of links
        raise Error(f"{path}: cannot be followed ({problem})") from problem
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not end.is_relative_to(root):
        raise Error(f"{path}: is a link out of its folder, to {end}; put the file itself there")


# --------------------------------------------------------------------------- JSON


def read_json(file: Path, cap: int = JSON_CAP) -> dict[str, Any]:
    """A JSON file that holds one object."""
    size = file.stat().st_size
    if size > cap:
        raise Error(f"{file}: has {size:,} bytes, at most {cap:,} are read")
    return parse_json(file.read_bytes(), str(file))


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """One JSON object, no key twice, at most `DEPTH_CAP` deep; `where` begins the message of what is refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise Error(f"{where}: holds {short(twice)} twice")
        return found

    try:
        read = json.loads(text, object_pairs_hook=once)
    except RecursionError as problem:
        raise Error(f"{where}: is nested too deeply, at most {DEPTH_CAP} levels are read") from problem
    except Error:
        raise
    except ValueError as problem:  # JSONDecodeError, UnicodeDecodeError, a number of thousands of digits
        raise Error(f"{where}: is not JSON ({problem})") from problem
    level, depth = [read], 0
    while level:
        depth += 1
        level = [
            part
            for item in level
            for part in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        ]
        if depth > DEPTH_CAP:
            raise Error(f"{where}: is nested too deeply, at most {DEPTH_CAP} levels are read")
    if not isinstance(read, dict):
        raise Error(f"{where}: must hold a JSON object, holds {type(read).__name__}")
    return read


def short(value: Any) -> str:
    """A value as an error shows it: quoted, never long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


# --------------------------------------------------------------------------- safetensors


def read_header(file: Path) -> dict[str, Entry]:
    """What tensors a safetensors file holds, from its header; checked against the size of the file, nothing is loaded.

    The header is a number of 8 bytes and so many bytes of JSON; the tensors follow without gap or overlap.
    """
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise Error(f"{file}: is cut off or no safetensors file ({size:,} bytes, a header of {length:,})")
        if length > HEADER_CAP:
            raise Error(f"{file}: has a header of {length:,} bytes, at most {HEADER_CAP:,} are read")
        header = parse_json(opened.read(length), f"{file}: header")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    found: dict[str, Entry] = {}
    for name, said in header.items():
        found[name], begin, end = _entry(f"{file}: {short(name)}", said)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise Error(f"{file}: {short(name)} begins at byte {begin:,} of the tensors, expected {at:,}")
        at = end
    if at != size - 8 - length:
        raise Error(f"{file}: is cut off or longer than it says (tensors of {at:,} bytes, {size - 8 - length:,} there)")
    return found


def _entry(where: str, said: Any) -> tuple[Entry, int, int]:
    """A tensor of the header: what it is, and where its bytes begin and end."""
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise Error(f"{where} must say dtype, shape and data_offsets, says {short(said)}")
    dtype, shape, span = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise Error(f"{where} has dtype {short(dtype)}, known are {', '.join(_BITS)}")
    for what, value in (("shape", shape), ("data_offsets", span)):
        if (
            not isinstance(value, list)
            or len(value) > 32
            or any(type(n) is not int or not 0 <= n < 1 << 60 for n in value)
        ):
            raise Error(f"{where} has {what} {short(value)}, must be whole numbers")
    entry = Entry(dtype, tuple(shape), (math.prod(shape) * _BITS[dtype] + 7) // 8)
    if len(span) != 2 or span[1] - span[0] != entry.bytes:
        raise Error(f"{where} is {dtype} {sized(entry.shape)}, {entry.bytes:,} bytes, but lies at {short(span)}")
    return entry, span[0], span[1]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of plain number types and finite."""
    for name, entry in read_header(file).items():
        if entry.dtype not in _PLAIN:
            raise Error(f"{file}: {short(name)} has dtype {entry.dtype}, allowed are {', '.join(_PLAIN)}")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
        raise Error(f"{file}: cannot be read ({problem})") from problem
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise Error(f"{file}: {short(name)} holds bytes that are neither true nor false")
        if not finite(tensor):
            raise Error(f"{file}: {short(name)} ({sized(tuple(tensor.shape))}) holds NaN or infinity")
    return tensors


def finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity; takes no memory of its size."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # float8 has no minimum of its own
        tensor = tensor.half()
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor.detach()))

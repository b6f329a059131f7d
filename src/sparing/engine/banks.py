"""Banks of compressed weights: every matrix of the decoder layers at several levels of sparsity or bits, on disk.

What a level saves is storage. A weight with zeros here and there (unstructured sparsity) is multiplied as fast as a
dense one, on CPUs and on GPUs; a quantised weight is brought back to the model's own number type before it is
multiplied. So a model at any levels runs exactly as fast, and in as much memory, as the dense one: levels are for
searching which matrices bear compression. Only a runtime with kernels for it (packed integers, or semi-structured
sparsity, which is another pattern) turns a choice of levels into time.

Shapes: N tokens, O outputs and C inputs of a linear layer, b columns of a block, G groups of input channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparing.engine.calls import split
from sparing.engine.view import View, evaluating
from sparing.grid import files
from sparing.grid.compress import (
    BITS,
    DATA_FREE,
    PRUNERS,
    SOLVERS,
    Gram,
    Quantised,
    SparsityLevels,
    gptq_factored,
    magnitude,
    must,
    ordered_factor,
    pack,
    rtn,
    sparsegpt_factored,
    unpack,
    wanda,
)
from sparing.grid.files import short, sized
from sparing.grid.method import Error

# --------------------------------------------------------------------------- what a linear layer reads


@contextlib.contextmanager
def _recording(
    linears: Mapping[str, nn.Linear], rows: Callable[[Tensor], Tensor], full: bool, dtype: torch.dtype = torch.float32
) -> Iterator[dict[str, Gram]]:
    """Grams of what these linear layers read while the block runs; layers that read one tensor in a row share one."""
    grams: dict[str, Gram] = {}
    last: tuple[Tensor, Gram] | None = None

    def reads(name: str, x: Tensor) -> None:
        nonlocal last
        if last is None or last[0] is not x:
            gram = grams.setdefault(name, Gram(x.shape[-1], full, dtype))
            gram.add(rows(x))
            last = x, gram
        grams[name] = last[1]

    with contextlib.ExitStack() as stack:
        for name, linear in linears.items():
            hook = linear.register_forward_pre_hook(lambda module, args, name=name: reads(name, args[0]))
            stack.callback(hook.remove)
        yield grams


def _real(x: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The rows that are not padding, (N, C)."""
    flat = x.flatten(0, -2)
    return flat if mask_BT is None else flat[mask_BT.flatten().to(x.device)]


def _inputs(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]]
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Arguments of forward, a batch, and its tokens that are not padding, bool (B, T), None where all count."""
    device = next(model.parameters()).device
    seen = False
    for batch in batches:
        seen = True
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
        given = inputs.get("attention_mask")
        yield inputs, given.bool() if given is not None and not bool(given.all()) else None
    if not seen:
        raise Error("batches: the calibration data is empty")


def hessian(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Gram]:
    """Grams of what linear layers read over calibration batches, in one dense pass of the whole model.

    All asked for are in memory together; `Bank.build` holds those of one layer at a time.

    Args:
        batches: keyword arguments of the model's forward. Padding (attention_mask 0) and labels are left out.
        names: weights, as `linears` names them; None for all.
        dtype: of the sums.

    Raises:
        Error: there is no batch, or no linear layer of that name.
    """
    every = {name: linear for layer in linears(model) for name, linear in layer.items()}
    for name in names or ():
        must("names", name, name in every, f"a linear layer of the decoder layers, e.g. {next(iter(every))}")
    mask: Tensor | None = None
    chosen = {name: every[name] for name in names or every}
    with evaluating(model), torch.no_grad(), _recording(chosen, lambda x: _real(x, mask), True, dtype) as grams:
        for inputs, given in _inputs(model, batches):
            mask = given
            model(**inputs, use_cache=False)
    return grams


def linears(model: nn.Module) -> list[dict[str, nn.Linear]]:
    """The linear layers inside each decoder layer, by the name of their weight among the model's parameters.

    Fused projections are one matrix. Stacked experts and routers are no linear layers and stay dense.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        {names[id(m.weight)]: m for m in layer.module.modules() if isinstance(m, nn.Linear) and m.weight.numel()}
        for layer in View(model).layers
    ]
    if not any(found):
        raise Error(f"model = {type(model).__name__}: no linear layers (torch.nn.Linear) found in its decoder layers")
    return found


@dataclass(frozen=True)
class _Recipe:
    """How the matrices of a bank are made."""

    solver: str
    levels: SparsityLevels | tuple[int, ...]
    block: int
    damp: float
    group: int
    act_order: bool
    inputs_at: int | None

    def __post_init__(self) -> None:
        must("solver", self.solver, self.solver in SOLVERS, f"one of {', '.join(SOLVERS)}")
        if self.solver in PRUNERS:
            good, allowed = isinstance(self.levels, SparsityLevels), "sparsity_levels(s, n, hidden)"
        else:
            bits = self.levels if isinstance(self.levels, tuple) else ()
            good = bool(bits) and all(b in BITS for b in bits) and list(bits) == sorted(set(bits))
            allowed = f"rising bit widths in {BITS[0]}..{BITS[-1]}"
        must(f"levels of {self.solver}", self.levels, good, allowed)
        for name, value in (("block", self.block), ("group", self.group)):
            must(name, value, isinstance(value, int) and value >= 1, "a number of columns, >= 1")
        must("damp", self.damp, self.damp >= 0, "a share of the mean of the diagonal, >= 0")
        usual = (0,) if isinstance(self.levels, SparsityLevels) else self.levels
        must("inputs_at", self.inputs_at, self.inputs_at in (None, *usual), f"None or one of {usual}")

    def of(self, numel: int) -> tuple[int, ...]:
        """The levels of a matrix of so many weights."""
        return self.levels.of(numel) if isinstance(self.levels, SparsityLevels) else self.levels

    def prepared(self, gram: Gram | None) -> tuple[Tensor, ...]:
        """What all levels, and all matrices that read the same, have in common."""
        if gram is None:
            return ()
        if self.solver == "wanda":
            return (gram.norm,)
        return ordered_factor(gram.total, self.damp, self.act_order and self.solver == "gptq")

    def stored(self, weight_OC: Tensor, level: int, prepared: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The tensors that a level is stored as."""
        if isinstance(self.levels, SparsityLevels):
            zeros = self.levels.zeros(weight_OC.numel(), level)
            if self.solver == "sparsegpt":
                found_OC = sparsegpt_factored(weight_OC, prepared[1], zeros, self.block)
            elif self.solver == "wanda":
                found_OC = wanda(weight_OC, prepared[0], zeros=zeros)
            else:
                found_OC = magnitude(weight_OC, zeros=zeros)
            kept_OC = (found_OC != 0).cpu()
            return {"mask": pack(kept_OC.to(torch.uint8), 1), "values": found_OC.cpu()[kept_OC]}
        if self.solver == "gptq":
            _, packed = gptq_factored(weight_OC, prepared[0], prepared[1], level, self.group, self.act_order)
        else:
            _, packed = rtn(weight_OC, level, self.group)
        return {"codes": pack(packed.codes, level), "scale": packed.scale.cpu(), "zero": packed.zero.cpu()}


# --------------------------------------------------------------------------- the model, layer by layer


class _Replay:
    """Runs a model's decoder layers one at a time over calibration batches.

    One dense pass notes what every layer is called with; then only the hidden states between two layers are held.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self.layers = View(model).layers
        self.hidden: list[Tensor] = []
        self._mask: Tensor | None = None  # of the batch that runs
        self._masks: list[Tensor | None] = []
        self._rest: list[list[dict[str, Any]]] = [[] for _ in self.layers]
        self._out: Tensor | None = None
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                before = self._before(layer.index)
                stack.callback(layer.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.module.register_forward_hook(self._after).remove)
            for inputs, mask in _inputs(model, batches):
                self._masks.append(mask)
                model(**inputs, use_cache=False)
        self._out = None

    def _before(self, index: int) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden, rest = split(module.forward, args, kwargs)
            if index == 0:
                self.hidden.append(hidden)
            elif self._out is None or (hidden is not self._out and not torch.equal(hidden, self._out)):
                raise Error(
                    f"model: layer {index} does not read what layer {index - 1} gives; cannot go layer by layer"
                )
            self._rest[index].append(rest)

        return before

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        self._out = _hidden(out)

    def run(self, layer: int, move: bool = True) -> None:
        """One layer over all batches; `move` makes its outputs the hidden states."""
        for i, rest in enumerate(self._rest[layer]):
            self._mask = self._masks[i]
            out = _hidden(self.layers[layer].module(self.hidden[i], **rest))
            if move:
                self.hidden[i] = out

    def grams(self, layer: int, chosen: Mapping[str, nn.Linear], full: bool, move: bool) -> dict[str, Gram]:
        """What linear layers of one layer read, padding left out."""
        with _recording(chosen, lambda x: _real(x, self._mask), full) as grams:
            self.run(layer, move)
        return grams


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


# --------------------------------------------------------------------------- banks

VERSION = 1  # of bank.json
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}


@dataclass(frozen=True)
class _Matrix:
    shape: tuple[int, int]
    dtype: torch.dtype
    levels: tuple[int, ...]


def _read(file: Path) -> dict[str, Any]:
    """bank.json of this version, with its two parts."""
    said = files.read_json(files.inside(file.parent, file.name))
    if said.get("version") != VERSION:
        raise Error(f"{file}: version is {short(said.get('version'))}, this library reads {VERSION}")
    for part in ("recipe", "matrices"):
        if not isinstance(said.get(part), dict):
            raise Error(f"{file}: not a bank: {part} = {short(said.get(part))}: must be an object")
    return said


@dataclass(frozen=True)
class Bank:
    """A folder with every matrix of the decoder layers at several levels.

    `bank.json` says how it was made; `NAME.safetensors` holds all levels of a matrix, named as its weight among the
    model's parameters, e.g. `model.layers.0.self_attn.q_proj.weight`. A sparse level is stored as one bit a weight
    (which are not zero) and the weights that stay, in the model's number type; a quantised one as packed codes, scales
    and zeros. Levels are -n..n of `SparsityLevels`, or bit widths.

    Attributes:
        folder: where it lies.
        solver: that made it.
        group: input channels that share a scale; of quantised levels.
        matrices: shape, number type and levels of each matrix, by name.
    """

    folder: Path
    solver: str
    group: int
    matrices: Mapping[str, _Matrix]

    @classmethod
    def build(
        cls,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]] | None,
        folder: str | Path,
        levels: SparsityLevels | Sequence[int],
        *,
        solver: str = "sparsegpt",
        block: int = 128,
        damp: float = 0.01,
        group: int = 128,
        act_order: bool = False,
        inputs_at: int | None = None,
        progress: bool = True,
    ) -> Bank:
        """Make a bank, or finish one: a matrix that is there already is not made again.

        The decoder layers are gone through once, each reading what the layers before it give, so that memory holds the
        sums of one layer, and the hidden states of all calibration tokens between two layers, in the model's number
        type. Before that one dense pass notes what else layers are called with (masks, positions).

        Args:
            model: evaluated as it is, and left bit for bit as it was.
            batches: keyword arguments of the model's forward; padding (attention_mask 0) and labels do not count. None
                for magnitude and rtn, which need no data. On resuming give the same: it is not stored.
            folder: to write to; made if missing.
            levels: `sparsity_levels(...)` for sparsegpt, wanda, magnitude; rising bit widths for gptq, rtn.
            solver: sparsegpt | wanda | magnitude | gptq | rtn; the functions of those names.
            block, damp, group, act_order: as there.
            inputs_at: level of the layers before one whose inputs are recorded; None: they are dense. Costs one more
                run of each layer.
            progress: show a bar.

        Raises:
            Error: an argument; a folder that holds another bank, or one of another model (names the tensor).
        """
        made = levels if isinstance(levels, SparsityLevels) else tuple(levels)
        recipe = _Recipe(solver, made, block, damp, group, act_order, inputs_at)
        layers = linears(model)
        matrices = {
            name: _Matrix((m.out_features, m.in_features), m.weight.dtype, recipe.of(m.weight.numel()))
            for layer in layers
            for name, m in layer.items()
        }
        for name, matrix in matrices.items():
            must(f"model: {name}", matrix.dtype, matrix.dtype in _DTYPES, f"one of {', '.join(_NAMED)}")
        bank = cls(Path(folder), solver, group, matrices)
        bank._begin(recipe)
        missing = [[name for name in layer if not bank._file(name).exists()] for layer in layers]
        if batches is None and solver not in DATA_FREE and any(missing):
            raise Error(f"batches = None: {solver} needs calibration data; {' and '.join(DATA_FREE)} do not")
        replay = None
        bar = tqdm(total=sum(map(len, missing)), desc=f"bank {solver}", disable=not progress)
        with bar, evaluating(model), torch.no_grad():
            if batches is not None and solver not in DATA_FREE and any(missing):
                replay = _Replay(model, batches)
            for index, (layer, names) in enumerate(zip(layers, missing, strict=True)):
                if not any(missing[index:]):
                    break
                chosen, grams = {name: layer[name] for name in names}, {}
                if replay is not None:
                    grams = replay.grams(index, chosen, full=solver != "wanda", move=inputs_at is None)
                bank._solve(chosen, grams, recipe, bar)
                if replay is not None and inputs_at is not None:
                    with at_levels(model, bank, dict.fromkeys(layer, inputs_at)):
                        replay.run(index)
        return cls.open(folder)

    def _begin(self, recipe: _Recipe) -> None:
        """Write bank.json, or make sure that the one there says the same."""
        matrices = {
            name: {"shape": list(m.shape), "dtype": str(m.dtype).removeprefix("torch."), "levels": list(m.levels)}
            for name, m in self.matrices.items()
        }
        wanted = {"version": VERSION, "recipe": dataclasses.asdict(recipe), "matrices": matrices}
        text = json.dumps(wanted, indent=1)
        file = self.folder / "bank.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(file):
                file.with_suffix(".new").write_text(text + "\n")
                os.replace(file.with_suffix(".new"), file)
        except OSError as problem:
            raise Error(f"folder = {str(self.folder)!r}: cannot be written to ({problem.strerror})") from problem
        there, here = _read(file), json.loads(text)
        for part in ("recipe", "matrices"):
            for key in (*here[part], *there[part]):
                old, new = there[part].get(key), here[part].get(key)
                if old != new:
                    raise Error(
                        f"folder = {str(self.folder)!r}: holds another bank: {key} is {short(old)} there, "
                        f"{short(new)} here; choose another folder"
                    )

    def _solve(self, chosen: Mapping[str, nn.Linear], grams: Mapping[str, Gram], recipe: _Recipe, bar: tqdm) -> None:
        """Make and write all levels of these matrices; neighbours that read the same share what is prepared."""
        last: tuple[Gram | None, tuple[Tensor, ...]] | None = None
        for name, linear in chosen.items():
            gram = grams.get(name)
            try:
                if last is None or last[0] is not gram:
                    last = gram, recipe.prepared(gram)
                found = {
                    f"{level}.{part}": tensor.contiguous()
                    for level in self.levels(name)
                    for part, tensor in recipe.stored(linear.weight, level, last[1]).items()
                }
            except Error as problem:
                raise Error(f"{name}: {problem}") from problem
            file = self._file(name)
            try:
                save_file(found, file.with_suffix(".new"))
                os.replace(file.with_suffix(".new"), file)
            except (OSError, SafetensorError) as problem:
                raise Error(f"{file}: cannot be written ({problem})") from problem
            bar.update()

    @classmethod
    def open(cls, folder: str | Path) -> Bank:
        """A finished bank. The folder is data: nothing in it runs, see docs/security.md.

        Raises:
            Error: no bank there, an unfinished or a damaged one; names the file and the tensor.
        """
        folder = Path(folder)
        if not (folder / "bank.json").exists():
            raise Error(f"folder = {str(folder)!r}: no bank there (bank.json is missing)")
        file = folder / "bank.json"
        said = _read(file)
        try:
            solver, group = said["recipe"]["solver"], said["recipe"]["group"]
            found = {
                name: _Matrix(
                    (int(m["shape"][0]), int(m["shape"][1])), _NAMED[m["dtype"]], tuple(map(int, m["levels"]))
                )
                for name, m in said["matrices"].items()
            }
        except (KeyError, TypeError, ValueError, IndexError) as problem:
            raise Error(f"{file}: not a bank: {type(problem).__name__} {problem}") from problem
        if solver not in SOLVERS or type(group) is not int or group < 1 or not found:
            raise Error(f"{file}: not a bank: solver {short(solver)}, group {short(group)}, {len(found)} matrices")
        bank = cls(folder, solver, group, found)
        for name in found:
            bank._check(name)
        return bank

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _parts(self, name: str, level: int) -> dict[str, tuple[str, tuple[int, ...] | None]]:
        """Number types and shapes of the tensors that a level is stored as; None: any number of them."""
        matrix = self.matrices[name]
        rows, columns = matrix.shape
        if self.solver in PRUNERS:
            return {"mask": ("U8", (rows, -(-columns // 8))), "values": (_DTYPES[matrix.dtype], None)}
        groups = (rows, -(-columns // self.group))
        return {"codes": ("U8", (rows, -(-columns * level // 8))), "scale": ("F32", groups), "zero": ("U8", groups)}

    def _check(self, name: str) -> None:
        """Hold a matrix file's header against bank.json."""
        if not os.path.lexists(self._file(name)):
            raise Error(f"{self._file(name)}: is missing: the bank is not finished; call Bank.build once more")
        file = files.inside(self.folder, self._file(name).name)
        header = files.read_header(file)
        for level in self.matrices[name].levels:
            for part, (dtype, shape) in self._parts(name, level).items():
                entry = header.get(f"{level}.{part}")
                found = "missing" if entry is None else f"{entry.dtype} {sized(entry.shape)}"
                good = entry is not None and entry.dtype == dtype
                if not (
                    good and entry is not None and (entry.shape == shape or (shape is None and len(entry.shape) == 1))
                ):
                    wanted = sized(shape) if shape is not None else "a list"
                    raise Error(f"{file}: {level}.{part} is {found}, bank.json asks for {dtype} {wanted}")

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices, in the model's order."""
        return tuple(self.matrices)

    def _known(self, name: str) -> _Matrix:
        if name not in self.matrices:
            raise Error(f"name = {name!r}: no matrix of this bank; its names begin with {self.names[0]}")
        return self.matrices[name]

    def levels(self, name: str) -> tuple[int, ...]:
        """The levels that a matrix has, rising."""
        return self._known(name).levels

    def size(self, name: str) -> int:
        """Weights of a matrix."""
        rows, columns = self._known(name).shape
        return rows * columns

    def bytes(self, name: str, level: int) -> int:
        """What a level takes on disk."""
        self._at(name, level)
        header = files.read_header(self._file(name))
        return sum(header[f"{level}.{part}"].bytes for part in self._parts(name, level))

    def _at(self, name: str, level: int) -> None:
        if level not in self._known(name).levels:
            raise Error(f"level = {level!r}: {name} has {', '.join(map(str, self.levels(name)))}")

    def load(self, name: str, level: int) -> Tensor:
        """A matrix at a level, ready to multiply: (O, C) on the CPU, in the number type of the model it was made of."""
        self._at(name, level)
        matrix, parts = self.matrices[name], {}
        try:
            with safe_open(self._file(name), "pt") as opened:
                for part in self._parts(name, level):
                    parts[part] = opened.get_tensor(f"{level}.{part}")
        except (SafetensorError, OSError) as problem:
            raise Error(f"{self._file(name)}: cannot be read ({problem})") from problem
        for part, tensor in parts.items():
            if not files.finite(tensor):
                raise Error(f"{self._file(name)}: {level}.{part} holds NaN or infinity")
        columns = matrix.shape[1]
        if "codes" in parts:
            codes = unpack(parts["codes"], level, columns)
            return Quantised(codes, parts["scale"], parts["zero"], level, self.group).dequantised().to(matrix.dtype)
        kept_OC = unpack(parts["mask"], 1, columns).bool()
        if int(kept_OC.sum()) != len(parts["values"]):
            raise Error(f"{self._file(name)}: {level}.values has {len(parts['values'])}, its mask {int(kept_OC.sum())}")
        weight_OC = torch.zeros(matrix.shape, dtype=matrix.dtype)
        weight_OC[kept_OC] = parts["values"]
        return weight_OC

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's own parameters that this bank has levels of, by name.

        Raises:
            Error: another model: names the first tensor that is not there, or has another size.
        """
        own = {name: linear.weight for layer in linears(model) for name, linear in layer.items()}
        for name in (*self.matrices, *own):
            here = sized(tuple(own[name].shape)) if name in own else "no such linear layer"
            there = sized(self.matrices[name].shape) if name in self.matrices else "no such matrix"
            if here != there:
                raise Error(
                    f"bank = {str(self.folder)!r}: was made of another model: {name} is {there}, "
                    f"{type(model).__name__} has {here}"
                )
        return own


def load_levels_(model: nn.Module, bank: Bank, levels: Mapping[str, int], loaded: dict[str, int]) -> list[str]:
    """Put matrices of a live model at the levels wanted, in place; those that are there already are not touched.

    The tensors that the model held are let go, not overwritten: whoever keeps them can put them back, see `at_levels`.

    Args:
        model: the one the bank was made of.
        levels: by name; matrices that are not named stay as they are.
        loaded: what the model holds, by name; empty for a dense model. Brought up to date.

    Returns:
        names of the matrices that changed.

    Raises:
        Error: another model, a name or a level that the bank does not have; then nothing has changed.
    """
    for name, level in levels.items():
        bank._at(name, level)
    changed = [name for name, level in levels.items() if loaded.get(name) != level]
    own = bank.weights(model) if changed else {}
    for name in changed:
        own[name].data = bank.load(name, levels[name]).to(own[name].data)
        loaded[name] = levels[name]
    return changed


@contextlib.contextmanager
def at_levels(model: nn.Module, bank: Bank, levels: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The live model at these levels for the time of a `with` block; its own weights come back bit for bit.

    They are kept by reference, not copied: memory holds the dense weights and those loaded. Yields what is loaded; give
    it to `load_levels_` to move on to other levels inside the block.
    """
    own = bank.weights(model)
    dense = {name: parameter.data for name, parameter in own.items()}
    loaded: dict[str, int] = {}
    try:
        load_levels_(model, bank, levels, loaded)
        yield loaded
    finally:
        for name, data in dense.items():
            own[name].data = data

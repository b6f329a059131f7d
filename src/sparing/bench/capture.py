"""What ran for one sample, as pictures show it: runs a method once on a task's own inputs and keeps which cells ran."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparing.bench import pictures, tasks, timing
from sparing.bench.compare import _slug as fitted_name
from sparing.bench.models import Loaded, load_model
from sparing.bench.pictures import Footprint
from sparing.bench.report import shots
from sparing.bench.summary import Experiment, Line, Row, experiments, percent
from sparing.engine.attach import attach
from sparing.engine.surgery import Plan, SurgeryMethod
from sparing.engine.view import View
from sparing.grid.method import Error, Method, load, load_fits, parse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 24  #: generated tokens that a compute map shows


@torch.no_grad()
def footprint(loaded: Loaded, task: tasks.Task, method: Method, sample: int = 0, steps: int = STEPS) -> Footprint:
    """Runs `method` on a batch of the task, prefill and `steps` generated tokens; keeps what ran for one sample."""
    inputs = task.inputs()
    ids = inputs["input_ids"]
    if not 0 <= sample < len(ids):
        raise Error(f"sample: {sample} is not there; the task's first batch holds 0 to {len(ids) - 1}")
    here = (
        inputs["attention_mask"][sample].bool().cpu()
        if "attention_mask" in inputs
        else torch.ones(ids.shape[1], dtype=torch.bool)
    )
    token = loaded.view.image_token_id
    visual = (ids[sample].cpu() == token) if token is not None else torch.zeros(ids.shape[1], dtype=torch.bool)
    picture = _picture(loaded, inputs, sample)
    if isinstance(method, SurgeryMethod):
        plan = method.plan(loaded.model)
        if method.card.axis == "experts":
            return _experts_left(loaded.model, plan)
        share = left(loaded.model, plan)
        prompt = np.repeat((share > 0)[:, None], int(here.sum()), 1)
        return Footprint(prompt, visual[here].numpy(), np.zeros((len(share), 0), bool), share, picture)
    with attach(loaded.model, method, warn=False) as run:
        run.keeps_index = True
        timing.decode(loaded.model, inputs, timing.prefill(loaded.model, inputs), steps)
        return pictures.footprint(run.trace, visual, sample=sample, here=here, image=picture)


def _experts_left(model: nn.Module, plan: Plan) -> Footprint:
    """The experts of each layer that a plan leaves; a layer without experts keeps its row empty."""
    layers = View(model).layers
    width = max(layer.experts.count for layer in layers if layer.experts is not None)
    stays, share = np.zeros((len(layers), width), bool), np.ones(len(layers))
    for row, layer, cut in zip(stays, layers, plan.layers, strict=True):
        if layer.experts is not None and cut is not None:
            row[: layer.experts.count] = cut.experts is None
            if cut.experts is not None:
                row[cut.experts.numpy()] = True
            share[layer.index] = row.sum() / layer.experts.count
    return Footprint(stays, np.zeros(width, bool), np.zeros((len(layers), 0), bool), share, experts=True)


def left(model: nn.Module, plan: Plan) -> NDArray[np.float64]:
    """Share of each layer's parameters that a plan leaves."""
    shares = []
    for layer, cut in zip(View(model).layers, plan.layers, strict=True):
        if cut is None:
            shares.append(0.0)
            continue
        gone = 0.0
        for part, size, kept, stays in (
            (layer.attention, layer.groups, cut.groups, cut.attention),
            (layer.mlp, layer.neurons, cut.neurons, cut.mlp),
        ):
            if part is not None:
                share = 0.0 if not stays else 1.0 if kept is None else kept.numel() / size
                gone += (1 - share) * sum(weight.numel() for weight in part.parameters())
        shares.append(1 - gone / sum(weight.numel() for weight in layer.module.parameters()))
    return np.array(shares)


def _picture(loaded: Loaded, inputs: tasks.Batch, sample: int) -> NDArray[np.uint8] | None:
    """The picture as the model got it, back in colours; None where it cannot be read off the inputs."""
    pixels = inputs.get("pixel_values")
    grids = inputs.get("image_grid_thw")
    if isinstance(pixels, Tensor) and isinstance(grids, Tensor) and len(grids) == len(inputs["input_ids"]):
        pixels, sample = _laid_out(pixels, grids.tolist(), sample, loaded), 0
    elif not isinstance(pixels, Tensor) or len(pixels) != len(inputs["input_ids"]):
        return None
    if pixels is None or pixels.ndim != 4 or pixels.shape[1] != 3:
        return None
    image = pixels[sample].float().cpu().permute(1, 2, 0)
    try:
        prepares: Any = loaded.processor.image_processor
        image = image * torch.tensor(prepares.image_std) + torch.tensor(prepares.image_mean)
    except (Error, AttributeError, TypeError):
        image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
    return (255 * image.clamp(0, 1)).round().byte().numpy()


def _laid_out(pixels: Tensor, grids: list[list[int]], sample: int, loaded: Loaded) -> Tensor | None:
    """(1, 3, H, W) picture of one sample, from the (patches, values) that a tower for any size is given.

    A patch holds 3 x time x side x side values. Patches that become one token follow each other: the rows of the grid
    are taken `merge` at a time, and so are the columns within them.
    """
    vision = getattr(loaded.model.config, "vision_config", None)
    merge, side = getattr(vision, "spatial_merge_size", None), getattr(vision, "patch_size", None)
    time, high, wide = grids[sample]
    if not isinstance(merge, int) or not isinstance(side, int) or time != 1 or pixels.shape[-1] % (3 * side * side):
        return None
    first = sum(math.prod(grid) for grid in grids[:sample])
    patches = pixels[first : first + high * wide]
    blocks = patches.reshape(high // merge, wide // merge, merge, merge, 3, -1, side, side)[..., 0, :, :]
    return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, high * side, wide * side)


# --------------------------------------------------------------------------- all pictures of a comparison


def draw(rows: Sequence[Row], out: Path, device: str = "cpu") -> dict[str, Figure]:
    """The pictures of what ran that `out` does not hold yet: compute maps, budgets of layers, visual tokens kept.

    The methods are those of the rows, as they were fitted.
    """
    found = experiments(rows)
    colours = {label: colour for label, (colour, _) in pictures.looks_of(found).items()}
    names = {shot.key: shot.name for shot in shots(found)}
    figures: dict[str, Figure] = {}
    for experiment in found:
        drawn = _wanted(experiment)
        if any(not (out / f"{names[key]}.svg").is_file() for key in drawn):
            figures |= {names[key]: figure for key, figure in _drawn(experiment, out, device, colours).items()}
    return figures


def _wanted(experiment: Experiment) -> list[tuple[str, ...]]:
    """Keys of the pictures that an experiment always has."""
    place = experiment.model, experiment.task
    ran = [line for line in experiment.lines if line.ran]
    maps = [("map", *place, label) for label in dict.fromkeys(line.label for line in ran if line.axis != "width")]
    return [*maps, ("budgets", *place)] if ran else []


def _drawn(experiment: Experiment, out: Path, device: str, colours: Mapping[str, str]) -> dict[tuple[str, ...], Figure]:
    dtype = next((row["dtype"] for row in experiment.rows if row.get("dtype")), None)
    loaded = load_model(experiment.model, device, dtype)
    task = tasks.parse(experiment.task, loaded)
    place = experiment.model, experiment.task
    figures: dict[tuple[str, ...], Figure] = {}
    shares = {}
    for label in experiment.labels:
        lines = [line for line in experiment.lines if line.label == label and line.ran]
        if not lines:
            continue
        seen = {f"keep {percent(line.keep)}": footprint(loaded, task, rebuilt(line, out, loaded)) for line in lines}
        shares[label] = {name: ran.share for name, ran in seen.items()}
        if lines[0].axis != "width":
            figures["map", *place, label] = pictures.compute_map(seen)
        if lines[0].axis == "tokens" and (shown := pictures.kept(seen)) is not None:
            figures["kept", *place, label] = shown
    if shares:
        figures["budgets", *place] = pictures.budgets(shares, colours)
    return figures


def rebuilt(line: Line, out: Path, loaded: Loaded) -> Method:
    """The method of a row at its budget, fitted as it was when the row was measured."""
    spec = str(line.row.get("spec") or line.row["method"])
    here = out / "fitted"
    folders = (Path(spec), here / fitted_name(spec), here / fitted_name(f"{spec}-keep-{line.keep:g}"))
    for folder in folders:
        if (folder / "method.json").is_file():
            return load(folder).at(line.keep, loaded.view.shape)
        if fits := load_fits(folder):
            return fits[line.keep].at(line.keep, loaded.view.shape)
    return parse(spec).at(line.keep, loaded.view.shape)

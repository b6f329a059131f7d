"""Training: one loop on `accelerate` for everything that is learned, resumable, what was learned kept apart."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparing.grid.files import short
from sparing.grid.method import Error, Method

Batch = Mapping[str, Tensor]


class Objective(nn.Module):
    """What is trained, and by which loss.

    A subclass keeps the frozen model as `model`, holds what it trains as parameters beside it (or sets `requires_grad`
    inside the model), and gives the loss of a batch in `forward`. Buffers of its own are kept in checkpoints too.

    Attributes:
        share: of the steps that lie behind, 0 to 1; set by `train` before each step and behind it, for schedules.
        shown: numbers shown beside the progress bar.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.share = 0.0
        self.shown: dict[str, float] = {}

    def forward(self, batch: Batch) -> Tensor:
        """The loss of one batch, a scalar."""
        raise Error(f"{type(self).__name__} defines no forward")

    def after_step(self, step: int) -> None:
        """Called when a step has been taken; for what is learned by other means than the gradient."""

    def learned(self) -> dict[str, Tensor]:
        """Parameters that train and buffers of its own, by name."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        own = {name: b for name, b in self.named_buffers() if not name.startswith("model.")}
        return {**trained, **own}


@dataclass(frozen=True)
class Training:
    """How to train; the options that `fit` of a trained method takes.

    Attributes:
        epochs: passes over the batches.
        lr: peak learning rate; None takes the method's.
        warmup: share of steps with a rising rate; it falls to zero along a cosine.
        weight_decay, clip: of AdamW; limit of the gradient's norm, above 0.
        checkpoint: folder for an unfinished training, None keeps it in memory only. A training that finds its file
            there goes on with it, with the same result as if it had never stopped.
        every: seconds between checkpoints.
        progress: show a bar.
    """

    epochs: int = 1
    lr: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint: str | Path | None = None
    every: float = 30.0
    progress: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.epochs, int) and not isinstance(self.epochs, bool) and self.epochs >= 1):
            raise Error(f"epochs = {short(self.epochs)}: must be a whole number >= 1")
        for name in ("lr", "warmup", "weight_decay", "clip", "every"):
            value = getattr(self, name)
            if value is None and name == "lr":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0:
                raise Error(f"{name} = {short(value)}: must be a number >= 0")
        if self.warmup > 1:
            raise Error(f"warmup = {self.warmup:g}: must be a share of the steps, at most 1")
        if self.clip == 0:
            raise Error("clip = 0: must be above 0; at 0 nothing would be learned")


def labelled(batches: Iterable[Batch]) -> list[Batch]:
    """The batches as a list; refuses none, and one without labels."""
    data = list(batches)
    if not data:
        raise Error("batches: the training data is empty")
    if any("labels" not in b for b in data):
        raise Error("batches: training needs labels in every batch")
    return data


def train(
    objective: Objective, data: Sequence[Batch], how: Training, *, lr: float, name: str, epochs: int | None = None
) -> dict[str, Tensor]:
    """AdamW with warm-up and cosine; under `accelerate launch` every process takes its part of the batches.

    Args:
        objective: trains in place.
        data: batches; moved to the objective's device one by one.
        how: the caller's options.
        lr: used where `how` gives none.
        name: of this training, for the bar and its checkpoint; a method that trains twice uses two names.
        epochs: instead of `how.epochs`.

    Returns:
        `objective.learned()`, detached copies.

    Raises:
        Error: a checkpoint of another training or a damaged one is in the way, less batches than processes, nothing
            to train, or a loss that is no number.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    alone = accelerator.num_processes == 1
    if len(data) < accelerator.num_processes:
        raise Error(f"batches: {len(data)} for {accelerator.num_processes} processes; each needs one at least")
    if not alone:
        objective.to(accelerator.device)
    device = next(objective.parameters()).device
    mine = list(data[accelerator.process_index :: accelerator.num_processes])
    mine = mine[: len(data) // accelerator.num_processes]
    parameters = [p for p in objective.parameters() if p.requires_grad]
    if not parameters:
        raise Error(f"{name}: no parameter is left to train")
    rate = lr if how.lr is None else how.lr
    how = replace(how, lr=rate)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=how.weight_decay, betas=(0.9, 0.98))
    steps = (how.epochs if epochs is None else epochs) * len(mine)
    rise = max(1, round(how.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / rise, 0.5 * (1 + math.cos(math.pi * max(0, t - rise) / max(1, steps - rise)))),
    )
    kept = _Checkpoint(how, name, objective, {"steps": steps, "processes": accelerator.num_processes}, data)
    done = kept.restore(objective, optimizer, schedule)
    whole = objective if alone else accelerator.prepare_model(objective)
    bar = tqdm(total=steps, initial=done, desc=name, disable=not (how.progress and accelerator.is_main_process))
    for step in range(done, steps):
        objective.share = step / steps
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in mine[step % len(mine)].items()}
        loss = whole(batch)
        if not bool(torch.isfinite(loss)):
            raise Error(
                f"lr = {optimizer.param_groups[0]['lr']:.3g}: the loss of {name} is {loss.item()} at step {step}"
            )
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(parameters, how.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        objective.share = (step + 1) / steps
        objective.after_step(step)
        if not alone:  # what is learned without a gradient is averaged, as gradients are
            for tensor in objective.learned().values():
                if not tensor.requires_grad and tensor.is_floating_point():
                    tensor.copy_(accelerator.reduce(tensor, "mean"))
        bar.update()
        bar.set_postfix({"loss": f"{loss.item():.3f}", **{k: f"{v:.3g}" for k, v in objective.shown.items()}})
        if accelerator.is_main_process:
            kept.save(step + 1, objective, optimizer, schedule)
    bar.close()
    if accelerator.is_main_process:
        kept.save(steps, objective, optimizer, schedule, now=True)
    accelerator.wait_for_everyone()
    return {k: v.detach().clone() for k, v in objective.learned().items()}


class _Checkpoint:
    """The file of one training: what was learned, the optimiser, the place in the schedule, and the generators."""

    def __init__(
        self, how: Training, name: str, objective: Objective, facts: Mapping[str, int], data: Sequence[Batch]
    ) -> None:
        self._every, self._last = how.every, time.monotonic()
        slug = "".join(c if c.isalnum() else "-" for c in name)
        self._file = None if how.checkpoint is None else Path(how.checkpoint) / f"{slug}.pt"
        self._device = next(objective.parameters()).device
        self._what: dict[str, Any] = {
            **facts,
            **{key: getattr(how, key) for key in ("lr", "warmup", "weight_decay", "clip")},
            "method": [f"{m.name}: {m.fields()}" for m in vars(objective).values() if isinstance(m, Method)],
            "data": "" if self._file is None else _digest(data),
            "sizes": {k: list(v.shape) for k, v in objective.learned().items()},
        }

    def restore(self, objective: Objective, optimizer: Any, schedule: Any) -> int:
        """Steps that lie behind, everything as it was after them."""
        if self._file is None or not self._file.is_file():
            return 0
        try:
            with zipfile.ZipFile(self._file) as parts:  # torch does not look at the checksums that it writes
                if (part := parts.testzip()) is not None:
                    raise ValueError(f"{part} is not what was written")
            held = torch.load(self._file, weights_only=True, map_location="cpu")
            other = [key for key, now in self._what.items() if held["what"].get(key) != now]
            if not other:
                with torch.no_grad():
                    for name, tensor in objective.learned().items():
                        tensor.copy_(held["learned"][name])
                optimizer.load_state_dict(held["optimizer"])
                schedule.load_state_dict(held["schedule"])
                self._draws(held["rng"])
                return int(held["step"])
        except Exception as problem:
            raise Error(
                f"checkpoint = '{self._file}': is damaged ({type(problem).__name__}: {short(str(problem))}); delete it "
                "to start again"
            ) from problem
        said = ", ".join(
            "other tensors" if key == "sizes" else f"{key} {short(held['what'].get(key))}, now {short(self._what[key])}"
            for key in other
        )
        raise Error(f"checkpoint = '{self._file}': is of another training ({said}); delete it, or take another folder")

    def save(self, step: int, objective: Objective, optimizer: Any, schedule: Any, now: bool = False) -> None:
        """A new file in place of the old one, whole or not at all, where it is time."""
        if self._file is None or not (now or time.monotonic() - self._last >= self._every):
            return
        self._last = time.monotonic()
        beside = self._file.with_suffix(".new")
        held = {
            "what": self._what,
            "step": step,
            "learned": {k: v.detach() for k, v in objective.learned().items()},
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": self._draws(),
        }
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(held, beside)
            os.replace(beside, self._file)
        except (OSError, RuntimeError) as problem:
            why = getattr(problem, "strerror", None) or short(str(problem))
            raise Error(f"checkpoint = '{self._file.parent}': cannot be written to ({why})") from problem

    def _draws(self, states: list[Tensor] | None = None) -> list[Tensor]:
        """States of torch's generators, of the CPU and of the device that trains; given some, those from now on."""
        cuda = self._device.type == "cuda"
        if states is not None:
            torch.set_rng_state(states[0])
            if cuda and len(states) > 1:
                torch.cuda.set_rng_state(states[1], self._device)
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self._device)] if cuda else [])]


def _digest(data: Sequence[Batch]) -> str:
    """A number for the tokens that are trained on."""
    seen = hashlib.sha256()
    for batch in data:
        if "input_ids" in batch:
            seen.update(batch["input_ids"].cpu().contiguous().numpy().tobytes())
    return seen.hexdigest()[:16]


def student(model: nn.Module, trains: Callable[[str], bool] = lambda name: False) -> nn.Module:
    """A copy of the model to train: in training mode, with gradients for the parameters whose names are chosen."""
    twin = copy.deepcopy(model).train()
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(trains(name))
    return twin


class _Finetuning(Objective):
    """The model's own loss, with a method attached."""

    def __init__(self, model: nn.Module, method: Method, prompt_from_labels: bool) -> None:
        super().__init__(model)
        self._method, self._splits = method, prompt_from_labels

    def forward(self, batch: Batch) -> Tensor:
        from sparing.engine.attach import attach

        inputs = dict(batch)
        prompt = inputs.pop("prompt", None)
        if prompt is None and self._splits:
            prompt = (batch["labels"] != -100).cumsum(1) == 0
        with attach(self.model, self._method, prompt=prompt, warn=False) as run:
            run.keeps_trace = False
            return self.model(**inputs, use_cache=False).loss


def finetune(
    model: nn.Module,
    method: Method,
    batches: Iterable[Batch],
    *,
    trains: Callable[[str], bool] | None = None,
    prompt_from_labels: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Fine-tune a model on its own loss with a method attached.

    Args:
        model: left unchanged; a copy trains.
        method: attached while training.
        batches: keyword arguments of forward with labels; kept in memory to go through them several times. One named
            `prompt` is for the method instead: what `attach` takes under that name.
        trains: which parameters train, by name; default all but the input embedding and the vision tower.
        prompt_from_labels: everything before the first label of a sample is prompt, the rest counts as generated.
        options: of `Training`; the learning rate is 2e-5 by default.

    Returns:
        "weight.NAME" -> trained tensor, for parameters that trained.

    Raises:
        Error: no batches, or a batch without labels.
    """
    data = labelled(batches)
    chosen = trains or (lambda name: not any(p in name for p in ("embed_tokens", "vision_tower", ".visual.")))
    objective = _Finetuning(student(model, chosen), method, prompt_from_labels)
    learned = train(objective, data, Training(**options), lr=2e-5, name=f"fit {method.name}")
    return {f"weight.{name.removeprefix('model.')}": tensor for name, tensor in learned.items()}

"""Training: one loop on `accelerate` for everything that is learned, resumable, what was learned kept apart."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        share: of the steps that lie behind, 0 to 1; set by `train` before each step, for schedules of the loss.
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
        weight_decay, clip: of AdamW; limit of the gradient's norm.
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
        for name, low in (("epochs", 1), ("lr", 0), ("warmup", 0), ("weight_decay", 0), ("clip", 0), ("every", 0)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= low):
                raise Error(f"{name} = {short(value)}: must be a number >= {low}")


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
        Error: a checkpoint of another training is in the way, or less batches than processes.
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
    optimizer = torch.optim.AdamW(
        parameters, lr=lr if how.lr is None else how.lr, weight_decay=how.weight_decay, betas=(0.9, 0.98)
    )
    steps = (how.epochs if epochs is None else epochs) * len(mine)
    rise = max(1, round(how.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / rise, 0.5 * (1 + math.cos(math.pi * max(0, t - rise) / max(1, steps - rise)))),
    )
    kept = _Checkpoint(how, name, steps, objective)
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
    """The file of one training: what was learned, the optimiser, the place in the schedule, and the generator."""

    def __init__(self, how: Training, name: str, steps: int, objective: Objective) -> None:
        self._every, self._last = how.every, time.monotonic()
        slug = "".join(c if c.isalnum() else "-" for c in name)
        self._file = None if how.checkpoint is None else Path(how.checkpoint) / f"{slug}.pt"
        self._what = {"steps": steps, "sizes": {k: list(v.shape) for k, v in objective.learned().items()}}

    def restore(self, objective: Objective, optimizer: Any, schedule: Any) -> int:
        """Steps that lie behind, everything as it was after them."""
        if self._file is None or not self._file.is_file():
            return 0
        try:
            held = torch.load(self._file, weights_only=True)
            same = held["what"] == self._what
        except Exception as problem:
            raise Error(f"checkpoint = '{self._file}': is damaged ({problem}); delete it to start again") from problem
        if not same:
            raise Error(f"checkpoint = '{self._file}': is of another training; delete it, or take another folder")
        with torch.no_grad():
            for name, tensor in objective.learned().items():
                tensor.copy_(held["learned"][name])
        optimizer.load_state_dict(held["optimizer"])
        schedule.load_state_dict(held["schedule"])
        torch.set_rng_state(held["rng"])
        return int(held["step"])

    def save(self, step: int, objective: Objective, optimizer: Any, schedule: Any, now: bool = False) -> None:
        """A new file in place of the old one, whole or not at all, where it is time."""
        if self._file is None or not (now or time.monotonic() - self._last >= self._every):
            return
        self._last = time.monotonic()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._file.with_suffix(".new")
        torch.save(
            {
                "what": self._what,
                "step": step,
                "learned": {k: v.detach() for k, v in objective.learned().items()},
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "rng": torch.get_rng_state(),
            },
            beside,
        )
        os.replace(beside, self._file)


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

        prompt = (batch["labels"] != -100).cumsum(1) == 0 if self._splits else None
        with attach(self.model, self._method, prompt=prompt) as run:
            run.keeps_trace = False
            return self.model(**batch, use_cache=False).loss


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
        batches: keyword arguments of forward with labels; kept in memory to go through them several times.
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

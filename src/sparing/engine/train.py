"""Fine-tune a model with a method attached; what was learned comes back apart from the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparing.grid.method import Error, Method


def finetune(
    model: nn.Module,
    method: Method,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    epochs: int = 1,
    lr: float = 2e-5,
    warmup: float = 0.03,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    trains: Callable[[str], bool] | None = None,
    prompt_from_labels: bool = False,
    progress: bool = True,
) -> dict[str, Tensor]:
    """AdamW with warm-up and cosine on the model's own loss, the method attached.

    Args:
        model: left unchanged; a copy trains.
        method: attached while training.
        batches: keyword arguments of forward with labels; kept in memory to go through them `epochs` times.
        epochs: passes over the batches.
        lr: peak learning rate.
        warmup: share of steps with a rising rate.
        weight_decay, clip: of AdamW; gradient norm limit.
        trains: which parameters train, by name; default all but the input embedding and the vision tower.
        prompt_from_labels: everything before the first label of a sample is prompt, the rest counts as generated.
        progress: show a bar.

    Returns:
        "weight.NAME" -> trained tensor, for parameters that trained.

    Raises:
        Error: no batches, or a batch without labels.
    """
    from sparing.engine.attach import attach

    data = list(batches)
    if not data:
        raise Error("batches: the training data is empty")
    if any("labels" not in b for b in data):
        raise Error("batches: training needs labels in every batch")
    student = copy.deepcopy(model).train()
    device = next(student.parameters()).device
    chosen = trains or (
        lambda name: "embed_tokens" not in name and "vision_tower" not in name and ".visual." not in name
    )
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(chosen(name))
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    steps = epochs * len(data)
    rise = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / rise, 0.5 * (1 + math.cos(math.pi * max(0, t - rise) / max(1, steps - rise)))),
    )
    bar = tqdm(total=steps, desc=f"fit {method.name}", disable=not progress)
    with attach(student, method) as run:
        run.keeps_trace = False
        for _ in range(epochs):
            for batch in data:
                inputs = {k: v.to(device) for k, v in batch.items()}
                if prompt_from_labels:
                    run.prompt = (inputs["labels"] != -100).cumsum(1) == 0
                loss = student(**inputs, use_cache=False).loss
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    return {f"weight.{n}": p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}

"""LoRA: low-rank repair of a model under a method, trained by PEFT, merged into the weights while attached."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparing.engine.train import Batch, Objective, Training, labelled, student, train
from sparing.engine.view import PARTS, LayerView, View
from sparing.grid.files import sized
from sparing.grid.method import Error, Method, state_check

# Projections that LoRA changes in each layer: query and value, or the one matrix that holds them both. Latent attention
# has the matrices that make queries and values out of their latents.
_QUERY, _VALUE, _FUSED = ("q_proj", "q_b_proj"), ("v_proj", "kv_b_proj"), ("qkv_proj", "query_key_value")


def targets(model: nn.Module) -> list[str]:
    """Names of the linear modules that LoRA changes: those that make queries and values in the decoder's layers.

    `q_proj` and `v_proj`; `qkv_proj` or `query_key_value` where they are one; `q_b_proj` (`q_proj` without a latent)
    and `kv_b_proj` in latent attention. A layer without attention has none.

    Raises:
        Error: no layer has any.
    """
    names = {module: name for name, module in model.named_modules()}
    found = []
    for layer in View(model).layers:
        for kinds in (_QUERY, _VALUE, _FUSED):
            parts = [getattr(layer.attention, kind, None) for kind in kinds]
            found += [names[part] for part in parts if isinstance(part, nn.Linear)][:1]
    if not found:
        raise Error(
            f"{type(model).__name__}: no projection for LoRA found (looked for linear modules named "
            f"{', '.join((*_QUERY, *_VALUE, *_FUSED))} in the attention of its layers)"
        )
    return found


def _targeted(layer: LayerView) -> str | None:
    kinds = (*_QUERY, *_VALUE, *_FUSED)
    found = [getattr(layer.attention, kind, None) for kind in kinds]
    if layer.attention is None or any(isinstance(getattr(m, "base_layer", m), nn.Linear) for m in found):  # or PEFT's
        return None
    return f"has no linear module that makes queries or values ({', '.join(kinds)})"


PARTS["lora"] = _targeted


class _Adapting(Objective):
    """The model's own loss with adapters, methods attached; everything before the first label is prompt."""

    def __init__(self, model: nn.Module, methods: tuple[Method, ...]) -> None:
        super().__init__(model)
        self._methods = methods

    def forward(self, batch: Batch) -> Tensor:
        from sparing.engine.attach import attach

        prompt_BT = (batch["labels"] != -100).cumsum(1) == 0
        with attach(self.model, *self._methods, prompt=prompt_BT, warn=False) as run:
            run.keeps_trace = False
            return self.model(**batch, use_cache=False).loss


def adapt(
    model: nn.Module,
    *methods: Method,
    batches: Iterable[Batch],
    how: Training,
    rank: int = 8,
    alpha: float = 16.0,
    name: str,
) -> dict[str, Tensor]:
    """Train LoRA on the model's own loss with methods attached, W + alpha / rank B A for each of `targets`.

    B starts at zero, so training starts from what the methods do without it. A and B train in float32, dropout is 0.

    Args:
        model: left unchanged; a copy trains.
        methods: attached while training, none for the plain model.
        batches: keyword arguments of forward with labels; what stands before a sample's first label is prompt.
        how: options; the learning rate is 1e-4 by default.
        rank, alpha: of LoRA, rank >= 1.
        name: of the training.

    Returns:
        State of a method: "lora.NAME.A" (rank, in) and "lora.NAME.B" (out, rank) for each changed weight NAME, and
        "lora.scale" = alpha / rank.

    Raises:
        Error: PEFT is not installed, the model has no projection that LoRA changes, or see `train`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as problem:
        raise Error("peft: LoRA is trained by PEFT, which is not installed: pip install sparing[peft]") from problem
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets(model))  # type: ignore[arg-type]
    twin: nn.Module = inject_adapter_in_model(config, student(model))
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    learned = train(_Adapting(twin, methods), labelled(batches), how, lr=1e-4, name=name)
    state = {"lora.scale": torch.tensor(alpha / rank)}
    for key, tensor in learned.items():  # model.NAME-OF-MODULE.lora_A.default.weight
        module, _, which = key.removeprefix("model.").removesuffix(".default.weight").rpartition(".lora_")
        state[f"lora.{module}.weight.{which}"] = tensor
    return state


def merged(model: nn.Module, method: Method) -> dict[str, Tensor]:
    """The weights of the model with a method's LoRA in them, by parameter name; empty without one."""
    own, found = dict(model.named_parameters()), {}
    with torch.no_grad():
        for name, (A, B) in _parts(method).items():
            weight = method.state.get(f"weight.{name}", own[name]).to(own[name])
            change = float(method.state["lora.scale"]) * (B.to(weight.device).float() @ A.to(weight.device).float())
            found[name] = (weight.float() + change).to(weight.dtype)
    return found


def _parts(method: Method) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each changed weight."""
    names = [
        k.removeprefix("lora.").removesuffix(".A") for k in method.state if k.startswith("lora.") and k[-2:] == ".A"
    ]
    return {name: (method.state[f"lora.{name}.A"], method.state[f"lora.{name}.B"]) for name in names}


@state_check
def _fits(method: Method, model: nn.Module) -> None:
    """Refuses a LoRA that is not of this model."""
    parts = _parts(method)
    if not parts:
        return
    own, scale = dict(model.named_parameters()), method.state["lora.scale"]
    if scale.numel() != 1:
        raise Error(f"method = {method.name!r}: lora.scale is {sized(tuple(scale.shape))}: must be one number")
    for name, (A, B) in parts.items():
        has = sized(tuple(own[name].shape)) if name in own else "no such parameter"
        gives = sized((B.shape[0], A.shape[1])) if A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] else "no matrix"
        if has != gives:
            raise Error(
                f"method = {method.name!r}: was trained on another model: lora.{name} is {gives} (B "
                f"{sized(tuple(B.shape))} times A {sized(tuple(A.shape))}), {type(model).__name__} has {has}"
            )

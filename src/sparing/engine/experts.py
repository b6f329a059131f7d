"""Which experts a model can do without: what they do on calibration text, and the kept ones as a plan.

Shapes: N token rows, K experts a token, E experts, M experts that stay, L layers, D hidden.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparing.engine.surgery import LayerCut, Plan, SurgeryMethod
from sparing.engine.view import Experts, LayerView, View, evaluating
from sparing.grid.method import BudgetError, Error, Method, Shape, choice, flag, integer, state_check
from sparing.grid.select import top_k

Batches = Iterable[Mapping[str, Tensor]]
STATISTICS = ("score", "count", "gate")
_PAIRS = 4096  # outputs of experts held at a time


@dataclass(frozen=True)
class Visits:
    """What the experts of one layer did for the tokens of one pass.

    Attributes:
        hidden: (N, D) residual stream entering the sub-layer, before its norm.
        index: (N, K) experts of each token.
        gate: (N, K) their gates as used, after normalisation and scaling.
        norm: (N, K) float32, Euclidean norms of the experts' un-gated outputs.
        routed: (N, D) sum of the gated outputs, shared experts not among them.
    """

    hidden: Tensor
    index: Tensor
    gate: Tensor
    norm: Tensor
    routed: Tensor


@torch.no_grad()
def observe_experts(model: nn.Module, batches: Batches, note: Callable[[int, Visits], None]) -> None:
    """Run calibration batches dense and hand `note` each layer's number and `Visits`; padding is left out.

    Args:
        model: in whatever mode; left as it was.
        batches: keyword arguments of the model's forward. Labels are left out.

    Raises:
        Error: no batches, no experts, or a layer whose norm before the experts was not found.
    """
    view = View(model)
    device = next(model.parameters()).device
    held: dict[int, Tensor] = {}
    mask: Tensor | None = None

    def before(layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        held[layer] = args[0].flatten(0, -2)

    def after(layer: int, module: Any, args: tuple[Tensor, Tensor, Tensor], routed: Tensor) -> None:
        hidden, index, gate = args
        K = index.shape[1]
        norms = []
        for rows, chosen in zip(hidden.split(_PAIRS // K + 1), index.split(_PAIRS // K + 1)):
            one = chosen.reshape(-1, 1)
            out = module.forward(rows.repeat_interleave(K, 0), one, torch.ones_like(one, dtype=gate.dtype))
            norms.append(out.float().norm(dim=-1).view(-1, K))
        visits = (held.pop(layer), index, gate, torch.cat(norms), routed)
        note(layer, Visits(*(x if mask is None else x[mask] for x in visits)))

    seen = False
    with contextlib.ExitStack() as stack:
        for layer in view.layers:
            if layer.experts is None:
                continue
            if layer.mlp_norm is None:
                raise Error(
                    f"layer {layer.index} ({type(layer.module).__name__}): the norm before its experts not found"
                )
            seen = True
            pre = layer.mlp_norm.register_forward_pre_hook(functools.partial(before, layer.index))
            post = layer.experts.module.register_forward_hook(functools.partial(after, layer.index))
            stack.callback(pre.remove)
            stack.callback(post.remove)
        if not seen:
            raise Error(f"{type(model).__name__}: no experts found (layers with a router beside a module experts)")
        stack.enter_context(evaluating(model))
        empty = True
        for batch in batches:
            given = batch.get("attention_mask")
            mask = given.bool().flatten().to(device) if given is not None and not bool(given.all()) else None
            model(**{k: v.to(device) for k, v in batch.items() if k != "labels"}, use_cache=False)
            empty = False
    if empty:
        raise Error("batches: the calibration data is empty")


def demonstrations(model: nn.Module, batches: Batches, samples: int, *, own: bool, seed: int = 0) -> Iterator[Any]:
    """The first `samples` rows of text, each as prompt and continuation, as batches to observe.

    Args:
        model: writes the continuations.
        batches: with input_ids; the prompt of a row ends at its first label, without labels in its middle.
        own: let the model write the continuation (sampled at temperature 1, as long as the given one, shorter where it
            ends the text itself); False takes the given one. Batches with images are taken as given.
        seed: of the sampling.
    """
    device, left = next(model.parameters()).device, samples
    for batch in batches:
        if left <= 0:
            return
        part = {k: v[:left].to(device) for k, v in batch.items()} if set(batch) <= _TEXT else dict(batch)
        left -= len(part["input_ids"])
        labels = part.pop("labels", None)
        if not own or set(part) - _TEXT:
            yield part
            continue
        ids, width = part["input_ids"], part["input_ids"].shape[1]
        mask = part.get("attention_mask", torch.ones_like(ids))
        start = torch.full((len(ids),), width // 2) if labels is None else (labels != -100).int().argmax(1)
        for at in start.unique().tolist():
            rows = start.to(device) == at
            prompt, known = ids[rows, :at], mask[rows, :at]
            yield _continued(model, prompt, known, width - at, seed)


_TEXT = {"input_ids", "attention_mask", "labels"}


@torch.no_grad()
def _continued(model: Any, prompt_BT: Tensor, mask_BT: Tensor, count: int, seed: int) -> dict[str, Tensor]:
    """Prompts and what the model writes after them, up to and with the end of text."""
    device = prompt_BT.device
    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else [end] if isinstance(end, int) else end, device=device)
    pad = model.generation_config.pad_token_id
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = model.generate(
            input_ids=prompt_BT,
            attention_mask=mask_BT,
            max_new_tokens=count,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0 if pad is None else pad,
        )
    new = ids[:, prompt_BT.shape[1] :]
    over = torch.isin(new, ends).cumsum(1)
    alive = (over - torch.isin(new, ends).long()) == 0
    return {"input_ids": ids, "attention_mask": torch.cat([mask_BT, alive.to(mask_BT)], 1)}


@dataclass(frozen=True)
class KeepExperts(SurgeryMethod):
    """Base of methods that keep M experts of every layer by one number an expert and layer.

    State, float64 (L, E) a domain, rows of layers without experts zero: DOMAIN.score (EASY-EP's importance),
    DOMAIN.count (visits) and DOMAIN.gate (sum of gates); one calibration serves the method and its controls.
    """

    M: int | None = integer(None, "experts kept a layer; none keeps half", low=1, optional=True)
    even: bool = flag(False, "keep as many of each group of a group-limited router")
    samples: int = integer(25, "demonstrations a domain", low=1)
    calibration: str = choice("own-output", ("own-output", "as-given"), "what follows the prompts")

    def importance(self, layers: Sequence[LayerView]) -> Tensor:
        """One number an expert, (L, E); of each layer the largest stay."""
        raise Error(f"{type(self).__name__} defines no importance")

    def mixed(self, name: str) -> Tensor:
        """Mean over domains of "score", "count" or "gate", (L, E), each domain's row of a layer divided by its sum."""
        found = [value for key, value in self.state.items() if key.endswith(f".{name}")]
        if not found:
            raise Error(f"{self.name}: needs calibration first: method = method.fit(model, batches)")
        return torch.stack([value / value.sum(1, keepdim=True).clamp(min=1e-30) for value in found]).mean(0)

    def fit(self, model: nn.Module, batches: Batches | Mapping[str, Batches], **options: Any) -> Self:
        """Watch the experts on demonstrations of one domain or of several.

        Args:
            model: left unchanged.
            batches: text of the domain (a row is a demonstration, labels start its continuation); for a mixture of
                domains a mapping from their names to such batches.
        """
        domains = batches if isinstance(batches, Mapping) else {"text": batches}
        state: dict[str, Tensor] = {}
        for domain, texts in domains.items():
            # all of them first: what the model does while it writes them is not to be watched
            shown = list(demonstrations(model, texts, self.samples, own=self.calibration == "own-output"))
            state |= {f"{domain}.{key}": value for key, value in expert_statistics(model, shown).items()}
        return self.with_state(state)

    def at(self, keep: float, shape: Shape) -> Self:
        M = int(keep * shape.experts + 0.5)
        if max(shape.top_k, 1) > M:
            raise BudgetError(
                f"keep = {keep:g}: {self.name} keeps at least the {shape.top_k} experts that a token visits, "
                f"{shape.top_k / max(shape.experts, 1):.3g} of {shape.experts}"
            )
        return self.replace(M=M)

    def mirrored(self, shape: Shape) -> dict[str, Any]:
        return {"M": self.M, "even": self.even}

    def kept(self, experts: Experts, score_E: Tensor) -> Tensor:
        """The experts of one layer that stay, rising, (M,); of equal scores the first."""
        M = experts.count // 2 if self.M is None else self.M
        if experts.count < M:
            raise Error(f"{self.name}: M = {self.M}: a layer has {experts.count} experts")
        if len(score_E) != experts.count:
            raise Error(
                f"{self.name}: was fitted on another model; it knows {len(score_E)} experts a layer, the model has "
                f"{experts.count}"
            )
        if not self.even or experts.groups == 1:
            return top_k(score_E[None], M)[0].nonzero().flatten()
        if M % experts.groups:
            raise Error(
                f"{self.name}: M = {M}, even = true: must be a multiple of the router's {experts.groups} groups"
            )
        return top_k(score_E.view(experts.groups, -1), M // experts.groups).flatten().nonzero().flatten()

    def plan(self, model: nn.Module) -> Plan:
        layers = View(model).layers
        if not any(layer.experts for layer in layers):
            raise Error(f"{self.name}: works on experts, and {type(model).__name__} has none")
        score_LE = self.importance(layers)
        if len(score_LE) != len(layers):
            raise Error(
                f"{self.name}: was fitted on another model; it knows {len(score_LE)} layers, "
                f"the model has {len(layers)}"
            )
        cuts = []
        for layer, score_E in zip(layers, score_LE):
            experts = layer.experts
            kept = None if experts is None else self.kept(experts, score_E)
            cuts.append(LayerCut(experts=None if experts is None or len(kept) == experts.count else kept))  # type: ignore[arg-type]
        return Plan(tuple(cuts))


@state_check
def watched_on(method: Method, model: nn.Module) -> None:
    """Refuses expert statistics that are not of this model: one row a layer, one number an expert."""
    view = View(model)
    wanted = (len(view), view.shape.experts)
    for name, tensor in method.state.items():
        if name.rpartition(".")[2] in STATISTICS and tensor.shape != wanted:
            raise Error(
                f"method = {method.name!r}: was fitted on another model: {name} is {'x'.join(map(str, tensor.shape))}, "
                f"the model has {wanted[0]} layers of {wanted[1]} experts"
            )


def expert_statistics(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """ "score", "count" and "gate" of `KeepExperts` over calibration batches, each float64 (L, E).

    The score is EASY-EP's: sum over tokens of s_t g_{i,t} ||e_{i,t}||, s_t = max(0, 1 - cos(h_t, h_t + routed_t)).
    """
    view = View(model)
    E = max((layer.experts.count for layer in view.layers if layer.experts), default=0)
    found = {name: torch.zeros(len(view), E, dtype=torch.float64) for name in STATISTICS}

    def note(layer: int, seen: Visits) -> None:
        index = seen.index.flatten().cpu()
        values = (contributions(seen), torch.ones_like(seen.gate), seen.gate)
        for name, value in zip(STATISTICS, values, strict=True):
            found[name][layer].index_add_(0, index, value.flatten().double().cpu())

    observe_experts(model, batches, note)
    return found


def contributions(seen: Visits) -> Tensor:
    """s_t g_{i,t} ||e_{i,t}|| of each visit, float32 (N, K)."""
    hidden = seen.hidden.float()
    cos = torch.nn.functional.cosine_similarity(hidden, hidden + seen.routed.float(), dim=-1)
    return (1 - cos).clamp(min=0)[:, None] * seen.gate.float() * seen.norm

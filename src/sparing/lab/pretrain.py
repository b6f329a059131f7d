"""How the language models of `lab/` learn: a fixed time on one CPU core, resumable, Muon and AdamW.

Shapes: B windows, T tokens, H heads, G key/value heads, D head size, N = B T, E experts, V vocabulary.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

BATCH = 4096  # tokens a step


def causal_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention in blocks of 128 queries, (B, H, T, D) and (B, G, T, D) in, (B, T, H, D) out.

    For training only. A bfloat16 step of plain matrix products skips the keys after each block and takes 0.45 of the
    time of PyTorch's fused CPU kernel at 512 tokens, whose backward pass dominated the training otherwise.
    """
    B, H, T, D = query.shape
    q, k, v = (x.repeat_interleave(H // x.shape[1], 1).view(B * H, T, D) for x in (query * scaling, key, value))
    out = []
    for start, block in zip(range(0, T, 128), q.split(128, 1), strict=True):
        end = start + block.shape[1]
        score = torch.bmm(block, k[:, :end].transpose(1, 2))
        score[:, :, start:] += torch.full((end - start,) * 2, -torch.inf, dtype=score.dtype).triu(1)
        out.append(torch.bmm(score.softmax(-1), v[:, :end]))
    return torch.cat(out, 1).view(B, H, T, D).transpose(1, 2), None


class Loss(torch.autograd.Function):
    """Mean cross-entropy in nats of (N, V) logits against N ids, in float32 whatever the logits are.

    Writes the gradient, softmax minus one-hot, in the forward pass: half the time of PyTorch's own on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_N: Tensor) -> Tensor:
        chance_NV, row_N = logits_NV.softmax(-1, dtype=torch.float32), torch.arange(len(ids_N))
        loss = -chance_NV[row_N, ids_N].log().mean()
        chance_NV[row_N, ids_N] -= 1
        ctx.save_for_backward((chance_NV / len(ids_N)).to(logits_NV.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad, None


def expert_loop(self: Any, hidden_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """Experts behind transformers' experts interface, one matrix product after the other in bfloat16.

    For training only: a step takes 0.85 of the time of `grouped_mm`, whose products stay in float32 under autocast.
    """
    expert, order = index_NK.flatten().sort(stable=True)
    row = order // index_NK.shape[1]
    parts = hidden_ND[row].split(torch.bincount(expert, minlength=self.num_experts).tolist())
    up, down = self.gate_up_proj.bfloat16(), self.down_proj.bfloat16()
    out = []
    for part, up_e, down_e in zip(parts, up, down, strict=True):
        gate, value = F.linear(part, up_e).chunk(2, -1)
        out.append(F.linear(self.act_fn(gate) * value, down_e))
    weighted = torch.cat(out) * weight_NK.flatten()[order, None]
    return torch.zeros_like(hidden_ND).index_add(0, row, weighted.to(hidden_ND.dtype))


def balance(logits: tuple[Tensor, ...], k: int) -> Tensor:
    """Load-balancing loss over router logits (N, E) of every layer: 1 where all experts are used alike.

    E sum_e f_e p_e, with f the share of the k N choices and p the mean probability; the mean over layers. Counted over
    the whole batch, so that a window of one kind may still prefer some experts.
    """
    losses = []
    for logits_NE in logits:
        chance_NE = logits_NE.float().softmax(-1)
        chosen = torch.zeros_like(chance_NE).scatter(1, chance_NE.topk(k).indices, 1.0)
        losses.append(logits_NE.shape[1] * (chosen.mean(0) / k * chance_NE.mean(0)).sum())
    return torch.stack(losses).mean()


class Optimizers:
    """Muon for matrices (each expert's its own), AdamW for embeddings, norms and routers.

    Args:
        model: a decoder with `model.layers`.
        lr: peak learning rate of both; Muon's update is scaled to the size of AdamW's.
    """

    def __init__(self, model: PreTrainedModel, lr: float = 3e-3) -> None:
        inner = dict(model.model.layers.named_parameters())
        routers = [w for name, w in inner.items() if name.endswith("mlp.gate.weight")]
        matrices = [w for w in inner.values() if w.ndim == 2 and all(w is not r for r in routers)]
        self.stacks = [(w, [nn.Parameter(part) for part in w.data]) for w in inner.values() if w.ndim == 3]
        others = [w for w in model.parameters() if all(w is not m for m in [*matrices, *(s for s, _ in self.stacks)])]
        matrices += [part for _, parts in self.stacks for part in parts]
        self.lr = lr
        self.all = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.95)),
        ]

    def step(self, factor: float) -> None:
        """One step at `factor` of the peak learning rate; gradients are gone afterwards."""
        for stack, parts in self.stacks:
            for part, grad in zip(parts, stack.grad, strict=True):
                part.grad = grad
            stack.grad = None
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * factor
            optimizer.step()
            optimizer.zero_grad()


def schedule(progress: float, step: int) -> float:
    """Learning-rate factor: 60 steps of warm-up, constant, then linear to 0 over the second half of the time."""
    return min(1.0, (step + 1) / 60, max(0.0, 2 * (1 - progress)))


def pretrain(
    model: PreTrainedModel,
    out: Path,
    draw: Callable[[float, int], Tensor],
    export: Callable[[], None],
    *,
    name: str,
    minutes: float,
    resume: bool = True,
    balanced: float = 0.0,
) -> None:
    """Train `model` in place within `minutes` of wall-clock time.

    Every two minutes the state goes to `out`/checkpoint.pt and `export` is called; with `resume` a later call goes on
    from there.

    Args:
        model: a decoder; its attention is SDPA again afterwards.
        out: folder for checkpoint.pt and progress.json.
        draw: (progress in 0..1, step) -> ids (B, T + 1).
        export: writes the model as a checkpoint folder.
        name: on the progress bar.
        balanced: weight of the load-balancing loss; 0 for a model without experts.
    """
    model.train()
    optimizers = Optimizers(model)
    step, spent, checkpoint = 0, 0.0, out / "checkpoint.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint)
        step, spent = state["step"], state["spent"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers.all, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save() -> None:
        states = [optimizer.state_dict() for optimizer in optimizers.all]
        state = {"step": step, "spent": spent, "model": model.state_dict(), "optimizers": states}
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        export()
        (out / "progress.json").write_text(json.dumps({"steps": step, "tokens": step * BATCH, "seconds": spent}))

    AttentionInterface.register("causal_blocks", causal_blocks)
    AttentionMaskInterface.register("causal_blocks", lambda *_, **__: None)
    model.set_attn_implementation("causal_blocks")
    routed: dict[str, Any] = {}
    if balanced:
        ALL_EXPERTS_FUNCTIONS.register("expert_loop", expert_loop)
        model.set_experts_implementation("expert_loop")
        routed = {"output_router_logits": True}
    clock, saved_at, budget = time.monotonic(), spent, 60 * minutes
    smooth = 0.0  # a running mean of the loss
    with tqdm(total=round(budget), initial=round(spent), unit="s", desc=name) as bar:
        while spent < budget:
            progress = spent / budget
            ids_BT = draw(progress, step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = model(ids_BT[:, :-1], use_cache=False, **routed)
                loss = Loss.apply(result.logits.flatten(0, 1), ids_BT[:, 1:].flatten())
            total = loss
            if balanced:
                total = loss + balanced * balance(result.router_logits, model.config.num_experts_per_tok)
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step(schedule(progress, step))
            step += 1
            smooth += (0.02 if smooth else 1.0) * (loss.item() - smooth)
            # A suspended process must not skip the part where the learning rate decays, hence at most a minute a step.
            now = time.monotonic()
            spent, clock = spent + min(now - clock, 60.0), now
            bar.update(min(round(spent), round(budget)) - bar.n)
            bar.set_postfix(step=step, loss=f"{smooth:.3f}")
            if spent - saved_at > 120:
                save()
                saved_at = spent
    save()
    model.set_attn_implementation("sdpa")
    if balanced:
        model.set_experts_implementation("grouped_mm")
    model.eval()


def windows(rows: list[Tensor], length: int, *, shares: list[float], seed: int) -> Tensor:
    """A batch of `BATCH` tokens, (B, T + 1) ids from random places; each window from row i with chance shares[i]."""
    generator = random.Random(seed)
    picked = []
    for _ in range(BATCH // length):
        (row,) = generator.choices(rows, shares)
        start = generator.randrange(len(row) - length)
        picked.append(row[start : start + length + 1])
    return torch.stack(picked)

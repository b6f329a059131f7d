"""How much of its FLOP bound does each action of the engine reach on this machine?

    python benchmarks/efficiency.py            # a table
    python benchmarks/efficiency.py --json     # the same as a JSON list, and nothing else on stdout
    python benchmarks/efficiency.py --device cuda

A Llama with random weights reads one prompt, dense and with one action at a time:

    drop-tokens    FastV: 75 % of the tokens leave after two layers, ranked by the last token's attention
    hold           a quarter of the tokens wait outside the layers and come in half-way up
    remove-layers  every second layer is cut out
    width          half of the KV groups (with their heads) and half of the neurons of every layer are cut out
    experts        half of the token-expert pairs of a Qwen3-MoE are skipped, those with the smaller gates

Dense and action run in turns in one process; the speed-up is the median of paired ratios, `speedup_low` and
`speedup_high` their 20th and 80th percentiles. `bound` is the ratio of the FLOPs that really ran (counted, head
included), `efficiency` is speedup / bound, and `decision_share` the part of the action's own time that goes into
deciding and gathering; a weight cut decides nothing while it runs.

FLOPs count the whole query x key rectangle of attention, as usual. Causal kernels skip about half of it, so `bound` is
not exact; `bound_causal` counts half the rectangle wherever the causal kernel ran.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import sparing
from sparing.bench import timing
from sparing.engine.routing import Routing, RoutingMethod
from sparing.engine.stream import Stream, StreamMethod
from sparing.engine.surgery import LayerCut, Plan, cut
from sparing.engine.view import View
from sparing.grid.method import Card, Method
from sparing.grid.trace import Counter

KEYS = ("action", "dtype", "speedup", "speedup_low", "speedup_high", "bound", "efficiency", "decision_share")
ACTIONS = ("drop-tokens", "hold", "remove-layers", "width", "experts")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEEP = 2  #: layers that see all tokens before drop-tokens acts
DROPPED = 0.75  #: share of the tokens that leave
STEPS = 8  #: decode steps of remove-layers


@dataclass(frozen=True)
class Size:
    """Shapes of the two models and of their prompt."""

    hidden: int
    neurons: int
    layers: int
    heads: int
    groups: int
    tokens: int
    vocab: int = 1024
    moe_layers: int = 5
    experts: int = 32
    top_k: int = 8
    expert_neurons: int = 384


SIZES = {
    "tiny": Size(64, 128, 4, 4, 4, 64, vocab=128, moe_layers=2, experts=8, top_k=4, expert_neurons=32),
    "208M": Size(1024, 2816, 16, 16, 16, 1024),
    "8B": Size(4096, 14336, 32, 32, 8, 4096, moe_layers=16, experts=64, top_k=8, expert_neurons=1024),
}


# --------------------------------------------------------------------------- models


def llama(size: Size, dtype: torch.dtype, device: str) -> nn.Module:
    """A Llama with random weights. Its config names an image token, so that token methods run on it; which columns of
    the prompt count as visual is said by `run.visual`."""
    own: dict[str, Any] = {"num_hidden_layers": size.layers, "image_token_id": size.vocab - 1}
    return _built(transformers.LlamaConfig(**_shapes(size), **own), dtype, device)


def moe(size: Size, dtype: torch.dtype, device: str) -> nn.Module:
    """A Qwen3-MoE with random weights and as many parameters."""
    own: dict[str, Any] = {
        "num_hidden_layers": size.moe_layers,
        "head_dim": size.hidden // size.heads,
        "num_experts": size.experts,
        "num_experts_per_tok": size.top_k,
        "moe_intermediate_size": size.expert_neurons,
        "norm_topk_prob": True,
    }
    return _built(transformers.Qwen3MoeConfig(**_shapes(size), **own), dtype, device)


def _shapes(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.neurons,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.groups,
        "max_position_embeddings": max(2048, 2 * size.tokens),
    }


def _built(config: transformers.PretrainedConfig, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def prompt(size: Size, device: str) -> dict[str, Tensor]:
    """One prompt of random tokens, without padding."""
    ids = torch.randint(0, size.vocab - 1, (1, size.tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device)}


# --------------------------------------------------------------------------- actions


def _card(axis: str, kind: str) -> Card:
    return Card("An action of the engine", year=2026, axis=axis, kind=kind, phase="prefill")


@dataclass(frozen=True)
class Late(StreamMethod):
    """Visual tokens wait outside the layers until layer `at`."""

    at_layer: int
    name = "late"
    card = _card("tokens", "stream")

    def before_layer(self, stream: Stream, layer: int) -> None:
        if layer == 0:
            stream.hold(stream.visual)
        elif layer == self.at_layer:
            stream.release()


@dataclass(frozen=True)
class Half(RoutingMethod):
    """Of each token's experts the half with the larger gates runs."""

    name = "half"
    card = _card("experts", "routing")

    def route(self, routing: Routing, layer: int) -> None:
        k = routing.index.shape[1]
        routing.keep(k // 2)


@dataclass
class Case:
    """One action made ready: the dense model, and the model and method that are held against it."""

    dense: nn.Module
    model: nn.Module
    method: Method | None = None
    visual: Tensor | None = None
    decodes: bool = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[sparing.Run | None]:
        """The method on the model; None for a cut, which is a model of its own."""
        if self.method is None:
            yield None
            return
        with sparing.attach(self.model, self.method) as run:
            run.visual = self.visual
            yield run


def case(action: str, size: Size, dtype: torch.dtype, device: str, models: dict[str, nn.Module]) -> Case:
    """The models are kept in `models`, so that the actions of one dtype share them."""
    kind = "moe" if action == "experts" else "llama"
    if kind not in models:
        models.clear()
        models[kind] = (moe if kind == "moe" else llama)(size, dtype, device)
    dense = models[kind]
    columns = torch.arange(size.tokens)[None]
    if action == "drop-tokens":
        leave = round(DROPPED * size.tokens) / (size.tokens - 1)  # so that a quarter of all tokens stays, the last too
        method = sparing.get("fastv")(K=DEEP, R=leave)  # type: ignore[call-arg]
        return Case(dense, dense, method, columns < size.tokens - 1)
    if action == "hold":
        start, number = size.tokens // 32, size.tokens // 4
        return Case(dense, dense, Late(size.layers // 2), (columns >= start) & (columns < start + number))
    if action == "experts":
        return Case(dense, dense, Half())
    if action == "remove-layers":
        plan = Plan(tuple(LayerCut() if i % 2 == 0 else None for i in range(size.layers)))
        return Case(dense, cut(dense, plan), decodes=True)
    bias = torch.zeros(size.hidden)
    part = LayerCut(
        groups=torch.arange(0, size.groups, 2),
        neurons=torch.arange(0, size.neurons, 2),
        attention_bias=bias,
        mlp_bias=bias,
    )
    return Case(dense, cut(dense, Plan((part,) * len(View(dense)))))


# --------------------------------------------------------------------------- measuring


class Split(Counter):
    """Counts the FLOPs of causal attention apart.

    Attributes:
        causal: FLOPs of attention where the kernel was told that it is causal, the whole rectangle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.causal = 0

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        before = self.flops
        out = super()._count_flops(func_packet, out, args, kwargs)
        if "attention" in str(func_packet):
            names = [a.name for a in func_packet.default._schema.arguments]
            if {**dict(zip(names, args, strict=False)), **kwargs}.get("is_causal"):
                self.causal += self.flops - before
        return out


def flops(call: Callable[[], object]) -> tuple[int, float]:
    """FLOPs of one call, with the whole rectangle of attention, and with half of it where a causal kernel ran."""
    with Split() as counter:
        call()
    return counter.flops, counter.flops - counter.causal / 2


@dataclass(frozen=True)
class Entry:
    """One line of the result; the first eight fields are the contract, the rest says more."""

    action: str
    dtype: str
    speedup: float
    speedup_low: float
    speedup_high: float
    bound: float
    efficiency: float
    decision_share: float
    bound_causal: float
    seconds_dense: float
    seconds: float
    pairs: int
    phase: str = "prefill"
    decode_speedup: float | None = None
    decode_bound: float | None = None
    decode_efficiency: float | None = None

    def plain(self) -> dict[str, Any]:
        """Without what does not apply; numbers to five places."""
        kept = {k: v for k, v in asdict(self).items() if v is not None}
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in kept.items()}


def measure(action: str, dtype: str, this: Case, inputs: dict[str, Tensor], pairs: int) -> Entry:
    """Counts, times and weighs the decisions of one action."""
    steps = STEPS if this.decodes else 0

    def dense() -> timing.Stages:
        return timing.generation(this.dense, inputs, steps)

    def ours() -> timing.Stages:
        with this.attached():
            return timing.generation(this.model, inputs, steps)

    with this.attached():
        less = flops(lambda: timing.prefill(this.model, inputs))
    full = flops(lambda: timing.prefill(this.dense, inputs))
    bound = full[0] / less[0]
    found = timing.time_stages(dense, ours, repeats=pairs)
    ratio = found["prefill"]
    entry = Entry(
        action,
        dtype,
        ratio.median,
        ratio.low,
        ratio.high,
        bound,
        ratio.median / bound,
        deciding(this, inputs) if this.method is not None else 0.0,
        full[1] / less[1],
        ratio.dense,
        ratio.other,
        ratio.n,
    )
    if not steps:
        return entry
    costs = []
    for model in (this.dense, this.model):
        out = timing.prefill(model, inputs)
        costs.append(flops(lambda model=model, out=out: timing.decode(model, inputs, out, steps))[0])  # type: ignore[misc]
    speedup, most = found["decode"].median, costs[0] / costs[1]
    return replace(entry, decode_speedup=speedup, decode_bound=most, decode_efficiency=speedup / most)


def deciding(this: Case, inputs: dict[str, Tensor], repeats: int = 3) -> float:
    """Share of the method's own time that is spent in its verbs, gathering included: the median of a few runs.

    Apart from the timed pairs, because on an accelerator the clock of a decision has to wait for the work before it.
    """
    shares = []
    for _ in range(repeats):
        with this.attached() as run:
            assert run is not None
            run.time_decisions = True
            seconds = timing.generation(this.model, inputs, 0)["prefill"]
            shares.append(run.trace.seconds_deciding / seconds)
    return statistics.median(shares)


def machine(device: str) -> str:
    """What it ran on, in one line."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    where = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    if torch.device(device).type == "cuda":
        where = torch.cuda.get_device_name(device)
    return f"{where}; torch {torch.__version__}, transformers {transformers.__version__}"


def table(entries: list[Entry]) -> str:
    """The result as Markdown."""
    head = ("action", "dtype", "speed-up", "20–80 %", "bound", "efficiency", "deciding", "causal bound", "seconds")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for e in entries:
        lines.append(
            f"| {e.action} | {e.dtype} | {e.speedup:.2f} | {e.speedup_low:.2f}–{e.speedup_high:.2f} | {e.bound:.2f} "
            f"| {e.efficiency:.2f} | {e.decision_share:.1%} | {e.bound_causal:.2f} "
            f"| {e.seconds_dense:.3f} → {e.seconds:.3f} |"
        )
    for e in entries:
        if e.decode_speedup is not None:
            lines += [
                "",
                f"{e.action}, {e.dtype}, decoding one token at a time: {e.decode_speedup:.2f} × of "
                f"{e.decode_bound:.2f}, efficiency {e.decode_efficiency:.2f}.",
            ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--size", choices=SIZES, help="of the models; default 208M on a CPU, 8B on cuda")
    parser.add_argument("--tokens", type=int, help="of the prompt; default by size")
    parser.add_argument("--actions", nargs="+", choices=ACTIONS, default=list(ACTIONS), metavar="ACTION")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default both, bfloat16 on cuda")
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs an action")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    cuda = torch.device(args.device).type == "cuda"
    size = SIZES[args.size or ("8B" if cuda else "208M")]
    if args.tokens:
        size = replace(size, tokens=args.tokens)
    dtypes = args.dtypes or (["bfloat16"] if cuda else list(DTYPES))
    print(machine(args.device), file=sys.stderr)

    entries = []
    with tqdm(total=len(dtypes) * len(args.actions), desc="efficiency", file=sys.stderr) as bar:
        for dtype in dtypes:
            models: dict[str, nn.Module] = {}
            for action in args.actions:
                bar.set_postfix_str(f"{action}, {dtype}")
                this = case(action, size, DTYPES[dtype], args.device, models)
                entries.append(measure(action, dtype, this, prompt(size, args.device), args.pairs))
                del this
                gc.collect()
                bar.update()
    if args.json:
        print(json.dumps([entry.plain() for entry in entries], indent=1))
    else:
        print(f"{machine(args.device)}\n\n{table(entries)}")


if __name__ == "__main__":
    main()

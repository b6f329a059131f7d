"""FastV here against FastV as ModelTC/LightCompress runs it: the same model, prompt, selection and process.

    python benchmarks/vs_lightcompress.py            # a table
    python benchmarks/vs_lightcompress.py --json     # the same as a JSON list

`two_passes` is a small re-implementation of what llmc/compression/token_reduction/fastv.py does (read at commit
9701d03): the layer before the cut runs once more, with its full attention matrix, and its other results are thrown
away; then the hidden states, positions and rotary embeddings are indexed. It runs on the transformers installed here,
so that both sides share every kernel. Where there was a choice it is the cheaper one: the extra pass writes no cache,
and the cut positions are handed on instead of being copied into the shared tensors.

Dense, theirs and ours take turns; every ratio is the median of ratios within one turn, beside its 20th and 80th
percentile. Memory is the peak of tensors held during a prefill beyond the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import transformers
from efficiency import DROPPED, DTYPES, SIZES, Size, llama, machine, prompt
from torch import Tensor, nn
from tqdm import tqdm

import sparing
from sparing.bench import timing
from sparing.bench.timing import Ratio
from sparing.engine.view import View

K = 2  #: layers that see all tokens
IMAGE = 576  #: visual tokens of the LLaVA-shaped model, 24 x 24 patches
BEFORE, AFTER = 35, 64  #: text tokens around its image


# --------------------------------------------------------------------------- theirs


@dataclass
class Cut:
    """What the extra pass found: columns that stay (N,), and what later layers are called with."""

    keep: Tensor | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def two_passes(model: nn.Module, start: int, length: int, K: int, R: float) -> Iterator[Cut]:
    """FastV with an extra pass of layer K that materialises its attention matrix; for one prompt without padding.

    Args:
        start: column of the first visual token.
        length: visual tokens.
        K: layers that see all tokens.
        R: share of visual tokens that leaves.
    """
    view = View(model)
    cut = Cut()
    rows: list[Tensor] = []
    hooks: list[Any] = []

    def again(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if args[0].shape[1] == 1:
            return
        attention: Any = view.layers[K - 1].attention
        kind = view.config._attn_implementation
        look = attention.register_forward_hook(lambda m, a, out: rows.append(out[1]))
        view.config._attn_implementation = "eager"
        try:
            type(module).forward(module, *args, **{**kwargs, "past_key_values": None})
        finally:
            view.config._attn_implementation = kind
            look.remove()

    def prune(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        if hidden.shape[1] == 1:
            return None
        last_T = rows.pop().mean(1)[0, -1]
        best = last_T[start : start + length].topk(round(length * (1 - R))).indices + start
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        keep = torch.cat([columns[:start], best, columns[start + length :]]).sort().values
        cut.keep = keep
        cut.arguments = {
            "position_ids": keep[None],
            "position_embeddings": tuple(x.index_select(1, keep) for x in kwargs["position_embeddings"]),
        }
        return (hidden[:, keep], *args[1:]), {**kwargs, **cut.arguments}

    def follow(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return None if args[0].shape[1] == 1 else (args, {**kwargs, **cut.arguments})

    try:
        for layer in view.layers[K - 1 :]:
            hook: Any = again if layer.index == K - 1 else prune if layer.index == K else follow
            hooks.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        yield cut
    finally:
        for handle in hooks:
            handle.remove()


# --------------------------------------------------------------------------- models


@dataclass
class World:
    """A model, a prompt, and where its visual tokens lie."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    start: int
    length: int

    @property
    def width(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @contextlib.contextmanager
    def ours(self) -> Iterator[sparing.Run]:
        method = sparing.get("fastv")(K=K, R=DROPPED)  # type: ignore[call-arg]
        columns = torch.arange(self.width)[None]
        with sparing.attach(self.model, method) as run:
            run.visual = (columns >= self.start) & (columns < self.start + self.length)
            yield run

    def theirs(self) -> contextlib.AbstractContextManager[Cut]:
        return two_passes(self.model, self.start, self.length, K, DROPPED)


def text(size: Size, model: nn.Module, device: str) -> World:
    """A Llama, all tokens but the last being visual."""
    return World("llama", model, prompt(size, device), 0, size.tokens - 1)


def seeing(size: Size, dtype: torch.dtype, device: str) -> World:
    """A model of LLaVA's shape around the same Llama: a small tower, 576 visual tokens (fewer in the tiny size)."""
    side = 24 if size.tokens >= 1024 else 4
    torch.manual_seed(0)
    language = View(llama(size, dtype, "meta")).config.to_dict()
    token: dict[str, Any] = {"image_token_id": size.vocab - 1}
    config = transformers.LlavaConfig(
        text_config=language,
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=14 * side,
            patch_size=14,
        ),
        vision_feature_layer=-1,
        **token,
    )
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    ids = torch.randint(0, size.vocab - 1, (1, BEFORE + side**2 + AFTER), generator=torch.Generator().manual_seed(0))
    ids[:, BEFORE : BEFORE + side**2] = size.vocab - 1
    pixels = torch.randn(1, 3, 14 * side, 14 * side, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids.to(device), "pixel_values": pixels.to(device, dtype)}
    return World("llava", model, inputs, BEFORE, side**2)


# --------------------------------------------------------------------------- measuring


def turns(programs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program, which take turns in an order that rotates; one turn beforehand is thrown away."""
    names = list(programs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        gc.collect()
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            took = programs[name]()
            if turn >= 0:
                seconds[name].append(took)
    return seconds


@dataclass(frozen=True)
class Entry:
    """One line: `ratio` is their seconds over ours, `same` the share of the kept tokens that both keep."""

    model: str
    dtype: str
    tokens: int
    visual: int
    kept: int
    same: float
    ratio: float
    ratio_low: float
    ratio_high: float
    speedup_ours: float
    speedup_theirs: float
    seconds_dense: float
    seconds_ours: float
    seconds_theirs: float
    peak_dense: int
    peak_ours: int
    peak_theirs: int
    rounds: int


def measure(world: World, dtype: str, rounds: int) -> Entry:
    """Both against dense, and against each other."""
    device = world.inputs["input_ids"].device

    def dense() -> object:
        return timing.prefill(world.model, world.inputs)

    def theirs() -> object:
        with world.theirs():
            return dense()

    def ours() -> object:
        with world.ours():
            return dense()

    def timed(run: contextlib.AbstractContextManager[object]) -> float:
        with run:
            watch = timing.Watch(device)
            dense()
            return watch.lap()

    with world.ours() as run:
        run.keeps_index = True
        dense()
        index = run.trace.cells[0].index[-1]
        assert index is not None
        mine = set(index[0].tolist())
    with world.theirs() as cut:
        dense()
        assert cut.keep is not None
        other = set(cut.keep.tolist())
    programs = {
        "dense": lambda: timed(contextlib.nullcontext()),
        "theirs": lambda: timed(world.theirs()),
        "ours": lambda: timed(world.ours()),
    }
    seconds = turns(programs, rounds)
    versus = Ratio.of(seconds["theirs"], seconds["ours"])
    found = {name: Ratio.of(seconds["dense"], seconds[name]) for name in ("ours", "theirs")}
    return Entry(
        world.name,
        dtype,
        world.width,
        world.length,
        len(mine),
        len(mine & other) / max(len(mine), len(other)),
        versus.median,
        versus.low,
        versus.high,
        found["ours"].median,
        found["theirs"].median,
        found["ours"].dense,
        versus.other,
        versus.dense,
        timing.peak_memory(dense, device),
        timing.peak_memory(ours, device),
        timing.peak_memory(theirs, device),
        versus.n,
    )


def table(entries: list[Entry]) -> str:
    """The result as Markdown."""
    head = (
        "model",
        "dtype",
        "tokens (visual)",
        "theirs / ours",
        "20–80 %",
        "ours vs dense",
        "theirs vs dense",
        "peak MB dense / ours / theirs",
        "kept alike",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for e in entries:
        peaks = " / ".join(f"{x / 1e6:.0f}" for x in (e.peak_dense, e.peak_ours, e.peak_theirs))
        lines.append(
            f"| {e.model} | {e.dtype} | {e.tokens} ({e.visual}) | {e.ratio:.2f} | {e.ratio_low:.2f}–{e.ratio_high:.2f} "
            f"| {e.speedup_ours:.2f} | {e.speedup_theirs:.2f} | {peaks} | {e.same:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--size", choices=SIZES, help="of the Llama; default 208M on a CPU, 8B on cuda")
    parser.add_argument("--tokens", type=int, nargs="*", help="context lengths of the Llama; default 1024 2048 4096")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default both, bfloat16 on cuda")
    parser.add_argument("--rounds", type=int, default=5, help="turns of dense, theirs and ours")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    cuda = torch.device(args.device).type == "cuda"
    size = SIZES[args.size or ("8B" if cuda else "208M")]
    contexts = args.tokens if args.tokens is not None else [size.tokens] if args.size == "tiny" else [1024, 2048, 4096]
    print(machine(args.device), file=sys.stderr)

    entries: list[Entry] = []
    dtypes = args.dtypes or (["bfloat16"] if cuda else list(DTYPES))
    with tqdm(total=len(dtypes) * (len(contexts) + 1), desc="vs LightCompress", file=sys.stderr) as bar:
        for dtype in dtypes:
            model = llama(replace(size, tokens=max(contexts, default=1)), DTYPES[dtype], args.device)
            for tokens in contexts:
                entries.append(measure(text(replace(size, tokens=tokens), model, args.device), dtype, args.rounds))
                bar.update()
            del model
            gc.collect()
            entries.append(measure(seeing(size, DTYPES[dtype], args.device), dtype, args.rounds))
            gc.collect()
            bar.update()
    if args.json:
        print(json.dumps([asdict(entry) for entry in entries], indent=1))
    else:
        print(f"{machine(args.device)}\n\n{table(entries)}")


if __name__ == "__main__":
    main()

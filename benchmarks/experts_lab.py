"""What removing experts of lab:moe costs on each domain: EASY-EP, its controls, and an oracle.

    python benchmarks/experts_lab.py --out docs/results/experts-lab-moe.md

Every method is calibrated on 25 demonstrations from training text of a domain (or 25 of each, mixed) and evaluated on
held-out text of both. The oracle removes, layer by layer, the experts whose absence costs least on the held-out text
itself, one at a time: no method knows that.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sparing
from sparing.bench import tasks
from sparing.bench.models import load_model
from sparing.engine.surgery import LayerCut, Plan, masked
from sparing.engine.view import View

DOMAINS = ("code", "prose")


def evaluate(loaded: Any, task: Any, plan: Plan | None, limit: int) -> float:
    """Bits per byte with these experts only."""
    if plan is None:
        return task.evaluate(loaded.model, limit=limit)
    with masked(loaded.model, plan):
        return task.evaluate(loaded.model, limit=limit)


def oracle(loaded: Any, task: Any, kept: list[int], limit: int, bar: tqdm) -> dict[int, Plan]:
    """Plans for each number of kept experts, by what the absence of one expert at a time costs on the task itself."""
    layers = View(loaded.model).layers
    cost = torch.zeros(len(layers), layers[0].experts.count)
    for layer in range(cost.shape[0]):
        for expert in range(cost.shape[1]):
            rest = torch.tensor([e for e in range(cost.shape[1]) if e != expert])
            cuts = [LayerCut(experts=rest if i == layer else None) for i in range(len(layers))]
            cost[layer, expert] = evaluate(loaded, task, Plan(tuple(cuts)), limit)
            bar.update()
    return {M: Plan(tuple(LayerCut(experts=row.topk(M).indices.sort().values) for row in cost)) for M in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write; otherwise printed")
    parser.add_argument("--keep", default="12,8,6", help="experts kept a layer")
    parser.add_argument("--limit", type=int, default=60, help="windows evaluated a domain")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    kept = [int(k) for k in given.keep.split(",")]
    loaded = load_model("lab:moe")
    shape = sparing.shape(loaded.model)
    held = {domain: tasks.parse(domain, loaded) for domain in DOMAINS}
    steps = len(DOMAINS) * (shape.layers * shape.experts + 1 + len(kept) * (given.seeds + 7)) + 3
    bar = tqdm(total=steps, unit="step")

    easy = sparing.parse("easy-ep")
    fitted = {}
    for name, parts in {**{d: (d,) for d in DOMAINS}, "mixed": DOMAINS}.items():
        fitted[name] = easy.fit(loaded.model, {d: held[d].batches(4) for d in parts})
        bar.update()

    lines = []
    for domain in DOMAINS:
        other = next(d for d in DOMAINS if d != domain)
        dense = evaluate(loaded, held[domain], None, given.limit)
        bar.update()
        best = oracle(loaded, held[domain], kept, max(given.limit // 6, 4), bar)

        def loss(plan: Plan, domain: str = domain, dense: float = dense) -> float:
            bar.update()
            return 100 * (evaluate(loaded, held[domain], plan, given.limit) / dense - 1)

        for M in kept:
            mine = fitted[domain].replace(M=M)
            drawn = [
                loss(mine.control("random", shape, seed).plan(loaded.model))  # type: ignore[attr-defined]
                for seed in range(given.seeds)
            ]
            cells = [
                loss(best[M]),
                loss(mine.plan(loaded.model)),
                loss(mine.control("gate", shape).plan(loaded.model)),  # type: ignore[attr-defined]
                loss(mine.control("frequency", shape).plan(loaded.model)),  # type: ignore[attr-defined]
            ]
            apart = [loss(fitted[name].replace(M=M).plan(loaded.model)) for name in ("mixed", other)]
            bar.update()
            row = [domain, f"{M} of {shape.experts}", *(f"{c:.1f}" for c in cells)]
            row.append(f"{statistics.fmean(drawn):.1f} ± {statistics.stdev(drawn):.1f}")
            lines.append(" | ".join([*row, *(f"{c:.1f}" for c in apart)]))
        lines.append(f"{domain} | all | dense: {dense:.3f} bits per byte | | | | | |")
    bar.close()
    heads = ["held-out", "kept a layer", "oracle", "easy-ep", "summed gate", "frequency", "random", "mixed", "other's"]
    text = "\n".join(
        [
            "# Experts of lab:moe",
            "",
            f"Percent of dense bits per byte lost on {given.limit} held-out windows; random: {given.seeds} seeds, mean",
            "± deviation. Methods see 25 demonstrations from training text of the same domain; `mixed` is easy-ep",
            "on 25 of each, `other's` easy-ep on the other domain.",
            "",
            f"| {' | '.join(heads)} |",
            "|" + "---|" * len(heads),
            *(f"| {line} |" for line in lines),
            "",
        ]
    )
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()

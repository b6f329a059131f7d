"""HiDrop against its controls on lab:vlm: same schedule, same training, at two budgets.

    python benchmarks/hidrop_lab.py --out out/hidrop

Chooses the layers (ILVAS), fits HiDrop and the random and uniform control with the same schedule on the same batches,
and writes docs/results/hidrop.{json,md}. Every finished fit is kept; a second call goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import sparing
from sparing.bench import tasks
from sparing.bench.models import load_model
from sparing.engine.train import finetune
from sparing.grid.method import Method

DOCS = Path(__file__).parent.parent / "docs" / "results"
START = {"inject": 1, "filters": (1, 2), "of": 256, "exit": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/hidrop"))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.11])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--limit", type=int, default=1000, help="held-out scenes")
    parser.add_argument("--keeps", type=int, nargs="+", default=[64, 32], help="shape of the pyramid, of 256")
    parser.add_argument("--arms", nargs="+", default=["hidrop", "random", "uniform", "oracle"])
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load_model("lab:vlm")
    model, task = loaded.model, tasks.parse("find-digit", loaded)
    shape = sparing.shape(model)
    calibration = [
        {k: v[:, :-1] if k in ("input_ids", "attention_mask") else v for k, v in b.items() if k != "labels"}
        for b in task.batches(4)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    train: list[Any] = []

    def note(key: str, value: Any) -> None:
        found[key] = value
        file.write_text(json.dumps(found, indent=2) + "\n")

    def score(method: Method | None) -> float:
        if method is None:
            return task.evaluate(model, None, args.limit)
        with sparing.attach(model, method) as run:
            return task.evaluate(model, run, args.limit)

    if "dense" not in found:
        note("dense", score(None))
    for keep in args.keep:
        start: Any = sparing.get("hidrop")(**START, keeps=tuple(args.keeps))
        hidrop, curves = start.choose(model, calibration, keep=keep)
        note(f"curves {keep:g}", {k: [round(x, 4) for x in v] for k, v in curves.items()})
        spends = sum(hidrop.shares(shape)) / shape.layers
        arms = {"hidrop": hidrop, **{k: hidrop.control(k, shape) for k in ("random", "uniform", "oracle")}}
        for name, method in arms.items():
            key = f"{name} {keep:g}"
            if key in found or name not in args.arms:
                continue
            row: dict[str, Any] = {"method": method.name, "fields": method.fields(), "cells": spends}
            row["untrained"] = score(method)
            if name != "oracle":
                folder = args.out / f"{name}-{keep:g}"
                if not train:
                    train = list(task.batches(args.steps))
                state = finetune(model, method, train, lr=args.lr, weight_decay=0.01)
                fitted = method.with_state(state)
                fitted.save(folder)
                row |= {"trained": score(fitted), "steps": args.steps}
            note(key, row)
            print(key, {k: v for k, v in row.items() if k in ("untrained", "trained")}, flush=True)
    write(found, args)


def write(found: dict[str, Any], args: argparse.Namespace) -> None:
    """The table of the docs."""
    dense = found["dense"]
    lines = [
        "# HiDrop on lab:vlm",
        "",
        f"Exact match on {args.limit} held-out scenes; dense {dense:.1%}. The arms of one budget have one "
        f"schedule (layers chosen by `HiDrop.choose`) and were trained on the same batches of 32 training scenes, one "
        f"question each (AdamW, peak rate {args.lr:g}, the schedule on). `benchmarks/hidrop_lab.py` writes this page.",
        "",
        "| vision-token-layers | tokens a layer | arm | steps | untrained | trained | of dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in found.items():
        if isinstance(row, dict) and "cells" in row:
            method = sparing.get(row["method"])(**row["fields"])
            shares = method.shares(sparing.Shape(8, 4, 2, 32, 128, 344, 256))  # type: ignore[attr-defined]
            trained = f"{row['trained']:.1%}" if "trained" in row else "–"
            best = row.get("trained", row["untrained"])
            tokens = " ".join(str(round(256 * s)) for s in shares)
            lines.append(
                f"| {row['cells']:.1%} | {tokens} | {key.split()[0]} | {row.get('steps', '–')} "
                f"| {row['untrained']:.1%} | {trained} | {best / dense:.1%} |"
            )
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "hidrop.md").write_text("\n".join(lines) + "\n")
    (DOCS / "hidrop.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""EvoPress on lab:lm against scores of single layers, random search with as many evaluations, and uniform levels.

    python benchmarks/evopress.py [--limit N] [--out docs/results] [--rows FILE]

Writes evopress.md. Every search sees the calibration half of the text, the loss is measured on the held-out half. Rows
are appended to out/evopress/rows.jsonl as they come; a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sparing.bench import tasks
from sparing.bench.models import load_model
from sparing.engine.surgery import prune
from sparing.grid.method import Method, parse
from sparing.width.evopress import EvoPress

SETTINGS = {  # smaller than published, the model is small
    "depth": {"offspring": 16, "survivors": (2, 1), "tokens": (2048, 8192)},
    "sparsity": {"generations": 15, "offspring": 16, "survivors": (4, 1), "tokens": (2048, 8192)},
    "bits": {"generations": 15, "offspring": 16, "survivors": (4, 1), "tokens": (2048, 8192)},
}
CASES = (("depth", 0.25), ("depth", 0.5), ("sparsity", 0.7), ("bits", 2.5))


def rivals(levels: str, amount: float, shape: Any) -> list[tuple[str, Method]]:
    """Name and method of every row of a case."""
    rows: list[tuple[str, Method]] = []
    for search in ("evolve", "random"):
        name = "EvoPress" if search == "evolve" else "best of as many random points"
        rows.append((name, EvoPress(levels=levels, amount=amount, search=search, **SETTINGS[levels])))
    if levels == "depth":
        whole = EvoPress(levels=levels, amount=amount, blocks=True, **SETTINGS[levels])
        rows.append(("EvoPress, whole layers", whole))
        kept = shape.layers - int(amount * shape.layers)
        rows.append(("ShortGPT", parse(f"shortgpt:R={kept}")))
        rows.append(("evenly spread sub-layers", whole.replace(blocks=False).control("uniform", shape)))
        rows += [(f"random sub-layers {s}", whole.replace(blocks=False).control("random", shape, s)) for s in range(5)]
    else:
        rows.append(
            (
                "uniform level",
                EvoPress(levels=levels, amount=amount, **SETTINGS[levels]).replace(generations=0),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=int, default=48, help="windows of held-out text")
    parser.add_argument("--batches", type=int, default=16, help="calibration batches of 8 x 512 tokens")
    parser.add_argument("--levels", nargs="*", default=["depth", "sparsity", "bits"])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--rows", type=Path, default=Path("out/evopress/rows.jsonl"), help="finished rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model("lab:lm", "cpu", "float32")
    task = tasks.parse("ppl", loaded)
    data = list(task.batches(options.batches))
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.rows
    file.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {(row["levels"], row["amount"], row["name"]) for row in done}
    dense = task.evaluate(loaded.model, None, options.limit)
    work = [(lv, a, *r) for lv, a in CASES if lv in options.levels for r in rivals(lv, a, loaded.view.shape)]
    for levels, amount, name, method in tqdm(work, unit="row"):
        if (levels, amount, name) in known:
            continue
        fitted = method if method.ready else method.fit(loaded.model, data)
        small = prune(loaded.model, fitted).eval()
        bits = task.evaluate(small, None, options.limit)
        row = {
            "levels": levels,
            "amount": amount,
            "name": name,
            "bits": bits,
            "dense": dense,
            "loss": task.loss(bits, dense),
        }
        if levels == "depth" and "attention" in fitted.state:
            row["gone"] = {s: (fitted.state[s] == 0).nonzero().flatten().tolist() for s in ("attention", "mlp")}
        with file.open("a") as opened:
            opened.write(json.dumps(row) + "\n")
        done.append(row)
    shown = [row for row in done if row["levels"] in options.levels]
    (options.out / "evopress.md").write_text(table(shown, options))


def _said(levels: str) -> str:
    words = {"offspring": "{} offspring", "survivors": "{} survivors", "tokens": "judged on {} tokens"}
    found = SETTINGS[levels] | {k: "/".join(map(str, SETTINGS[levels][k])) for k in ("survivors", "tokens")}
    said = ", ".join(text.format(found[k]) for k, text in words.items())
    return f"{levels}: {said}" + (f", {found['generations']} generations" if "generations" in found else "")


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The page."""
    lines = [
        "# EvoPress on lab:lm",
        "",
        "Written by `benchmarks/evopress.py`. Bits per byte on held-out text "
        f"({options.limit} windows), dense {rows[0]['dense']:.3f}; % lost against dense. Settings, smaller than "
        "published: " + "; ".join(_said(levels) for levels in options.levels) + ". Random search "
        "judges as many points through the same stages.",
        "",
    ]
    for levels, amount in dict.fromkeys((r["levels"], r["amount"]) for r in rows):
        what = {"depth": f"{amount:.0%} of attentions and of MLPs removed", "sparsity": f"{amount:.0%} zeros"}
        lines += [f"## {what.get(levels, f'{amount:g} bits a weight, groups of 128')}", "", "| | % lost |", "|---|---|"]
        mine = [r for r in rows if (r["levels"], r["amount"]) == (levels, amount)]
        lots = [r["loss"] for r in mine if r["name"].startswith("random sub")]
        for r in mine:
            if not r["name"].startswith("random sub"):
                gone = r.get("gone")
                said = f" (attention {gone['attention']}, MLP {gone['mlp']})" if gone else ""
                lines.append(f"| {r['name']}{said} | {r['loss']:.2f} |")
        if lots:
            said = f"{statistics.median(lots):.2f} [{min(lots):.2f}–{max(lots):.2f}]"
            lines.append(f"| random sub-layers, median [range] of {len(lots)} draws | {said} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

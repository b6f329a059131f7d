"""`sparing search` on lab:lm against FLAP alone and depth alone, all at the same measured speed-up.

    sparing search lab:lm --speedup 1.5 --dtype float32 -o out/search/both
    sparing search lab:lm --speedup 1.5 --dtype float32 -o out/search/depth --axes depth
    python benchmarks/search_lab.py out/search/both out/search/depth

Every saved model is loaded in a process of its own beside dense and timed there; FLAP's p is found by bisection on the
measured speed-up. Writes docs/results/search.md and the picture of what was found.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import sparing
from sparing.bench import tasks
from sparing.bench.models import load_model
from sparing.bench.search import measured
from sparing.engine.surgery import prune

PAIRS = 31


def fresh(folder: Path, limit: int) -> dict[str, Any]:
    """What a process that has seen nothing but the folder measures."""
    words = [sys.executable, __file__, "--measure", str(folder), "--limit", str(limit)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(folder: Path, limit: int) -> dict[str, Any]:
    loaded = load_model("lab:lm", "cpu", "float32")
    task = tasks.parse("ppl", loaded)
    small = sparing.from_pretrained(folder, dtype=torch.float32).eval()
    ratio = measured(loaded.model, small, task.inputs(), PAIRS)
    dense, bits = (task.evaluate(m, None, limit) for m in (loaded.model, small))
    weights = [sum(p.numel() for p in m.parameters()) for m in (loaded.model, small)]
    return {
        "speedup": [ratio.median, ratio.low, ratio.high],
        "bits": bits,
        "dense": dense,
        "loss": task.loss(bits, dense),
        "parameters": weights[1] / weights[0],
    }


def at_speed(name: str, target: float, folder: Path) -> Path:
    """A width method cut so that its measured speed-up is the target."""
    loaded = load_model("lab:lm", "cpu", "float32")
    task = tasks.parse("ppl", loaded)
    method = sparing.parse(name)
    method = method if method.ready else method.fit(loaded.model, task.batches(16))
    low, high = 0.2, 0.95  # share kept
    for _ in tqdm(range(7), desc=f"{name} at {target:g}x"):
        keep = (low + high) / 2
        small = prune(loaded.model, method.at(keep, loaded.view.shape)).eval()
        fast = measured(loaded.model, small, task.inputs(), 15).median > target
        low, high = (keep, high) if fast else (low, keep)
    small = prune(loaded.model, method.at((low + high) / 2, loaded.view.shape))
    sparing.save_pretrained(small, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="of sparing search: both axes, then depth")
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--target", type=float, default=1.5)
    parser.add_argument("--limit", type=int, default=64, help="windows of held-out text")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.limit)))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in zip(("search: depth and width", "search: depth alone"), options.folders):
            rows[name] = fresh(folder / "model", options.limit)
        for method in ("flap", "wanda-sp:compensate=true"):
            cut = at_speed(method, options.target, Path(scratch) / method.partition(":")[0])
            rows[f"{method} alone"] = fresh(cut, options.limit)
    dense = next(iter(rows.values()))["dense"]
    lines = [
        f"# The best cut of lab:lm at {options.target:g}x",
        "",
        "Written by `benchmarks/search_lab.py`: saved models, each loaded in a fresh process and timed against dense, "
        f"interleaved ({PAIRS} pairs, one thread, prefill of 4 x 512 tokens, float32). Bits per byte on "
        f"{options.limit} held-out windows, dense {dense:.3f}.",
        "",
        "| | prefill | parameters | bits per byte | % lost |",
        "|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        median, low, high = r["speedup"]
        lines.append(
            f"| {name} | {median:.2f}x [{low:.2f}-{high:.2f}] | {r['parameters']:.1%} | {r['bits']:.4f} | "
            f"{r['loss']:.2f} |"
        )
    lines += ["", "![What was found](search.png)", ""]
    (options.out / "search.md").write_text("\n".join(lines))
    picture = options.folders[0] / "found.png"
    (options.out / "search.png").write_bytes(picture.read_bytes())
    (options.out / "search.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

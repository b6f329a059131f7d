"""Decode speed-up of the layer-skipping methods at half of the layers' work, against the roofline bound.

    python benchmarks/decode.py            # a table
    python benchmarks/decode.py --json     # a JSON list, nothing else on stdout
    python benchmarks/decode.py --device cuda --size 8B --dtypes bfloat16

The model is the Llama of benchmarks/efficiency.py with random weights (16 layers of width 1,024 by default). Dense and
method generate the same number of tokens after one prompt, in turns in one process; the speed-up is the median of the
paired ratios of decode time. FLOPs and bytes are those that ran; `bound` is the roofline ratio with this machine's
measured peaks, `efficiency` speed-up / bound. Finished rows are kept in out/decode; a second call goes on.

Random weights do not saturate, so ffn-skipllm tests against theta = -1: every test is made and hits, and 12 of the
16 feed-forward blocks are skipped, half of the weights of the layers.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from efficiency import DTYPES, SIZES, llama
from tqdm import tqdm

import sparing
from sparing.bench import bounds, timing
from sparing.bench.bounds import Bounds
from sparing.bench.compare import Subject

STEPS = 16
METHODS = ("unified-layer-skipping:S=2", "skipdecode", "ffn-skipllm")


def method_of(text: str, model: torch.nn.Module, layers: int) -> sparing.Method:
    """The method at half of the work."""
    if text == "skipdecode":
        return sparing.parse(f"skipdecode:T_ref={STEPS}").at(0.5, sparing.shape(model))
    if text == "ffn-skipllm":
        method = sparing.parse(f"ffn-skipllm:W=0,s=1,e={layers - 1},theta=-1,k={(layers - 2) // 2 - 1}")
        return method.with_state({"hot": torch.tensor([1, layers - 1])})
    return sparing.parse(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="208M", choices=SIZES)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--rows", type=Path, default=Path("out/decode/rows.jsonl"), help="finished rows, kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    same = {"device": device, "threads": options.threads, "size": options.size}
    rows = [row for row in kept if same.items() <= row.items()]
    done = {(row["dtype"], row["batch"], row["method"]) for row in rows}
    wanted = [(d, b, m) for d in options.dtypes for b in options.batches for m in options.methods]
    work = [one for one in wanted if one not in done]
    bar = tqdm(work, file=sys.stderr)
    last = None
    for dtype, batch, text in bar:
        bar.set_postfix_str(f"{text}, batch {batch}, {dtype}")
        if last != dtype:
            model = llama(SIZES[options.size], DTYPES[dtype], options.device)
            peaks, last = bounds.peaks(options.device, DTYPES[dtype]), dtype
        ids = torch.randint(2, SIZES[options.size].vocab - 2, (batch, options.prompt), device=options.device)
        inputs = {"input_ids": ids}
        method = method_of(text, model, SIZES[options.size].layers)
        dense, mine = Subject(model, steps=STEPS), Subject(model, method, STEPS)
        ratio = timing.time_stages(
            lambda d=dense, i=inputs: d.generation(i), lambda m=mine, i=inputs: m.generation(i), repeats=options.pairs
        )["decode"]
        costs = [s.cost(inputs)["decode"] for s in (dense, mine)]
        bound = Bounds.of(*costs, peaks).roofline
        with sparing.attach(model, method) as run:
            timing.decode(model, inputs, timing.prefill(model, inputs), STEPS)
        rows.append(
            {
                "method": text,
                "dtype": dtype,
                "batch": batch,
                "share": run.trace.share("depth", "decode"),
                "speedup": ratio.median,
                "speedup_low": ratio.low,
                "speedup_high": ratio.high,
                "bound": bound,
                "flop_bound": costs[0].flops / costs[1].flops,
                "byte_bound": costs[0].bytes / costs[1].bytes,
                "efficiency": ratio.median / bound,
                "dense_ms": 1000 * ratio.dense,
                "decision_share": mine.deciding(inputs),
                "device": device,
                "threads": options.threads,
                "size": options.size,
            }
        )
        with options.rows.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(
        "| method | dtype | batch | share | decode | bound | efficiency | deciding |\n|---|---|---|---|---|---|---|---|"
    )
    for r in rows:
        print(
            f"| {r['method']} | {r['dtype']} | {r['batch']} | {r['share']:.2f} | {r['speedup']:.2f}x "
            f"[{r['speedup_low']:.2f}-{r['speedup_high']:.2f}] | {r['bound']:.2f} | {r['efficiency']:.2f} | "
            f"{r['decision_share']:.1%} |"
        )


if __name__ == "__main__":
    main()

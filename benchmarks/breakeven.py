"""Where does a method start to pay on the embedded models? Over context lengths and batch sizes, on this machine.

    make breakeven                                        # the committed map, about 20 minutes on two quiet cores
    python benchmarks/breakeven.py --contexts 256,512     # a quick look

FastV on lab:vlm, unified layer skipping and FLAP on lab:lm, each at half its cells, with 64 generated tokens. The
prompts of lab:vlm hold whole pictures: 256 tokens for each, and two for the question. Rows go to OUT as they are
measured, a second call goes on. Writes docs/results/breakeven.png and breakeven.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sparing.bench import pictures, report
from sparing.bench.models import load_model
from sparing.bench.summary import breakevens
from sparing.bench.sweep import sweep
from sparing.grid.method import Error

RESULTS = Path(__file__).parent.parent / "docs" / "results"
RUNS = (  # model, task, methods, tokens beside the pictures
    ("lab:vlm", "find-digit", ("fastv",), 2),
    ("lab:lm", "ppl", ("unified-layer-skipping", "flap"), 0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="256,512,1024,2048,4096,8192", help="tokens of a prompt")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--pairs", type=int, default=None, help="timed pairs a cell; if not given 3 to 30, by length")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/breakeven"), help="folder for the rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for picture and table")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    contexts, batches = ([int(part) for part in text.split(",")] for text in (args.contexts, args.batches))
    rows = []
    for model, task, methods, beside in RUNS:
        given = [context + beside for context in contexts]
        out = args.out / model.replace(":", "-")
        rows += sweep(
            load_model(model), task, methods, [args.keep], given, batches, repeats=args.pairs, out=out, resume=True
        )
    figure = pictures.breakeven(rows)
    if figure is None:
        raise Error("rows: nothing was measured")
    args.results.mkdir(parents=True, exist_ok=True)
    pictures.save(figure, args.results / "breakeven.png")
    threads = torch.get_num_threads()
    on = f"{report.machine()}; {threads} thread{'s' * (threads > 1)}, float32"
    page = [
        report.breakeven(rows),
        f"Machine: {on}. `make breakeven` writes this page.",
        "",
        "![Speed-up over context length and batch size](breakeven.png)",
        "",
    ]
    (args.results / "breakeven.md").write_text("\n".join(page), encoding="utf-8")
    for mine in breakevens(rows):
        print(f"{mine.label}: {mine.sentence}.")
    minutes = sum(row["seconds"] for row in rows) / 60
    print(f"{minutes:.1f} minutes in {len(rows)} cells. {args.results / 'breakeven.md'}")


if __name__ == "__main__":
    main()

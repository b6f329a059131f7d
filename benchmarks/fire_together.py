"""Fire Together Wire Together on a small CNN and the handwritten digits of scikit-learn, against what it has to beat.

    python benchmarks/fire_together.py --resume

A CNN of three convolutions (32, 64, 64 filters, 8 x 8 pixels) learns one half of the digits; gates are trained and the
network fine-tuned for each r, decoupled and joint, with the published gate and with one that has no softmax. Beside
each decoupled network stand four others of equal size, fine-tuned as long: filters of the largest L1 norm, random
filters for each image, gates trained on labels with a fixed ratio, and one mask for all images. Accuracy is that on the
other half, FLOPs those that ran.

Then neurons of lab:lm: gates trained on its calibration text, bits per byte of held-out text whose second halves count
as generated, against one mask for all tokens and static cuts of equal cost and of equal size.

Writes one line an arm to --out, and docs/results/fire-together.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import sparing
from sparing.bench import tasks
from sparing.bench.models import load_model
from sparing.engine.gating import Fired, GatedCNN, GatedConv, Label, flops, mlp_activity, relabelled, train_gates
from sparing.engine.view import View
from sparing.grid.select import top_k
from sparing.grid.trace import count
from sparing.width.fire_together_wire_together import (
    QUANTILES,
    FireTogetherWireTogether,
    Gate,
    curve,
    labels,
    uniform_labels,
)

PAGE = Path(__file__).parent.parent / "docs" / "results" / "fire-together.md"
FILTERS = ((32, 1), (64, 2), (64, 1))  # filters and stride of each convolution
CLASSES = 10
ARMS = ("decoupled", "joint", "L1", "random", "uniform labels", "mean mask")
GATES = {"published": True, "no softmax": False}

Masks = Callable[[int], Sequence[Tensor]]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and classes of one half, then of the other."""
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    parts = train_test_split(images, torch.tensor(y), test_size=0.5, stratify=y, random_state=0)
    return parts[0], parts[2], parts[1], parts[3]


def network(seed: int, softmax: bool = True, joint: bool = False) -> GatedCNN:
    """Untrained."""
    torch.manual_seed(seed)
    blocks, channels = [], 1
    for filters, stride in FILTERS:
        conv = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        gate = Gate(channels, filters, softmax=softmax)
        blocks.append(GatedConv(conv, nn.BatchNorm2d(filters), gate, joint=joint))
        channels = filters
    return GatedCNN(blocks, nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, CLASSES)))


def backbone(model: GatedCNN) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".gate." not in name}


# --------------------------------------------------------------------------- controls


def static(masks: Sequence[Tensor]) -> Masks:
    return lambda batch: masks


def largest(model: GatedCNN, target: float, dense: Sequence[Fired]) -> list[Tensor]:
    """Filters of the largest L1 norm, the same share of every layer, as many as `target` FLOPs pay for."""
    norms = [conv.weight.detach().abs().sum((1, 2, 3)) for conv in model.modules() if isinstance(conv, nn.Conv2d)]

    def at(share: float) -> list[Tensor]:
        return [top_k(norm[None], max(1, round(share * len(norm))))[0] for norm in norms]

    shares = [step / 64 for step in range(1, 65)]
    fitting = [s for s in shares if _cost(model, dense, at(s)) <= target]
    return at(max(fitting, default=shares[0]))


def by_lot(counts: Sequence[int], seed: int) -> Masks:
    """For each image other filters, a given number a layer."""
    lot = torch.Generator().manual_seed(seed)

    def masks(batch: int) -> list[Tensor]:
        sizes = zip(counts, (filters for filters, _ in FILTERS))
        return [top_k(torch.rand(batch, size, generator=lot), k) for k, size in sizes]

    return masks


def fixed_ratio(model: GatedCNN, target: float, dense: Sequence[Fired]) -> Label:
    """Labels with the ratio whose FLOPs come nearest to `target`, gates included."""
    gates = 2 * sum(gate.linear.weight.numel() for gate in model.modules() if isinstance(gate, Gate))

    def miss(ratio: float) -> float:
        found = relabelled(dense, functools.partial(uniform_labels, ratio=ratio))
        return abs(flops(model, found) + gates - target)

    return functools.partial(uniform_labels, ratio=min((step / 64 for step in range(64)), key=miss))


def _cost(model: GatedCNN, dense: Sequence[Fired], masks: Sequence[Tensor]) -> float:
    return flops(model, [f._replace(mask_BK=mask[None]) for f, mask in zip(dense, masks)])


# --------------------------------------------------------------------------- runs


def measure(model: GatedCNN, x: Tensor, y: Tensor, masks: Masks | None) -> dict[str, Any]:
    """Accuracy, FLOPs of an image that ran in the convolutions and gates, and what the gates did."""
    given = None if masks is None else masks(len(x))
    with torch.no_grad():
        scores, fired = model(x, given)
        ran = count(lambda: model(x, given))[0] / len(x)
    moved = [(f.mask_BK != (f.mask_BK.float().mean(0) > 0.5)).float().mean().item() for f in fired]
    return {
        "accuracy": (scores.argmax(1) == y).float().mean().item(),
        "flops": ran - 2 * CLASSES * model.head[1].in_features,  # type: ignore[index]
        "counts": [f.mask_BK.float().sum(1).mean().item() for f in fired],
        "moved": statistics.fmean(moved),
    }


class Bench:
    """The arms of one seed after another; finished ones are kept."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.file = args, args.out / "results.jsonl"
        args.out.mkdir(parents=True, exist_ok=True)
        if self.file.exists() and not args.resume:
            self.file.unlink()
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.x, self.y, self.x_held, self.y_held = digits()

    def run(self) -> None:
        total = len(self.args.seeds) * (1 + len(GATES) * len(self.args.r) * len(ARMS))
        with tqdm(total=total, desc="fire together", unit="arm") as bar:
            for seed in self.args.seeds:
                weights = self.dense(seed)
                bar.update()
                for gate, r in ((g, r) for g in GATES for r in self.args.r):
                    for arm in ARMS:
                        bar.set_postfix_str(f"seed {seed}, {gate}, r {r:g}, {arm}")
                        self.arm(seed, gate, r, arm, weights)
                        bar.update()

    def kept(self, **key: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(k) == v for k, v in key.items())), None)

    def note(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def dense(self, seed: int) -> dict[str, Tensor]:
        """Weights of the dense network; trained again where only its row was kept, with the same result."""
        model, start = network(seed), time.process_time()
        ones = [torch.ones(filters, dtype=torch.bool) for filters, _ in FILTERS]
        third = self.args.dense_epochs // 3
        train_gates(
            model, self.x, self.y, lambda a: a > 0, epochs=3 * third, lr=0.05, milestones=(third, 2 * third),
            masks=static(ones), seed=seed, progress=False,
        )  # fmt: skip
        if not self.kept(seed=seed, arm="dense"):
            estimates = {f"{r:g}": done for r, done in curve(model, self.x, [*self.args.r, 1.0]).items()}
            row = {"seed": seed, "arm": "dense", "estimates": estimates}
            row |= measure(model, self.x_held, self.y_held, static(ones))
            self.note({**row, "seconds": time.process_time() - start})
        return backbone(model)

    def arm(self, seed: int, gate: str, r: float, arm: str, weights: dict[str, Tensor]) -> None:
        key = {"seed": seed, "gate": gate, "r": r, "arm": arm}
        if self.kept(**key):
            return
        start = time.process_time()
        model = network(seed + 1000, GATES[gate], joint=arm == "joint")
        model.load_state_dict(weights, strict=False)
        dense = model.dense(self.x)[1]
        label: Label = functools.partial(labels, r=r)
        masks: Masks | None = None
        if arm not in ("decoupled", "joint"):
            like = self.kept(seed=seed, gate=gate, r=r, arm="decoupled")
            assert like is not None
            counts = [max(1, round(k)) for k in like["counts"]]
            if arm == "L1":
                masks = static(largest(model, like["flops"], dense))
            elif arm == "random":
                masks = by_lot(counts, seed)
            elif arm == "uniform labels":
                label = fixed_ratio(model, like["flops"], dense)
            else:
                often = [f.mask_BK.float().mean(0) for f in relabelled(dense, label)]
                masks = static([top_k(p[None], k)[0] for p, k in zip(often, counts)])
        epochs = self.args.epochs
        train_gates(
            model, self.x, self.y, label, epochs=epochs, lr=self.args.lr, masks=masks, seed=seed, progress=False,
            milestones=[round(epochs * share) for share in (0.58, 0.78, 0.98)],
        )  # fmt: skip
        row = {**key, **measure(model, self.x_held, self.y_held, masks)}
        self.note({**row, "seconds": time.process_time() - start})


# --------------------------------------------------------------------------- neurons


CUTS = [f"{kind} cut of equal {what}" for what in ("cost", "size") for kind in ("random", "uniform")]


def neurons(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bits per byte of lab:lm with gates and with what they have to beat, one row an arm."""
    file, folder = args.out / "neurons.jsonl", args.out / "fitted"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if args.resume and file.exists() else []
    loaded = load_model("lab:lm")
    model, task = loaded.model, tasks.parse("ppl", loaded)
    data = list(task.batches(args.batches))
    if not (args.resume and (folder / "method.json").exists()):
        FireTogetherWireTogether().fit(model, data, epochs=3).save(folder)
    gates = sparing.load(folder)
    asked = [("dense", 1.0), *((arm, share) for share in args.neurons for arm in ("gates", "one mask for all", *CUTS))]
    for arm, share in tqdm(asked, desc="neurons", unit="arm"):
        if any((row["arm"], row["neurons"]) == (arm, share) for row in rows):
            continue
        start = time.process_time()
        method: Any = gates.replace(neurons=share)
        if arm == "one mask for all":
            method = one_mask(method, model, data[:3])
        elif arm in CUTS[:2]:
            method = method.control(arm.split()[0], sparing.shape(model))
        elif arm in CUTS[2:]:
            seen = mlp_activity(model, {"input_ids": task.inputs()["input_ids"]})
            size = tuple(round(float(method.fires(i, x_RD).float().sum(1).mean())) for i, (x_RD, _) in enumerate(seen))
            method = sparing.get(f"{arm.split()[0]}-width")(neurons=size).with_state(gates.state)  # type: ignore[call-arg]
        with sparing.attach(model, method) as run:
            quality = task.evaluate(model, run, args.windows)
        rows.append({"arm": arm, "neurons": share, "bits": quality, "seconds": time.process_time() - start})
        with file.open("a") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
    return rows


def one_mask(gates: Any, model: nn.Module, data: Sequence[Any]) -> Any:
    """The neurons that fire most often, in place of what a gate says: gates whose logits do not read the token."""
    state = dict(gates.state)
    often: list[Any] = [0.0] * len(View(model))
    for batch in data:
        seen = mlp_activity(model, batch)
        often = [n + labels(a_RN.abs(), gates.r).float().sum(0) for n, (_, a_RN) in zip(often, seen)]
    for i, count_N in enumerate(often):
        state[f"gate.{i}.up"] = torch.zeros_like(state[f"gate.{i}.up"])
        state[f"gate.{i}.bias"] = count_N
        state[f"gate.{i}.quantiles"] = count_N.quantile(torch.linspace(0, 1, QUANTILES))
    return gates.with_state(state)


# --------------------------------------------------------------------------- page


def spread(values: Sequence[float], digits: int = 1) -> str:
    off = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {off:.{digits}f}"


def table(bench: Bench) -> list[str]:
    """A line for each gate, r and arm, means over seeds."""
    rows, seeds = bench.rows, bench.args.seeds
    full = statistics.fmean(row["flops"] for row in rows if row["arm"] == "dense" and row["seed"] in seeds)
    lines = [
        "| gate | r | arm | accuracy, % | FLOPs that ran, % | estimate before training, % | mask ≠ mean mask, % |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = [row for row in rows if row["arm"] == "dense" and row["seed"] in seeds]
    lines.append(f"| – | – | dense | {spread([100 * d['accuracy'] for d in dense])} | 100 | – | – |")
    for gate in GATES:
        for r in bench.args.r:
            for arm in ARMS:
                mine = [q for q in rows if (q.get("gate"), q.get("r"), q["arm"]) == (gate, r, arm)]
                mine = [q for q in mine if q["seed"] in seeds]
                known = spread([100 * d["estimates"][f"{r:g}"] / full for d in dense]) if arm == ARMS[0] else ""
                lines.append(
                    f"| {gate} | {r:g} | {arm} | {spread([100 * q['accuracy'] for q in mine])} "
                    f"| {spread([100 * q['flops'] / full for q in mine])} | {known} "
                    f"| {spread([100 * q['moved'] for q in mine])} |"
                )
    return lines


def write(bench: Bench, found: list[dict[str, Any]]) -> None:
    """The page; what stands behind its tables, under a heading, is written by hand and stays."""
    dense = next(row for row in bench.rows if row["arm"] == "dense")
    args = bench.args
    page = [
        "# Fire together, wire together, on handwritten digits",
        "",
        f"A CNN of 3 x 3 convolutions with {', '.join(str(k) for k, _ in FILTERS)} filters and "
        f"{dense['flops'] / 1e6:.2f} MFLOPs an image, trained on {len(bench.x)} digits of 8 x 8 pixels, held-out "
        f"accuracy on the other {len(bench.x_held)}; mean and deviation over {len(args.seeds)} seeds. Every arm starts "
        f"from the dense network of its seed and is fine-tuned for {args.epochs} epochs (SGD {args.lr:g}, gates 0.1 in "
        "the first half). `L1`, `random`, `uniform labels` and `mean mask` have the size of the decoupled network "
        "above them. FLOPs, in percent of dense, are those counted while the held-out half ran with only the wanted "
        "filters computed; gates are in it, the head is not. The estimate is that of the labels on the dense network, "
        "without gates. The last column says how far masks follow the image: the share of mask entries that "
        "differ from the filter's usual state.",
        "",
        *table(bench),
        "",
        "**Neurons of `lab:lm`.** Bits per byte of "
        f"{args.windows} held-out windows; what is scored counts as generated. Gates of rank D / 16, labels of "
        f"r = 0.8, trained on {args.batches} batches of 8 x 512 tokens, three times. The mask for all tokens holds "
        "what fires most often. Cuts are compensated and hold for the prompt too; those of equal cost run as many "
        "parameters as a generated token does with gates, whose `down_proj` stays whole. "
        "`python benchmarks/fire_together.py` writes this page down to here.",
        "",
        "| neurons of a token | arm | bits per byte | more than dense, % |",
        "|---|---|---|---|",
    ]
    least = next(row["bits"] for row in found if row["arm"] == "dense")
    page += [
        f"| {q['neurons']:.0%} | {q['arm']} | {q['bits']:.3f} | {100 * (q['bits'] / least - 1):.1f} |" for q in found
    ]
    page.append("")
    _, rest, more = PAGE.read_text().partition("\n## ") if PAGE.exists() else ("", "", "")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join(page) + rest + more, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/fire-together"), help="folder of results.jsonl")
    parser.add_argument("--resume", action="store_true", help="keep the arms that --out holds")
    parser.add_argument("--r", type=float, nargs="+", default=[0.4, 0.55, 0.7], help="mass thresholds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30, help="of fine-tuning")
    parser.add_argument("--dense-epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.01, help="of fine-tuning")
    parser.add_argument("--neurons", type=float, nargs="+", default=[0.5, 0.3], help="shares of the neurons")
    parser.add_argument("--batches", type=int, default=10, help="calibration batches of lab:lm")
    parser.add_argument("--windows", type=int, default=4, help="held-out windows of lab:lm")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    bench.run()
    found = neurons(args)
    write(bench, found)
    rows = [*bench.rows, *found]
    print(f"{sum(row['seconds'] for row in rows) / 60:.1f} CPU minutes in {len(rows)} arms. {PAGE}")


if __name__ == "__main__":
    main()

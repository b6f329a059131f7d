"""Hourglass against conventional MLPs on the 8 x 8 digits of scikit-learn, at equal trainable parameters.

    python benchmarks/hourglass.py --threads 1     # the committed figures, about 15 minutes on one core
    python benchmarks/hourglass.py --resume        # goes on after an interruption; finished rows are kept

Two tasks of the paper: generative classification (image -> one fixed image of its class) and denoising (sigma 0.25).
MSE, AdamW, learning rate linearly to 0, the checkpoint that is best on the validation images; PSNR on test images.
Each family gets the same search at each budget: every design of its grid is trained shortly, the two best of them whole
at three learning rates, a fourth where an end was best, and what is then best on the validation images with two more
seeds. Controls without blocks, in
closed form: a linear map and ridge regression on random ReLU features. Rows go to OUT/rows.jsonl as they are measured;
docs/results/hourglass.md and hourglass.png are written from them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from sparing.bench import pictures, report
from sparing.bench.timing import time_pair
from sparing.grid.method import BudgetError
from sparing.width.hourglass_mlp import (
    Design,
    HourglassMLP,
    ResidualMLP,
    designs,
    draw_lift,
    flops,
    non_dominated,
    parameters,
)

RESULTS = Path(__file__).parent.parent / "docs" / "results"
PIXELS, SIGMA, BATCH, SEEDS = 64, 0.25, 64, (0, 1, 2)
RATES, OUTER = (3e-3, 1e-3, 1e-2), {1e-3: 3e-4, 1e-2: 3e-2}  #: the first one screens; one more where an end is best
SCREEN, BEST = 0.2, 2  #: share of the epochs of a short run; designs that go on
TASKS = {"classify": "generative classification", "denoise": f"denoising, sigma {SIGMA}"}
COSTS = {"trainable": "trainable parameters", "total": "all parameters", "cheaper": "FLOPs, cheaper form"}

WIDE = {"d_z": (16, 24, 32, 48, 72, 96, 128, 192, 256, 384, 512, 768, 1024), "L": (1, 2, 4, 8)}
NEAR = {"d_z": (16, 24, 32, 48, 64, 96, 128), "L": (1, 2, 4, 8)}
SAME = {"d_z": (PIXELS,), "L": (1, 2, 4, 8)}
FAMILIES: dict[str, dict[str, Any]] = {  # arguments of `designs`; none where the model is not residual
    "hourglass": WIDE,
    "hourglass, fixed lift": WIDE | {"lift": "fixed"},
    "conventional": NEAR | {"hourglass": False},
    "conventional, no W_in": SAME | {"hourglass": False, "lift": "identity"},
    "conventional, neither": SAME | {"hourglass": False, "lift": "identity", "readout": False},
    "no skip": {},
    "random features": {},
    "linear map": {},
}
OURS, THEIRS = list(FAMILIES)[:2], list(FAMILIES)[2:5]
LOOKS = dict(zip(FAMILIES, zip((*pictures.SERIES[:5], pictures.INK, pictures.RANDOM, pictures.RANDOM), "oosD^vXP")))

Row = dict[str, Any]


# --------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Task:
    """Images in [0, 1], (N, 64), of the three splits: what goes in, and what should come out.

    Attributes:
        x, y: by split; of denoising x holds the noise for validation and test, and is clean for training.
        sigma: of the noise that every training batch gets anew.
    """

    x: dict[str, Tensor]
    y: dict[str, Tensor]
    sigma: float


def load(name: str) -> Task:
    """Of each digit every fifth image is for validation and every fifth for test (359 and 360 of 1,797)."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    nth = torch.zeros_like(labels)
    for digit in range(10):
        nth[labels == digit] = torch.arange(int((labels == digit).sum()))
    where = {"train": nth % 5 < 3, "val": nth % 5 == 3, "test": nth % 5 == 4}
    x = {split: images[mask] for split, mask in where.items()}
    if name == "classify":
        seen, classes = x["train"], labels[where["train"]]
        prototype = torch.zeros(10, PIXELS)
        for digit in range(10):  # the training image nearest to the mean of its class
            own = seen[classes == digit]
            prototype[digit] = own[(own - own.mean(0)).norm(dim=1).argmin()]
        return Task(x, {split: prototype[labels[mask]] for split, mask in where.items()}, 0.0)
    generator = torch.Generator().manual_seed(0)
    noisy = {k: v if k == "train" else v + SIGMA * torch.randn(v.shape, generator=generator) for k, v in x.items()}
    return Task(noisy, x, SIGMA)


def psnr(y: Tensor, target: Tensor) -> float:
    """dB for a peak of 1, from the mean squared error over all images."""
    return -10 * math.log10((y - target).square().mean().item())


# --------------------------------------------------------------------------- models


class NoSkip(nn.Module):
    """Plain MLP, the blocks' norm and ReLU after every one of its hidden layers: L of width d_h."""

    def __init__(self, d_h: int, L: int) -> None:
        super().__init__()
        widths = [PIXELS] + [d_h] * L
        hidden = [
            m for a, b in itertools.pairwise(widths)
            for m in (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=False), nn.ReLU())
        ]  # fmt: skip
        self.layers = nn.Sequential(*hidden, nn.Linear(d_h, PIXELS, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def sizes_of(family: str, budget: int) -> list[Row]:
    """Sizes of the designs of a family with that many trainable parameters, within 5 %."""
    if family == "random features":
        return [{"features": budget // PIXELS}]
    if family == "no skip":  # 128 d_h + (L - 1) d_h^2 = budget
        widths = {L: (math.sqrt(PIXELS**2 + (L - 1) * budget) - PIXELS) / (L - 1) for L in (2, 3, 5, 9)}
        return [{"d_h": budget // (2 * PIXELS), "L": 1}] + [{"d_h": round(w), "L": L} for L, w in widths.items()]
    try:
        found = designs(budget, PIXELS, PIXELS, **FAMILIES[family])
    except BudgetError:
        return []
    return [{"d_z": d.d_z, "d_h": d.d_h, "L": d.L} for d in found]


def design(family: str, sizes: Row) -> Design:
    options = FAMILIES[family]
    return Design(
        PIXELS, sizes["d_z"], sizes["d_h"], sizes["L"], PIXELS,
        lift=options.get("lift", "trained"), readout=options.get("readout", True),
    )  # fmt: skip


def build(family: str, sizes: Row, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if family == "no skip":
        return NoSkip(**sizes)
    kind: type[ResidualMLP] = HourglassMLP if family in OURS else ResidualMLP
    options = {k: v for k, v in FAMILIES[family].items() if k in ("lift", "readout")}
    return kind(d_x=PIXELS, d_y=PIXELS, **sizes, **options, seed=seed)


def cost(family: str, sizes: Row) -> Row:
    """Parameters, and FLOPs of one sample in the plain form and in the cheaper one of plain and collapsed."""
    if family in ("random features", "linear map"):
        n = sizes.get("features")
        trained, total = (PIXELS * n, PIXELS * n + n * (PIXELS + 1)) if n else (PIXELS * (PIXELS + 1),) * 2
        return {"trainable": trained, "total": total, "flops": 2 * total, "cheaper": 2 * total}
    if family == "no skip":
        n = sum(p.numel() for p in NoSkip(**sizes).parameters())
        return {"trainable": n, "total": n, "flops": 2 * n, "cheaper": 2 * n}
    this = design(family, sizes)
    trained, total = parameters(this)
    plain, collapsed = flops(this), flops(this, collapsed=True)
    return {"trainable": trained, "total": total, "flops": plain, "cheaper": min(plain, collapsed)}


# --------------------------------------------------------------------------- training


def train(model: nn.Module, task: Task, lr: float, seed: int, epochs: int) -> Row:
    """Validation and test PSNR of the epoch that was best on the validation images."""
    generator = torch.Generator().manual_seed(seed)
    x, y = task.x["train"], task.y["train"]
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    steps = epochs * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=steps)
    found = {"val": -math.inf}
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            batch = x[index]
            if task.sigma:
                batch = batch + task.sigma * torch.randn(batch.shape, generator=generator)
            optimiser.zero_grad()
            (model(batch) - y[index]).square().mean().backward()
            optimiser.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            val = psnr(model(task.x["val"]), task.y["val"])
            if val > found["val"]:
                found = {"val": val, "test": psnr(model(task.x["test"]), task.y["test"])}
    return found


def ridge(task: Task, features: int | None, seed: int) -> Row:
    """Least squares on ReLU(W (x, 1)) with a random W, or on (x, 1) itself; the penalty that is best for validation."""
    one = {split: torch.cat([x, torch.ones(len(x), 1)], 1) for split, x in task.x.items()}
    x, y = one["train"], task.y["train"]
    if task.sigma:
        copies, generator = 8, torch.Generator().manual_seed(seed)
        x, y = x.repeat(copies, 1), y.repeat(copies, 1)
        x[:, :PIXELS] += task.sigma * torch.randn(len(x), PIXELS, generator=generator)

    def lifted(x: Tensor) -> Tensor:
        return (x if features is None else (x @ draw_lift(features, PIXELS + 1, "uniform", seed).T).relu()).double()

    f = lifted(x)
    gram, right = f.T @ f / len(f), f.T @ y.double() / len(f)
    found = {"val": -math.inf}
    for penalty in 10.0 ** np.arange(-7, 1):
        ridged = gram + penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        w = torch.cholesky_solve(right, torch.linalg.cholesky(ridged))
        dB = {split: psnr((lifted(one[split]) @ w).clamp(0, 1), task.y[split]) for split in ("val", "test")}
        found = max(found, dB, key=lambda row: row["val"])
    return found


class Rows:
    """Measured rows by their key, appended to a file as they come."""

    def __init__(self, file: Path, resume: bool) -> None:
        self.file, self.done = file, {}
        if file.exists() and not resume:
            raise SystemExit(f"{file} exists: --resume goes on with it, or name another --out")
        text = file.read_text() if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # killed while it wrote the last row
            file.write_text(whole)
        for line in whole.splitlines():
            row = json.loads(line)
            self.done[json.dumps(row["key"])] = row

    def get(self, key: Row, measure: Callable[[], Row]) -> Row:
        name = json.dumps(key)
        if name not in self.done:
            start = time.process_time()
            row = {"key": key, **measure(), "seconds": round(time.process_time() - start, 2)}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            self.done[name] = row
        return self.done[name]


def search(name: str, task: Task, family: str, budget: int, epochs: int, rows: Rows, bar: Any) -> Row | None:
    """What a family reaches with a budget: sizes and rate chosen on validation images, test PSNR of every seed."""

    def run(sizes: Row, lr: float, seed: int, epochs: int) -> Row:
        key = {"task": name, "family": family, "sizes": sizes, "lr": lr, "seed": seed, "epochs": epochs}
        bar.set_postfix_str(f"{name} {budget} {family}")
        row = rows.get(key, lambda: train(build(family, sizes, seed), task, lr, seed, epochs))
        bar.update()
        return row

    sizes = sizes_of(family, budget)
    short = max(1, round(SCREEN * epochs))
    if not sizes:
        return None
    screened = sorted(sizes, key=lambda s: -run(s, RATES[0], 0, short)["val"])[:BEST]
    whole = [run(s, lr, 0, epochs) for s in screened for lr in RATES]
    best = max(whole, key=lambda row: row["val"])
    if best["key"]["lr"] in OUTER:
        bar.total += 1
        best = max(best, run(best["key"]["sizes"], OUTER[best["key"]["lr"]], 0, epochs), key=lambda row: row["val"])
    chosen, lr = best["key"]["sizes"], best["key"]["lr"]
    tests = [best["test"], *(run(chosen, lr, seed, epochs)["test"] for seed in SEEDS[1:])]
    return {"budget": budget, "sizes": chosen, "lr": lr, "designs": len(sizes), "tests": tests} | cost(family, chosen)


def runs_of(family: str, budget: int) -> int:
    n = len(sizes_of(family, budget))
    return n + min(n, BEST) * len(RATES) + len(SEEDS) - 1 if n else 0


def closed(name: str, task: Task, family: str, budget: int, rows: Rows) -> Row:
    sizes = {} if family == "linear map" else sizes_of(family, budget)[0]
    tests = []
    for seed in SEEDS:
        key = {"task": name, "family": family, "sizes": sizes, "seed": seed}
        tests.append(rows.get(key, partial(ridge, task, sizes.get("features"), seed))["test"])
    return {"budget": budget, "sizes": sizes, "tests": tests} | cost(family, sizes)


# --------------------------------------------------------------------------- collapsed form


COLLAPSED = (Design(64, 256, 24, 8, 64), Design(784, 785, 115, 7, 784), Design(3072, 3546, 16, 5, 3072))


def collapsed_speed(this: Design, batch: int) -> Row:
    """Plain form against collapsed form: ratio of the FLOPs and of the seconds of one batch, median of pairs."""
    torch.manual_seed(0)
    model = HourglassMLP(this.d_x, this.d_z, this.d_h, this.L, this.d_y).eval()
    narrow, x = model.collapsed(), torch.rand(batch, this.d_x)
    with torch.inference_mode():
        ratio = time_pair(lambda: model(x), lambda: narrow(x), repeats=15)
        off = (model(x) - narrow(x)).abs().max().item()
    return {
        "bound": flops(this) / flops(this, collapsed=True),
        "speedup": [ratio.median, ratio.low, ratio.high],
        "ms": [1e3 * ratio.dense, 1e3 * ratio.other],
        "off": off,
    }


# --------------------------------------------------------------------------- page


Found = dict[str, dict[str, list[Row]]]  # task -> family -> a row a budget


def at_cost(points: Sequence[Row], key: str, value: float) -> float:
    """PSNR of the front of `points` at a cost, straight between its points over log cost; nan outside of its range."""
    pairs = [(float(p[key]), mean(p["tests"])) for p in points]
    front = [pairs[i] for i in non_dominated(pairs)]
    if not front or not front[0][0] <= 1.05 * value:
        return math.nan
    if value > 1.05 * max(cost for cost, _ in pairs):
        return math.nan
    return float(np.interp(math.log(value), [math.log(c) for c, _ in front], [q for _, q in front]))


def beside(ours: Row, others: Sequence[Row]) -> tuple[float, str]:
    """dB over the best of the others at the same budget, and whether all seeds agree on the order."""
    best = max(others, key=lambda row: mean(row["tests"]))
    gain = mean(ours["tests"]) - mean(best["tests"])
    if min(ours["tests"]) > max(best["tests"]):
        return gain, "ahead"
    return gain, "behind" if max(ours["tests"]) < min(best["tests"]) else "level"


def sentences(found: Found) -> Iterator[str]:
    """What the rows say, in words; ahead and behind only where all seeds agree."""
    for ours in OURS:
        rivals = {
            "the best conventional variant": THEIRS,
            "the paper's baseline (conventional with W_in and W_out)": ["conventional"],
            "the MLP without skip": ["no skip"],
            **({"the trained lift": ["hourglass"]} if ours != "hourglass" else {}),
        }
        for rival, families in rivals.items():
            parts = []
            for task, by in found.items():
                said: dict[str, list[str]] = {"ahead": [], "behind": [], "level": []}
                for row in by.get(ours, []):
                    others = [r for f in families for r in by.get(f, []) if r["budget"] == row["budget"]]
                    if others:
                        gain, verdict = beside(row, others)
                        said[verdict].append(f"{row['budget'] // 1000}k ({_signed(gain)})")
                words = [f"{verdict} at {', '.join(at)}" for verdict, at in said.items() if at]
                if words:
                    parts.append(f"{TASKS[task]}: {'; '.join(words)}")
            if parts:
                yield (
                    f"- **{ours}** against {rival}, dB at equal trainable parameters. "
                    + ". ".join(part[0].upper() + part[1:] for part in parts)
                    + "."
                )

    chosen = []
    for task, by in found.items():
        for family in OURS:
            sizes = [row["sizes"] for row in by.get(family, [])]
            if sizes:
                shapes = ", ".join(f"{s['d_z']}/{s['d_h']}/{s['L']}" for s in sizes)
                chosen.append(f"{TASKS[task]}, {family.partition(', ')[2] or 'trained lift'}: {shapes}")
    if chosen:
        yield (
            "- Chosen as the budget grows, d_z/d_h/L: "
            + "; ".join(chosen)
            + ". The paper reports deeper networks, wider "
            "skips and narrower bottlenecks at larger budgets."
        )


def _signed(dB: float) -> str:
    return f"{round(dB, 2) + 0.0:+.2f}"


def table(by: dict[str, list[Row]]) -> Iterator[str]:
    yield "| budget | family | d_z | d_h | L | rate | trainable | all | kFLOPs | collapsed | test PSNR, dB | seeds |"
    yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"
    for budget in sorted({row["budget"] for rows in by.values() for row in rows}):
        here = {family: row for family, rows in by.items() for row in rows if row["budget"] == budget}
        best = max(mean(row["tests"]) for row in here.values())
        for family in FAMILIES:
            if family not in here:
                if family != "linear map":
                    yield f"| {budget:,} | {family} |" + " – |" * 10
                continue
            row = here[family]
            s, dB = row["sizes"], mean(row["tests"])
            narrower = f"{row['cheaper'] / 1e3:.1f}" if row["cheaper"] < row["flops"] else "–"
            said = f"**{dB:.2f}**" if dB == best else f"{dB:.2f}"
            yield (
                f"| {budget:,} | {family} | {s.get('d_z', '–')} | {s.get('d_h', s.get('features', '–'))} "
                f"| {s.get('L', '–')} | {row.get('lr', '–')} | {row['trainable']:,} | {row['total']:,} "
                f"| {row['flops'] / 1e3:.1f} | {narrower} | {said} | {min(row['tests']):.2f}–{max(row['tests']):.2f} |"
            )


def equal_cost(found: Found) -> Iterator[str]:
    yield "| task | family | budget | " + " | ".join(f"equal {name}" for name in (*COSTS.values(), "FLOPs")) + " |"
    yield "|---|---|---:|" + "---:|" * (len(COSTS) + 1)
    for task, by in found.items():
        others = [row for family in THEIRS for row in by.get(family, [])]
        for family in OURS:
            for row in by.get(family, []):
                gains = [mean(row["tests"]) - at_cost(others, key, row[key]) for key in (*COSTS, "flops")]
                said = " | ".join("–" if math.isnan(g) else _signed(g) for g in gains)
                yield f"| {TASKS[task]} | {family} | {row['budget']:,} | {said} |"


def picture(found: Found) -> Figure:
    """PSNR over cost: a row of panels a task, a panel a measure of cost; filled points are on the common front."""
    figure = Figure(figsize=(12, 0.9 + 3.4 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(COSTS), squeeze=False, sharey="row")
    for line, (task, by) in zip(axes, found.items()):
        for ax, (key, label) in zip(line, COSTS.items()):
            points = [(family, row) for family, rows in by.items() for row in rows]
            front = {id(points[i][1]) for i in non_dominated([(r[key], mean(r["tests"])) for _, r in points])}
            for family, rows in by.items():
                colour, marker = LOOKS[family]
                rows = sorted(rows, key=lambda row: row[key])
                ax.plot([r[key] for r in rows], [mean(r["tests"]) for r in rows], color=colour, lw=1.2, alpha=0.6)
                for row in rows:
                    low, high = min(row["tests"]), max(row["tests"])
                    ax.plot([row[key]] * 2, [low, high], color=colour, lw=1.2)
                    face = colour if id(row) in front else pictures.CARD
                    ax.plot(row[key], mean(row["tests"]), marker, color=colour, mfc=face, ms=6)
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k"))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.grid(True, color=pictures.RULE, lw=0.7)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_xlabel(label)
        line[0].set_ylabel("test PSNR, dB")
        line[0].set_title(TASKS[task], loc="left", weight="bold", fontsize=10.5)
    handles = [
        axes[0][0].plot([], [], color=colour, marker=marker, label=family, mfc=colour)[0]
        for family, (colour, marker) in LOOKS.items()
        if any(family in by for by in found.values())
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def page(found: Found, trivial: dict[str, str], speeds: dict[Design, Row], rows: Rows, args: Any) -> str:
    threads, epochs, rates = torch.get_num_threads(), args.epochs, ", ".join(f"{r:g}" for r in sorted(RATES))
    counts = {split: len(x) for split, x in load("classify").x.items()}
    minutes = sum(row["seconds"] for row in rows.done.values()) / 60
    lines = [
        "# Hourglass MLP on 8 x 8 digits",
        "",
        *sentences(found),
        "",
        f"`benchmarks/hourglass.py` writes this page: {report.machine()}, {threads} thread{'s' * (threads > 1)}, "
        f"float32, {minutes:.0f} CPU minutes in {len(rows.done)} runs.",
        "",
        f"Data: the 1,797 digits of scikit-learn, pixels in [0, 1]: {counts['train']:,} to train, {counts['val']} to "
        f"choose checkpoint, design and learning rate, {counts['test']} to test. AdamW, batches of {BATCH}, {epochs} "
        f"epochs, rate linearly to 0. Each family and budget gets the same search: all designs of its grid for "
        f"{max(1, round(SCREEN * epochs))} epochs at rate {RATES[0]:g}, the best {BEST} of them whole at {rates} and, "
        f"where an end of these was best, one beyond it; the winner with {len(SEEDS)} seeds (weights, lift, batches, "
        "noise). Ahead and behind are said only where every seed of one side beats every seed of the other; "
        "the best conventional variant is the best of three on the test images, which favours it. Small "
        "pictures and small models: nothing here speaks about larger ones.",
        "",
        "![PSNR over trainable parameters, all parameters and FLOPs](hourglass.png)",
        "",
        "Bars: lowest and highest seed. Filled: no other point is both cheaper and better.",
    ]
    for task, by in found.items():
        lines += ["", f"## {TASKS[task][0].upper()}{TASKS[task][1:]}", "", trivial[task], "", *table(by)]
    lines += [
        "",
        "A dash: the family has no design within 5 % of the budget (without W_in it needs at least 12,416 parameters, "
        "without both projections 8,320). A trained lift leaves room for an hourglass wider than its input, d_z > 64, "
        "only above 8,192 parameters: what it has at 5,000 is narrower. The grid of the conventional form reaches down "
        "to d_z = 16 and up to 128, the paper's stays near d_x. Of random features d_h is their number; of the MLP "
        "without skip d_h and L are width and number of hidden layers. FLOPs are those of one image; collapsed: those "
        "of the collapsed form where it is the cheaper one.",
        "",
        "## Against the conventional front at other equal costs",
        "",
        "dB over the front of all three conventional variants at the same cost, interpolated between its points over "
        "log cost; a dash outside of the range that was measured. Cheaper form: of either side, plain or collapsed.",
        "",
        *equal_cost(found),
        "",
        "## The collapsed form",
        "",
        f"Plain over collapsed, batches of {args.batch}, median of 15 interleaved pairs [20th–80th percentile].",
        "",
        "| d_x | d_z | d_h | L | FLOPs | measured | plain ms | collapsed ms | largest difference |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for d, row in speeds.items():
        middle, low, high = row["speedup"]
        lines.append(
            f"| {d.d_x} | {d.d_z} | {d.d_h} | {d.L} | {row['bound']:.2f}× | {middle:.2f}× [{low:.2f}–{high:.2f}] "
            f"| {row['ms'][0]:.2f} | {row['ms'][1]:.2f} | {row['off']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[5_000, 15_000, 45_000, 130_000])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=256, help="of the timing of the collapsed form")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--resume", action="store_true", help="go on with the rows that OUT holds")
    parser.add_argument("--out", type=Path, default=Path("out/hourglass"), help="folder for the rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for page and picture")
    args = parser.parse_args(given)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = Rows(args.out / "rows.jsonl", args.resume)
    trained = [family for family in args.families if family not in ("random features", "linear map")]
    found: Found = {}
    trivial = {}
    total = len(args.tasks) * sum(runs_of(family, budget) for family in trained for budget in args.budgets)
    with tqdm(total=total, unit="run", smoothing=0.05, mininterval=2) as bar:
        for name in args.tasks:
            task = load(name)
            by = found[name] = {}
            mean_dB = psnr(task.y["train"].mean(0).expand_as(task.y["test"]), task.y["test"])
            input_dB = psnr(task.x["test"].clamp(0, 1), task.y["test"])
            trivial[name] = f"The mean training target has {mean_dB:.2f} dB, the input as it comes {input_dB:.2f} dB."
            for family in args.families:
                if family == "linear map":
                    by[family] = [closed(name, task, family, min(args.budgets), rows)]
                elif family == "random features":
                    by[family] = [closed(name, task, family, budget, rows) for budget in args.budgets]
                else:
                    each = (search(name, task, family, b, args.epochs, rows, bar) for b in args.budgets)
                    by[family] = [row for row in each if row is not None]
    speeds = {}
    for this in COLLAPSED:
        key = {"collapsed": vars(this), "batch": args.batch}
        speeds[this] = rows.get(key, partial(collapsed_speed, this, args.batch))
    args.results.mkdir(parents=True, exist_ok=True)
    pictures.save(picture(found), args.results / "hourglass.png")
    (args.results / "hourglass.md").write_text(page(found, trivial, speeds, rows, args), encoding="utf-8")
    print(f"{args.results / 'hourglass.md'}")


if __name__ == "__main__":
    main()

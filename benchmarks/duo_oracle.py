"""Duo-LLM's oracle on lab:lm: how far the learned router is from the best route of each token.

    python benchmarks/duo_oracle.py --out out/duo

Fits duo-llm (or takes a fitted folder), tries all 4,096 routes for some held-out tokens and writes
docs/results/duo-oracle.{json,md}. An interrupted fit goes on, a finished one is used again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import sparing
from sparing.bench import tasks
from sparing.bench.models import Loaded, load_model
from sparing.depth.duo_llm import DuoLlm
from sparing.engine import oracle
from sparing.grid.budget import spaced
from sparing.lab.text import heldout_text

DOCS = Path(__file__).parent.parent / "docs" / "results"
EASY = 0.01  # nats; a token that gains less than this is not difficult


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/duo"))
    parser.add_argument("--method", type=Path, default=None, help="a fitted duo-llm; default OUT/method")
    parser.add_argument("--steps", type=int, default=200, help="of each of the two trainings")
    parser.add_argument("--rho", type=float, default=0.5, help="share of big that the routers are trained at")
    parser.add_argument("--train-big", action="store_true", help="train the model along, as published")
    parser.add_argument("--tokens", type=int, default=240, help="held-out tokens examined")
    parser.add_argument("--context", type=int, default=256, help="tokens a window")
    parser.add_argument("--each", type=int, default=20, help="tokens examined in a window")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load_model("lab:lm")
    method = fitted(loaded, args)
    found = examine(loaded, method, args)
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "duo-oracle.json").write_text(json.dumps(found, indent=2) + "\n")
    (DOCS / "duo-oracle.md").write_text(page(found))
    print(page(found))


def fitted(loaded: Loaded, args: argparse.Namespace) -> DuoLlm:
    """The method of the folder, fitted first if there is none."""
    folder = args.method or args.out / "method"
    if args.method is None and not (folder / "method.json").exists():
        torch.manual_seed(0)
        data = list(tasks.parse("ppl", loaded).batches(args.steps))
        method = DuoLlm(rho=args.rho, train_big=args.train_big)
        method.fit(loaded.model, data, checkpoint=args.out / "unfinished").save(folder)
    found = sparing.load(folder)
    if not isinstance(found, DuoLlm) or found.skip:
        raise SystemExit(f"--method {folder}: must be a fitted duo-llm of two choices")
    return found


def windows(loaded: Loaded, args: argparse.Namespace) -> tuple[list[Tensor], list[int]]:
    """Evenly spread windows of the held-out text, each behind a <bos>, and the columns that are examined in each."""
    ids = torch.tensor(loaded.tokenizer(heldout_text(), verbose=False)["input_ids"])
    count = -(-args.tokens // args.each)
    starts = torch.linspace(1, len(ids) - args.context, count).long().tolist()
    columns = torch.linspace(8, args.context - 2, args.each).long().tolist()
    return [torch.cat([ids[:1], ids[s : s + args.context - 1]]) for s in starts], columns


def examine(loaded: Loaded, method: DuoLlm, args: argparse.Namespace) -> dict[str, Any]:
    """All routes of all examined tokens, under their own label and under that of another token."""
    texts, columns = windows(loaded, args)
    own = torch.stack([text[c + 1] for text in texts for c in columns])
    other = own.roll(len(own) // 2)  # of another place in another file
    labels = torch.stack([own, other], 1).split(len(columns))
    loss, noted = [], []
    for text, label in zip(tqdm(texts, desc="routes", unit="window"), labels, strict=True):
        explored = oracle.explore(
            loaded.model, method.ffns(), text, columns, labels_NM=label, method=method, progress=False,
            note=lambda layer, x: method.margin(layer.index, x)[0],
        )  # fmt: skip
        loss.append(explored.loss_NMR.double())
        noted.append(explored.noted)
    true_NR, wrong_NR = torch.cat(loss).unbind(1)
    states = [torch.cat(layer) for layer in zip(*noted)]
    L = len(states)
    count_R, table = oracle.first_choices(L), oracle.routes(L)
    best, lucky = oracle.by_budget(true_NR, count_R), oracle.by_budget(wrong_NR, count_R)
    rows = []
    for k in range(L + 1):
        of_k = true_NR[:, count_R == k]
        route_N = oracle.walk(states, method.replace(rho=k / L, router="learned").threshold)
        rows.append(
            {
                "k": k,
                "routes": of_k.shape[1],
                "oracle": best[:, k].mean().item(),
                "best of 100": oracle.best_of(of_k, min(100, of_k.shape[1])).mean().item(),
                "random": of_k.mean().item(),
                "best fixed": of_k.mean(0).min().item(),
                **{name: true_NR[:, oracle.number(route)].mean().item() for name, route in patterns(k, L).items()},
                "learned": true_NR.gather(1, route_N[:, None]).mean().item(),
                "learned k": count_R[route_N].double().mean().item(),
                "gain": (true_NR[:, 0] - best[:, k]).mean().item(),
                "gain, other label": (wrong_NR[:, 0] - lucky[:, k]).mean().item(),
            }
        )
    used = {}
    for k in (L // 3, 2 * L // 3):
        numbers = (count_R == k).nonzero().flatten()
        chosen = numbers[true_NR[:, numbers].argmin(1)]
        routed = oracle.walk(states, method.replace(rho=k / L, router="learned").threshold)
        used[str(k)] = {
            name: (table[r] == 0).double().mean(0).tolist() for name, r in (("oracle", chosen), ("learned", routed))
        }
    hard = oracle.difficulty(true_NR, 2**L - 1)
    gain = oracle.difficulty(true_NR, 0)
    ranks = torch.stack([x.argsort().argsort().double() for x in (true_NR[:, 0], gain)])
    return {
        "tokens": len(own), "context": args.context, "L": L,
        "fields": method.fields(), "steps": args.steps if args.method is None else None,
        "rows": rows, "used": used,
        "free": true_NR.amin(1).mean().item(), "free, other label": wrong_NR.amin(1).mean().item(),
        "other label": wrong_NR[:, 0].mean().item(),
        "difficulty": hard.mean().item(), "easy": (hard < EASY).double().mean().item(),
        "rank correlation": torch.corrcoef(ranks)[0, 1].item(),
    }  # fmt: skip


def patterns(k: int, L: int) -> dict[str, list[int]]:
    """Routes that are the same for all tokens; 0 is big."""
    even = spaced(L, k) if k > 1 else range(k)
    return {
        "first": [0] * k + [1] * (L - k),
        "last": [1] * (L - k) + [0] * k,
        "even": [int(layer not in even) for layer in range(L)],
    }


def page(found: dict[str, Any]) -> str:
    """What is written to the docs."""
    rows, L = found["rows"], found["L"]
    dense = rows[L]["oracle"]
    names = ("oracle", "best of 100", "random", "best fixed", "first", "last", "even", "learned")
    fields, steps = found["fields"], found["steps"]
    beats = next((row["k"] for row in rows if row["oracle"] < dense), L)
    top = min(rows, key=lambda row: row["oracle"])
    lines = [
        "# Duo-LLM's oracle on lab:lm",
        "",
        f"Every route through {L} layers (big or small FFN, {2**L:,} routes) for {found['tokens']} held-out tokens in "
        f"windows of {found['context']}. Mean loss in nats of the next token; the keys before it are those of the "
        f"model with big FFNs. All big: {dense:.3f}. Fitted at rho = {fields['rho']:g}"
        + (f", {steps} batches of 8 x 512 tokens for each of the two trainings" if steps else "")
        + f"; the model itself was {'trained along' if fields['train_big'] else 'left as it is'}. "
        "`benchmarks/duo_oracle.py` writes this page.",
        "",
        "| big layers k | routes | "
        + " | ".join(names)
        + " | its mean k | gain of the oracle | … under another label |",
        "|---" * (len(names) + 5) + "|",
    ]
    for row in rows:
        cells = [f"{row[name]:.3f}" for name in names]
        lines.append(
            f"| {row['k']} | {row['routes']} | {' | '.join(cells)} | {row['learned k']:.2f} | {row['gain']:+.3f} "
            f"| {row['gain, other label']:+.3f} |"
        )
    lines += [
        "",
        "- oracle: each token's best route of k big layers, chosen with the label. best of 100: of so many drawn by "
        "lot, on average, also chosen with the label for each token. random: one route by lot. best fixed: the one "
        "route that is best for these tokens together. first, last, even: which layers are big. learned: the router at "
        "rho = k / L.",
        "- gain: loss of all big less that of the oracle. Under another label the same is done with the label of some "
        "other token, which no route can know of: what is gained there is selection alone.",
        f"- The oracle beats all big from k = {beats} on and is best at k = {top['k']}. There the router lies "
        f"{top['learned'] - top['oracle']:.2f} above it and {top['learned'] - top['even']:+.2f} from even spacing.",
        f"- Free choice of k: {found['free']:.3f}, a gain of {dense - found['free']:+.3f}; under another label "
        f"{found['other label'] - found['free, other label']:+.3f} (of a loss of {found['other label']:.2f}).",
        f"- Difficulty (loss of all small less that of the best route): mean {found['difficulty']:.2f}; "
        f"{found['easy']:.0%} of the tokens gain less than {EASY:g}. Rank correlation of the loss of all big with what "
        f"the best route gains on it: {found['rank correlation']:.2f}.",
        "",
        "Share of tokens for which a layer is big:",
        "",
        "| k | route | " + " | ".join(f"layer {layer}" for layer in range(L)) + " |",
        "|---" * (L + 2) + "|",
    ]
    for k, kinds in found["used"].items():
        for name, shares in kinds.items():
            lines.append(f"| {k} | {name} | " + " | ".join(f"{100 * share:.0f}" for share in shares) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

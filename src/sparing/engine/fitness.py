"""How far a candidate is from the dense model: divergence on calibration text, the same minibatch for all."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparing.engine.view import evaluating
from sparing.grid.method import Error
from sparing.grid.score import divergence
from sparing.grid.search import Genome

_LOGITS = 1 << 26  # logits held at a time


class Fidelity:
    """Fitness of a search: what candidates say against what the dense model says, lower is better.

    A stage's minibatch is drawn without replacement from the calibration sequences until it holds exactly the tokens
    asked for, the last sequence cut; every candidate of the stage sees it. Dense logits are computed once a minibatch
    and dropped with it.

    Args:
        model: in any mode; evaluated, and left as it was.
        batches: calibration data, keyword arguments of forward; a row is a sequence.
        switch: makes the live model a candidate.
        dense: the candidate that is the model itself.
        measure: "kl" (mean over positions of KL(dense || candidate)) or "perplexity".
        top_k: for kl: both distributions restricted to the dense model's k likeliest tokens and renormalised.

    Attributes:
        tokens: there are in all.
        evaluated: tokens that candidates were run on so far; the dense model's own not counted.
        dearest: the most tokens a stage will ask for; less in the data is refused at once.

    Raises:
        Error: the data is empty, or has less tokens than a stage asks for.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        switch: Callable[[Genome], None],
        dense: Genome,
        *,
        measure: str = "kl",
        top_k: int | None = None,
        dearest: int = 0,
    ) -> None:
        self.model, self._switch, self._dense = model, switch, dense
        self._measure, self._top_k = measure, top_k
        self._rows = [row for batch in batches for row in _sequences(batch)]
        self.tokens = sum(len(row) for row in self._rows)
        self.evaluated = 0
        self._vocabulary = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        if dearest > self.tokens or not self.tokens:
            raise Error(
                f"calibration data: has {self.tokens:,} tokens, the search evaluates on {dearest:,}; give more text, "
                "or ask for less"
            )

    @property
    def sample(self) -> Tensor:
        """The first tokens of the data, (1, 8) or fewer."""
        return self._rows[0][None, :8]

    def __call__(self, candidates: Sequence[Genome], effort: int, draw: int) -> list[float]:
        """Mean divergence (or perplexity) of each candidate on `effort` tokens, the minibatch fixed by `draw`."""
        if effort > self.tokens:
            raise Error(f"calibration data: has {self.tokens:,} tokens, a stage asks for {effort:,}; give more text")
        totals = [0.0] * len(candidates)
        count = 0
        device = next(self.model.parameters()).device
        with evaluating(self.model), torch.no_grad():
            for rows_BT in self._minibatch(effort or self.tokens, draw):
                rows_BT = rows_BT.to(device)
                self._switch(self._dense)
                dense = self._logits(rows_BT)
                count += self._positions(rows_BT)
                for i, candidate in enumerate(candidates):
                    self._switch(candidate)
                    totals[i] += self._lost(dense, self._logits(rows_BT), rows_BT)
                self.evaluated += rows_BT.numel() * len(candidates)
        self._switch(self._dense)
        means = [total / max(count, 1) for total in totals]
        return [_exp(m) for m in means] if self._measure == "perplexity" else means

    def _minibatch(self, tokens: int, draw: int) -> list[Tensor]:
        """(B, T) rows of equal length, together exactly `tokens`."""
        order = list(range(len(self._rows)))
        random.Random(draw).shuffle(order)
        rows: list[Tensor] = []
        left = tokens
        for i in order:
            if left <= 0:
                break
            rows.append(self._rows[i][:left])
            left -= len(rows[-1])
        groups: dict[int, list[Tensor]] = {}
        for row in rows:
            groups.setdefault(len(row), []).append(row)
        out = []
        for length, members in sorted(groups.items()):
            each = max(1, _LOGITS // (length * self._vocabulary))
            out += [torch.stack(members[i : i + each]) for i in range(0, len(members), each)]
        return out

    def _logits(self, rows_BT: Tensor) -> Tensor:
        return self.model(input_ids=rows_BT, use_cache=False).logits

    def _positions(self, rows_BT: Tensor) -> int:
        return rows_BT.numel() if self._measure == "kl" else rows_BT.numel() - len(rows_BT)

    def _lost(self, dense_BTV: Tensor, logits_BTV: Tensor, rows_BT: Tensor) -> float:
        if self._measure == "kl":
            return float(divergence(dense_BTV, logits_BTV, top_k=self._top_k).double().sum())
        flat = logits_BTV[:, :-1].flatten(0, 1).float()
        return float(nn.functional.cross_entropy(flat, rows_BT[:, 1:].flatten(), reduction="sum"))


def _sequences(batch: Mapping[str, Tensor]) -> list[Tensor]:
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    return [row if mask is None else row[mask[i].bool()] for i, row in enumerate(ids)]


def _exp(nats: float) -> float:
    return float(torch.tensor(nats, dtype=torch.float64).exp())

"""FFN-SkipLLM: generated tokens skip the next feed-forward blocks once one of them hardly turns their state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparing.engine.saturation import mlp_shares, saturation
from sparing.engine.stream import Stream, StreamMethod
from sparing.grid.method import BudgetError, Card, Error, Method, Shape, get, integer, number, register
from sparing.grid.score import cosine

_ROWS = 4096  # tokens whose cosines are kept to choose settings by
_JUDGED = 512  # of them, evenly, those that k and the range are chosen by; theta sees them all


@register(
    "ffn-skipllm",
    Card(
        "FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward Skipping",
        year=2024,
        arxiv="2404.03865",
        axis="depth",
        kind="stream",
        phase="decode",
        needs="calibration",
        summary="generated tokens keep all attention but skip feed-forward blocks where their state hardly changes",
        controls=("random", "static"),
        requires=("mlp",),
    ),
)
@dataclass(frozen=True)
class FfnSkipLLM(StreamMethod):
    """x is a token's state before an FFN (its norm not applied), y = x + FFN(norm(x)) after it, c = cos(x, y).

    1. The prompt and the first W generated tokens run every FFN, and so do all tokens outside the layers [s, e).
    2. Inside, a token runs the FFN and is tested: if c >= theta, it skips its next k FFNs untested, as far as e.
    3. Every token starts anew. Attention runs in all layers: the KV cache has every layer and position.

    Tokens decide for themselves: those of a batch that run an FFN are gathered.

    Calibration: c of generated tokens in all layers but the last, from dense passes; m_l is its mean in a layer. The
    model saturates over [s, e), the longest run of layers with m_l above the median; the first and the last layer are
    never in it. Without a run of two layers nothing is skipped and `at` refuses: the model is none for this method.

    Budget: cells are layers by their active weights, so that a skipped FFN saves its share of the layer. `at` goes
    through steps 1 and 2 on the recorded c. It stays in the calibrated range if any k can save enough there after
    warm-up; else ranges that grow from it compete as well, a layer at a time to the neighbour with the larger m_l. Each
    k and range gets the largest theta that saves enough; the one is taken whose tokens would turn least: a token turns
    by sum arccos(c) over the FFNs that it skips, and the mean of the squares counts. On this library's language model
    that ranks 43 settings of two budgets by their loss (rank correlation 0.91 and 0.83); the mean cosine of what is
    skipped does not (0.09 and -0.27), because it does not see that runs pile up in few tokens.

    What is spent differs a little, as a token that skips has other states behind. At a small budget theta may let all
    tokens through: they all skip the same FFNs, nothing is decided any more, and `static` is True.

    Controls save as much a token: `random` skips FFNs of [s, e) by lot, `static` the same ones for every token, those
    with the largest m_l (and one more for a part of the tokens).

    Cost of the decision: a cosine for each FFN that is tested, about 6 D operations, and on an accelerator one wait.

    Departures: neither values nor control flow were available; W, theta and k are proposals, s and e the calibration's.
    More skipped with a longer run k (at the same theta) holds for tokens that stay saturated, not for all: a longer run
    may pass over the test that would have begun the next one.

    State: cosine, float32 (rows, L-1), recorded tokens; mlp, float64 (L,), the FFN's share of a layer; hot, int64 (2,),
    the calibrated s and e. All fields can change without a new fit.

    Args:
        W: generated tokens that run everything.
        s, e: first layer that may skip, and the first behind it that may not; none is as calibrated.
        theta: least cosine; above 1 nothing is skipped.
        k: FFNs skipped after a hit; none is all up to e.

    >>> method = FfnSkipLLM(theta=0.95, k=3)
    >>> method.skipped(torch.full((1, 11), 0.99), s=2, e=10)[0].nonzero().flatten().tolist()
    [3, 4, 5, 7, 8, 9]
    """

    W: int = integer(25, "generated tokens that run everything", low=0)
    s: int | None = integer(None, "first layer that may skip", low=0, optional=True)
    e: int | None = integer(None, "first layer after that which may not", low=0, optional=True)
    theta: float = number(0.95, "least cosine of a token that goes on to skip", low=-1)
    k: int | None = integer(5, "FFNs skipped after a hit, none for all that may", low=1, optional=True)

    def check(self) -> None:
        if self.s is not None and self.e is not None and self.e < self.s:
            raise Error(f"ffn-skipllm: e = {self.e}: must be >= s = {self.s}")

    # ---- the verb

    def before_layer(self, stream: Stream, layer: int) -> None:
        if stream.generated is False or self.theta > 1:
            return
        if stream.common_step is not None and stream.common_step < self.W:
            return
        s, e = self.hot(stream.layers)
        if not s <= layer < e:
            return
        if layer == s:
            until_BN = np.zeros(stream.hidden.shape[:2], np.int64)  # of a few numbers, each operation counts
        else:
            until_BN, tests = stream.memory["ffn-skipllm"]
            if tests:
                c_BN = cosine(*stream.watched_mlp())
                if stream.common_step is None:  # prompt, and generated tokens in warm-up, never hit
                    c_BN = c_BN.masked_fill(stream.step < self.W, -math.inf)
                until_BN = self._after(until_BN, layer - 1, c_BN.cpu().numpy())
        skip_BN = layer < until_BN
        skipped = int(skip_BN.sum())
        tests = skipped < skip_BN.size and layer + 1 < e
        stream.memory["ffn-skipllm"] = until_BN, tests
        if skipped:
            stream.bypass_mlp(torch.from_numpy(skip_BN).to(stream.hidden.device) if skipped < skip_BN.size else True)
        if tests:
            stream.watch_mlp()

    def _after(self, until_R: NDArray[np.int64], layer: int, c_R: NDArray[np.float32]) -> NDArray[np.int64]:
        """Step 2: FFNs of layers below `until` are skipped; who ran this one and hits skips the k behind it."""
        k = 1 << 30 if self.k is None else self.k
        return np.where((until_R <= layer) & (c_R >= self.theta), layer + 1 + k, until_R)

    def hot(self, L: int) -> tuple[int, int]:
        """[s, e) in a model of L layers; the last one is never in it."""
        s, e = self._calibrated("hot").tolist() if self.s is None or self.e is None else (0, 0)
        return s if self.s is None else self.s, min(L - 1, e if self.e is None else self.e)

    def skipped(self, c_RL: Tensor, s: int, e: int) -> Tensor:
        """Which FFNs tokens with these cosines skip, bool (R, L); all tokens after warm-up."""
        until_R, c_LR = np.zeros(len(c_RL), np.int64), c_RL.T.contiguous().numpy()
        out_RL = torch.zeros(c_RL.shape, dtype=torch.bool)
        for layer in range(s, e):
            out_RL[:, layer] = torch.from_numpy(layer < until_R)
            until_R = self._after(until_R, layer, c_LR[layer])
        return out_RL

    @property
    def horizon(self) -> int:
        return 8 * self.W

    # ---- budget

    def at(self, keep: float, shape: Shape) -> Self:
        c_RL, L = self._calibrated("cosine"), shape.layers
        wanted = (1 - keep) * L
        if wanted < 1e-9:
            return self.replace(theta=2.0)
        hot = self._calibrated("hot").tolist()
        if hot[0] == hot[1]:
            raise BudgetError(
                f"keep = {keep:g}: the model does not saturate, no two neighbouring layers have a mean cosine above "
                "the median; ffn-skipllm is not for it"
            )
        mlp, ranges = self._calibrated("mlp").tolist(), _growing(hot[0], hot[1], c_RL.double().mean(0))
        settings = [(k, s, e) for s, e in ranges for k in range(1, e - s)]
        most = [sum(mlp[layer] for layer in range(s, e) if (layer - s) % (k + 1)) for k, s, e in settings]
        if max(most) < wanted - 1e-9:
            least = math.ceil(1000 * (1 - max(most) / L)) / 1000
            raise BudgetError(
                f"keep = {keep:g}: ffn-skipllm keeps at least {least:g}: attention, and the first two FFNs and the last"
            )
        reach = [setting for setting, saves in zip(settings, most) if saves >= wanted - 1e-9]
        inside = [setting for setting in reach if list(setting[1:]) == hot]
        few_RL = c_RL[:: -(-len(c_RL) // _JUDGED)]
        tried = (self.replace(k=k, s=s, e=e)._sparing(wanted, few_RL, L) for k, s, e in inside or reach)
        return min(tried, key=lambda method: method._turned(few_RL, L))._sparing(wanted, c_RL, L)

    def _sparing(self, wanted: float, c_RL: Tensor, L: int) -> Self:
        """With the largest theta that saves so many layers; lowering theta never saves less."""
        thetas = c_RL[:, self.s : self.e].flatten().sort().values
        low, high = 0, len(thetas) - 1
        while low < high:
            middle = (low + high + 1) // 2
            enough = self.replace(theta=float(thetas[middle]))._saves(c_RL, L) >= wanted
            low, high = (middle, high) if enough else (low, middle - 1)
        return self.replace(theta=float(thetas[low]))

    def saved(self, L: int) -> float:
        """Layers that a token saves on average, by the recorded cosines; after warm-up."""
        return self._saves(self._calibrated("cosine"), L)

    def _saves(self, c_RL: Tensor, L: int) -> float:
        skip_RL = self.skipped(c_RL, *self.hot(L))
        return float(skip_RL.double().mean(0) @ self._calibrated("mlp")[:-1])

    def _turned(self, c_RL: Tensor, L: int) -> float:
        """Mean square of the angle, in radians, that tokens turn in the FFNs that they skip."""
        angle_RL = c_RL.double().clamp(-1, 1).arccos()
        return float((angle_RL * self.skipped(c_RL, *self.hot(L))).sum(1).square().mean())

    @property
    def static(self) -> bool:
        """Whether these settings decide nothing: all recorded tokens skip the same FFNs, one at least."""
        c_RL = self._calibrated("cosine")
        skip_RL = self.skipped(c_RL, *self.hot(c_RL.shape[1] + 1))
        return bool(skip_RL[0].any() and (skip_RL == skip_RL[0]).all())

    @property
    def remark(self) -> str:
        return "static: every token skips the same FFNs" if self.state and self.static else ""

    def control(self, kind: str, shape: Shape, seed: int = 0) -> Method:
        if kind not in self.card.controls:
            return super().control(kind, shape, seed)
        (s, e), saved = self.hot(shape.layers), self.saved(shape.layers)
        mlp_L, m_L = self._calibrated("mlp"), self._calibrated("cosine").double().mean(0)
        skip = torch.zeros(shape.layers, dtype=torch.float64)
        if kind == "random" and saved:
            skip[s:e] = saved / mlp_L[s:e].sum()
        elif saved:
            order = s + m_L[s:e].argsort(descending=True, stable=True)
            before = mlp_L[order].cumsum(0) - mlp_L[order]  # what is saved already, layer by layer
            skip[order] = ((saved - before) / mlp_L[order]).clamp(0, 1)
        values: dict[str, Any] = {"skip": tuple(skip.tolist()), "W": self.W, "seed": seed}
        return get("random-ffn")(**values)

    # ---- calibration

    def fit(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **options: object) -> Self:
        """Record the cosines of generated tokens in dense passes.

        Args:
            model: left unchanged.
            batches: keyword arguments of the model's forward; what stands before the first label (-100) is prompt and
                does not count, nor does padding. Without labels every token counts.
        """
        c_RL = saturation(model, batches, _ROWS)
        hot = torch.tensor(_saturated(c_RL.double().mean(0)))
        return self.with_state({"cosine": c_RL, "mlp": mlp_shares(model), "hot": hot})

    def _calibrated(self, name: str) -> Tensor:
        if not self.state:
            raise Error("ffn-skipllm: needs calibration first: method = method.fit(model, batches)")
        return self.state[name]


def _saturated(m_L: Tensor) -> tuple[int, int]:
    """[s, e) of the longest run of layers above the first with a mean above the median; (0, 0) if it is no run."""
    best, start = (0, 1), 1
    above = (m_L > m_L.median()).tolist()
    for layer, high in enumerate([*above, False]):
        if layer and not high:
            best = max(best, (start, layer), key=lambda run: run[1] - run[0])
            start = layer + 1
    return best if best[1] - best[0] > 1 else (0, 0)


def _growing(s: int, e: int, m_L: Tensor) -> list[tuple[int, int]]:
    """[s, e), then one layer more each time, the neighbour with the larger mean; neither the first nor the last."""
    ranges = [(s, e)]
    while s > 1 or e < len(m_L):
        down = s > 1 and (e == len(m_L) or bool(m_L[s - 1] >= m_L[e]))
        s, e = (s - 1, e) if down else (s, e + 1)
        ranges.append((s, e))
    return ranges

"""Route oracle: what every combination of choices at the MLPs would have cost a token, by trying them all as a tree.

Semantics. One token runs all routes; the keys and values before it are those of the dense model, whatever route its
predecessors would have taken. So a route is judged by the loss of the next token alone. (The other meaning, one route
for a whole sequence, takes a pass of the sequence a route and says less about a token.)

A minimum over routes that knows the label is optimistic: it also gains where the label means nothing. Show beside it
the best of a few routes drawn by lot (`best_of`) and the same minimum under labels of other tokens.

Shapes: T tokens, N of them examined, M labels a token, C choices, L layers, R = C^L routes, S = C^l states at layer l,
D hidden, G key/value groups, d head size.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from sparing.engine.attach import _tuned
from sparing.engine.calls import mask_parameter, needed_cache_parameter, split, with_cache
from sparing.engine.surgery import trained_weights
from sparing.engine.view import LayerView, View, evaluating
from sparing.grid.method import Error, Method

#: (layer, x_BND, the layer's own MLP) -> (B, N, D): one choice, in the MLP's place.
Choice = Callable[[LayerView, Tensor, Callable[[Tensor], Tensor]], Tensor]
#: (layer, x_BND) -> (B, N): what a router says of rows, e.g. by how much it prefers choice 0.
Note = Callable[[LayerView, Tensor], Tensor]

MOST = 1 << 16  # routes, whose states and logits are all in memory at the end


# --------------------------------------------------------------------------- routes


def routes(L: int, C: int = 2) -> Tensor:
    """All routes, uint8 (C^L, L): layer l of route r takes digit l of r in base C, the first layer's digit lowest.

    >>> routes(2).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    return torch.stack([torch.arange(C**L) // C**layer % C for layer in range(L)], 1).byte()


def number(route: Sequence[int] | Tensor, C: int = 2) -> int:
    """The row of a route in `routes`.

    >>> number([0, 1, 1])
    6
    """
    return sum(int(c) * C**layer for layer, c in enumerate(route))


def first_choices(L: int, C: int = 2) -> Tensor:
    """How many layers of each route take choice 0, long (R,)."""
    return (routes(L, C) == 0).sum(1)


# --------------------------------------------------------------------------- what the losses say


def by_budget(loss_NR: Tensor, count_R: Tensor) -> Tensor:
    """The oracle: least loss among the routes of each count, (N, largest count + 1); column k are those of count k."""
    columns = [loss_NR[:, count_R == k].amin(1) for k in range(int(count_R.max()) + 1)]
    return torch.stack(columns, 1)


def best_of(loss_NR: Tensor, tries: int) -> Tensor:
    """Least loss of `tries` of the R routes drawn without replacement, on average over all draws, (N,).

    Of the sorted losses the j-th (from 0) is the least one with probability C(R-1-j, tries-1) / C(R, tries).
    """
    R = loss_NR.shape[1]
    if not 1 <= tries <= R:
        raise Error(f"tries = {tries}: must be in 1..{R}, the number of routes")
    chance, left = [], 1.0
    for j in range(R - tries + 1):
        chance.append(left * tries / (R - j))
        left -= chance[-1]
    return loss_NR.double().sort(1).values[:, : len(chance)] @ torch.tensor(chance, dtype=torch.double)


def difficulty(loss_NR: Tensor, base: int) -> Tensor:
    """What a token can gain: loss of route `base` (say, all small) less that of its best route, (N,), never negative.

    A high loss is no difficulty where no route lowers it.
    """
    return loss_NR[:, base] - loss_NR.amin(1)


def walk(noted: Sequence[Tensor], threshold: float) -> Tensor:
    """The route of a router of two choices that takes choice 0 where what it noted exceeds a threshold, long (N,).

    Args:
        noted: of `explore`: for each layer (N, 2^l), a state's column being the number of the route that leads to it.
    """
    at_N = torch.zeros(len(noted[0]), dtype=torch.long)
    for layer, seen_NS in enumerate(noted):
        margin_N = seen_NS.gather(1, at_N[:, None])[:, 0]
        at_N = at_N + (margin_N <= threshold) * 2**layer
    return at_N


# --------------------------------------------------------------------------- trying them


@dataclass
class Explored:
    """Losses of tokens under all routes.

    Attributes:
        loss_NMR: nats of each label, float32 (float64 for a model in that); on the CPU.
        noted: for each layer what `note` said of its states, (N, C^l); empty without.
    """

    loss_NMR: Tensor
    noted: list[Tensor]


@torch.no_grad()
def explore(
    model: nn.Module,
    choices: Sequence[Choice],
    ids_T: Tensor,
    at: Sequence[int],
    *,
    labels_NM: Tensor | None = None,
    note: Note | None = None,
    method: Method | None = None,
    width: int = 64,
    progress: bool = True,
) -> Explored:
    """Run tokens of a text by all routes.

    Routes share their first layers: layer l runs attention on C^l states of the token and each choice on C^l rows, so
    L = 12 layers of two choices cost 8,190 MLP rows a token and not 12 * 4,096. Of the C^l states `width` share a copy
    of the keys before them, each seeing its own key only.

    Args:
        model: a text model; left as it was.
        choices: what may stand in an MLP's place.
        ids_T: the text.
        at: columns of the tokens to examine, each with a token behind it unless labels are given.
        labels_NM: labels to score each token by; default the token behind it.
        note: recorded for every state of every layer.
        method: whose trained weights the model takes on meanwhile.
        width: states that share a copy of the keys.
        progress: show a bar.

    Raises:
        Error: more than 2^16 routes, a layer without an MLP of its own, methods attached, or a column out of range.
    """
    tree = _Tree(model, choices, note, width)
    labels_NM = _labels(ids_T, at, labels_NM)
    device = next(model.parameters()).device
    ids_T = ids_T.to(device)
    losses, noted = [], []
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if method is not None:
            stack.enter_context(_tuned(model, trained_weights(method)))
        keys: Any = DynamicCache()
        tree.view.decoder(input_ids=ids_T[None], use_cache=True, **with_cache(tree.view.decoder, keys))
        tree.past = [(entry.keys, entry.values) for entry in keys.layers]
        stack.enter_context(tree.planted())
        for column, label_M in zip(tqdm(at, desc="routes", disable=not progress), labels_NM, strict=True):
            logits_RV = tree.run(ids_T[column], column)
            losses.append((logits_RV.logsumexp(1) - logits_RV[:, label_M.to(device)].T).cpu())
            noted.append([x.cpu() for x in tree.noted])
    return Explored(torch.stack(losses), [torch.stack(states) for states in zip(*noted)])


def _labels(ids_T: Tensor, at: Sequence[int], labels_NM: Tensor | None) -> Tensor:
    last = len(ids_T) - (2 if labels_NM is None else 1)
    for column in at:
        if not 0 <= column <= last:
            raise Error(f"at = {column}: must be in 0..{last}, for a text of {len(ids_T)} tokens")
    if not at:
        raise Error("at: no tokens to examine")
    if labels_NM is None:
        return ids_T[torch.tensor(at) + 1][:, None]
    if len(labels_NM) != len(at):
        raise Error(f"labels_NM: {len(labels_NM)} rows for {len(at)} tokens")
    return labels_NM


class _Prefix:
    """Stands where a layer looks for its cache: the keys before the token, then those of the states."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self._held = key, value

    def update(self, key_BGNd: Tensor, value_BGNd: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new = key_BGNd, value_BGNd
        key, value = (torch.cat([old.expand(len(x), -1, -1, -1), x], 2) for old, x in zip(self._held, new))
        return key, value


class _Tree:
    """One token on its way through the layers, as many rows as there are routes so far."""

    def __init__(self, model: nn.Module, choices: Sequence[Choice], note: Note | None, width: int) -> None:
        self.model: Any = model
        self.view = View(model)
        self.choices, self.note = choices, note
        lacks = self.view.lacks(("mlp",))
        if lacks is not None:
            raise Error(f"model = {type(model).__name__}: {lacks}")
        C, L = len(choices), len(self.view)
        if C**L > MOST:
            raise Error(f"choices = {C}: make {C}^{L} = {C**L} routes through {L} layers, at most {MOST} can be tried")
        self.width = next(C**power for power in range(L, -1, -1) if C**power <= max(width, 1))
        self.past: list[tuple[Tensor, Tensor]] = []
        self.noted: list[Tensor] = []
        self.column = 0

    def run(self, token: Tensor, column: int) -> Tensor:
        """Logits of the token behind `column` by every route, (R, V), float32 at least."""
        self.column, self.noted = column, []
        ids = token[None, None]
        out = self.model(input_ids=ids, position_ids=torch.full_like(ids, column), use_cache=False)
        logits_RV = out.logits[0]
        return logits_RV if logits_RV.dtype == torch.double else logits_RV.float()

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """The model with layers that branch."""
        with contextlib.ExitStack() as stack:
            for layer in self.view.layers:
                around = {layer.module: self._layer, layer.attention: self._attention, layer.mlp: self._mlp}
                for module, wrapper in around.items():
                    if module is not None:
                        if "forward" in module.__dict__:
                            raise Error(f"model: layer {layer.index} has methods attached; leave their block first")
                        stack.callback(module.__dict__.pop, "forward")
                        module.forward = functools.partial(wrapper, layer, module.forward)
            yield

    def _layer(self, layer: LayerView, forward: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, kwargs = split(forward, args, kwargs)
        return forward(hidden.repeat(1, len(self.choices), 1), **kwargs)

    def _attention(self, layer: LayerView, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """On each state once, for all choices behind it."""
        x, kwargs = split(forward, args, kwargs)
        C, D = len(self.choices), x.shape[-1]
        S = x.shape[1] // C
        m = min(self.width, S)
        start = 0 if layer.sliding is None else max(0, self.column - layer.sliding + 1)
        past = _Prefix(*(held[:, :, start : self.column] for held in self.past[layer.index]))
        seen = torch.cat([x.new_ones(m, self.column - start), torch.eye(m).to(x)], 1).bool()
        kwargs[mask_parameter(forward)] = torch.zeros_like(seen, dtype=x.dtype).masked_fill(
            ~seen, torch.finfo(x.dtype).min
        )[None, None]
        kwargs[needed_cache_parameter(forward)] = past
        out = forward(x[:, :S].reshape(S // m, m, D), **kwargs)
        first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        first = first.reshape(1, S, D).repeat(1, C, 1)
        return first if rest is None else (first, *rest)

    def _mlp(self, layer: LayerView, forward: Any, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.choices), 1)
        if self.note is not None:
            self.noted.append(self.note(layer, parts[0])[0])
        return torch.cat([choice(layer, part, forward) for choice, part in zip(self.choices, parts)], 1)

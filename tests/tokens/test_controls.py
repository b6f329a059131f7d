"""The controls on visual tokens: what stays, layer by layer, for samples with unequal numbers of images."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import sparing
from sparing.engine.schedule import _drawn
from sparing.engine.stream import Stream
from sparing.grid.method import Shape
from sparing.grid.select import evenly
from sparing.testing.models import IMAGE, LAYERS, VISUAL, build, prompt
from sparing.tokens.oracle import OracleTokens
from sparing.tokens.random import RandomTokens
from sparing.tokens.uniform import UniformTokens

SCHEDULE = (1.0, 1.0, 0.5, 0.5, 0.125, 0.0)
KINDS = {"random": RandomTokens, "uniform": UniformTokens, "oracle": OracleTokens}


@functools.cache
def two_and_one() -> dict[str, Tensor]:
    """Two images and text in the first sample, one image in the second, padded on the left."""
    lot = torch.Generator().manual_seed(4)
    text = torch.randint(2, IMAGE - 5, (7,), generator=lot)
    image = torch.full((VISUAL,), IMAGE)
    long = torch.cat([text[:2], image, text[2:3], image, text[3:]])
    short = torch.cat([text[:1], image, text[4:]])
    ids = torch.stack([long, torch.cat([torch.zeros(len(long) - len(short), dtype=torch.long), short])])
    pixels = torch.randn(3, 3, 32, 32, generator=lot)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


def places(method: Any, batch: dict[str, Tensor], oracle: Tensor | None = None) -> list[list[list[int]]]:
    """Per layer and sample, which of the sample's visual tokens run it, counted from 0."""
    model = build("llava")
    image = batch["input_ids"] == IMAGE
    number = image.cumsum(1) - 1
    with torch.no_grad(), sparing.attach(model, method, trace=True) as run:
        run.oracle = oracle
        model(**batch)
    found = []
    for index in run.trace.cells[0].index:
        rows = torch.arange(image.shape[1]).expand(len(image), -1) if index is None else index
        found.append([sorted({int(number[b, i]) for i in rows[b] if image[b, i]}) for b in range(len(image))])
    return found


def one_image(rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    return prompt("llava", (6,) * rows, side="none", seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_follow_the_schedule_of_each_sample(kind: str) -> None:
    truth = torch.rand(2, 2 * VISUAL)
    found = places(KINDS[kind](schedule=SCHEDULE), two_and_one(), truth)
    counts = [[len(sample) for sample in layer] for layer in found]
    assert counts == [[32, 16], [32, 16], [16, 8], [16, 8], [4, 2], [0, 0]]
    for before, after in itertools.pairwise(found):
        assert all(set(b) <= set(a) for a, b in zip(before, after, strict=True))  # who left does not come back


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_is_exactly_as_many_as_asked_for(kind: str) -> None:
    """Also where a sample has fewer visual tokens than another: none of its empty places is chosen."""
    seen: list[tuple[list[int], list[int]]] = []

    class Look(KINDS[kind]):  # type: ignore[misc, name-defined]
        def choose(self, stream: Stream, count_B: Tensor) -> Tensor:
            chosen = super().choose(stream, count_B)
            seen.append((chosen.sum(1).tolist(), count_B.tolist()))
            return chosen

    places(Look(schedule=SCHEDULE), two_and_one(), torch.rand(2, 2 * VISUAL))
    assert seen == [([16, 8], [16, 8]), ([4, 2], [4, 2])]


def test_uniform_keeps_even_steps_of_what_is_alive() -> None:
    found = places(UniformTokens(schedule=SCHEDULE), two_and_one())
    for sample, total in ((0, 32), (1, 16)):
        half = evenly(total, total // 2).nonzero().flatten()
        assert found[2][sample] == half.tolist() == list(range(1, total, 2))
        assert found[4][sample] == half[evenly(total // 2, total // 8)].tolist()
    third = places(UniformTokens(schedule=(1.0, 0.3, 0.3, 0.3, 0.3, 0.3)), one_image())[1][0]
    assert third == [1, 4, 8, 11, 14]  # floor((i + 1/2) 16 / 5), by hand


def test_oracle_keeps_what_the_truth_ranks_first() -> None:
    truth = torch.rand(2, 2 * VISUAL, generator=torch.Generator().manual_seed(8))
    found = places(OracleTokens(schedule=SCHEDULE), two_and_one(), truth)
    for sample, total in ((0, 32), (1, 16)):
        order = truth[sample, :total].argsort(descending=True).tolist()
        assert found[2][sample] == sorted(order[: total // 2])
        assert found[4][sample] == sorted(order[: total // 8])
    level = places(OracleTokens(schedule=SCHEDULE), one_image(), torch.ones(1, VISUAL))
    assert level[2] == [list(range(8))] and level[4] == [[0, 1]]  # equal values keep the lower index
    with pytest.raises(sparing.Error, match="the task set no run"):
        places(OracleTokens(schedule=SCHEDULE), one_image())


def test_random_draws_by_seed_layer_and_place() -> None:
    half = (1.0, 0.5, 0.5, 0.25, 0.25, 0.25)
    draws = [places(RandomTokens(schedule=half, seed=seed), one_image()) for seed in range(40)]
    assert places(RandomTokens(schedule=half), one_image()) == draws[0]  # seed 0 is the default
    assert places(RandomTokens(schedule=half, seed=3), one_image(seed=7)) == draws[3]  # whatever the picture shows
    assert all(a[1] != b[1] for a, b in itertools.combinations(draws, 2))
    often = torch.zeros(2, VISUAL)
    for found in draws:
        often[0, found[1][0]] += 1
        often[1, found[3][0]] += 1
    assert float(often[0].min()) > 8 and float(often[0].max()) < 32  # 20 on average
    assert float(often[1].min()) > 1 and float(often[1].max()) < 22  # 10 on average
    first = places(RandomTokens(schedule=(0.5,) * LAYERS, seed=3), one_image())[0]
    assert first != draws[3][1]  # a layer has a draw of its own
    ranked = [_drawn(seed, layer, VISUAL) for seed in range(40) for layer in range(LAYERS)]
    assert len({tuple(row.tolist()) for row in ranked}) == 40 * LAYERS  # no draw comes twice
    in_batch = places(RandomTokens(schedule=SCHEDULE, seed=3), two_and_one())
    lone = {k: v[1:, 14:] if k != "pixel_values" else v[2:] for k, v in two_and_one().items()}
    assert [layer[1] for layer in in_batch] == [layer[0] for layer in places(RandomTokens(SCHEDULE, 3), lone)]


def test_a_control_takes_the_schedule_of_its_method() -> None:
    shape = Shape(LAYERS, 4, 2, 8, 32, 48, VISUAL)
    fastv = sparing.parse("fastv:K=2,R=0.75")
    for kind, cls in KINDS.items():
        control = fastv.control(kind, shape, seed=5)
        assert control == cls(schedule=(1.0, 1.0, 0.25, 0.25, 0.25, 0.25), **({"seed": 5} if kind == "random" else {}))
        assert cls().at(0.3, shape) == cls(schedule=(0.3,) * LAYERS)
        assert cls(schedule=(0.4,)).shares(shape) == (0.4,) * LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_cards_of_the_controls(kind: str) -> None:
    """What `compare` and the tables read: on visual tokens of the prompt, no publication, nothing to beat."""
    cls: Any = KINDS[kind]
    card = cls.card
    assert cls.name == f"{kind}-tokens" and sparing.get(cls.name) is cls
    assert (card.axis, card.kind, card.phase, card.needs) == ("tokens", "stream", "prefill", "nothing")
    assert card.is_control and card.visual and card.controls == () and not card.trains
    with pytest.raises(sparing.Error, match="works on visual tokens"):
        sparing.attach(build("llama"), cls())

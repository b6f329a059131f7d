"""The controls on experts: each keeps what its own number says, and as many as the method it stands against."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import sparing
from sparing.engine.experts import KeepExperts
from sparing.engine.view import View
from sparing.experts.easy_ep import EasyEp
from sparing.experts.random import RandomExperts
from sparing.testing.models import EXPERTS, LAYERS, build, prompt

KINDS = {"frequency": "count", "gate": "gate"}


def statistics(seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """Scores, counts and gates that rank the experts of every layer in other ways; no layer is like another."""
    lot = torch.Generator().manual_seed(seed)

    def table() -> Tensor:
        rows = [torch.randperm(EXPERTS, generator=lot) + 1.0 for _ in range(LAYERS)]
        return scale * torch.stack(rows).double()

    return {name: table() for name in ("score", "count", "gate")}


def method(M: int | None = 4, even: bool = False, **domains: dict[str, Tensor]) -> EasyEp:
    """EASY-EP with made-up statistics."""
    found = domains or {"text": statistics()}
    state = {f"{domain}.{name}": value for domain, held in found.items() for name, value in held.items()}
    return EasyEp(M=M, even=even, calibration="as-given").with_state(state)


def kept(what: Any, model: Any) -> list[list[int] | None]:
    """Experts of every layer that stay; None where all do."""
    return [None if c is None or c.experts is None else c.experts.tolist() for c in what.plan(model).layers]


def best(table_LE: Tensor, count: int = 4) -> list[list[int]]:
    return [sorted(sorted(range(EXPERTS), key=lambda e: -row[e])[:count]) for row in table_LE.tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_keeps_the_experts_that_its_own_statistic_ranks_first(kind: str) -> None:
    model = build("qwen3-moe")
    control = method().control(kind, sparing.shape(model))
    found = kept(control, model)
    assert found == best(statistics()[KINDS[kind]])
    assert all(found != best(statistics()[other]) for other in statistics() if other != KINDS[kind])
    assert kept(method(), model) == best(statistics()["score"])


@pytest.mark.parametrize("kind", KINDS)
def test_domains_count_alike_and_equal_experts_keep_the_first(kind: str) -> None:
    model = build("qwen3-moe")
    a, b = statistics(1), statistics(2, scale=1000.0)
    name = KINDS[kind]
    control = method(a=a, b=b).control(kind, sparing.shape(model))
    assert kept(control, model) == best(a[name] / a[name].sum(1, True) + b[name] / b[name].sum(1, True))
    level = {key: torch.ones_like(value) for key, value in a.items()}
    assert kept(method(text=level).control(kind, sparing.shape(model)), model) == [[0, 1, 2, 3]] * LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_can_be_calibrated_by_itself(kind: str) -> None:
    """Its statistic over real demonstrations: visits, or gates as the layer uses them."""
    model = build("mixtral")
    data = [prompt("mixtral", (9, 6), seed=s) for s in (5, 6)]
    cls: Any = sparing.get(f"{kind}-experts")
    found = cls(M=4, calibration="as-given").fit(model, data)
    seen = torch.zeros(LAYERS, EXPERTS, dtype=torch.double)
    for layer, block in enumerate(model.model.layers):
        for batch in data:
            given: dict[str, Any] = {}
            hook = block.mlp.experts.register_forward_pre_hook(lambda m, args, to=given: to.update(args=args))
            with torch.no_grad():
                model(**batch)
            hook.remove()
            real = batch["attention_mask"].bool().flatten()
            index, gates = given["args"][1][real], given["args"][2][real].double()
            value = torch.ones_like(gates) if kind == "frequency" else gates
            seen[layer].index_add_(0, index.flatten(), value.flatten())
    torch.testing.assert_close(found.state[f"text.{KINDS[kind]}"], seen)
    assert kept(found, model) == best(seen)


@pytest.mark.parametrize("kind", ["frequency", "gate", "random"])
def test_a_control_spends_what_its_method_spends(kind: str) -> None:
    model = build("deepseek-v3")
    control = method(M=6, even=True).control(kind, sparing.shape(model), 3)
    assert control.fields() == {"M": 6, "even": True, "samples": 25, "calibration": "own-output"} | (
        {"seed": 3} if kind == "random" else {}
    )
    found = kept(control, model)
    assert found[0] is None  # a dense layer
    assert all(len([e for e in row or [] if e < 6]) == 3 == len([e for e in row or [] if e >= 6]) for row in found[1:])
    small, dense = sparing.prune(model, control), build("deepseek-v3")
    assert sparing.shape(small).experts == 6 and sparing.shape(dense).experts == EXPERTS


def test_random_draws_by_seed_and_layer_and_fewer_out_of_more() -> None:
    model = build("qwen3-moe")
    draws = [kept(RandomExperts(M=4, seed=seed), model) for seed in range(60)]
    assert all(len(row or []) == 4 for found in draws for row in found)
    assert kept(RandomExperts(M=4, seed=0), model) == draws[0] == kept(RandomExperts(M=4), model)
    assert all(a != b for a, b in itertools.combinations(draws, 2))
    assert all(len({str(row) for row in found}) > 1 for found in draws)  # layers differ
    more = kept(RandomExperts(M=7, seed=2), model)
    assert all(set(a or []) < set(b or []) for a, b in zip(draws[2], more, strict=True))
    often = torch.zeros(LAYERS, EXPERTS)
    for found in draws:
        for layer, row in enumerate(found):
            often[layer, row] += 1
    assert float(often.sum(0).min()) > 80 and float(often.sum(0).max()) < 160  # 120 on average
    ranked = [RandomExperts(seed=seed).importance(View(model).layers) for seed in range(60)]
    assert len({tuple(row) for table in ranked for row in table.tolist()}) == 60 * LAYERS  # no draw comes twice
    half = kept(RandomExperts(seed=5), model)
    assert all(len(row or []) == EXPERTS // 2 for row in half)


def test_random_refuses_a_model_without_experts() -> None:
    with pytest.raises(sparing.Error, match="works on experts"):
        RandomExperts(M=4).plan(build("llama"))


@pytest.mark.parametrize(
    ("kind", "needs"), [("frequency", "calibration"), ("gate", "calibration"), ("random", "nothing")]
)
def test_cards_of_the_controls(kind: str, needs: str) -> None:
    """What `compare` and the tables read: static cuts that save memory, no publication, nothing to beat themselves."""
    cls = sparing.get(f"{kind}-experts")
    card = cls.card
    assert issubclass(cls, KeepExperts) and cls.name == f"{kind}-experts"
    assert (card.axis, card.kind, card.phase, card.saves) == ("experts", "surgery", "static", "memory")
    assert card.needs == needs
    assert card.is_control and card.controls == () and not card.visual and not card.trains
    if needs == "calibration":
        assert not cls().ready
        with pytest.raises(sparing.Error, match="needs calibration first"):
            sparing.attach(build("qwen3-moe"), cls(M=4))
    else:
        assert cls().ready

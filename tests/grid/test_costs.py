"""Tables of costs: sums by hand, what is measured of whole candidates, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from sparing.grid.costs import CostTable
from sparing.grid.files import parse_json
from sparing.grid.method import Error

NAMES = ("attention.0", "mlp.0", "mlp.1")
LEVELS = ((0.0, 0.1, 0.25), (0.0, 0.3), (0.05, 0.05, 0.2, 0.35))
FACTS = {"kind": "params", "parameters": 4096, "batch": 4, "tokens": 128}
TABLE = CostTable("params", NAMES, LEVELS, rest=0.1, floor=0.12, facts=FACTS)


def test_a_candidate_costs_the_sum_of_its_units_and_the_rest() -> None:
    for genome in itertools.product(range(3), range(2), range(4)):
        by_hand = 0.1 + LEVELS[0][genome[0]] + LEVELS[1][genome[1]] + LEVELS[2][genome[2]]
        assert TABLE.of(genome) == pytest.approx(max(by_hand, 0.12))
        assert TABLE.ratio(genome) == pytest.approx(1 / max(by_hand, 0.12))
    assert TABLE.of((2, 1, 3)) == pytest.approx(1) and TABLE.of((0, 0, 0)) == pytest.approx(0.15)
    assert TABLE.of((1, 0, 0)) == pytest.approx(0.25)


def test_the_floor_was_measured_as_a_whole_and_nothing_is_below_it() -> None:
    assert replace(TABLE, floor=0.4).of((1, 0, 0)) == 0.4
    assert replace(TABLE, rest=-0.2, floor=0.0).of((0, 0, 0)) == 1e-6  # units that sum to more than there is, by noise


@pytest.mark.parametrize("correction", [0.5, 0.9, 1.25])
def test_the_correction_is_on_what_is_saved(correction: float) -> None:
    table = replace(TABLE, correction=correction, floor=0.0)
    assert table.of((2, 1, 3)) == pytest.approx(1)  # dense stays dense
    assert table.of((1, 0, 2)) == pytest.approx(1 - correction * (1 - 0.4))
    assert table.of((0, 1, 3)) == pytest.approx(1 - correction * 0.25)


def test_a_candidate_of_other_length_is_no_candidate() -> None:
    with pytest.raises(ValueError, match="argument"):
        TABLE.of((0, 0))


def test_a_table_goes_through_json_unharmed() -> None:
    table = replace(TABLE, rest=1 / 3, correction=math.pi / 3)
    again = CostTable.from_plain(parse_json(json.dumps(table.plain()), "costs.json"))
    assert again == table
    again.matches(NAMES, [3, 2, 4], FACTS)


@pytest.mark.parametrize(
    ("names", "sizes", "facts", "words"),
    [
        (NAMES[:2], [3, 2], FACTS, "the table has 3 units, .* the search has 2"),
        (("attention.0", "mlp.0", "mlp.2"), [3, 2, 4], FACTS, "'mlp.2'.*profile this model again"),
        (NAMES, [3, 2, 5], FACTS, "or other levels: profile this model again"),
        (NAMES, [3, 2, 4], {**FACTS, "kind": "seconds"}, "measured with kind = 'params', now 'seconds'"),
        (NAMES, [3, 2, 4], {**FACTS, "parameters": 8192}, "measured with parameters = 4096, now 8192"),
        (NAMES, [3, 2, 4], {**FACTS, "tokens": 512}, "measured with tokens = 128, now 512"),
        (NAMES, [3, 2, 4], {**FACTS, "threads": 2}, "measured with threads = None, now 2"),
    ],
)
def test_a_table_of_another_model_or_machine_is_refused(
    names: tuple[str, ...], sizes: list[int], facts: dict[str, Any], words: str
) -> None:
    with pytest.raises(Error, match=words):
        TABLE.matches(names, sizes, facts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"levels": None}, "no table of costs: 'levels' is missing"),
        ({"facts": None}, "'facts' is missing"),
        ({"rest": "much"}, "no table of costs: could not convert string to float: 'much'"),
        ({"rest": [1]}, "no table of costs"),
        ({"rest": math.nan}, "damaged"),
        ({"floor": math.inf}, "damaged"),
        ({"correction": 10**400}, "no table of costs"),
        ({"levels": 3}, "no table of costs"),
        ({"levels": [[0.0, 0.1, 0.25], [0.0, 0.3]]}, "3 names, 2 units: damaged"),
        ({"levels": [[0.0, 0.1, 0.25], [0.3, 0.0], [0.0]]}, "damaged"),  # less for more
        ({"levels": [[0.0, 0.1, 0.25], [-0.3, 0.0], [0.0]]}, "damaged"),
        ({"levels": [[0.0, 0.1, 0.25], [], [0.0]]}, "damaged"),
        ({"levels": [[0.0, 0.1, 0.25], [0.0, math.nan], [0.0]]}, "damaged"),
        ({"kind": "joules"}, "kind = 'joules'"),
        ({"facts": 5}, "no table of costs"),
    ],
)
def test_a_damaged_table_is_refused(changes: dict[str, Any], words: str) -> None:
    data = {k: v for k, v in {**TABLE.plain(), **changes}.items() if v is not None}
    with pytest.raises(Error, match=words):
        CostTable.from_plain(data)

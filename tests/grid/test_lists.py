"""One item where several are meant is a list of it; a string is never its letters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.feature_extraction_utils import BatchFeature

import sparing
from sparing.bench import report, search, sweep
from sparing.bench.models import load_model
from sparing.engine.elastic import units
from sparing.grid.lists import listed
from sparing.testing import cases, check_method
from sparing.testing.models import build, prompt


def test_listed() -> None:
    method = sparing.parse("fastv")
    for one in ("flap", b"flap", Path("flap"), 0.5, math.nan, method, None):
        assert listed(one) == [one] or one is math.nan
    assert listed(("flap", "fastv")) == listed(iter(["flap", "fastv"])) == ["flap", "fastv"]
    assert listed("") == [""] and listed([]) == []


def test_compare_takes_one_method_and_one_budget() -> None:
    options: dict[str, Any] = {"repeats": 0, "limit": 1, "controls": False, "progress": False}
    one, several = (
        sparing.compare("lab:lm", "ppl", methods, keep, **options)
        for methods, keep in (("magnitude-sp", 0.5), (["magnitude-sp"], (0.5,)))
    )
    kept = [[(r["method"], r["keep"], r["status"], r["quality"]) for r in rows] for rows in (one, several)]
    assert kept[0] == kept[1] and kept[0][1][:3] == ("magnitude-sp", 0.5, "ok")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: sparing.compare("lab:lm", "ppl", "flapp", 0.5), "method = 'flapp'.*did you mean flap"),
        (lambda: sparing.compare("lab:lm", "ppl", Path("flapp"), 0.5), "method = 'flapp'"),
        (lambda: sparing.compare("lab:lm", "ppl", "flap", 1.5), "keep = 1.5: must be above 0"),
        (lambda: sparing.compare("lab:lm", "ppl", "flap", "0.5"), "keep = '0.5': must be above 0"),  # type: ignore[arg-type]
        (lambda: sparing.compare("lab:lm", "ppl", [], 0.5), r"methods = \[\]"),
        (lambda: sweep.prepare(load_model("lab:lm"), "ppl", "flapp", 0.5, 64), "method = 'flapp'"),
        (lambda: sweep.prepare(load_model("lab:lm"), "ppl", "flap", 0.5, "64"), "context = '64': must be a whole"),  # type: ignore[arg-type]
        (lambda: sweep.axes("depth=3"), "no axis 'depth'"),
        (lambda: units(build("llama"), "depths"), "axes = 'depths'"),
        (lambda: check_method("uniform-depth", "lama"), "architectures = 'lama'"),
        (lambda: cases("uniform-deep"), "method = 'uniform-deep'"),
        (lambda: cases("uniform-depth", "llama", "bath"), "checks = 'bath'"),
        (lambda: sparing.parse("flap").fit(build("llama"), "text.txt"), "batches = 'text.txt': must be batches"),
        (lambda: sparing.parse("flap").fit(build("llama"), Path("t.txt")), "batches = 't.txt': must be batches"),
    ],
)
def test_a_string_is_one_item_in_what_is_refused(act: Callable[[], Any], words: str) -> None:
    with pytest.raises(sparing.Error, match=words):
        act()


def test_a_sweep_takes_single_numbers() -> None:
    loaded = load_model("lab:lm")
    given = sweep.prepare(loaded, "ppl", "unified-layer-skipping", 0.5, 64, 2).arguments
    listed_ = sweep.prepare(loaded, "ppl", ["unified-layer-skipping"], [0.5], [64], [2]).arguments
    assert given == listed_ and (given["keep"], given["contexts"], given["batches"]) == ([0.5], [64], [2])
    assert sweep.axes("context=8,16") == ([8, 16], [1])


def test_a_search_takes_one_axis(tmp_path: Path) -> None:
    assert units(build("llama"), "depth") == units(build("llama"), ["depth"])
    loaded = load_model(build("llama"))
    rows = [{"input_ids": torch.randint(3, 100, (8, 128))} for _ in range(9)]
    target = search.Target("params", 0.7)
    found = search.Search(loaded, rows, "depth", target, tmp_path / "s", generations=0, progress=False)
    assert {unit.levels for unit in found.elastic.units} == {(0, 2), (0, 48)}
    assert json.loads((tmp_path / "s" / "search.json").read_text())["axes"] == ["depth"]


def test_the_suite_takes_one_check_of_one_architecture() -> None:
    one = cases("uniform-depth", "llama", "batch")
    assert one == cases(["uniform-depth"], ["llama"], ["batch"]) and len(one) == 1


@pytest.mark.parametrize("kind", [dict, BatchFeature])
def test_one_batch_is_a_list_of_it(kind: Any) -> None:
    model, batch = build("llama"), prompt("llama", (9, 9))
    one, several = (sparing.parse("flap").fit(model, given) for given in (kind(batch), [batch]))
    assert one.state and all(torch.equal(one.state[name], tensor) for name, tensor in several.state.items())


def test_several_domains_are_not_one_batch() -> None:
    model, batch = build("qwen3-moe"), prompt("qwen3-moe", (9, 9))
    fitted = sparing.parse("easy-ep:samples=2,calibration=as-given").fit(model, {"one": [batch], "two": [batch]})  # type: ignore[arg-type]
    assert {"one.score", "two.score"} <= fitted.state.keys()


def test_a_report_takes_one_machine_and_a_folder_by_name(tmp_path: Path) -> None:
    rows = sparing.compare("lab:lm", "ppl", "magnitude-sp", 0.5, repeats=0, limit=1, controls=False, progress=False)
    page = report.write(rows, str(tmp_path / "r"), machines="my laptop").read_text()
    assert "on my laptop (" in page and "m; y" not in page
    assert "on my laptop (" in report.markdown(rows, "my laptop")

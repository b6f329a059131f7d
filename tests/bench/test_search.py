"""The search on tiny models, where costs are counted: budgets are met, a resumed search ends the same, models load."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sparing
from sparing.bench import costs, search_report
from sparing.bench import search as searching
from sparing.bench.models import Loaded
from sparing.bench.search import Found, Search, Target, save
from sparing.bench.timing import Ratio
from sparing.engine.elastic import AXES
from sparing.engine.surgery import cut
from sparing.grid.costs import CostTable
from sparing.grid.method import Error
from sparing.grid.search import Stage
from sparing.testing.models import build, prompt

STAGES = (Stage(2, 48), Stage(1, 96))
SITES = ("attention", "mlp", "experts")
DENSE_AXES = ("depth", "width")


def batches(name: str, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    return [prompt(name, (24,) * 4, side="none", seed=seed + i) for i in range(2)]


def searcher(
    out: Path, name: str = "llama", axes: tuple[str, ...] = DENSE_AXES, target: Target | None = None, **options: Any
) -> Search:
    loaded = options.pop("loaded", None) or Loaded(f"tiny {name}", build(name))
    given = {"generations": 3, "offspring": 4, "stages": STAGES, "progress": False} | options
    rows = given.pop("rows", None) or batches(name)
    return Search(loaded, rows, axes, target or Target("params", 0.6), out, **given)


# --------------------------------------------------------------------------- what it finds


@pytest.mark.parametrize(
    ("name", "axes", "target"),
    [
        ("llama", DENSE_AXES, Target("params", 0.6)),
        ("llama", ("width",), Target("params", 0.7)),
        ("llama", DENSE_AXES, Target("flops", 0.55)),
        ("gpt-neox", ("depth",), Target("params", 0.5)),
        ("qwen3-moe", ("experts",), Target("params", 0.8)),
        ("qwen3-moe", ("depth", "experts"), Target("params", 0.4)),
    ],
)
def test_the_target_is_met_and_the_budget_is_used_up(
    tmp_path: Path, name: str, axes: tuple[str, ...], target: Target
) -> None:
    """Cost at most the target, and no unit could be one level higher; the saved model really has that cost."""
    search = searcher(tmp_path / "s", name, axes, target)
    found = search.run()
    assert found.cost <= target.value + 1e-12
    for i, level in enumerate(found.genome):
        if level < search.elastic.dense[i]:
            more = (*found.genome[:i], level + 1, *found.genome[i + 1 :])
            assert search.table.of(more) > target.value, search.elastic.units[i]
    dense = search.model
    if target.kind == "params":
        layers = search.elastic.view.layers
        gone = [layer for layer in layers if not any(found.kept.get(f"{s}.{layer.index}", (0,))[0] for s in SITES)]
        norms = sum(p.numel() for layer in gone for n, p in layer.module.named_parameters() if "norm" in n)
        real = costs.weights(found.model) + norms  # a layer that goes whole takes its norms with it
        assert real / costs.weights(dense) == pytest.approx(found.cost, abs=1e-6)
    assert len(found.history) == 3 and found.ratio is None and found.fitness == found.history[-1] > 0
    assert found.kept == {
        u.name: (u.levels[level], u.levels[-1]) for u, level in zip(search.elastic.units, found.genome)
    }
    assert search.elastic.genome == search.elastic.dense
    # the saved model computes what the candidate computed
    batch = prompt(name, (7, 5))
    with search.elastic, torch.no_grad():
        search.elastic.set(found.genome)
        live = dense(**batch, use_cache=False).logits
    folder = save(search, found, "made up")
    with torch.no_grad():
        loaded = sparing.from_pretrained(folder)(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(loaded[real], live[real], rtol=1e-4, atol=1e-4)
    card = (folder / "README.md").read_text()
    assert f"tiny {name}" in card and str(target) in card and "made up" in card


def test_better_candidates_are_found_than_it_starts_with(tmp_path: Path) -> None:
    search = searcher(tmp_path, target=Target("params", 0.65), generations=4, offspring=8, stages=(Stage(1, 192),))
    with search.elastic:
        starts = search.fitness(search.starts(), 192, 0)
        assert all(search.fits(genome) for genome in search.starts())
        found = search.run()
        assert search.fitness([found.genome], 192, 0)[0] < min(starts)
    assert found.history == sorted(found.history, reverse=True)  # all of the text each time, so the best stays
    assert len(search.starts()) == len(set(search.starts())) >= 2


def test_it_also_starts_from_one_kind_of_unit_alone(tmp_path: Path) -> None:
    """Neurons, or KV groups, at one width and the others whole: either may be what loses least."""
    search = searcher(tmp_path, axes=("width",), target=Target("params", 0.85))
    tops = search.elastic.dense
    levels = {
        site: [[k for k, u in zip(genome, search.elastic.units) if u.site == site] for genome in search.starts()]
        for site in SITES[:2]
    }
    most = {site: [top for top, u in zip(tops, search.elastic.units) if u.site == site] for site in SITES[:2]}
    for site, other in (SITES[:2], SITES[1::-1]):
        alone = [mine for mine, its in zip(levels[site], levels[other]) if its == most[other]]
        assert any(max(mine) - min(mine) <= 1 and mine != most[site] for mine in alone), f"no start cuts {site} alone"
    assert all(map(search.fits, search.starts()))


def test_a_whole_model_is_the_answer_where_nothing_has_to_go(tmp_path: Path) -> None:
    search = searcher(tmp_path, target=Target("params", 1.0), generations=1)
    found = search.run()
    assert found.genome == search.elastic.dense and found.fitness == 0 and found.cost == pytest.approx(1)


def test_no_generation_is_the_best_of_the_starts(tmp_path: Path) -> None:
    search = searcher(tmp_path, generations=0)
    found = search.run()
    assert found.history == [] and math.isfinite(found.fitness) and found.genome in search.starts()
    assert search_report.write(search, found).is_file()
    again = searcher(tmp_path, generations=0, resume=True).run()
    assert (again.genome, again.fitness) == (found.genome, found.fitness)


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    search = searcher(tmp_path)
    found = search.run()
    facts = dict(search_report.facts(search, found))
    assert (
        facts["Target"] == "60% of the params"
        and facts["Model"] == "tiny llama"
        and not {"Measured", "Timed on", "Counted on"} & set(facts)
    )
    assert facts["Loads in"] == "sparing.from_pretrained"
    share = sum(p.numel() for p in found.model.parameters()) / sum(p.numel() for p in search.model.parameters())
    assert facts["Parameters"].startswith(f"{share:.1%} of ")
    assert facts["Parameters"].endswith(", embeddings included")
    page = search_report.write(search, found).read_text()
    for unit in search.elastic.units:
        stays, there = found.kept[unit.name]
        assert (f"{unit.site} {stays} of {there}" if stays else f"{unit.site} gone") in page
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------- interrupted and resumed


class Killed(Exception):
    pass


def kill(patch: pytest.MonkeyPatch, time: int, before: bool) -> None:
    """The process dies at this save, before or after the file is written."""
    real, left = Search._save, [time]

    def save(self: Search, *args: Any) -> None:
        left[0] -= 1
        if not left[0] and before:
            raise Killed
        real(self, *args)
        if not left[0]:
            raise Killed

    patch.setattr(Search, "_save", save)


@pytest.mark.parametrize(("time", "before"), [(1, True), (3, True), (3, False), (5, False)])
@pytest.mark.parametrize("portable", [False, True])
def test_a_resumed_search_ends_like_one_that_was_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time: int, before: bool, portable: bool
) -> None:
    """Killed at one of the four generations, or at the end (the fifth save)."""
    options: dict[str, Any] = {"generations": 4, "portable": portable, "loaded": Loaded("tiny", build("llama"))}
    whole = searcher(tmp_path / "whole", **options).run()
    with monkeypatch.context() as patch:
        kill(patch, time, before)
        with pytest.raises(Killed):
            searcher(tmp_path / "killed", **options).run()
    resumed = searcher(tmp_path / "killed", resume=True, **options)
    evaluated = resumed.fitness.evaluated
    found = resumed.run()
    assert (found.genome, found.history, found.fitness) == (whole.genome, whole.history, whole.fitness)
    states = [json.loads((tmp_path / name / "state.json").read_text()) for name in ("whole", "killed")]
    assert states[0] == states[1] and states[0]["done"]
    assert time < 5 or before or resumed.fitness.evaluated == evaluated  # the end was written: nothing to do


def test_profiling_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = searcher(tmp_path / "a")
    monkeypatch.setattr(costs, "profile", lambda *_, **__: pytest.fail("profiled again"))
    assert searcher(tmp_path / "a", resume=True).table == first.table
    given = CostTable.from_plain(json.loads((tmp_path / "a" / "costs.json").read_text()))
    assert searcher(tmp_path / "b", table=given).table == first.table
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "costs.json").write_bytes((tmp_path / "a" / "costs.json").read_bytes())
    assert searcher(tmp_path / "c").table == first.table


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": Target("params", 0.5)}, "holds another search (target ['params', 0.6], now ['params', 0.5])"),
        ({"seed": 1}, "holds another search (seed 0, now 1)"),
        ({"generations": 5}, "generations 3, now 5"),
        ({"offspring": 6}, "offspring 4, now 6"),
        ({"stages": (Stage(1, 96),)}, "stages [[2, 48], [1, 96]], now [[1, 96]]"),
        ({"axes": ("depth",)}, "axes ['depth', 'width'], now ['depth']"),
        ({"portable": True}, "portable False, now True"),
        ({"data": "b.txt"}, "data '', now 'b.txt'"),
        ({"rows": batches("llama")[:1]}, "tokens 192, now 96"),
        ({"loaded": "other"}, "model 'tiny llama', now 'other'"),
        ({"resume": False}, "holds this search already; pass --resume to go on, or another folder"),
    ],
)
def test_the_folder_of_another_search_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    searcher(tmp_path)
    if "loaded" in changes:
        changes = {"loaded": Loaded(changes["loaded"], build("llama"))}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(Error) as caught:
        searcher(tmp_path, **{"resume": True, **changes})
    assert f"out = '{tmp_path}'" in str(caught.value) and words in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_table_of_another_search_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    table = searcher(tmp_path / "a").table
    for changes, words in (
        ({"target": Target("flops", 0.5)}, "measured with kind = 'params', now 'flops'"),
        ({"axes": ("depth",)}, "or other levels: profile this model again"),
        ({"name": "gpt-neox", "axes": ("depth",)}, "or other levels"),
        ({"rows": [prompt("llama", (30,) * 4, side="none")]}, "measured with tokens = 24, now 30"),
    ):
        with pytest.raises(Error, match=words):
            searcher(tmp_path / "b", table=table, **changes)  # type: ignore[arg-type]
        assert not (tmp_path / "b").exists()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "costs.json").write_text(json.dumps(table.plain()))
    with pytest.raises(Error, match="measured with kind"):
        searcher(tmp_path / "c", target=Target("flops", 0.5))
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["costs.json"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(Error, match="is not empty and holds no search; take another folder"):
        searcher(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(Error, match=r"thesis.txt': cannot be written to \((Not a directory|File exists)\)"):
        searcher(tmp_path / "thesis.txt")


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(key)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("search.json", "{", "what it holds is damaged"),
        ("costs.json", "[]", "must hold a JSON object"),
        ("costs.json", "{}", "costs: no table of costs: 'levels' is missing"),
        ("state.json", "{", "is not JSON"),
        ("state.json", "{}", "state.json: is damaged (KeyError: 'table'); take another folder"),
        ("state.json", _without("search"), "state.json: is damaged (KeyError: 'search')"),
        ("state.json", lambda s: s["search"].update(parents=[[0, 1]]), "state.json: is damaged"),
        ("state.json", lambda s: s["search"].update(parents=[["x"] * 12]), "state.json: is damaged"),
        ("state.json", lambda s: s["search"].update(parents=[[99] * 12]), "state.json: is damaged"),
        ("state.json", lambda s: s["search"].update(random=[3, [1, 2], None]), "state.json: is damaged"),
        ("state.json", lambda s: s.update(table=5), "state.json: is damaged"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, file: str, damage: Any, words: str) -> None:
    searcher(tmp_path, generations=1).run()
    path = tmp_path / file
    if callable(damage):
        state = json.loads(path.read_text())
        damage(state)
        damage = json.dumps(state)
    path.write_text(damage)
    with pytest.raises(Error) as caught:
        searcher(tmp_path, generations=1, resume=True).run()
    assert words in str(caught.value), str(caught.value)


# --------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("speedup", 0.5, "speedup = 0.5: must be at least 1; it is dense seconds over the cut model's"),
        ("speedup", math.nan, "speedup = nan: must be at least 1"),
        ("params", 0.0, r"params = 0: must be in \(0, 1\]; it is the share that stays"),
        ("flops", 1.5, r"flops = 1.5: must be in \(0, 1\]"),
        ("watts", 2, "target = 'watts': must be one of speedup, flops, params"),
    ],
)
def test_wrong_targets(kind: str, value: float, words: str) -> None:
    with pytest.raises(Error, match=words):
        Target(kind, value)


@pytest.mark.parametrize(
    ("name", "axes", "words"),
    [
        ("llama", ("heads",), f"axes = 'heads': must be among {', '.join(AXES)}"),
        ("llama", (), "axes = []: name at least one"),
        ("llama", ("experts",), "axes = 'experts': LlamaForCausalLM has none"),
        ("gpt-neox", ("width",), "axes = 'width': GPTNeoXForCausalLM cannot be cut in width"),
        ("qwen3-moe", ("depth", "width"), "axes = 'width': Qwen3MoeForCausalLM cannot be cut in width"),
    ],
)
def test_wrong_axes(tmp_path: Path, name: str, axes: tuple[str, ...], words: str) -> None:
    with pytest.raises(Error) as caught:
        searcher(tmp_path / "out", name, axes)
    assert words in str(caught.value) and not (tmp_path / "out").exists()


def test_too_little_text_is_said_before_any_work(tmp_path: Path) -> None:
    rows = [prompt("llama", (20, 20), side="none")]
    with pytest.raises(Error, match="calibration data: has 40 tokens, the search evaluates on 96; give more text"):
        searcher(tmp_path / "out", rows=rows)
    with pytest.raises(Error, match="calibration data: has 0 tokens"):
        Search(Loaded("tiny", build("llama")), [], ("depth",), Target("params", 0.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("axes", [("depth",), ("width",), DENSE_AXES])
def test_out_of_reach_says_how_far_it_goes(tmp_path: Path, axes: tuple[str, ...], portable: bool) -> None:
    """And as far as that it goes, in the same folder."""
    with pytest.raises(Error, match=r"params = 0\.001: out of reach on these axes, the least is 0\.\d+,") as caught:
        searcher(tmp_path, axes=axes, target=Target("params", 0.001), portable=portable)
    least = float(str(caught.value).split("the least is ")[1].split(",")[0])
    search = searcher(tmp_path, axes=axes, target=Target("params", least), portable=portable, generations=1)
    found = search.run()
    assert found.cost <= least and any(stays for stays, _ in found.kept.values())
    with pytest.raises(Error, match="out of reach"):
        searcher(tmp_path / "less", axes=axes, target=Target("params", least - 0.0011), portable=portable)


def test_the_largest_speedup_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "profile", _seconds)
    with pytest.raises(Error, match=r"speedup = 99: out of reach on these axes, the largest is \d\.\d\d,") as caught:
        searcher(tmp_path, axes=("depth",), target=Target("speedup", 99))
    largest = float(str(caught.value).split("the largest is ")[1].split(",")[0])
    assert largest == math.floor(100 / (0.1 + 0.9 / 12)) / 100  # a rest of a tenth, and the last sub-layer
    searcher(tmp_path, axes=("depth",), target=Target("speedup", largest))


# --------------------------------------------------------------------------- measured speed-ups


def _seconds(elastic: Any, inputs: Any, kind: str, progress: bool) -> CostTable:
    """Every sub-layer takes as long, a tenth goes elsewhere."""
    levels = tuple(tuple(0.9 / 12 * i / (len(u.levels) - 1) for i in range(len(u.levels))) for u in elastic.units)
    names = tuple(u.name for u in elastic.units)
    return CostTable(kind, names, levels, 0.1, 0.1, facts=costs.facts(kind, elastic.model, inputs))


def _machine(patch: pytest.MonkeyPatch, really: float) -> list[float]:
    """A machine on which cuts save `really` of what the table says; the speed-ups that it measured."""
    seen: list[float] = []

    def measured(dense: Any, small: Any, inputs: Any, pairs: int = 0) -> Ratio:
        left = sum(sum(p is not None and any(True for _ in p.parameters()) for p in (layer.self_attn, layer.mlp))
                   for layer in small.model.layers)  # fmt: skip
        seen.append(1 / (1 - really * (1 - (0.1 + 0.9 / 12 * left))))
        return Ratio(seen[-1], seen[-1], seen[-1], 21, 0.2, 0.2 / seen[-1])

    patch.setattr(costs, "profile", _seconds)
    patch.setattr(searching, "measured", measured)
    return seen


def test_a_table_that_promises_too_much_is_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.6 wanted of cuts that save four fifths of what the table says: at first too slow, then right."""
    seen = _machine(monkeypatch, 0.8)
    search = searcher(tmp_path, axes=("depth",), target=Target("speedup", 1.6), generations=2)
    found = search.run()
    assert len(seen) >= 2 and seen[0] < 1.6 * 0.97
    assert search.table.correction == pytest.approx(0.8, rel=1e-6)
    assert found.ratio is not None and found.ratio.median == seen[-1] >= 1.6 and found.cost <= 1 / 1.6
    facts = dict(search_report.facts(search, found))
    assert facts["Measured"].startswith(f"{seen[-1]:.3f}× prefill") and facts["Target"] == "1.6×"
    assert facts["Timed on"] == "4 × 24 tokens, 1 threads"
    assert searcher(
        tmp_path, axes=("depth",), target=Target("speedup", 1.6), generations=2, resume=True
    ).run().genome == (found.genome)


def test_a_table_that_is_right_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _machine(monkeypatch, 1.0)
    search = searcher(tmp_path, axes=("depth",), target=Target("speedup", 1 / (0.1 + 0.9 / 12 * 7)), generations=2)
    found = search.run()
    assert len(seen) == 1 and search.table.correction == 1 and found.ratio is not None
    assert found.ratio.median == pytest.approx(search.target.value)


@pytest.mark.parametrize("really", [-0.2, 0.0, 0.1])
def test_cuts_that_save_no_time_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, really: float) -> None:
    """Nothing is cut to nothing because the machine is slow: the report says what was missed."""
    seen = _machine(monkeypatch, really)
    found = searcher(tmp_path, axes=("depth",), target=Target("speedup", 1.5), generations=1).run()
    assert len(seen) == 1 and any(stays for stays, _ in found.kept.values()) and found.cost <= 1 / 1.5


# --------------------------------------------------------------------------- portable models


@pytest.mark.parametrize(
    ("name", "axes", "target"),
    [
        ("llama", DENSE_AXES, Target("params", 0.55)),
        ("llama", ("width",), Target("params", 0.7)),
        ("qwen3", DENSE_AXES, Target("flops", 0.6)),
        ("gpt-neox", ("depth",), Target("params", 0.5)),
        ("qwen3-moe", ("depth", "experts"), Target("params", 0.5)),
    ],
)
def test_portable_models_load_with_transformers_alone(
    tmp_path: Path, name: str, axes: tuple[str, ...], target: Target, tokenizer: PreTrainedTokenizerFast
) -> None:
    search = searcher(tmp_path, name, axes, target, portable=True, loaded=Loaded(name, build(name), None, tokenizer))
    found = search.run()
    assert found.cost <= target.value
    layers: dict[str, dict[str, int]] = {}
    for unit, (stays, _) in found.kept.items():
        layers.setdefault(unit.split(".")[1], {})[unit.split(".")[0]] = stays
    stay = [sizes for sizes in layers.values() if any(sizes.values())]
    assert all(sizes == stay[0] and all(sizes.values()) for sizes in stay)  # whole layers go, all others are alike
    assert dict(search_report.facts(search, found))["Loads in"] == "plain transformers"
    folder = save(search, found, "made up")
    plain, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values())
    assert type(plain).__module__.startswith("transformers.")
    batch = prompt(name, (7, 5))
    with torch.no_grad():
        expected = found.model(**batch).logits
        torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        small = cut(search.model, search.elastic.plan(found.genome))
        torch.testing.assert_close(small(**batch).logits, expected)
    assert PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


def test_a_model_of_unlike_layers_can_be_searched(tmp_path: Path) -> None:
    """The first layer has an MLP, the others experts; it may go and come back."""
    search = searcher(
        tmp_path, "deepseek-v3", ("depth", "experts"), Target("params", 0.6), portable=True, generations=4
    )
    found = search.run()
    assert found.cost <= 0.6
    assert all(search.fits(genome) for genome in search.starts())
    facts = dict(search_report.facts(search, found))
    assert facts["Loads in"] in ("plain transformers", "sparing.from_pretrained")
    batch = prompt("deepseek-v3", (7, 5), side="none")
    with torch.no_grad():
        expected = found.model(**batch).logits
        again = sparing.from_pretrained(save(search, found, ""))(**batch).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def test_found_prints_without_its_model() -> None:
    assert "model" not in repr(Found((1,), {}, 0.0, [], None, 1.0, build("llama")))

"""The fit that comes with the library and that `make demo` shows."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import sparing
from sparing.bench import tasks
from sparing.bench.models import load_model
from sparing.tokens.hidrop import HiDrop

ROOT = Path(__file__).parent.parent.parent
FIT = ROOT / "src" / "sparing" / "lab" / "fits" / "hidrop-vlm"


def test_hidrop_is_small_and_holds_what_was_trained_only() -> None:
    fit, model = sparing.load(FIT), load_model("lab:vlm").model
    assert isinstance(fit, HiDrop)
    assert sum(file.stat().st_size for file in FIT.iterdir()) < 4e6
    trained = {
        f"weight.{name}"
        for name, _ in model.named_parameters()
        if "vision_tower" not in name and "embed_tokens" not in name
    }
    assert set(fit.state) == trained
    assert {tensor.dtype for tensor in fit.state.values()} == {torch.bfloat16}
    fit.check_model(model)


def test_hidrop_fitted_keeps_what_the_untrained_loses() -> None:
    loaded = load_model("lab:vlm")
    task, shape = tasks.parse("find-digit", loaded), sparing.shape(loaded.model)
    fit = sparing.load(FIT)
    assert sum(fit.shares(shape)) / shape.layers == 0.25  # type: ignore[attr-defined]
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    right = {}
    for name, method in (("fitted", fit), ("untrained", sparing.get("hidrop")(**fit.fields()))):
        with sparing.attach(loaded.model, method) as run:
            right[name] = task.evaluate(loaded.model, run, 64)
        assert run.trace.share("tokens") == 0.25
    assert right["fitted"] > 0.85 > 0.7 > right["untrained"]
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())


def test_the_demo_shows_it_beside_the_same_schedule_untrained() -> None:
    demo = re.search(r"^demo:.*?\n\n", (ROOT / "Makefile").read_text(), re.DOTALL | re.MULTILINE)
    assert demo is not None
    asked = re.findall(r"--method (\S+)", demo[0])
    assert str(FIT.relative_to(ROOT)) in asked
    untrained = [sparing.parse(spec) for spec in asked if spec.startswith("hidrop")]
    assert [method.fields() for method in untrained] == [sparing.load(FIT).fields()]
    assert untrained[0].fields().items() >= {"filters": (1, 2), "of": 256}.items()
    command = (FIT / "README.md").read_text()
    assert next(spec for spec in asked if spec.startswith("hidrop")) in command

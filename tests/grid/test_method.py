"""Registry, fields, errors, saving."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import sparing


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(sparing.Error, match=r"method = 'hidrp'.*hidrop"):
        sparing.parse("hidrp")


def test_unknown_field_lists_the_fields() -> None:
    with pytest.raises(sparing.Error, match=r"no field 'keep'; its fields are K, R"):
        sparing.parse("fastv:keep=0.5")


@pytest.mark.parametrize("spec", ["fastv:K=0", "fastv:K=two", "fastv:R=1.5", "unified-layer-skipping:rule=odd"])
def test_wrong_value_says_what_is_allowed(spec: str) -> None:
    with pytest.raises(sparing.Error, match="must be"):
        sparing.parse(spec)


def test_parse_reads_tuples_flags_and_none() -> None:
    method = sparing.parse("hidrop:inject=2,filters=3/5,keeps=9/4,of=16,exit=6,compact=true,sharpness=none")
    assert method.fields()["filters"] == (3, 5) and method.fields()["compact"] is True
    assert method.fields()["sharpness"] is None


def test_methods_by_axis() -> None:
    assert "fastv" in sparing.methods("tokens") and "fastv" not in sparing.methods("depth")
    assert all(not c.card.is_control for c in sparing.methods(controls=False).values())
    with pytest.raises(sparing.Error, match=r"axis = 'colour': must be one of depth"):
        sparing.methods("colour")


def test_every_field_is_documented_and_defaults_are_valid() -> None:
    for name, cls in sparing.methods().items():
        cls()
        for value in dataclasses.fields(cls):
            assert value.metadata["doc"] and value.name in (cls.__doc__ or ""), f"{name}.{value.name}"


def test_a_tampered_method_folder_is_refused(tmp_path: Path) -> None:
    sparing.parse("fastv").save(tmp_path)
    file = tmp_path / "method.json"
    with pytest.raises(sparing.Error, match="no fitted method there"):
        sparing.load(tmp_path / "nowhere")
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "fields": {"K": 2, "run": "rm"}}))
    with pytest.raises(sparing.Error, match="no field 'run'"):
        sparing.load(tmp_path)
    file.write_text("{")
    with pytest.raises(sparing.Error, match="not a method file"):
        sparing.load(tmp_path)
    file.write_text(json.dumps(data))
    (tmp_path / "state.safetensors").write_bytes(b"123")
    with pytest.raises(sparing.Error, match="cut off or no safetensors"):
        sparing.load(tmp_path)


def test_methods_never_change() -> None:
    method = sparing.parse("fastv")
    with pytest.raises(AttributeError):
        method.K = 3  # type: ignore[attr-defined]


def test_public_surface() -> None:
    assert sorted(sparing.__all__) == sorted(n for n in dir(sparing) if n in set(sparing.__all__))

"""A portable cut is an ordinary checkpoint: transformers alone loads it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparing
from sparing.engine.checkpoint import not_portable
from sparing.grid.method import parse
from sparing.testing.models import build, prompt

ALONE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/small").eval()
with torch.no_grad():
    logits = model(**load_file(sys.argv[1] + "/batch.safetensors")).logits
save_file({"logits": logits}, sys.argv[1] + "/out.safetensors")
assert not any(name.startswith("sparing") for name in sys.modules)
"""


@pytest.mark.parametrize("text", ["flap", "wanda-sp"])
def test_a_portable_cut_loads_with_nothing_but_transformers(text, tmp_path):
    model, batch = build("llama"), prompt("llama", (7, 5))
    data = [prompt("llama", (9, 9, 9), side="none", seed=s) for s in (1, 2)]
    method = parse(f"{text}:multiple=8").fit(model, data).at(0.6, sparing.shape(model)).portable()
    small = sparing.prune(model, method)
    assert not_portable(small) is None
    sparing.save_pretrained(small, tmp_path / "small")
    save_file(batch, tmp_path / "batch.safetensors")
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True)
    with torch.no_grad():
        expected = small(**batch).logits
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["logits"], expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_portable_says_which_tensor():
    model = build("llama")
    data = [prompt("llama", (9, 9, 9), side="none", seed=s) for s in (1, 2)]
    method = parse("flap:multiple=8").fit(model, data).at(0.6, sparing.shape(model))
    assert "transformers would build" in str(not_portable(sparing.prune(model, method)))

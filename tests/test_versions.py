"""What has to hold under any versions that the ranges admit: `make test-newest` and `make test-oldest` run this file.

Short by design: generation equals recomputation, one method of each kind passes the conformance suite on three
architectures, and the README's ten lines run.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import sparing
from sparing.testing import Case, cases
from sparing.testing.models import build, prompt

README = Path(__file__).parent.parent / "README.md"
KINDS = {  # a method of each kind, and three architectures that it works on
    "unified-layer-skipping": ("llama", "gemma3", "falcon"),
    "fastv": ("llava", "qwen2.5-vl"),
    "flap": ("llama", "phi3", "qwen2.5-vl"),
    "easy-ep": ("qwen3-moe", "mixtral", "deepseek-v3"),
}
CASES = [case for name, architectures in KINDS.items() for case in cases([name], architectures)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt-neox", "bloom", "qwen2.5-vl"])
def test_decoding_equals_recomputation_and_leaves_layers_out(architecture: str) -> None:
    """The method must act: if a cache goes unseen, every step is a prompt and nothing is skipped."""
    model, batch = build(architecture), prompt(architecture, (9, 9), side="none")
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), sparing.attach(model, sparing.parse("unified-layer-skipping:S=3")) as run:
        out = model.generate(**batch, **options)
        assert run.trace.share("depth", phase="decode") == pytest.approx(1 / 3)
        run.prompt = batch["input_ids"].shape[1]
        full = {**batch, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        if "mm_token_type_ids" in batch:
            full["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 5))
        again = model(**full).logits[:, batch["input_ids"].shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), again, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conforms(case: Case) -> None:
    case.run()


def test_routing_acts() -> None:
    from sparing.engine.routing import Routing, RoutingMethod
    from sparing.grid.method import Card

    class One(RoutingMethod):
        name = "one"
        card = Card("one expert a token", 2026, "experts", "routing", "both")

        def route(self, routing: Routing, layer: int) -> None:
            routing.keep(1)

    model: PreTrainedModel = build("qwen3-moe")
    with torch.no_grad(), sparing.attach(model, One()) as run:
        model(**prompt("qwen3-moe"))
    assert run.trace.share("experts") == pytest.approx(1 / 3)


def test_the_ten_lines_of_the_readme() -> None:
    code = re.search(r"```python\n(import torch\nimport sparing\n.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})

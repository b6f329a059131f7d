"""docs/situations.md: what comes of the ways in which people run a model, a method and an architecture at a time.

python tools/situations.py > docs/situations.md
"""

from __future__ import annotations

import sys
import warnings

import torch
import transformers

from sparing.grid.method import get
from sparing.testing.settings import BUDGETS
from sparing.testing.situations import SITUATIONS, outcome
from sparing.testing.suite import Subject

METHODS = ("unified-layer-skipping", "skipdecode", "ffn-skipllm", "first", "fastv", "hidrop")
ARCHITECTURES = ("llama", "qwen3", "gemma3", "llava")
VISUAL = ("fastv", "hidrop")
HEAD = """# Situations

What is prompt and what is generated is defined once (`sparing.engine.prompt`). Each cell is a method at half of its
budget on a tiny random model, held against plain cached generation: the same tokens, or a refusal in the words below.
Written by `tools/situations.py`; the check `situations` of the conformance suite holds every stream method to it.

"""


def main() -> None:
    rows, words = [], {}
    for name in METHODS:
        for architecture in ARCHITECTURES if name not in VISUAL else ("llava", "qwen2.5-vl"):
            own = BUDGETS.get(f"{name} {architecture}", BUDGETS.get(name, {}))
            subject = Subject(get(name), architecture, own)
            method, cells = subject.at("cut"), []
            for situation in SITUATIONS:
                said = outcome(situation, subject.model, method, architecture)
                if said == "equal":
                    cells.append("equal")
                else:
                    text = said.removeprefix("refused: ")
                    cells.append(f"refused [{words.setdefault(text, len(words) + 1)}]")
            rows.append(f"| {name} | {architecture} | " + " | ".join(cells) + " |")
            print(rows[-1], file=sys.stderr)
    print(HEAD + "| method | architecture | " + " | ".join(SITUATIONS) + " |")
    print("|---" * (2 + len(SITUATIONS)) + "|")
    print("\n".join(rows) + "\n")
    for text, number in words.items():
        print(f"[{number}] {text}\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main()

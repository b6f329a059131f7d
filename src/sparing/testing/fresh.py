"""A process that loads folders and writes logits, for the check that saving and loading loses nothing.

Reads one JSON request a line: a folder, and in it a model, a method ("" for none) and batch.safetensors; the method's
module and class, for methods that this library does not bring. Answers with a line.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import sparing
from sparing.grid.method import register


def answer(folder: Path, model_name: str, method_name: str) -> None:
    """Write out.safetensors: the logits of the model in `folder`, with the method if there is one."""
    model = sparing.from_pretrained(folder / model_name).eval()
    batch = load_file(folder / "batch.safetensors")
    with torch.no_grad():
        if method_name:
            with sparing.attach(model, sparing.load(folder / method_name)) as run:
                run.oracle = torch.arange(16) % 3
                logits = model(**batch).logits
        else:
            logits = model(**batch).logits
    save_file({"logits": logits.contiguous()}, folder / "out.safetensors")


def known(module: str, name: str) -> None:
    """Make a method class findable by its name."""
    method = getattr(importlib.import_module(module), name)
    if method.name not in sparing.methods():
        register(method.name, method.card)(method)


def main() -> None:
    """Answer requests until the input ends."""
    torch.set_num_threads(int(sys.argv[1]))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["method"]:
                known(request["module"], request["name"])
            answer(Path(request["folder"]), request["model"], request["method"])
            said: dict[str, object] = {"ok": True}
        except Exception as problem:
            said = {"ok": False, "error": f"{type(problem).__name__}: {problem}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()

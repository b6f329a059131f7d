"""Width: cut a fifth of the heads and neurons away, save the smaller model, load it again."""

import tempfile

import sparing
from sparing.bench import tasks
from sparing.bench.models import load_model

loaded = load_model("lab:lm")
calibration = tasks.parse("ppl", loaded).batches(2)
flap = sparing.parse("flap:p=0.2").fit(loaded.model, calibration)
small = sparing.prune(loaded.model, flap)


def size(model) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"


print("before:", size(loaded.model), "after:", size(small))
with tempfile.TemporaryDirectory() as folder:
    sparing.save_pretrained(small, folder, loaded.tokenizer, {"data": "standard library"})
    again = sparing.from_pretrained(folder)
    print("loaded:", size(again))

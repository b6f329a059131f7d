"""Tokens: drop three quarters of the visual tokens after layer 4, and see what ran."""

import torch

import sparing
from sparing.bench.models import load_model
from sparing.lab.digits import scene

loaded = load_model("lab:vlm")
picture = scene("test", 7)
inputs = loaded.processor(images=picture.image, text=picture.prompt("green"), return_tensors="pt")

with torch.no_grad(), sparing.attach(loaded.model, sparing.parse("fastv:K=4,R=0.75"), trace=True) as run:
    out = loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)

print("the green digit is", loaded.tokenizer.decode(out[0, -1]), "- truth:", picture.answer("green"))
print("rows a layer:", run.trace.cells[0].rows)
print(f"visual-token-layers that ran: {run.trace.share():.0%}, {run.trace.flops / 1e6:.0f} MFLOPs")

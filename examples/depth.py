"""Depth: the prompt at full depth, generated tokens through half of the layers."""

import torch

import sparing
from sparing.bench.models import load_model

loaded = load_model("lab:lm")
inputs = loaded.tokenizer("def read(path):\n    with open(path) as ", return_tensors="pt")
inputs.pop("token_type_ids", None)

for spec in ("unified-layer-skipping:S=1", "unified-layer-skipping:S=2"):
    with torch.no_grad(), sparing.attach(loaded.model, sparing.parse(spec)) as run:
        out = loaded.model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0)
    print(f"--- {spec}: {run.trace.share('depth', 'decode'):.0%} of the layers a generated token")
    print(loaded.tokenizer.decode(out[0]))

"""Experts: keep half of the experts that matter for prose, and see what that costs on prose and on code."""

import sparing
from sparing.bench import tasks
from sparing.bench.models import load_model

loaded = load_model("lab:moe")
prose, code = (tasks.parse(domain, loaded) for domain in ("prose", "code"))
method = sparing.parse("easy-ep:M=8,samples=8,calibration=as-given").fit(loaded.model, prose.batches(1))
small = sparing.prune(loaded.model, method)

for task in (prose, code):
    before, after = (task.evaluate(model, limit=2) for model in (loaded.model, small))
    print(f"{task.name}: {before:.3f} bits per byte with 16 experts a layer, {after:.3f} with 8 kept for prose")

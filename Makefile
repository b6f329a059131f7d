# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv once and reuse it.

PYTHON ?= python3
# A CPU or CUDA build of your choice: make demo TORCH="torch==2.13.0"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo
KEEP_VLM ?= 0.5,0.25,0.2
KEEP_LM ?= 0.8,0.5,0.33
SCENES ?= 150
WINDOWS ?= 16
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-newest test-oldest lock lint format docs contrast breakeven efficiency depth-width search clean

# Exact versions, so that the two commands work on any later day.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# The main job on the embedded models. Finished rows are kept: a second call recomputes nothing.
# HiDrop is shown as it is meant to be used, fitted (at 0.25; the folder's README says how), beside its schedule untrained.
demo: $(VENV)/.ready
	$(BIN)/sparing compare lab:vlm --task find-digit --keep $(KEEP_VLM) --limit $(SCENES) --repeats 7 --out $(OUT)/vlm --resume \
		--method src/sparing/lab/fits/hidrop-vlm --method hidrop:inject=1,filters=1/2,keeps=127/43,of=256,exit=5 \
		--method fastv:K=1
	$(BIN)/sparing compare lab:lm --task ppl --keep $(KEEP_LM) --limit $(WINDOWS) --repeats 7 --out $(OUT)/lm --resume \
		--method unified-layer-skipping --method flap
	$(BIN)/sparing report $(OUT)/vlm $(OUT)/lm --out $(OUT)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto $(ARGS)

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow -n auto $(ARGS)

# The short list of tests/test_versions.py in an environment of its own: what the ranges of pyproject.toml admit, newest
# and oldest, installed as a user would install it.
test-newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet "$(TORCH)"
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager "$(TORCH)" ".[test]"
	.venv-newest/bin/python -m pip install --quiet --force-reinstall --no-deps .
	.venv-newest/bin/python -m pip list 2>/dev/null | grep -iE "^(torch|transformers|accelerate|numpy) "
	.venv-newest/bin/python -m pytest -n auto tests/test_versions.py $(ARGS)

test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	$(PYTHON) tools/lock.py oldest | grep -v "^torch==" > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet "$(TORCH)"
	.venv-oldest/bin/python -m pip install --quiet -r .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --force-reinstall --no-deps .
	.venv-oldest/bin/python -m pytest -n auto tests/test_versions.py $(ARGS)

# constraints.txt anew: the newest versions that the ranges admit today. Run `make test` before committing it.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet "$(TORCH)"
	.venv-lock/bin/python -m pip install --quiet -e ".[dev]"
	$(PYTHON) tools/lock.py freeze .venv-lock/bin/python > constraints.new && mv constraints.new constraints.txt
	rm -rf .venv-lock

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.ready
	$(BIN)/python tools/tables.py

# The validity table of lab:vlm (docs/instrument.md): what random, FastV and the oracle lose, layer by layer.
contrast: $(VENV)/.ready
	$(BIN)/python benchmarks/contrast.py

# The map of docs/results/breakeven.md: from which context length and batch size on three methods are faster than dense.
breakeven: $(VENV)/.ready
	$(BIN)/python benchmarks/breakeven.py

# Realised speed-up of every engine action against its FLOP bound (docs/efficiency.md).
efficiency: $(VENV)/.ready
	$(BIN)/python benchmarks/efficiency.py

# The table of docs/results/depth-width.md: every depth and width method on lab:lm, trained ones after `sparing fit`.
FITTED := first das ftp duo-llm unified-layer-skipping skipdecode fire-together-wire-together lora-depth
SPEC_ftp := ftp:population=12,generations=10
BATCHES ?= 32
depth-width: export OMP_NUM_THREADS := 1
depth-width: $(VENV)/.ready
	$(foreach method,$(FITTED),$(BIN)/sparing fit lab:lm --method $(or $(SPEC_$(method)),$(method)) \
		$(if $(filter fire%,$(method)),,--keep 0.75,0.5) --data lab --batches $(BATCHES) --dtype float32 -o out/fits/$(method) --resume &&) true
	$(BIN)/sparing compare lab:lm --task ppl --keep 0.75,0.5 --dtype float32 --limit 24 --out out/depth-width --resume \
		$(foreach method,$(FITTED),--method out/fits/$(method)) --method ffn-skipllm --method shortgpt \
		--method evopress:offspring=16,tokens=2048/8192,survivors=2/1 --method flap --method wanda-sp --method magnitude-sp
	( printf '# Depth and width on lab:lm\n\nWritten by `make depth-width`; how to read it: '; \
		printf '[depth.md](../depth.md#what-it-gave-on-lablm).\n\n![Loss against speed-up](depth-width.png)\n\n'; \
		cat out/depth-width/report.md ) > docs/results/depth-width.md
	cp out/depth-width/pareto.png docs/results/depth-width.png

# docs/results/search.md: the best cut of lab:lm at 1.5x, against FLAP alone and depth alone.
search: export OMP_NUM_THREADS := 1
search: $(VENV)/.ready
	$(BIN)/sparing search lab:lm --speedup 1.5 --dtype float32 -o out/search/both --resume
	$(BIN)/sparing search lab:lm --speedup 1.5 --dtype float32 --axes depth -o out/search/depth --resume
	$(BIN)/python benchmarks/search_lab.py out/search/both out/search/depth

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest out

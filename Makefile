# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv once and reuse it.

PYTHON ?= python3
# A CPU or CUDA build of your choice: make demo TORCH="torch==2.13.0"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow lint format contrast clean

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py --out $(OUT) $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The validity table of lab:vlm (docs/instrument.md): what random, FastV and the oracle lose, layer by layer.
contrast: $(VENV)/.ready
	$(BIN)/python benchmarks/contrast.py

clean:
	rm -rf $(VENV) out

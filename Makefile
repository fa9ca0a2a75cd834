# The commands of the project. `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and pinned: a plain requirement would fetch the CUDA build, several GB.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/regrow run recipes/demo.yaml --out runs/demo $(DEMO_ARGS)

# The fast suite: under 10 minutes on 2 cores. One thread per worker, or the workers fight for the cores.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu" $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python benchmarks/loss.py --quick
	$(BIN)/python benchmarks/generation.py --quick
	$(BIN)/python benchmarks/criteria.py --width 1280 --untrained

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache

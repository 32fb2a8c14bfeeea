# Two commands set everything up: `make demo` shows it, `make test` checks it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test nginx fuzz bench lint format clean

help:
	@echo "make demo    train ten cities' models, serve them from one process, draw a chart (./demo)"
	@echo "make test    run all tests"
	@echo "make fuzz    send 100,000 damaged artifacts through a registry (half an hour)"
	@echo "make bench   run the benchmarks and rewrite benchmarks/results/"
	@echo "make lint    ruff, mypy --strict"
	@echo "make format  let ruff format the code"
	@echo "make clean   remove what the other targets made"

demo: $(VENV)/.demo
	$(BIN)/modelcache demo

test: $(VENV)/.test nginx
	$(BIN)/python -m pytest --numprocesses auto

# A web server for the tests of HTTPStore, which pip does not bring. Whoever is not root on Debian installs it or sees
# these tests skipped.
nginx:
	@PATH="$$PATH:/usr/sbin"; command -v nginx >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends nginx-light; } \
		>/dev/null 2>&1 || true

fuzz: $(VENV)/.test
	PYTHONPATH=.:tests $(BIN)/python tests/fuzz_artifacts.py

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/budget.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/cold.py
	$(BIN)/python benchmarks/batch.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/isolation.py
	$(BIN)/python benchmarks/many_models.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/over_http.py
	$(BIN)/python benchmarks/readme.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One stamp for each extra, so that a target installs what it needs and no more, once.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "modelcache needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# Every target does its own set-up in .venv; `make` alone explains.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STARTED := $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help quickstart demo test test-slow check format bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

quickstart: $(VENV)/.core ## from nothing to a model that answers questions about images, in some ten minutes
	$(BIN)/python scripts/quickstart.py --started $(STARTED)

demo: $(VENV)/.dev ## ask the quickstart's model in the browser
	$(BIN)/mmpeft demo

test: $(VENV)/.dev ## the whole suite but the slow tests
	$(BIN)/mmpeft prepare
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/.dev ## the slow tests
	$(BIN)/mmpeft prepare
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --dist loadfile

check: $(VENV)/.dev ## ruff, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## our steps and adapters beside peft's, as JSON lines
	$(BIN)/python -m benchmarks training_step adapter_step adapter_forward adapter_joint hot_bank

clean: ## remove the environment and caches, not the runs
	rm -rf $(VENV) .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "mmpeft needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.core

# Every task of the project; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench golden docs test-engines clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv with everything that demo and tests need

$(STAMP): pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints-dev.txt torch
	$(BIN)/python -m pip install -q -c constraints-dev.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup ## Quantize a real small model with every method, measure it, show the table
	$(BIN)/fewbits demo

test: setup ## Run the tests
	$(BIN)/python -m pytest

check: setup ## Formatting, lint, types, layering
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## Run the benchmarks that need no second tool; rows go to bench/results
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/streaming.py
	$(BIN)/python bench/streaming.py --summary
	$(BIN)/python bench/planning.py

golden: setup ## Make the golden bytes anew with the reference libraries
	$(BIN)/python tests/golden/make_golden.py

docs: setup ## Check that every command and example in the documentation runs
	$(BIN)/python -m pytest tests/cli/test_documentation.py

test-engines: setup ## Slower checks against real engines, and of kernels that only compile with Triton
	-$(BIN)/python -m pip install -q --no-deps --target $(VENV)/triton triton
	PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest -m engine tests/engines

clean: ## Remove what setup and tests made
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache

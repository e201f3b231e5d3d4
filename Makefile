# make quickstart | test | lint | setup | clean
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: quickstart test lint setup clean

quickstart: setup
	$(BIN)/python scripts/prepare_quickstart.py
	$(BIN)/python scripts/quickstart.py

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/.installed
	@$(BIN)/python scripts/tiny_models.py

# torch first, with the dependencies that its build on this machine has; the rest exactly as locked.
.venv/.installed: requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("seqkd needs Python 3.11 or newer; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	@echo "installing into .venv (about 4 GB, a few minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) --constraint requirements/cpu.txt torch
	$(PIP) --no-deps --requirement requirements/cpu.txt
	$(PIP) --no-deps --editable .
	@touch $@

clean:
	rm -rf .venv runs

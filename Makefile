# make quickstart | test | check | lint | docs | setup | browser | clean
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: quickstart test check lint docs setup browser clean

quickstart: setup
	$(BIN)/python scripts/prepare_quickstart.py
	$(BIN)/python scripts/quickstart.py

# Two files at a time, each as a whole: half of a test is waiting for processes to start.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: lint docs browser
	$(PYTEST) --durations=20

# For daily work: what starts no actors.
check: lint
	$(PYTEST) tests/unit tests/exact

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.language

# The documentation site, in site/. Needs no network; a broken link or anchor is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A Chromium for the test of the report's page.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; \
	else \
		echo "make test needs a browser: install chromium or google-chrome (Debian, Ubuntu: sudo apt-get install chromium)" >&2; exit 1; \
	fi

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
	rm -rf .venv runs site

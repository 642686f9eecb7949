# make demo    sets everything up and runs the main job: train, then evaluate (needs Python 3.11, 3.12 or 3.13 and pip)
# make check   sets everything up and runs the quick checks: format, lint, types, import rules, unit tests
# make test    sets everything up and runs every check: the same, and all tests
# make lowest  runs the unit tests and trains with the lowest versions that pyproject.toml allows
# make docs    sets everything up and builds the documentation as a site; open site/index.html

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name) 2>/dev/null)))
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
RECIPE ?= ocr.yaml
OUT ?= gdro-out
# As many processes as cores; one that has finished takes over half of what another still has to do.
PYTEST_WORKERS ?= -n logical --maxprocesses 4 --dist worksteal
PYTEST_ARGS ?=

.PHONY: demo check test docs lowest static lint types unit-tests all-tests format
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/gdro train --recipe $(RECIPE) --out $(OUT)
	$(BIN)/gdro eval --recipe $(RECIPE) --out $(OUT)

# mypy takes a core for about a minute when it has no cache; the tests run beside it.
check: $(VENV)/.installed-dev
	$(MAKE) --jobs 2 static unit-tests

test: $(VENV)/.installed-dev
	$(MAKE) --jobs 2 static all-tests

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

LOWEST := VENV=.venv-lowest CONSTRAINTS=.ci/lowest.txt
lowest:
	$(MAKE) .venv-lowest/.installed-dev unit-tests $(LOWEST)
	$(MAKE) all-tests $(LOWEST) PYTEST_ARGS=tests/stages/training/test_main_job.py

static: lint types

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: lint
	$(BIN)/mypy

unit-tests:
	$(BIN)/pytest -m "not slow" $(PYTEST_WORKERS) $(PYTEST_ARGS)

all-tests:
	$(BIN)/pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e ".[dev]"
	touch $(VENV)/.installed $@

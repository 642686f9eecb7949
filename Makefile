# make demo   sets everything up and runs the main job: train, then evaluate (needs Python 3.11 or 3.12 and pip)
# make test   sets everything up and runs every check: format, lint, types, import rules, tests

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name) 2>/dev/null)))
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= ocr.yaml
OUT ?= gdro-out
# As many processes as cores; a file's tests in one of them, so that what they share is made once.
PYTEST_WORKERS ?= -n logical --maxprocesses 4 --dist loadfile
PYTEST_ARGS ?=

.PHONY: demo test format
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/gdro train --recipe $(RECIPE) --out $(OUT)
	$(BIN)/gdro eval --recipe $(RECIPE) --out $(OUT)

test: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $(VENV)/.installed $@

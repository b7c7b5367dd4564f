# Two commands on a fresh machine with Python 3.11 or newer and make:
#   make demo   sets everything up and runs the whole job on built-in data, offline once installed
#   make test   sets everything up with the test tools and checks everything
# and make test-long, about an hour and a half: damages thousands of inputs at random, and kills runs of every verb; its
# results are in tests/fuzz/results.json and tests/kills/results.json

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test test-long lint install clean

demo: $(VENV)/.installed
	$(BIN)/aligncurate demo --out demo

test: lint
	$(BIN)/python -m pytest

test-long: $(VENV)/.installed-test
	$(BIN)/python -m tests.fuzz --cases 10000 --save
	$(BIN)/python -m tests.kills --kills 100 --save
	$(BIN)/python -m tests.support.s3_sweep

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "aligncurate needs Python 3.11 or newer; say which with make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); torch is large, so this takes a few minutes the first time."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); torch is large, so this takes a few minutes the first time."
	$(INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

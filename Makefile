# `make demo`: set up and do the main job. `make test`: the tests. `make check`: what a commit must pass.
# `make fuzz`: the property tests with new random examples, which must be turned into tests where they find something.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test fuzz check lint types setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python tools/demo.py

test: setup
	$(BIN)/python -m pytest

fuzz: setup
	$(BIN)/python -m pytest --hypothesis-profile=fuzz -p no:cacheprovider $$(grep -lr "from hypothesis" tests)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A few honest verbs. `make train` and `make test` do all the set-up they need, on a machine with nothing but Python.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install train test test-all check format clean

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "Colossus needs Python 3.11 or 3.12; %s is %d.%d. Say: make PYTHON=python3.12 $(MAKECMDGOALS)" % ((sys.executable,) + v))'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,test,dev]'
	@touch $@

train: install            ## train the default run: about three minutes, then a sample
	$(BIN)/colossus train

test: install             ## the tests that take minutes
	$(BIN)/python -m pytest -m 'not slow'

test-all: install         ## these, and the slow ones
	$(BIN)/python -m pytest

check: install            ## what a change must pass besides its tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache

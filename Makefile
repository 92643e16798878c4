# Every target makes .venv first where it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test lint format bench study clean

train: $(VENV)/.made
	$(BIN)/python -m mgrpo.train $(ARGS)

test: $(VENV)/.made
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.made
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.made
	$(BIN)/python -m pytest bench $(ARGS)

study: $(VENV)/.made
	$(BIN)/python -m bench.study $(ARGS)

$(VENV)/.made: requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: PYTHON must be 3.11 or newer, got $$($(PYTHON) --version). Try make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

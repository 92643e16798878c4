# Every target makes .venv first where it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
NATIVE := CMakeLists.txt setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)

.PHONY: train test lint format bench study clean

train: $(VENV)/.built
	$(BIN)/python -m mgrpo.train $(ARGS)

test: $(VENV)/.built
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.built
	$(BIN)/python -m pytest bench $(ARGS)

study: $(VENV)/.built
	$(BIN)/python -m bench.study $(ARGS)

$(VENV)/.built: $(VENV)/.made $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.made: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: PYTHON must be 3.11 or newer, got $$($(PYTHON) --version). Try make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info mgrpo_kernels/*.so

# Every target first makes .venv if it is missing or older than its sources.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
NATIVE := CMakeLists.txt setup.py mgrpo_kernels/_sources.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*)

.PHONY: train test test-scale chaos-scale test-vllm test-verl chaos chaos-full lint format bench bench-peers fuzz emulate old-cpus sanitize gpu study nightly clean

train: $(VENV)/.built
	$(BIN)/python -m mgrpo.train $(ARGS)

# In random order, whose seed is printed: ARGS='-p no:randomly' takes the written order, ARGS='--randomly-seed=N'
# repeats one.
test: $(VENV)/.built
	$(BIN)/python -m pytest $(ARGS)

# Real vLLM on the CPU, in a separate environment, with the library built in .venv.
VLLM := .venv-vllm
test-vllm: $(VENV)/.built $(VLLM)/.made
	PYTHONPATH=. VLLM_LOGGING_LEVEL=ERROR $(VLLM)/bin/python -m pytest tests/hosts/vllm $(ARGS)

$(VLLM)/.made: requirements.txt requirements-vllm.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --requirement requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm.txt
	@touch $@

# Stock verl with the plug-in on the CPU, in a separate environment, where the plug-in is found like an installed one.
VERL := .venv-verl
test-verl: $(VENV)/.built $(VERL)/.made
	$(VERL)/bin/python -m pytest tests/hosts/verl $(ARGS)

$(VERL)/.made: requirements-verl.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VERL)
	$(VERL)/bin/python -m pip install --quiet --no-deps --requirement requirements-verl.txt
	MGRPO_SKIP_NATIVE=1 $(VERL)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Runs of several processes: steps, checkpoints, launcher; chaos-scale injects their faults, in full.
test-scale: $(VENV)/.built
	$(BIN)/python -m pytest tests/mgrpo/distributed -m "not fault" $(ARGS)

chaos-scale: $(VENV)/.built
	$(BIN)/python -m pytest tests/mgrpo/distributed -m fault --fault-table --full $(ARGS)

# Injects every fault that a run must survive, with one line for each. chaos-full adds tests that take minutes.
chaos: $(VENV)/.built
	$(BIN)/python -m pytest tests -m fault --fault-table $(ARGS)

chaos-full: $(VENV)/.built
	$(BIN)/python -m pytest tests -m fault --fault-table --full $(ARGS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.built
	$(BIN)/python -m pytest bench $(ARGS)

# Benchmarks the kernels against other libraries, which it installs; writes bench/records and bench/RECORDS.md.
bench-peers: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-bench.txt
	$(BIN)/python -m pytest bench --record $(ARGS)
	$(BIN)/python -m bench.records

# The property tests on new examples: ROUNDS rounds on each instruction set in turn.
ROUNDS ?= 6
fuzz: $(VENV)/.built
	for round in $$(seq $(ROUNDS)); do for isa in portable avx2 avx512; do \
		MGRPO_CPU_ISA=$$isa HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -q -m hypothesis $(ARGS) || exit 1; \
	done; done

# The property tests on processors without AVX-512 and without AVX, by qemu's emulation of them (qemu-user-static).
QEMU ?= qemu-x86_64-static
old-cpus: $(VENV)/.built
	for cpu in Nehalem Haswell; do \
		OMP_NUM_THREADS=1 $(QEMU) -cpu $$cpu $(BIN)/python -m pytest -q -m hypothesis tests/kernels -k "not triton" || exit 1; \
	done

# The kernels' tests on a library built with the address and undefined-behaviour sanitizers, in a copy of the package.
SANITIZED := build/sanitized
sanitize: $(VENV)/.built
	mkdir -p $(SANITIZED)/package
	cp -r mgrpo_kernels $(SANITIZED)/package/ && rm -f $(SANITIZED)/package/mgrpo_kernels/*.so
	$(BIN)/cmake -S . -B $(SANITIZED)/cmake -DMGRPO_SANITIZE=address,undefined -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath $(SANITIZED)/package/mgrpo_kernels)
	$(BIN)/cmake --build $(SANITIZED)/cmake --parallel
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 MGRPO_SANITIZED=1 \
		PYTHONPATH=$(SANITIZED)/package $(BIN)/python -P -m pytest tests/kernels -m "not slow" -k "not instruction_set" $(ARGS)

# The kernels' tests on the CUDA sources, emulated on the CPU with one thread at a time.
EMULATED := build/emulated
emulate: $(VENV)/.built
	mkdir -p $(EMULATED)/package
	cp -r mgrpo_kernels $(EMULATED)/package/ && rm -f $(EMULATED)/package/mgrpo_kernels/*.so
	$(BIN)/cmake -S . -B $(EMULATED)/cmake -DMGRPO_EMULATE=ON \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath $(EMULATED)/package/mgrpo_kernels)
	$(BIN)/cmake --build $(EMULATED)/cmake --parallel
	PYTHONPATH=$(EMULATED)/package $(BIN)/python -P -m pytest $(EMULATED_TESTS) \
		tests/kernels/test_cuda.py::test_rows_that_threads_take_in_several_batches -p no:cacheprovider \
		-k "not triton and not reference and not instruction_set and not thread_count and not 2_31 and not large-" $(ARGS)
EMULATED_TESTS := $(addprefix tests/kernels/test_, group_advantage.py trajectory_entropy.py iqr_filter.py \
	majority_vote.py ema_update.py token_logprob.py grpo_loss.py grpo_loss_cpu.py logits_grpo_loss.py on_device.py)

# All checks that need a GPU, in under nine minutes and offline, with the machine's own Python; see bench/gpu/.
gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

# What takes too long for every change; docs/NIGHTLY.md keeps the last result with its commit.
nightly: $(VENV)/.built
	$(BIN)/python -m bench.nightly $(ARGS)

study: $(VENV)/.built
	$(BIN)/python -m bench.studies.stability $(ARGS)

$(VENV)/.built: $(VENV)/.made $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.made: requirements.txt requirements-openrlhf.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: PYTHON must be 3.11 or newer, got $$($(PYTHON) --version). Try make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-openrlhf.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(VERL) build dist *.egg-info mgrpo_kernels/*.so

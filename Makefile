# mcore: everything a fresh machine needs is python3.12 (or newer) and make.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	&& { command -v $$p; break; }; done)
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
PACKAGES := -e . $(addprefix -e ,$(PLUGINS))
TEST_WORKERS ?= 2
BENCHMARKS := startup overhead head packing tokenizing
export UV_COMPILE_BYTECODE := 1
export UV_LINK_MODE := copy
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE
# uv does not read pip's variables: hand a mirror over
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test parity grid slow test-gpu lint format docs bench lock clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## make .venv with the locked dependencies and the packages, editable

$(VENV)/.ready: requirements.lock pyproject.toml $(wildcard plugins/*/pyproject.toml)
	@if [ -z "$(PYTHON)" ]; then \
		echo "mcore needs Python 3.12 or newer, and none was found on PATH." >&2; \
		echo "  fix: apt install python3.12 python3.12-venv, or pyenv install 3.12, then run make again" >&2; \
		echo "  or name one: make PYTHON=/path/to/python3.12" >&2; exit 2; fi
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $(VENV)
	@[ -x $(BIN)/uv ] || $(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps $(PACKAGES)
	@touch $@

quickstart: setup  ## make a small model, fine-tune it, and measure it before and after
	$(BIN)/python examples/quickstart/run.py

test: setup  ## every test that is quick and needs no GPU
	$(BIN)/python -m pytest tests -m "not parity and not grid and not slow and not gpu" \
		-n $(TEST_WORKERS) --dist loadfile

parity: setup  ## every layout against one rank, the default ones included
	$(BIN)/python -m pytest tests/parity -m "not gpu and not grid"

grid: setup  ## every recipe x architecture x layout (an hour, goes on where it stopped); writes docs/reference/layouts.md
	MCORE_GRID=$(CURDIR)/.grid.jsonl MCORE_GRID_RESUME=1 $(BIN)/python -m pytest tests/parity/test_grid.py
	$(BIN)/python tests/parity/grid_table.py .grid.jsonl docs/reference/layouts.md

slow: setup  ## real models, the quickstart, training killed and resumed
	$(BIN)/python -m pytest tests -m slow --timeout 1800

test-gpu: setup  ## what needs a CUDA device
	$(BIN)/python -m pytest tests -m gpu --timeout 1800

lint: setup  ## ruff, mypy --strict, and the layers of the architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## generate docs/reference/options.md anew
	$(BIN)/python -m mcore_core.cli.options_doc docs/reference/options.md

bench: setup  ## measure what docs/benchmarks.md reports for the CPU
	@set -e; for name in $(BENCHMARKS); do echo "== bench/$$name.py"; $(BIN)/python bench/$$name.py; done

lock: setup  ## resolve requirements.lock anew from every pyproject.toml
	$(BIN)/uv pip compile --generate-hashes --python-version 3.12 --group dev pyproject.toml \
		$(addsuffix /pyproject.toml,$(PLUGINS)) -o requirements.lock \
		$(addprefix --no-emit-package ,$(shell sed -n 's/^name = "\(mcore-.*\)"/\1/p' pyproject.toml $(addsuffix /pyproject.toml,$(PLUGINS)))) \
		--no-emit-index-url

clean:  ## remove what was built and run here, .venv included
	rm -rf $(VENV) runs mcore_output .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

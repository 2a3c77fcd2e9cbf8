# mcore: everything a fresh machine needs is python3.12 (or newer) and make.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	&& { command -v $$p; break; }; done)
PACKAGES := -e . -e plugins/mcore_sft -e plugins/mcore_bridge -e plugins/mcore_rlhf -e plugins/mcore_moe -e plugins/mcore_rewards
export UV_COMPILE_BYTECODE := 1
export UV_LINK_MODE := copy
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test parity slow test-gpu lint format docs bench lock clean

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

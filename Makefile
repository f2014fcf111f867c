# make run    the main job on a fresh machine: environment, install, text from the built-in model on the CPU
# make test   environment, install, the tests that need no GPU
# make check  what CI runs: format, lint, types, then every CPU test with the slow ones
#
# Needs Python 3.11 or later with pip; everything else is installed into .venv. Stamps inside .venv remember what
# was installed, so deleting .venv starts over.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
PROMPT ?= def fibonacci(n):
LOWEST := .venv-lowest
NEWEST := .venv-newest
HOPPER_CASES := 64-causal or 128-causal or 128-packed or 256-causal or anew
MEETS_TRANSFORMERS := tests/models tests/cache/test_static.py tests/engine/test_runner.py tests/engine/test_step.py

.PHONY: run test test-interpreter test-lowest test-newest check lint format clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -3

$(VENV)/pyvenv.cfg:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"hasten needs Python 3.11 or later, this is {sys.version.split()[0]}; run: make PYTHON=/path/to/python3.11"'
	$(PYTHON) -m venv $(VENV)

# torch goes in first and alone, by its exact version: a later step finds it there and cannot pull another build
$(VENV)/.torch: $(VENV)/pyvenv.cfg constraints.txt
	$(PIP) install -c constraints.txt torch
	touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e .
	touch $@

# a CUDA build of torch brought its own triton; a CPU build gets the one whose interpreter and compiler we test with
$(VENV)/.dev: $(VENV)/.core
	triton=$$($(BIN)/python -c 'import torch; print("" if torch.version.cuda or torch.version.hip else "triton==3.6.0")') \
	  && $(PIP) install -c constraints.txt -e '.[dev,bench]' $$triton
	touch $@

$(LOWEST)/.dev: $(VENV)/.dev
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt torch
	grep -vE '^(transformers|huggingface[-_]hub|hf-xet|httpx2?|httpcore2?|truststore)==' constraints.txt > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install -q -c $(LOWEST)/constraints.txt -e '.[dev]' transformers==5.17.0
	touch $@

# only triton: it stands before .venv on the path, whose torch and tools serve here too
$(NEWEST)/.dev: $(VENV)/.dev
	rm -rf $(NEWEST)
	$(PIP) install -q --no-deps --target $(NEWEST) triton==3.9.0
	touch $@

run: $(VENV)/.core
	$(BIN)/hasten generate --prompt '$(PROMPT)' --max-tokens 64

test: $(VENV)/.dev
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m 'interpreter and not slow'

# the interpreter replaces triton's compiler when triton is imported, so its tests need a process of their own
test-interpreter: $(VENV)/.dev
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# the lowest transformers that pyproject.toml allows, under what meets it
test-lowest: $(LOWEST)/.dev
	$(LOWEST)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal $(MEETS_TRANSFORMERS)

# some of the kernels for Hopper, forward and backward, by the triton that the newest torch brings
test-newest: $(NEWEST)/.dev
	PYTHONPATH=$(NEWEST) $(PYTEST) tests/ops/hopper -m compiler -k '$(HOPPER_CASES)'

check: lint test-interpreter test-lowest test-newest
	$(PYTEST) -m ''

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

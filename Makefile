# mmada: `make quickstart` trains a small model, `make test` runs every test, `make check` reads the code.
# The environment lives in .venv/: made when missing, and used as it is while pyproject.toml and
# constraints.txt stay the same.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
NAME ?= quickstart-$(shell date +%m%d-%H%M%S)
# Test files at a time: a test of a whole run mostly waits for processes to start.
JOBS ?= 2

# Without .pyc files every start of every worker compiles the whole stack anew.
unexport PYTHONDONTWRITEBYTECODE

PINS := $(shell cat pyproject.toml constraints.txt | sha256sum | cut -c 1-16)
INSTALLED := .venv/.installed-$(PINS)

.PHONY: help install quickstart test check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make or renew the environment in .venv/ and nothing else
	@echo "the environment in .venv/ is what pyproject.toml and constraints.txt say"

quickstart: $(INSTALLED) ## train a small mixture-of-experts model on real text (NAME=... names the run)
	@.venv/bin/mmada train jobs/recipes/quickstart.yaml run.name=$(NAME)

test: $(INSTALLED) ## run every test (ARGS="tests/jobs -k plan" for some, JOBS=1 for one file after the other)
	@.venv/bin/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(INSTALLED) ## ruff (lint and format) and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

clean: ## remove the environment and every cache; runs/ stays
	@rm -rf .venv build ./*.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find cluster jobs mmada tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED):
	@command -v $(PYTHON) > /dev/null || \
	  { echo "$(PYTHON) is not installed; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || \
	  { echo "$(PYTHON) is older than 3.11 or does not start; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@command -v cc > /dev/null || command -v gcc > /dev/null || \
	  { echo "no C compiler (cc) was found, which one of the packages is built with; install gcc or clang" >&2; exit 1; }
	@echo "installing into .venv (about three minutes, once)"
	@mkdir -p .venv && rm -f .venv/.installed-*
	@{ $(PYTHON) -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ".[test,dev]"; } \
	  > .venv/install.log 2>&1 || \
	  { grep -v "is ignored" .venv/install.log >&2; \
	    echo "the installation failed; all of it is in .venv/install.log" >&2; exit 1; }
	@touch $@

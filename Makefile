# Every target makes .venv first if it is missing or older than the lists of dependencies.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
MINUTES ?= 1
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
BIN := .venv/bin
STAMP := .venv/.installed
# Minutes of a soak that is asked for by name, without MINUTES.
long = $(if $(and $(filter file,$(origin MINUTES)),$(filter $@,$(MAKECMDGOALS))),20,$(MINUTES))
SOAKS := $(shell sed -n 's/^\(soak-[a-z0-9-]*\):.*/\1/p' Makefile)

.PHONY: demo test check fix bench soak $(SOAKS) clean

demo: $(STAMP)  ## the trained model writes text over two rank processes
	$(BIN)/drumline generate --model demo -dp 2 --enable-expert-parallel \
	    --prompt 'The "with" statement is used to' \
	    --prompt 'If the file does not exist,' \
	    --prompt $$'import os\n\n\nclass' \
	    --max-tokens 96 --temperature 0.7 --top-p 0.9 --seed 3

test: $(STAMP)  ## a process for each core, at most 4
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: $(STAMP)  ## only looks
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fix: $(STAMP)  ## repairs what can be repaired
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	$(BIN)/drumline bench scheduler
	$(BIN)/python -m tests.unit.protocol.measure
	$(BIN)/python -m tests.benchmarks.idle --data-parallel-size 2
	$(BIN)/python -m tests.benchmarks.collectives
	$(BIN)/python -m tests.benchmarks.journal
	$(BIN)/python -m tests.benchmarks.planner_disturbance

soak: $(SOAKS)  ## each soak-* target for MINUTES

soak-sim: $(STAMP)  ## 20 minutes when called alone
	$(BIN)/python -m tests.simulation.soak --minutes $(long)

soak-faults: $(STAMP)  ## 20 minutes when called alone
	$(BIN)/python -m tests.faults.soak --minutes $(long)

soak-layouts: $(STAMP)  ## every model in every layout once, whatever MINUTES says
	DRUMLINE_EVERY_LAYOUT=1 $(BIN)/python -m pytest tests/parity/test_layouts.py tests/parity/test_rebalanced_text.py
	$(BIN)/python -m tests.parity.soak_layouts

soak-stateless: $(STAMP)  ## at least 200,000 calls, whatever MINUTES says
	$(BIN)/python -m tests.unit.protocol.soak_stateless --operations 100000 --minutes $(MINUTES)

soak-rpc: $(STAMP)
	$(BIN)/python -m tests.simulation.rank_calls --minutes $(MINUTES)

soak-chaos: $(STAMP)  ## 20 minutes when called alone; random faults on a real engine under load
	$(BIN)/drumline chaos --minutes $(long) --seed $(or $(SEED),0)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("drumline needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (torch is large; this takes some minutes once)"
	@$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	    | sed -un -E 's/^(Collecting|Downloading|Building|Installing)([^(]*).*/  \1\2/p'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find engine workers protocol tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

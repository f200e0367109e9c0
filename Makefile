# Every target can be called on a bare machine: what it needs, it makes first. `make` alone says what there is.

VENV        ?= .venv
BACKEND     ?= auto
PYTHON      ?= python3
PYTEST_ARGS ?=
BENCH_ARGS  ?=

# Tests without an engine wait about as much as they compute: one process more than there are cores.
PROCESSES   ?= $(shell expr $$(nproc) + 1)

BIN     := $(VENV)/bin
INSTALL := $(PYTHON) packaging/install --venv $(VENV) --backend $(BACKEND)

.DEFAULT_GOAL := help
.PHONY: help setup dev demo faults test test-again check lint types unit-verify format bench deb lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  BACKEND=cpu|cuda picks the build of vLLM (default: what the machine has); VENV=DIR the place;"
	@echo "  PYTEST_ARGS='-k word' goes to pytest, BENCH_ARGS='--rounds 5' to the bench; LLM_SERVE_REPEAT=10 repeats faults."

setup: ## make the environment (.venv) from the locks; a second run ends at once
	@$(INSTALL)

dev: ## as setup, with what tests and checks need
	@$(INSTALL) --dev

demo: setup ## serve the embedded model on 127.0.0.1:8000, on the CPU or the GPU
	@$(BIN)/llm-serve demo

faults: dev ## hurt real engines in every way of the fault matrix, and print a table of figures (25 min.)
	@packaging/test-tools
	@$(BIN)/python -m pytest tests/faults tests/system/test_recovery.py $(PYTEST_ARGS)

# Daemons and booted machines have the cores for themselves; the rest runs side by side before. 5 is pytest's word for
# nothing picked, as by `-k word` in one of the two.
QUICK   := tests/unit tests/contract
ENGINES := tests/e2e tests/system
PYTEST  := $(BIN)/python -m pytest --ignore=tests/faults

test: dev ## run all tests but the faults (as root it first installs the programs that some of them need)
	@packaging/test-tools
	@$(PYTEST) $(ENGINES:%=--ignore=%) -n $(PROCESSES) --dist loadfile $(PYTEST_ARGS); quick=$$?; \
	$(PYTEST) $(QUICK:%=--ignore=%) $(PYTEST_ARGS); slow=$$?; \
	case $$quick-$$slow in 0-0 | 0-5 | 5-0) ;; *) exit 1 ;; esac

test-again: dev ## run what failed in the last `make test` once more, one after the other
	@$(PYTEST) --last-failed --last-failed-no-failures=none $(PYTEST_ARGS)

check: lint types test unit-verify ## everything that must hold: lint, strict types, tests, units

lint: dev ## ruff: every rule that is on, and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: dev ## mypy, strict
	@$(BIN)/mypy
	@$(BIN)/mypy --scripts-are-modules packaging/install packaging/lock packaging/man packaging/setup packaging/grafana/make-dashboard

unit-verify: ## systemd-analyze verify of the shipped units
	@packaging/verify-units

format: dev ## let ruff rewrite the layout
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: dev ## measure against vLLM's own server: start, load, memory, idle CPU, recovery (25 min.)
	@$(BIN)/python -m tests.bench.bench_decode $(BENCH_ARGS)
	@$(BIN)/python -m tests.bench.bench_serve $(BENCH_ARGS)
	@$(BIN)/python -m tests.bench.bench_survivor $(BENCH_ARGS)
	@$(BIN)/python -m tests.bench.bench_front_end $(BENCH_ARGS)
	@$(BIN)/python -m tests.bench.bench_recovery $(BENCH_ARGS)

deb: setup ## build the Debian package in dist/, with debhelper
	@packaging/test-tools dh
	@packaging/deb --python $(BIN)/python

lock: dev ## resolve the locks anew (packaging/locks/README.md)
	@$(BIN)/python packaging/lock --uv $(BIN)/uv

clean: ## remove the environment and every cache of the source tree; the demo's model stays
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

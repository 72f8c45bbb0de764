# The two commands of a newcomer are `make run` and `make test`; both begin with what `make setup` does.

SHELL := /bin/bash
BIN := .venv/bin
# More than cores: tests of real VMs wait half of their time.
WORKERS ?= 6
# How many mutants of each package are tried, and which; 0 is all of them.
MUTANTS ?= 300
SEED ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup run check docs test test-long coverage mutants lock package

help:
	@echo 'make run         set up what is missing, then serve on loopback with a demo VM; Ctrl-C ends the server'
	@echo 'make check       set up what is missing, then lint, format, types and imports: seconds, for the inner loop'
	@echo 'make docs        draw the pages of docs/ that are made from the program'
	@echo 'make test        set up what is missing, then make check and the tests: before every commit'
	@echo 'make test-long   the same with long walks, kill rounds, load and proofs: every night'
	@echo 'make coverage    the tests of make test, then which lines and branches none of them reached'
	@echo 'make mutants     change one expression at a time, and see which changes no test notices; MUTANTS=300 SEED=1'
	@echo 'make setup       set up what is missing; after it $(BIN)/interlock works'
	@echo 'make package     make dist/: wheel, sdist, Containerfile and systemd units'
	@echo 'make lock        resolve the dependencies of pyproject.toml anew into requirements.lock'

setup:
	@setup/setup.sh

run: setup
	@exec $(BIN)/interlock demo

check: setup
	@setup/stages.sh check

docs: setup
	@$(BIN)/python tools/draw_docs.py

test: setup
	@setup/stages.sh test $(WORKERS)

test-long: setup
	@setup/stages.sh test-long $(WORKERS)

coverage: setup
	@setup/stages.sh coverage $(WORKERS)

mutants: setup
	@for part in core policies driver stores; do \
		PYTHONPATH=tests $(BIN)/python -m mutants $$part --sample $(MUTANTS) --seed $(SEED) || code=1; \
	done; exit $${code:-0}

package: setup
	@setup/package.sh

lock: setup
	@setup/lock.sh

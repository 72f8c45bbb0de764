# The two commands of a newcomer are `make run` and `make test`; both begin with what `make setup` does.

SHELL := /bin/bash
BIN := .venv/bin
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup run test lock

help:
	@echo 'make run     set up what is missing, then serve on loopback with a demo VM; Ctrl-C ends the server'
	@echo 'make test    set up what is missing, then run every check and test'
	@echo 'make setup   set up what is missing; after it $(BIN)/interlock works'
	@echo 'make lock    resolve the dependencies of pyproject.toml anew into requirements.lock'

setup:
	@setup/setup.sh

run: setup
	@exec $(BIN)/interlock demo

# One stage after the other; the first that fails is the last that runs.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup

lock: setup
	@setup/lock.sh

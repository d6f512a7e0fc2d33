# `make demo` shows it, `make test` checks it, `make help` lists the rest.

.DEFAULT_GOAL := help
.PHONY: help demo demo-reject test setup up down status lint lock demo-assets compose-env audit new-pipeline clean
.DELETE_ON_ERROR:

# The first of these that is Python 3.11 or 3.12; when none is, the preflight says what to do.
PYTHON ?= $(firstword $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$python; \
	done) python3)
BIN := .venv/bin
RUN := $(BIN)/python -m

# uv does not read pip's settings; a company's package index is usually named there.
INDEX = $(or $(UV_DEFAULT_INDEX),$(PIP_INDEX_URL),$(shell $(BIN)/pip config get global.index-url 2>/dev/null))
INSTALL = $(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes --requirement
COMPILE = $(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) \
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate $(if $(UPGRADE),--upgrade)

TOOL = $(if $(INDEX),UV_DEFAULT_INDEX=$(INDEX)) $(BIN)/uv tool run --quiet

help: ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-14s %s\n", $$1, $$2 }'

demo: setup ## a run of the demo pipeline, from data to a promoted model that translates: about three minutes
	@$(RUN) scripts.local demo

demo-reject: setup ## the same with a harmful setting: the gate refuses, and production stays where it is
	@$(RUN) scripts.local demo --reject

test: .venv/installed-dev lint ## every check: lint, types, and tests against real servers
	@$(RUN) pytest --numprocesses 2 --dist loadfile

setup: .venv/installed ## make .venv and install the libraries in it; nothing when they are there

up: setup ## start Airflow and the object store, and leave them running
	@$(RUN) scripts.local up

down: setup ## stop them; the data stays
	@$(RUN) scripts.local down

status: setup ## say what runs, and where
	@$(RUN) scripts.local status

lint: .venv/installed-dev ## style and types only
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

demo-assets: setup ## make the demo's corpus and base model again
	@$(BIN)/python examples/demo/make_assets.py

new-pipeline: setup ## write config/PAIR.yaml, as PAIR=en-fr
	@$(RUN) scripts.new_pipeline "$(PAIR)"

compose-env: setup ## write .env with random passwords for docker-compose.yaml
	@$(RUN) scripts.compose_env

lock: setup ## compile requirements*.txt anew; `make lock UPGRADE=1` takes the newest versions that the .in files allow
	$(COMPILE) requirements.in --output-file requirements.txt
	$(COMPILE) requirements-dev.in --output-file requirements-dev.txt
	$(COMPILE) requirements-gpu.in --output-file requirements-gpu.txt
	$(COMPILE) requirements-airflow.in --output-file requirements-airflow.txt

# `uv tool run` keeps the two tools out of the locks. --strict: a library that the database does not know is a failure too.
audit: setup ## a bill of materials (CycloneDX, in .cache/sbom) of each image's libraries, and their known vulnerabilities
	@mkdir -p .cache/sbom
	@for lock in requirements requirements-gpu requirements-airflow; do \
		$(TOOL) --from cyclonedx-bom==7.5.0 cyclonedx-py requirements $$lock.txt --output-file .cache/sbom/$$lock.json || exit; \
	done
	@for lock in requirements requirements-gpu requirements-airflow; do \
		$(TOOL) pip-audit==2.10.1 --requirement $$lock.txt --require-hashes --disable-pip --strict --progress-spinner off || exit; \
	done

clean: ## delete .venv, and .retrain with all data of the local stack
	@if [ -x $(BIN)/python ] && [ -d .retrain ]; then $(RUN) scripts.local down; fi
	rm -rf .venv .retrain .cache .mypy_cache .ruff_cache

# Stamps: what is newer than the list that it was installed from need not be installed again.
.venv/installed: requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or 3.12 is needed, and there is no $(PYTHON)." >&2; exit 2; }
	@$(PYTHON) scripts/preflight.py
	@echo "Installing the libraries in .venv (3 GB, some minutes) ..."
	@[ -x $(BIN)/uv ] || { $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9; }
	@$(INSTALL) requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	@$(INSTALL) requirements-dev.txt
	@touch $@

# `make help` lists the targets. Each one is cached: a second call does only what has become out of date.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt

GGUF := models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL := models/SmolLM2-135M-Instruct
PAIRS := data/quickstart
QUICKSTART := trainer/configs/quickstart.toml
RUN := runs/quickstart
GPU_READINGS := runs/gpu/kernels.json

# Threads that wait for work must not spin: on few cores they take the time of those that have some.
export OMP_WAIT_POLICY ?= passive

.PHONY: help train test test-long test-gpu lint clean
help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(MODEL)/config.json $(PAIRS)/train.jsonl  ## fetch SmolLM2-135M, build reasoning pairs, train DPO, print the result
	$(BIN)/torchrun --standalone --nproc-per-node=1 trainer/main.py $(QUICKSTART)
	@[ $(RUN)/result.txt -nt $(RUN)/export/model.safetensors ] || { \
	  $(BIN)/python -m eval.preference --before $(MODEL) --after $(RUN)/export --data $(PAIRS)/eval.jsonl --run $(RUN) \
	    --dtype bf16 > $(RUN)/result.part && mv $(RUN)/result.part $(RUN)/result.txt; }
	@cat $(RUN)/result.txt

test: $(VENV)/test.stamp  ## run the tests that take seconds (a few minutes in all)
	$(BIN)/python -m pytest -q -m "not long" -rs

test-long: $(VENV)/test.stamp  ## run the tests that take minutes
	$(BIN)/python -m pytest -q -m long -rs

test-gpu: $(VENV)/test.stamp  ## run the tests that need a GPU, then time every kernel; without a GPU both are skipped
	$(BIN)/python -m pytest -q -m gpu -rs
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  mkdir -p $(dir $(GPU_READINGS)) && $(BIN)/python -m kernels.bench --device cuda --json $(GPU_READINGS); \
	else echo "no GPU here: kernels.bench is skipped"; fi

lint: $(VENV)/test.stamp  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment, the fetched model, the quickstart's pairs and its run
	rm -rf $(VENV) $(MODEL) $(GGUF) models/.tests.lock $(PAIRS) $(RUN) build logratio.egg-info
	rm -rf .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Logratio needs Python 3.11 or newer; say which: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Two stamps: `make train` installs what a run needs, the tools of the tests come with the first `make test` or `make lint`.
$(VENV)/run.stamp: setup.py constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(PIP_INSTALL) -e '.[test]'
	@touch $@

$(MODEL)/config.json: | $(VENV)/run.stamp
	$(BIN)/python -m data_tools.fetch_model --out models/
	$(BIN)/python -m trainer.models.gguf_import --gguf $(GGUF) --out $(MODEL)

$(PAIRS)/train.jsonl: $(wildcard data_tools/pairs/arithmetic*.py) | $(VENV)/run.stamp
	$(BIN)/python -m data_tools.pairs.arithmetic --out-dir $(PAIRS)

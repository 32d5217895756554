# Every target sets up what it needs in .venv by itself; nothing is installed twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo matrix test fuzz lint clean

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

setup: $(READY)  ## make .venv with everything that requirements.txt names

$(READY): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

demo: $(READY)  ## train and test ClipFusionVAD on made-up data, in a minute or two on a CPU
	$(BIN)/python -m clipfusionvad demo

matrix: $(READY)  ## train and test every method on every dataset's made-up data, in about ten minutes on a CPU
	$(BIN)/python -m clipfusionvad matrix

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -q

fuzz: $(READY)  ## try some 24000 damaged, foreign and absurd inputs on every reader and command, in about ten minutes
	$(BIN)/python tests/fuzz/run.py

lint: $(READY)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove .venv and what the demo made
	rm -rf $(VENV) demo runs

# Every target sets up what it needs in .venv by itself; nothing is installed twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# What reads, computes and writes; the other tests take long or look at details.
CORE := $(addprefix tests/unit/test_,$(addsuffix .py,decode detection frame_metrics lists losses npy options pack runs \
	snippets truth)) tests/integration/test_scripts.py tests/integration/test_report_page.py

.DEFAULT_GOAL := help
.PHONY: help setup demo matrix test fuzz torture lint coverage oldest audit clean

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

test: $(READY)  ## run the tests, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

fuzz: $(READY)  ## try some 24000 damaged, foreign and absurd inputs on every reader and command, in about ten minutes
	$(BIN)/python tests/helpers/fuzz/run.py

torture: $(READY)  ## kill the programs 200 times at random moments and compare what they make, in about ten minutes
	PYTHONPATH=. $(BIN)/python tests/helpers/torture.py --kills 200

lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(READY)  ## run the tests and report the lines that none of them reaches
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered

# torch is kept: older ones bring gigabytes of CUDA with them.
oldest:  ## run the core of the tests with the oldest packages that pyproject.toml admits (Python 3.11)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	$(PYTHON) tests/helpers/floors.py --keep torch torchvision > .venv-oldest/constraints.txt
	PIP_CONSTRAINT=.venv-oldest/constraints.txt .venv-oldest/bin/pip install --quiet setuptools
	PIP_CONSTRAINT=.venv-oldest/constraints.txt .venv-oldest/bin/pip install --quiet --editable . pytest hypothesis
	.venv-oldest/bin/python -m pytest -q $(CORE)

audit: $(READY)  ## look for known vulnerabilities of the pinned packages (asks a service on the network)
	$(BIN)/python tests/helpers/audit.py

clean:  ## remove .venv and what the demo made
	rm -rf $(VENV) .venv-oldest demo runs

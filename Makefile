# Every target installs what it needs into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Reading, computing and writing: the part that is tested with the oldest packages.
CORE := $(addprefix tests/unit/test_,$(addsuffix .py,decode detection frame_metrics lists losses npy options pack runs \
	snippets truth)) tests/integration/test_scripts.py tests/integration/test_report.py

.DEFAULT_GOAL := help
.PHONY: help setup demo matrix test test-all fuzz torture gpu lint coverage oldest audit clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 14

setup: $(READY)  ## create .venv with everything that requirements.txt lists

$(READY): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

demo: $(READY)  ## train and test ClipFusionVAD on generated data, 15 seconds on a CPU
	$(BIN)/python -m clipfusionvad demo

matrix: $(READY)  ## train and test every method on generated data of every dataset, in about ten minutes on a CPU
	$(BIN)/python -m clipfusionvad matrix

test: $(READY)  ## run the fast tests of every part, in at most five minutes on two cores
	$(TESTS) -m "not slow"

# Tests of Ray and of the browser are skipped where ray, playwright or Chromium is not installed.
test-all: $(READY)  ## run all tests, the slow ones included
	$(TESTS)

fuzz: $(READY)  ## try 24000 damaged, foreign and absurd inputs on every reader and command, in about ten minutes
	$(BIN)/python tests/helpers/fuzz/run.py

torture: $(READY)  ## kill the programs 200 times at random moments and compare their results, in about ten minutes
	PYTHONPATH=. $(BIN)/python tests/helpers/torture.py --kills 200

gpu: $(READY)  ## run what needs a GPU: tests on it, then benchmarks, into benchmarks/RESULTS_cuda.md
	$(BIN)/python benchmarks/gpu.py

lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(READY)  ## run all tests and report the lines that none of them reaches
	$(TESTS) --cov --cov-report=term:skip-covered

# torch stays: older versions bring gigabytes of CUDA.
oldest:  ## run a part of the tests with the oldest packages that pyproject.toml allows (Python 3.11)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	$(PYTHON) tests/helpers/floors.py --keep torch torchvision > .venv-oldest/constraints.txt
	PIP_CONSTRAINT=.venv-oldest/constraints.txt .venv-oldest/bin/pip install --quiet setuptools
	PIP_CONSTRAINT=.venv-oldest/constraints.txt .venv-oldest/bin/pip install --quiet --editable . pytest hypothesis
	.venv-oldest/bin/python -m pytest -q $(CORE)

audit: $(READY)  ## look up known vulnerabilities of the pinned packages (on the network)
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner=off --requirement requirements.txt

clean:  ## remove .venv, demo/ and runs/
	rm -rf $(VENV) .venv-oldest demo runs

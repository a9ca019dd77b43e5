# Everything a newcomer needs, one word each. `make setup` runs by itself before the others.
#
#   make demo        the embedded model and its adapter report three studies
#   make test        the tests (minutes; WORKERS=2 processes); make test-all adds the exhaustive tier
#   make lint        formatter, linter, strict types
#   make serve       a server on port 8000; ARGS='--model PATH --port 9000'
#   make train-demo  trains the embedded model anew and scores it (half an hour on two cores)
#   make model-table the table of docs/models.md, from the tests of the model families
#   make bench       load against a server of its own, results under benchmarks/results/
#   make gpu-check   on a CUDA machine: kernels, parity and the benchmark
#
# PYTHON names the interpreter to build from, VENV the environment. Where PYTHON already has a torch that sees
# a GPU, its packages are used and only missing ones are installed; without a network, point PIP_ARGS at a
# folder of wheels: PIP_ARGS='--no-index --find-links wheels'.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
RESULTS ?= benchmarks/results
WORKERS ?= 2

PY := $(VENV)/bin/python
STAMP := $(VENV)/.set-up
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup demo test test-all lint serve model-table bench train-demo gpu-check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "vlm-serve needs Python 3.11 or newer: make setup PYTHON=python3.12"; exit 1; }
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	  echo "Setting up $(VENV) over the CUDA torch of $(PYTHON)"; \
	  $(PYTHON) -m venv --without-pip $(VENV); \
	  $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system.pth"; \
	  $(PYTHON) -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null \
	    || $(PYTHON) -m pip --python $(PY) install --quiet $(PIP_ARGS) 'setuptools>=77'; \
	  $(PYTHON) -m pip --python $(PY) install --quiet --no-build-isolation $(PIP_ARGS) -e '.[test,dev]'; \
	else \
	  echo "Setting up $(VENV) (torch and the model libraries: a few minutes the first time)"; \
	  $(PYTHON) -m venv $(VENV); \
	  $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[test,dev]'; \
	fi
	@touch $(STAMP)

demo: setup
	@$(PY) scripts/demo.py $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu" $(ARGS)

test-all: setup
	$(PY) -m pytest -m "not gpu" $(ARGS)

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

serve: setup
	$(VENV)/bin/vlm-serve serve $(ARGS)

train-demo: setup
	OMP_WAIT_POLICY=PASSIVE $(PY) -m scripts.train_demo $(ARGS)

model-table: setup
	$(PY) -m pytest tests/families -m "not slow and not gpu" -o junit_family=xunit1 --junitxml $(VENV)/families.xml $(ARGS)
	$(PY) scripts/model_table.py $(VENV)/families.xml

bench: setup
	@mkdir -p $(RESULTS)
	$(VENV)/bin/vlm-serve bench --out $(RESULTS)/serve.json $(ARGS)

gpu-check: setup
	$(PY) -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())'
	VLM_SERVE_TEST_DEVICE=cuda $(PY) -m pytest -m gpu $(ARGS)
	VLM_SERVE_TEST_DEVICE=cuda $(PY) -m pytest -m "not slow and not demo and not gpu" -k parity $(ARGS)
	@mkdir -p $(RESULTS)
	$(VENV)/bin/vlm-serve bench --out $(RESULTS)/serve-cuda.json

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Two commands do everything: `make quickstart` and `make test`. Both make what they need.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
WORKERS ?= 2

.PHONY: help quickstart test test-image image image-test-cuda lint format clean

help:
	@echo "make quickstart   virtual environment, install, train the small Llama of configs/quickstart.yaml"
	@echo "make test         virtual environment, install, run all tests (no GPU needed)"
	@echo "make test-image   build the CPU image on an engine of its own, run and kill it (root, Debian; minutes)"
	@echo "make image-test-cuda   the same with the CUDA wheels, as far as that goes without a GPU"
	@echo "make image        build amsf-dist:cuda with your own docker"
	@echo "make lint         ruff and mypy"
	@echo "make clean        remove the virtual environment and the runs"

$(BIN)/python:
	@echo "== making the virtual environment $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing amsf_dist with what training needs (minutes, once)"
	@$(PIP) torch
	@$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.test: $(VENV)/.train
	@echo "== installing what the tests compare and work with (schedulefree, adam-mini, DeepSpeed, pytest)"
	@$(PIP) --editable '.[train,deepspeed,test,dev]'
	@touch $@

quickstart: $(VENV)/.train
	@echo "== training: amsf train configs/quickstart.yaml"
	@$(BIN)/amsf train configs/quickstart.yaml

# DeepSpeed compiles a collective for CPUs, a minute, once; it looks for ninja in PATH.
test: $(VENV)/.test
	@echo "== testing with $(WORKERS) workers"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/warm_up.py
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -q tests

# Not a part of `make test`: it installs Debian's docker.io if it is missing, and starts it.
test-image: $(VENV)/.test
	@echo "== testing the CPU image"
	@$(BIN)/python -m pytest -q --durations=10 tests/containers/test_image.py

image-test-cuda: $(VENV)/.test
	@echo "== testing the image with CUDA wheels, without a GPU"
	@$(BIN)/python -m pytest -q --durations=10 tests/containers/test_image_cuda.py

image:
	docker buildx build -f docker/Dockerfile -t amsf-dist:cuda \
	  --build-arg REVISION=$$(git rev-parse --short HEAD) .

lint: $(VENV)/.test
	@echo "== ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs

# make install | demo | test | test-all | lint | format.  Each installs first if needed; `make PYTHON=python3.12 install` picks the interpreter.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread a worker and a worker a core (of two) is faster than one worker with two threads. No test needs the network.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.DEFAULT_GOAL := install
.PHONY: install demo test test-all lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "lolgen needs Python >= 3.11, found " + sys.version.split()[0] + ": make PYTHON=python3.11 install")'
	$(PYTHON) -m venv $(VENV)
	@# torch alone and pinned, first: left to an open range, pip may fetch gigabytes of CUDA packages.
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@# The build backend too, so that the build below is not isolated and uses the pinned one.
	$(INSTALL) hatchling
	$(INSTALL) --no-build-isolation --editable '.[all,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/lolgen generate --set hair_color=red --set glasses=yes --seed 0 --rank 4 --format peft -o out/red --preview out/red.png
	$(BIN)/lolgen edit out/red --set beard=yes -o out/bearded --preview out/bearded.png
	@echo
	@echo "The adapters, generated and edited and not trained, are the folders out/red and out/bearded (PEFT format);"
	@echo "out/red.png and out/bearded.png (before, after) show what diffusers' StableDiffusionPipeline draws with them."
	@echo "The app: $(BIN)/lolgen demo"

test: $(STAMP)
	$(PYTEST) -m 'not slow'

test-all: $(STAMP)
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

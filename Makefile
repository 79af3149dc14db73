# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out/quickstart

.PHONY: quickstart test test-ray test-slow check format install clean

quickstart: $(STAMP)  ## A poisoned dataset, with and without the Ref-Teacher: the whole method in minutes, offline, on CPU
	$(BIN)/reft-ray quickstart --out $(OUT)

test: $(STAMP)  ## The fast lane: everything that starts no cluster
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-ray: $(STAMP)  ## Tests on real Ray clusters, loopback only
	$(BIN)/python -m pytest -m "ray and not slow and not gpu" --timeout 600

test-slow: $(STAMP)  ## Long tests, and those on real rows
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 3600

check: $(STAMP)  ## Static checks: style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# torch first and pinned: an unpinned torch brings gigabytes of CUDA to machines without a GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[service,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) out build *.egg-info

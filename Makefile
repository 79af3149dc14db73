# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out/quickstart
# Where it is set, each process compiles torch, Transformers and Ray again, which more than doubles the time of imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart console test test-ray test-servers test-slow check format docs pictures install clean

quickstart: $(STAMP)  ## The whole method on a real language model, offline, on CPU
	$(BIN)/reft-ray quickstart --out $(OUT)

console: $(STAMP)  ## The console with a job that waits for a reviewer, in seconds
	$(BIN)/reft-ray serve --state out/console --demo

test: $(STAMP)  ## The fast lane: everything that starts no cluster and no server
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-servers: $(STAMP)  ## Tests against PostgreSQL, Prometheus, Redis, kubectl and Chromium from PATH
	$(BIN)/python -m pytest -m "servers and not ray and not slow and not gpu" --timeout 600

test-ray: $(STAMP)  ## Tests on real Ray clusters, loopback only
	$(BIN)/python -m pytest -m "ray and not slow and not gpu" --timeout 600 $(RAY_TESTS)

test-slow: $(STAMP)  ## Long tests, and those on real rows and real models
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 3600

check: $(STAMP)  ## Static checks: style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Regenerate dashboards, alert rules and manifests
	$(BIN)/reft-ray telemetry render
	$(BIN)/reft-ray manifests render

pictures: $(STAMP)  ## Make the pictures of docs/console.md; needs Chromium
	$(BIN)/python benchmarks/console_pictures.py docs/pictures/console

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt install.sh
	$(PYTHON) -m venv $(VENV)
	sh install.sh $(VENV)
	touch $(STAMP)

clean:
	rm -rf $(VENV) out build *.egg-info

# Needs python3 >= 3.11 and the package index, nothing else; all is kept in .venv.
PYTHON ?= python3
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PLUGIN := plugins/autoft-torchvision
# Inside the environment, so that it goes with it.
READY := $(VENV)/.ready
RESULTS := benchmarks/speed/results
PAGE := docs/results/speed.md
SPEED := PYTHONPATH=benchmarks $(BIN)/python benchmarks/speed
DEMO := runs/demo
DEMO_IMAGES := runs/demo-images

.PHONY: help demo test quick lint bench clean
.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

demo: $(READY) ## Search on a sample, show the leaderboard, predict one image (3 minutes)
	$(BIN)/autoft search --dataset sample:digits --offline --time 150s --out $(DEMO)
	$(BIN)/autoft leaderboard $(DEMO) --top 10
	$(BIN)/python -c "from pathlib import Path; from autoft.data.inputs.sample import write_sample; \
	  write_sample('digits', Path('$(DEMO_IMAGES)'), limit=1)"
	$(BIN)/autoft predict $(DEMO) $(DEMO_IMAGES)/0/0000.png --top 3

test: lint ## Lint, then all tests: the quick ones on all cores, then the searches one by one
	$(BIN)/python -m pytest -m "not slow" -n auto $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

quick: $(READY) ## The tests without whole searches
	$(BIN)/python -m pytest -m "not slow" -n auto $(PYTEST_ARGS)

lint: $(READY) ## Style, types and the floors of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## Measure start-up, goals P1 to P17 and a million rows; DATA=FOLDER gives photographs
	$(BIN)/python benchmarks/startup.py
	$(SPEED)/sharing.py --json $(RESULTS)/sharing.json
	$(SPEED)/controller.py --sharing $(RESULTS)/sharing.json --json $(RESULTS)/controller.json
	$(SPEED)/heads.py --json $(RESULTS)/heads.json --page $(PAGE)
	$(SPEED)/device.py --json $(RESULTS)/device.json --page $(PAGE)
	$(SPEED)/data.py $(if $(DATA),--dataset $(DATA)) --json $(RESULTS)/data.json
	$(SPEED)/summary.py $(RESULTS) --page $(PAGE)
	$(SPEED)/million.py

clean: ## Remove the environment, the caches of the tools and the demo
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -rf $(DEMO) $(DEMO_IMAGES)

$(BIN)/uv:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	  || { echo "autoft needs Python >= 3.11: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

# A stamp: nothing is installed again until one of the two lists of requirements changes.
$(READY): pyproject.toml $(PLUGIN)/pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[ray]" --group dev
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable $(PLUGIN)
	@touch $(READY)

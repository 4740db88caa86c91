# Everything a newcomer or a machine runs. `make demo` and `make test` need only python3 (3.11 or
# newer, with venv), g++ 12 or newer and make; the rest is installed into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help env demo test test-full test-peers lint format asan tsan bench proto clean
.PHONY: cuda-check cuda-wheels

BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
BIN := $(abspath $(VENV))/bin
PACKAGES := $(VENV)/.packages
READY := $(VENV)/.ready
# true: every import rebuilds what changed in csrc/ (for C++ edits; a start then takes a second longer)
REBUILD ?= false
# Processes that run the tests, a file of tests in one of them
JOBS ?= 2
# Threads of torch that spin for each other beside other tests make some take fifty times as long.
PYTEST = OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -q -n $(JOBS) --dist loadfile
# A folder of `make cuda-wheels`: what the environment is made of, on a host without a network
WHEELS ?=
# Where there is CUDA, or another index: make CONSTRAINTS=/dev/null
CONSTRAINTS ?= constraints.txt
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'tests/cpp/*.h' 'tests/cpp/*.cpp' 'tests/cuda/driver/*.h' 'tests/cuda/driver/*.cpp')
comma := ,
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name CMakeLists.txt)
INSTALL := -C editable.rebuild=$(REBUILD) -C build-dir=build/editable -e
export PATH := $(BIN):$(PATH)
export HF_HUB_OFFLINE := 1

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

env: $(READY)  ## the virtual environment, with both packages built and installed in place

ifneq ($(WHEELS),)
# without a network, beside the machine's own torch
export PIP_NO_INDEX := 1
export PIP_FIND_LINKS := $(abspath $(WHEELS))
$(PACKAGES): pyproject.toml constraints.txt
	$(BASE_PYTHON) -m venv --system-site-packages $(VENV)
	$(PYTHON) -m pip install --quiet -r $(WHEELS)/requirements.txt
	$(PYTHON) -m pip install --quiet --no-deps flashinfer-python
	@$(PYTHON) -c "import torch; print('torch', torch.__version__, 'cuda' if torch.cuda.is_available() else 'cpu')"
	@touch $@
else
$(PACKAGES): pyproject.toml constraints.txt
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -c $(CONSTRAINTS) "scikit-build-core>=0.11" "pybind11>=2.13" cmake ninja
	$(PYTHON) -m pip install --quiet -c $(CONSTRAINTS) --no-build-isolation $(INSTALL) ".[engine,dev]"
	@$(PYTHON) -c "import torch; print('torch', torch.__version__, 'cuda' if torch.cuda.is_available() else 'cpu')"
	@touch $@
endif

$(READY): $(PACKAGES) $(SOURCES)
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation $(INSTALL) .
	@touch $@

demo: $(READY)  ## a real model, the daemon and the engine: what each tier saves, in one table
	$(PYTHON) -m benchmarks.demo

test: lint  ## everything that runs in under 15 minutes
	$(PYTEST) -m "not slow and not peers"

test-full: lint  ## the slow tests too
	$(PYTEST) -m "not peers"

test-peers: $(READY)  ## other engines on this tree, in environments of their own below build/peers: 7 GB, 25 minutes
	$(PYTHON) -m pytest -v -m peers tests/peers

lint: $(READY)  ## ruff, mypy --strict, clang-format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run --Werror $(CPP))

format: $(READY)  ## write what lint asks for
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(BIN)/clang-format -i $(CPP)

# Where the sanitized extensions lie; tests/csrc/sanitized.py puts them in front of the installed ones.
SANITIZE = cmake -S csrc -B build/$(1) -G Ninja -DKVC2_TESTS=ON -DKVC2_SANITIZE=$(2) \
	-DPython_EXECUTABLE=$(abspath $(PYTHON)) -Dpybind11_DIR=$$($(PYTHON) -m pybind11 --cmakedir) \
	&& cmake --build build/$(1) && ctest --test-dir build/$(1) --output-on-failure
PRELOAD = $$(g++ -print-file-name=$(1)) $$(g++ -print-file-name=libstdc++.so)
CORE_TESTS := tests/csrc/test_beat.py tests/csrc/test_block.py tests/csrc/test_copy.py $(wildcard tests/csrc/test_index*.py)

asan: $(READY)  ## C++ tests and core tests under AddressSanitizer and UBSan
	$(call SANITIZE,asan,address$(comma)undefined)
	KVC2_WALK=quick KVC2_EXTENSIONS=build/asan ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
		LD_PRELOAD="$(call PRELOAD,libasan.so)" $(PYTHON) -m pytest -q -p tests.csrc.sanitized \
		-k "not instruction_set" -m "not slow" $(CORE_TESTS)

tsan: $(READY)  ## the same under ThreadSanitizer
	$(call SANITIZE,tsan,thread)
	KVC2_WALK=quick KVC2_EXTENSIONS=build/tsan TSAN_OPTIONS=halt_on_error=1 \
		LD_PRELOAD="$(call PRELOAD,libtsan.so)" $(PYTHON) -m pytest -q -p tests.csrc.sanitized \
		-k "not instruction_set" -m "not slow" $(CORE_TESTS)

proto: $(READY)  ## generate kvc2/v1 from proto/
	$(PYTHON) -m grpc_tools.protoc -I proto --python_out=. --grpc_python_out=. --pyi_out=. \
		$(shell cd proto && find . -name '*.proto' | sed 's,^\./,proto/,')

# Half an hour; with TRACES=DIR also those that replay traces.
BENCHMARKS := rpc objects restart page_copy overlap disk index_ops ttft mixed_models slow_disk
bench: $(READY)  ## every benchmark of benchmarks/README.md, JSON into build/bench
	mkdir -p build/bench
	for each in $(BENCHMARKS); do $(PYTHON) -m benchmarks.$$each --json build/bench/$$each.json; done
	$(if $(TRACES),for each in hit_rate tier_hits reuse_curve; do \
		$(PYTHON) -m benchmarks.$$each --traces $(TRACES) --json build/bench/$$each.json; done)

# DRIVER=hostile runs what can run without a GPU; ARGS: --only STEP, --json FILE
DRIVER ?= real
cuda-check: $(READY)  ## what is promised of a CUDA device, checked on one in 8 minutes
	$(PYTHON) -m tests.cuda.check --driver $(DRIVER) $(ARGS)

# For a host without a network that has torch: make cuda-wheels DIR=wheels TARGET_PYTHON=3.12, and there
# make WHEELS=wheels cuda-check
TARGET_PYTHON ?= 3.12
cuda-wheels: $(READY)  ## wheels that daemon, engine and check need beside torch, into DIR
	$(PYTHON) -m tests.cuda.wheels $(DIR) --python $(TARGET_PYTHON)

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build

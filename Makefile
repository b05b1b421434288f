# Everything a user of this repository types. Each target says what it does in `make help`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install run test test-unit lint ui kind-up kind-test kind-down clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv and install Graftwork with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "graftwork: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); use make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "graftwork: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[weights,onnx,text,text-weights,chatterbot,dev]'
	@touch $(STAMP)

run: $(STAMP) ## the whole pipeline on real images: Fashion-MNIST, 100 labels a class
	$(BIN)/graftwork run --data fashion-mnist --train-per-class 100 --test-per-class 200 --image-size 96 --with-scratch-control

test: $(STAMP) ## every test, whole runs included
	$(BIN)/python -m pytest -m "not e2e"
	$(BIN)/python -m pytest -m "e2e and timed" -n 0  # alone, since they bound what a run may take
	$(BIN)/python -m pytest -m "e2e and not timed"

test-unit: $(STAMP) ## the fast tests alone
	$(BIN)/python -m pytest -m "not e2e"

lint: $(STAMP) ## ruff, mypy, and what a cluster gets: manifests, scripts, Dockerfiles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python infra/check.py

ui: $(STAMP) ## MLflow's pages on the runs made here
	$(BIN)/graftwork ui

kind-up: $(STAMP) ## a cluster on this machine (Docker and kind), with KFP, MLflow and a node that looks like a GPU pool
	infra/kind/kind.sh up

kind-test: $(STAMP) ## try everything on the cluster of KUBECONFIG: components as pods, the pipeline, a pod deleted in mid-training
	infra/test-cluster.sh

kind-down: ## remove that cluster again
	infra/kind/kind.sh down

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each target sets up what it needs; a machine with Python 3.11+, pip and make is enough.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup parity test lint bench docs clean

parity: .venv/.runtime
	$(BIN)/ipa-parity

test: .venv/.dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --require=jax,torch,alphafold,transformers,invariant_point_attention,gemmi,optax,matplotlib,tqdm,jupytext,nbclient,ipykernel

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.bench
	$(BIN)/python -m benchmarks --residues 64 128 256 512 1024
	$(BIN)/python -m benchmarks --module structure-module --residues 512

docs: .venv/.dev
	$(BIN)/python docs/build_tutorial.py

setup: .venv/.dev

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.runtime: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install --constraint constraints.txt --editable '.[jax,torch,structures]'
	touch $@

# alphafold-colabfold imports colabfold-kernels without declaring it, and its declared requirements are more
# than its folding code needs.
.venv/.dev: .venv/.runtime
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --constraint constraints.txt --no-deps alphafold-colabfold colabfold-kernels
	touch $@

.venv/.bench: .venv/.dev
	$(PIP) install --constraint constraints.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv build *.egg-info

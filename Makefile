# Everything runs in .venv, which is made on first use and brought up to date when these files change.
PYTHON ?= python3
# RELEASE=2.11 takes the oldest torch that is meant to work, RELEASE=2.15 the newest; each has an environment of its own
RELEASE ?=
VENV ?= .venv$(RELEASE:%=-%)
CONSTRAINTS = $(if $(RELEASE),tests/releases/torch-$(RELEASE).txt,constraints.txt)
PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed

.PHONY: help venv demo test lint format bench-cpu readme plots codegen emulate roofline activations mutants clean
.PHONY: gpu gpu-check gpu-suite gpu-tune gpu-bench gpu-profile gpu-install

help:
	@echo "make venv       .venv with the package, the tests' tools and the developers'; the others make it, too"
	@echo "make demo       compare eager and fused networks on sample images (ARGS='--model resnet50 --batch 8')"
	@echo "make test       run the tests (ARGS='-k conv'; RELEASE=2.11 or 2.15: with the oldest or the newest torch)"
	@echo "make lint       ruff and mypy; make format repairs what ruff can"
	@echo "make codegen    compile every kernel for six chips without a GPU; make roofline predicts their time"
	@echo "make activations  count the memory that a forward takes on a GPU, without one"
	@echo "make emulate    run the compiled kernels without a GPU (ARGS='--capability 90 --dtype fp16'; some minutes each)"
	@echo "make mutants    put faults into copies of the library, one by one: the tests must notice each"
	@echo "make bench-cpu  measure on this machine's CPU; make readme puts the results into tables, make plots draws them"
	@echo "make gpu        check, tune, measure and profile on an NVIDIA GPU, with python3's own torch (OUT=folder)"
	@echo "                gpu-check, gpu-suite, gpu-tune, gpu-bench, gpu-profile are its steps; each goes on where it was stopped"
	@echo "make clean      remove .venv, caches and build output"

venv: $(STAMP)

$(STAMP): setup.py pyproject.toml $(CONSTRAINTS) fused_resblock/version.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --editable '.[test,dev]' --constraint $(CONSTRAINTS)
	touch $@

demo: $(STAMP)
	$(PY) -m fused_resblock demo $(ARGS)

# one process a core, and one thread each: most tests are far too small for more
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench-cpu: $(STAMP)
	$(PY) -m benchmarks.bench_cpu $(ARGS)

readme: $(STAMP)
	$(PY) -m benchmarks.readme_tables $(ARGS)

plots: $(STAMP)
	$(PY) -m benchmarks.plots $(ARGS)

mutants: $(STAMP)
	$(PY) tests/mutants.py $(ARGS)

# On a GPU: no virtual environment, no network. Where the checkout cannot be installed it is run as it lies.
gpu: gpu-install
	$(PYTHON) -m benchmarks.gpu all $(ARGS)

gpu-check gpu-suite gpu-tune gpu-bench gpu-profile: gpu-install
	$(PYTHON) -m benchmarks.gpu $(@:gpu-%=%) $(ARGS)

gpu-install:
	-$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

codegen: $(STAMP)
	$(PY) -m benchmarks.codegen $(ARGS)

emulate: $(STAMP)
	$(PY) -m benchmarks.emulate $(ARGS)

roofline: $(STAMP)
	$(PY) -m benchmarks.roofline $(ARGS)
	$(PY) -m benchmarks.basic_block
	$(PY) -m benchmarks.predictions
	$(PY) -m benchmarks.l2_rates

activations: $(STAMP)
	KINETO_LOG_LEVEL=6 $(PY) -m benchmarks.activations $(ARGS)  # else torch's profiler says when it starts

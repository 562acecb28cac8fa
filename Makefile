# `make demo` and `make test` work in a fresh clone with nothing but Python 3.11+.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO_OUTPUT ?= demo-output
SPEECHOCEAN762 ?= ../shared/data/speechocean762
ESSENCE_OUTPUT ?= essence-output
EPOCHS ?= 12

KILLS ?= 100
SEED ?= 1

.PHONY: demo essence test bench storm lint format clean

demo: $(VENV)/.installed-demo
	$(BIN)/python deploy/local/demo.py $(DEMO_OUTPUT)

essence: $(VENV)/.installed-teacher,decode
	$(BIN)/python deploy/local/essence.py $(SPEECHOCEAN762) $(ESSENCE_OUTPUT) --epochs $(EPOCHS) $(if $(FURTHER),--further)

# Three processes for two cores: many tests wait for Ray, S3 and killed processes; with four, a slow machine is so busy that Ray
# may not start within the 30 s that it allows itself. Each with one thread: torch's threads spin while they wait for each other,
# and cost the other processes a third of their time. Files in their order: the long tests, each alone in its file, would come
# last otherwise.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# One table of all figures; it takes an hour and wants the machine for itself. See tests/benchmarks/README.md.
bench: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.benchmarks.run_all

storm: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.storm --kills $(KILLS) --seed $(SEED) $(if $(FORMAT),--format $(FORMAT)) $(if $(URL),--url $(URL))

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) --editable ".[$*]"
	@touch $@

# Runs from anywhere: make -C path/to/mergecli demo
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/demo

.PHONY: help setup demo test slow gpu bench table check lint types format docs startup sizes bare clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: .venv/installed ## install mergecli and its tools into .venv

.venv/installed: pyproject.toml scripts/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/installed ## the main job on the toy models: task vectors, merges, evaluation, report, heat-map
	@$(MAKE) --no-print-directory -j2 -C recipes RECIPE=toy.toml MERGECLI=$(CURDIR)/$(BIN)/mergecli OUT=$(abspath $(OUT)) \
	  MERGES='average task_arithmetic-0.2 ties-0.3' show

test: .venv/installed ## tests that need no network and no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m 'not slow and not gpu'

slow: .venv/documents .venv/ray ## the long tests too, on a Ray cluster of this machine, and the documentation built strictly
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

gpu: .venv/installed ## what only a GPU can show, in five minutes, with a table at the end
	$(BIN)/python scripts/gpu_check.py

# BENCH has more options, such as BENCH="--peers other-env/bin/python --peer-rounds 1" or BENCH="--beside before=../old-checkout"
bench: .venv/installed ## time and memory of merges, medians of five, growth, cold files; the tables and the picture; 15 minutes
	$(BIN)/python scripts/bench.py --repeat 5 --json $(BENCH)
	$(BIN)/python scripts/bench.py --growth --repeat 3 --json
	$(BIN)/python scripts/bench.py --cold --only average,ties --repeat 3 --json
	$(BIN)/python scripts/readme_picture.py

# TABLE has more options, such as TABLE="--share 1 --seeds 0"
TABLE ?= --share 0.1
table: .venv/installed ## every method on the toys, and its place in the published order; resumes; hours
	OMP_NUM_THREADS=1 $(BIN)/python scripts/method_table.py recipes/toy.toml out/toy-table $(TABLE) \
	  --json recipes/experiments/toy-methods.json --page docs/experiments/toys.md

check: lint types test ## before a commit: everything

lint: .venv/installed ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed ## pyright, strict
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/installed ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/documents ## build the documentation into out/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(CURDIR) $(BIN)/mkdocs build --strict --quiet

.venv/ray: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[ray]'
	@touch $@

.venv/documents: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[docs]'
	@touch $@

startup: .venv/installed ## milliseconds of --help, best of ten, for each command
	$(BIN)/python scripts/startup.py

sizes: ## lines per file, largest first
	@git ls-files '*.py' | xargs wc -l | sort -rn | head -30

bare: ## build the wheel and try it in an empty environment
	rm -rf out/bare && $(PYTHON) -m venv out/bare
	out/bare/bin/pip wheel --quiet --disable-pip-version-check --no-deps -w out/bare/wheel .
	out/bare/bin/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt out/bare/wheel/*.whl
	cd out/bare && bin/mergecli --help > /dev/null
	cd out/bare && bin/mergecli merge --base toy:base toy:digits toy:letters --method average -o m.safetensors
	cd out/bare && bin/mergecli eval m.safetensors --clip toy:base --task digits --limit 16 --no-cache
	rm -rf out/bare

clean: ## remove what the demo and the tools made
	rm -rf out .pytest_cache .ruff_cache

# `make` lists the targets. Everything runs in .venv, which is built on first use.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
CORES ?= $(shell nproc)
MUTANTS ?= 200
SEED ?= 1
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help install run report repro compare test test-all mutants lint types format docs bench unlock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## build .venv with the tested versions and install the package

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("blobpipe needs Python 3.11 or later: make PYTHON=python3.11 install" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

run: install ## run the whole pipeline (CORES=2) and print the path of the report
	snakemake --cores $(CORES)
	@$(MAKE) --no-print-directory report
	@if git rev-parse -q --verify HEAD > /dev/null 2>&1 && ! git diff --quiet HEAD -- dvc.lock results; then \
	echo "Git shows dvc.lock and numbers in results as changed: times and, on another processor, last digits."; \
	echo "They are this machine's record. To keep it: git commit -m 'Results of this machine' dvc.lock results"; fi

report: install ## write results/report.html from the existing results
	snakemake --quiet host progress --report results/stages.html
	@blobpipe report > /dev/null
	@echo "The report: $(CURDIR)/results/report.html"

repro: install ## run the same pipeline with DVC
	dvc repro

compare: ## list all experiments: what each changed, its rates with intervals, its time
	@command -v dvc > /dev/null || { echo "dvc: not found; make install, or activate the environment that has it"; exit 1; }
	@python workflow/scripts/compare.py

test: install ## run the tests, including whole runs of both tools (15 minutes)
	pytest -n 2 --dist loadgroup -m 'not long'

test-all: install ## run all tests, including a kill in every stage, experiments, SLURM and S3 where they are installed, and all benchmarks (one hour)
	@python -m pip install -q -c constraints.txt -e '.[cluster]'
	pytest -n 2 --dist loadgroup

mutants: install ## change the code at random points and list the changes that no test detects (MUTANTS=200 SEED=1; one hour)
	@python -m pip install -q -c constraints.txt -e '.[mutants]'
	python -m tests.mutants --count $(MUTANTS) --seed $(SEED)

lint: install ## check the style of code and rules
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow/rules

types: install ## run mypy, strict
	mypy

format: install ## format code and rules
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow/rules

docs: install ## build the documentation: docs/_build/html/index.html
	sphinx-build -W -q -b html docs docs/_build/html

bench: install ## time everything against plain PyTorch and the original code's methods, and compare with other detectors (12 minutes; run nothing else)
	@python -m pip install -q -c constraints.txt -e '.[bench]'
	python -m benchmarks
	python -m benchmarks.peers

unlock: install ## clear the locks of runs that were killed
	python workflow/scripts/run_lock.py

clean: ## remove logs, caches and the report; keep the stages' outputs
	rm -rf logs results/report.html results/stages.html dvc_plots .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests workflow -name __pycache__ -type d -prune -exec rm -rf {} +

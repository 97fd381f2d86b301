# `make` lists what there is. Everything runs in .venv, which is made on first use.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
CORES ?= $(shell nproc)
MUTANTS ?= 200
SEED ?= 1
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help install run report repro test test-all mutants lint types format docs bench unlock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make .venv with the tested versions, and the package in it

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("blobpipe needs Python 3.11 or later: make PYTHON=python3.11 install" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

run: install ## run the whole pipeline (CORES=2) and say where the report is
	snakemake --cores $(CORES)
	@$(MAKE) --no-print-directory report

report: install ## write results/report.html about what is there
	snakemake --quiet host progress --report results/report.html
	@echo "The report: $(CURDIR)/results/report.html"

repro: install ## the same pipeline by DVC
	dvc repro

test: install ## the tests, whole runs of both tools among them (a quarter of an hour)
	pytest -n 2 --dist loadgroup -m 'not long'

test-all: install ## these and the longest: a kill in every stage, experiments, all benchmarks (three quarters of an hour)
	pytest -n 2 --dist loadgroup

mutants: install ## change the code at random places and say which changes no test notices (MUTANTS=200 SEED=1; an hour)
	@python -m pip install -q -c constraints.txt -e '.[mutants]'
	python -m tests.mutants --count $(MUTANTS) --seed $(SEED)

lint: install ## style of the code and of the rules
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow/rules

types: install ## mypy, strict
	mypy

format: install ## bring code and rules into style
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow/rules

docs: install ## build the documentation: docs/_build/html/index.html
	sphinx-build -W -q -b html docs docs/_build/html

bench: install ## time everything against plain PyTorch and the original's ways (ten minutes; run nothing else meanwhile)
	python -m benchmarks

unlock: install ## after a kill: clear the locks of runs that are over
	python workflow/scripts/run_lock.py

clean: ## remove logs, caches and the report; what the stages made stays
	rm -rf logs results/report.html dvc_plots .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests workflow -name __pycache__ -type d -prune -exec rm -rf {} +

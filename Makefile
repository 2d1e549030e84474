# `make help` lists the targets. They use the environment that `make setup` makes; `make test PYTHON=python` uses another.
PYTHON ?= .venv/bin/python

.PHONY: help setup test lint docs site bench house

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## make .venv with everything the tests need
	python -m venv .venv
	.venv/bin/pip install -c tests/constraints.txt -e '.[test]'

test:  ## run the tests (those marked slow: make test ARGS='-m slow')
	$(PYTHON) -m pytest $(ARGS)

lint:  ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs:  ## run the code blocks of README.md and docs/
	$(PYTHON) -m pytest -n 0 --no-cov tests/test_readme.py

site:  ## build the documentation site into build/docs; a warning is an error
	.ci/docs

bench:  ## list the benchmarks and how to run one
	@$(PYTHON) -m benchmarks

house:  ## print the package's structure (beside another checkout: make house ARGS='--against FOLDER')
	@$(PYTHON) -m benchmarks.house $(ARGS)

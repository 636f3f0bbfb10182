# Every target does its own set-up (.ci/setup) and can be interrupted and run again.
PYTHON_BIN := .venv/bin/python
MINDJAX := .venv/bin/mindjax
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: help quickstart quickstart-moe test prove lint bench notebook setup clean

help:
	@echo 'make quickstart      train a small vision-language model from nothing: SFT, GSPO, DPO, report (minutes)'
	@echo 'make quickstart-moe  the same with a mixture of experts'
	@echo 'make test            lint, types and tests (minutes)'
	@echo 'make prove           the full matrices behind the claims (hours, resumable)'
	@echo 'make bench           speed and memory beside the alternatives, in one run'
	@echo 'make notebook        execute the notebooks'
	@echo 'make lint            ruff and mypy'
	@echo 'make clean           remove caches and the environment; runs/ stays'

quickstart:
	@.ci/setup quickstart
	$(MINDJAX) run --config=experiments/quickstart.py

quickstart-moe:
	@.ci/setup quickstart
	$(MINDJAX) run --config=experiments/quickstart.py:moe

setup:
	@.ci/setup test

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: lint
	$(PYTHON_BIN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m 'not gpu and not prove' --durations=15 --durations-min=1

prove: setup
	$(PYTHON_BIN) -m pytest -q -m 'prove and not gpu' --durations=0

bench: setup
	$(MINDJAX) bench

notebook: setup
	.venv/bin/jupyter-execute --inplace notebooks/*.ipynb

clean:
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# `make run` and `make test` do everything on a fresh machine with Python 3.11, 3.12
# or 3.13: they create .venv, install the pinned packages, and run. --no-compile saves a
# fifth of the installation: Python compiles what it imports.
PYTHON ?= python3
BIN := .venv/bin

run: .venv/run.stamp
	$(BIN)/python main.py --model_name resnet50 --train_type act_norm_betti_train --rho 0.1

test: .venv/test.stamp
	$(BIN)/python -m pytest -m "not long" --numprocesses 2 --dist loadfile

test-long: .venv/test.stamp
	$(BIN)/python -m pytest -m long --numprocesses 2 --dist loadfile

test-fast: .venv/test.stamp
	$(BIN)/python -m pytest -m "not slow and not long" --numprocesses 2 --dist loadfile

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy core selection

.venv/run.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11, 3.12 or 3.13 is needed. Received: %d.%d; choose one with make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

.venv/test.stamp: .venv/run.stamp requirements-dev.txt
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv

.PHONY: run test test-long test-fast lint clean

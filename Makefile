# `make run` and `make test` do all that they need on a fresh machine with
# Python 3.11, 3.12 or 3.13: make .venv, install the pinned packages, run.
PYTHON ?= python3
BIN := .venv/bin

run: .venv/run.stamp
	$(BIN)/python main.py --model_name resnet50 --train_type act_norm_betti_train --rho 0.1

test: .venv/test.stamp
	$(BIN)/python -m pytest

.venv/run.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11, 3.12 or 3.13 is needed; found %d.%d. Say which with make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

.venv/test.stamp: .venv/run.stamp requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv

.PHONY: run test clean

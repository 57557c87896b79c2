# make quickstart    create .venv, install, run the whole job on real images in minutes
# make test          create .venv, install, run every test

PYTHON ?= python3
OUT ?= quickstart

.PHONY: quickstart test lint

quickstart: .venv/installed
	.venv/bin/fastdit quickstart --out $(OUT)

test: .venv/installed-test
	.venv/bin/python -m pytest

lint: .venv/installed-test
	.venv/bin/ruff check .

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt torch
	.venv/bin/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

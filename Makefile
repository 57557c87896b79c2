# make quickstart    create .venv, install, run every stage from real images to samples in minutes
# make test          create .venv, install, run every test in WORKERS processes (one per core, at most 4)
# make lint          create .venv, install, run ruff
# make fuzz          create .venv, install, read COUNT mutated files of every kind (SEED) in minutes
# make chaos         create .venv, install, inject faults for 25 minutes, write docs/reliability.md

PYTHON ?= python3
OUT ?= quickstart
COUNT ?= 10000
SEED ?= 0
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))

.PHONY: quickstart test lint fuzz chaos

quickstart: .venv/installed
	.venv/bin/fastdit quickstart --out $(OUT)

test: .venv/installed-test
	.venv/bin/python -m pytest -n $(WORKERS) --dist worksteal

lint: .venv/installed-test
	.venv/bin/ruff check .

fuzz: .venv/installed-test
	PYTHONPATH=.:tests .venv/bin/python -m chaos.fuzz --count $(COUNT) --seed $(SEED)

chaos: .venv/installed-test
	PYTHONPATH=.:tests .venv/bin/python -m chaos --out docs/reliability.md

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt torch
	.venv/bin/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

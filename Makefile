# `make search` and `make test` set up what they need by themselves.

# The first interpreter that is new enough; or give PYTHON=/path/to/python.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; \
  do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$p && break; done)
BIN := .venv/bin

.PHONY: search test test-slow types format docs clean

search: .venv/ready
	$(BIN)/python -m experiments.search $(ARGS)

test: .venv/ready-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-slow: .venv/ready-tests
	$(BIN)/python -m pytest -m slow

types: .venv/ready-tests
	$(BIN)/ty check

format: .venv/ready-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv

.venv/ready: requirements.txt setup.py
	@test -n "$(PYTHON)" || { echo 'nemo_jax needs Python 3.11 or newer; \
	none was found. Name one: make PYTHON=/path/to/python ...' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv/ready-tests: .venv/ready tests/requirements.txt
	$(BIN)/python -m pip install --quiet --requirement tests/requirements.txt
	touch $@

.venv/ready-docs: .venv/ready docs/requirements.txt
	$(BIN)/python -m pip install --quiet --requirement docs/requirements.txt
	touch $@

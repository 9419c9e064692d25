# Two commands to begin with: `make demo` and `make test`. Both make .venv first and are safe to run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo
unexport PYTHONDONTWRITEBYTECODE  # with it, hundreds of processes of the tests compile what they import, each again

.PHONY: demo test test-long lint bench soak docs wheel-check other-python trainers clean help

help:
	@echo "make demo          text -> activations -> store -> trained SAE, on a real model"
	@echo "make test          every check, those of many cases with a part of them: 17 minutes on two cores"
	@echo "make test-long     all other cases: every kill point, schedule, damage, hostile store: 35 minutes"
	@echo "make lint          format, lint, types, import rules"
	@echo "make docs          the documentation, into docs/_build/html"
	@echo "make bench         benchmarks beside peers, one JSON line last: 4 GB of disk, and 3 GB of peers at first"
	@echo "make soak          ten minutes of training with restores, failures and killed readers: nothing may leak;"
	@echo "                   then a bucket behind a network that fails, and kills at every point: 15 minutes"
	@echo "make wheel-check   build the wheel, read a store in an empty environment"
	@echo "make other-python  the tests on the newest other Python found"
	@echo "make trainers      real trainers on a small store, each in its own environment: 8 GB, ten minutes"

# One stamp per set of extras: pip runs again only when pyproject.toml has changed.
$(VENV)/.%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing actstore[$*] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/actstore demo --folder $(DEMO)

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

test-long: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m long

lint: $(VENV)/.test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/python -m tests.benchmarks

soak: $(VENV)/.test
	$(BIN)/python -m tests.soak --minutes 10 --seed 1
	$(BIN)/python -m tests.bucket_soak --seconds 60 --seed 1
	$(BIN)/python -m tests.bucket_storm --kills 60

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -b html docs docs/_build/html

wheel-check: $(VENV)/.test
	$(BIN)/python tests/wheel_check.py

other-python: $(VENV)/.test
	$(BIN)/python tests/other_python.py $(PYTEST_ARGS)

# Says loudly which trainer could not be installed, and then fails: TRAINERS="saelens sparsify" runs only some.
trainers:
	$(PYTHON) -m tests.trainers $(TRAINERS)

clean:
	rm -rf $(VENV) .venv-trainers .venv-bench-* docs/_build build dist

# Everything sets itself up in .venv, and again only when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
LOWEST := .venv-lowest
LOWEST_PYTHONS ?= python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) python3.11 python3.12
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test test-all test-lowest lint bench bench-gpu docs dist clean

demo: $(READY)
	$(BIN)/python examples/transfer_digits.py

# In a process for each core, since most of it is tracing, which uses one.
test: $(READY)
	TAPELOOP_EXAMPLES=10 $(BIN)/python -m pytest -m "not slow" -n auto --dist worksteal

# All of them, with more of the models that Hypothesis draws; first a list of what `make test` leaves out.
test-all: $(READY)
	$(BIN)/python -m pytest -m slow --collect-only
	TAPELOOP_EXAMPLES=100 $(BIN)/python -m pytest -n auto --dist worksteal

# With the lowest versions that pyproject.toml allows, on the lowest Python that is here and that they run on. Old packages
# warn of newer ones beside them.
test-lowest: $(LOWEST)/.ready
	TAPELOOP_EXAMPLES=24 $(LOWEST)/bin/python -m pytest -m "not slow" -n auto --dist worksteal -W ignore::DeprecationWarning

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tapeloop

bench: $(READY)
	$(BIN)/python -m benchmarks run --suite quick

# In slices, each of which ends with a table; results are added to, so that it can be interrupted and run again.
bench-gpu: $(READY)
	status=0; for slice in 1 2 3 4 5 6 7 8; do $(BIN)/python -m benchmarks run --suite gpu --time-limit 540; code=$$?; \
	  [ $$code -le 1 ] || exit $$code; status=$$code; done; exit $$status

# The documentation as a site; a link that leads nowhere is an error.
docs: $(READY)
	$(BIN)/python -m mkdocs build --strict

# The sdist, and the wheel that is built from it, in dist/.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv $(LOWEST) dist site .pytest_cache .hypothesis .ruff_cache .mypy_cache

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(LOWEST)/.ready: pyproject.toml
	rm -rf $(LOWEST)
	for python in $(LOWEST_PYTHONS); do $$python -m venv $(LOWEST) && break; done
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --compile-bytecode \
		--editable '.[test]'
	touch $@

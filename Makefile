PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers: what the smallest machines have.
WORKERS ?= 2

.PHONY: demo test check pytest matrix test-slow test-oldest calibration docs clean

demo: $(VENV)/.examples  ## Train on real data; ends with a table and a picture.
	$(BIN)/python examples/digits.py --out demo

test: check pytest  ## Lint, type-check, doctests and tests.

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "" --matrix check

matrix: $(VENV)/.dev  ## The table of docs/everywhere.md.
	$(BIN)/python -m pytest -q -n $(WORKERS) -m environment --matrix write tests

test-slow: $(VENV)/.dev  ## The property tests with ten times the examples.
	HYPOTHESIS_PROFILE=slow $(BIN)/python -m pytest -q -n $(WORKERS) -m "not example"

# The lower bounds of pyproject.toml. Flax, Orbax, Equinox, NumPyro have later ones.
test-oldest: .venv-oldest/.oldest  ## The tests on the oldest JAX and optax supported.
	.venv-oldest/bin/python -m pytest -q -n $(WORKERS) -m "not example" \
		--ignore tests/test_flax.py --ignore tests/test_clients.py \
		--ignore tests/test_checkpoints.py

calibration: $(VENV)/.dev  ## The table of docs/calibration.md.
	$(BIN)/python benchmarks/calibration.py

docs: $(VENV)/.docs  ## The documentation, into site/.
	$(BIN)/sphinx-build -q -W docs site

clean:
	rm -rf .venv .venv-oldest demo site

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$*]'
	touch $@

.venv-oldest/.oldest: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check \
		-r tests/oldest.txt -e .
	touch $@

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The smallest machines have two cores.
WORKERS ?= 2
# Each file is run by one worker, which compiles what its tests share once.
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile
# Where it is set, each process compiles all that it imports again, for some 7 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check pytest matrix test-slow test-one-device \
	test-oldest calibration collapse bench evidence evidence-large papers validity \
	docs docs-serve test-docs release-check release clean

demo: $(VENV)/.examples  ## Train on real data, with a table and a picture at the end.
	$(BIN)/python examples/digits.py --out demo

test: check pytest  ## Lint, type-check, doctests and tests.

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

pytest: $(VENV)/.dev
	$(PYTEST) -m "" --matrix check --counts check

matrix: $(VENV)/.dev  ## The tables of docs/everywhere.md and docs/reliability.md.
	$(PYTEST) -m environment --matrix write tests
	$(BIN)/python -m pytest -qq --collect-only -m "" --counts write

test-slow: $(VENV)/.dev  ## The property tests with ten times the examples.
	HYPOTHESIS_PROFILE=slow $(PYTEST) -m "not example"

# On a CPU with one device the leaves are computed in sequence. With eight they are not.
test-one-device: $(VENV)/.dev  ## The tests that can run on a single device.
	NUM_DEVICES=1 $(PYTEST) -m "" \
		tests/everywhere tests/oracles tests/test_controller.py tests/test_fuzz.py \
		tests/test_line_search*.py tests/test_momentum.py \
		tests/test_own_statistics.py tests/test_statistics.py

# The lower bounds of pyproject.toml. Flax, Orbax, Equinox and NumPyro have later ones,
# and the measurements of docs/validity.md take ten times as long there.
test-oldest: .venv-oldest/.oldest  ## The tests on the oldest JAX and optax supported.
	.venv-oldest/bin/python -m pytest -q -n $(WORKERS) -m "not example" \
		--ignore tests/test_flax.py --ignore tests/test_clients.py \
		--ignore tests/test_checkpoints.py --ignore tests/test_evidence.py \
		--ignore tests/test_papers.py --ignore tests/test_recipes.py \
		--ignore tests/test_scale.py --ignore tests/test_validity.py --ignore-glob "tests/test_large_*.py"

calibration: $(VENV)/.dev  ## The table of docs/calibration.md.
	$(BIN)/python -m benchmarks.validity.calibration

# statopt runs on PyTorch, in an environment of its own.
bench: $(VENV)/.dev .venv-statopt/.statopt  ## The tables and picture of docs/performance.md.
	$(BIN)/python -m benchmarks.performance --publish \
		--statopt-python .venv-statopt/bin/python

evidence: $(VENV)/.dev  ## The page docs/evidence.md. What was run is not run again.
	$(BIN)/python -m benchmarks.evidence --sensitivity --publish

# Some of its data sets are Debian's; each run that lacks one says which.
evidence-large: $(VENV)/.dev  ## The second tier of docs/evidence.md. Likewise; hours.
	$(BIN)/python -m benchmarks.evidence --tier large --publish

papers: $(VENV)/.dev  ## The tables of docs/papers.md. What was run is not run again.
	$(BIN)/python -m benchmarks.papers cifar10 --publish
	$(BIN)/python -m benchmarks.papers imagenet --publish
	$(BIN)/python -m benchmarks.papers wikitext2 --publish

collapse: $(VENV)/.dev  ## The table of docs/collapse.md.
	$(BIN)/python -m benchmarks.validity.collapse --publish

validity: $(VENV)/.dev  ## The tables and picture of docs/validity.md.
	$(BIN)/python -m benchmarks.validity --publish
	$(BIN)/python -m benchmarks.validity.progress --publish

# The site offers the wheel. Its notebooks run anew if they or the package changed.
docs: $(VENV)/.docs  ## The documentation, into site/.
	rm -rf docs/_wheel
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps -w docs/_wheel .
	$(BIN)/python -m sphinx -q -W --keep-going docs site

docs-serve: docs  ## The documentation, at http://127.0.0.1:8000.
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory site

test-docs: docs  ## Opens every page of the site in Chromium.
	$(BIN)/python -m pytest -q docs/tests

release-check: $(VENV)/.dev $(VENV)/.release  ## What a release does, without the tag.
	.ci/release $(BIN)

release: $(VENV)/.dev $(VENV)/.release  ## Build into dist/, check, tag. Uploads nothing.
	.ci/release $(BIN) --tag

clean:
	rm -rf .venv .venv-oldest .venv-statopt .docs_cache docs/_wheel jupyter_execute \
		demo dist site

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e '.[$*]'
	touch $@

.venv-statopt/.statopt:
	$(PYTHON) -m venv .venv-statopt
	.venv-statopt/bin/python -m pip install -q --disable-pip-version-check \
		numpy scipy torch==2.13.0
	.venv-statopt/bin/python -m pip install -q --disable-pip-version-check \
		--no-deps statopt==0.2
	touch $@

.venv-oldest/.oldest: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check \
		-r tests/oldest.txt -e .
	touch $@

# Every target works on a fresh machine with Python >= 3.11 and make: those that need the environment make it first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test check fix smoke docs dist bench golden nightly test-pretend

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/strop demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The suite in each pretended processor, locale, time zone and folder (tests/pretend.py), five runs in all: an hour.
# PRETEND="bf16 locale+no-shm" names other runs, TESTS="tests/unit" some of the tests.
test-pretend: setup
	$(BIN)/python tests/pretend.py $(PRETEND) -- -q -n 2 --dist worksteal $(TESTS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/architecture

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smoke: setup
	$(BIN)/python -m pytest -n 2 tests/smoke

docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/templates.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict  # of a later version than the pinned one

# A wheel and an archive of the sources, in dist/.
dist: setup
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

# Hours long. BENCH="--fp32" is for processors that only emulate bfloat16; "--rounds 1 --pairs 4 --out /tmp/look" is a
# quick look, which leaves the stored results as they are.
bench: setup
	$(BIN)/python -m benchmarks.measure --wait-idle 5 $(BENCH)
	$(BIN)/python -m benchmarks.report

# Whether this tree trains the same bits as another commit: make golden AGAINST=COMMIT (three minutes).
golden: setup
	$(BIN)/python -m benchmarks.golden --against $(AGAINST)

nightly: setup
	$(BIN)/python -m pytest -n 2 -m "nightly or not nightly" --hypothesis-profile nightly --timeout 3600

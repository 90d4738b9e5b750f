# make quickstart   set up, run the embedded study, write its report
# make test         set up, run the whole test suite
# make check        lint, format, types, import contracts
# make bench        our fine-tune against a plain loop, on the quickstart
# make bench-search how soon each way of searching knows the front, where the truth is known
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check bench bench-search format clean

quickstart: .venv/installed
	$(BIN)/prunesearch launch studies/quickstart
	$(BIN)/prunesearch report studies/quickstart

test: .venv/installed
	$(BIN)/pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed
	$(BIN)/python benchmarks/step.py studies/quickstart

bench-search: .venv/installed
	$(BIN)/python benchmarks/search/compare.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and by itself, so that nothing else decides which build of it is fetched
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv studies/quickstart/run

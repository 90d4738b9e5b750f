# make quickstart    install what a user needs, run the embedded study, write its report
# make test          install the development tools as well, run the whole test suite
# make fuzz          damage audio, models, studies and tables for ten minutes; each must be read right or named
# make check         lint, format, types, import contracts
# make format        let ruff fix and format the code
# make bench         compare our fine-tune with a plain training loop, on the quickstart
# make bench-search  compare search methods on tables where every result is known
PYTHON ?= python3
TEST_PROCESSES ?= 2
PYTEST_OPTIONS ?=
FUZZ_SECONDS ?= 600
BIN := .venv/bin

.PHONY: quickstart test fuzz check bench bench-search format clean

quickstart: .venv/installed
	$(BIN)/prunesearch launch studies/quickstart
	$(BIN)/prunesearch report studies/quickstart

# Each test process (and each worker process that a test starts) gets one thread: more threads than cores slow all of them down.
# A file's tests stay in one process, because many files share a study that is trained once per file.
test: export OMP_NUM_THREADS = 1
test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_OPTIONS)

fuzz: export OMP_NUM_THREADS = 1
fuzz: .venv/installed-dev
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed
	$(BIN)/python benchmarks/step.py studies/quickstart

bench-search: .venv/installed
	$(BIN)/python benchmarks/search/compare.py

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch is installed first and alone, so that no other package decides which build of it is downloaded
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv studies/quickstart/run

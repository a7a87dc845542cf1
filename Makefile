# Every target creates .venv on first use, and updates it when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := $(VENV)/.native

# Two test processes with one thread each. Each starts with one half of the tests, so fixtures shared within a file
# are seldom built twice. Byte code is written, for the many processes that tests start.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Built from the whole checkout, so that links work as in the repository. Warnings are errors.
SITE := $(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/site

.DEFAULT_GOAL := help
.PHONY: help demo readme cards evidence faults matrix bench docs test test-all test-web test-sanitized \
	test-lowest test-newest dist check format clean again

help: ## this list
	@echo "make TARGET [PYTHON=python3.12]; the first use sets up .venv, which needs Python 3.11 or newer and pip"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

demo: $(NATIVE) ## train a small network with and without attention, and report the difference (demo-report/)
	$(BIN)/cbam compare --out demo-report --overwrite
	@echo "The report is in demo-report/: open report.html, or read report.md"

readme: $(NATIVE) ## put the image and the table of the last demo into README.md
	$(BIN)/python -m docs.fill_readme demo-report

cards: $(READY) ## write docs/methods/, a card for each attention module, and the tables of docs/dialects.md
	$(BIN)/python -m docs.fill_methods
	$(BIN)/python -m docs.fill_dialects

evidence: $(READY) ## compute the tables of results/ from their records, and docs/evidence.md from those
	$(BIN)/python -m docs.fill_evidence
	$(BIN)/python -m docs.fill_boxes
	$(BIN)/python -m docs.fill_runtimes

faults: $(READY) ## write tests/FAULTS.md: which test covers which fault, and which are open
	$(BIN)/python -m docs.fill_faults

matrix: $(NATIVE) ## attach to every network of the matrix and write docs/matrix.md (resumes where it stopped)
	$(BIN)/python -m benchmarks.matrix

bench: $(NATIVE) ## measure what attention costs here (correctness first), and put it into docs/kernels.md
	$(BIN)/cbam bench --compiled --out benchmarks/results
	$(BIN)/python -m docs.fill_kernels

docs: $(READY) ## build the documentation site (build/site/index.html)
	$(SITE)
	@echo "The site is in build/site/: open build/site/index.html"

test: $(NATIVE) ## the tests, with a sample of the large matrices (at most 8 minutes on 2 cores)
	$(PYTEST) -m "not large"

test-all: $(NATIVE) ## every test
	$(PYTEST)

# In an environment of its own: Gradio restricts the Pillow version and takes 300 MB.
test-web: $(READY) ## the tests of `cbam serve` in a real browser (sets up .venv-web; needs chromium)
	$(BIN)/python -m venv .venv-web
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$(.venv-web/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outer.pth"
	.venv-web/bin/python -m pip install --quiet "gradio>=6.31" "scikit-image>=0.25" "playwright>=1.50"
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv-web/bin/python -m pytest tests/app/test_serve.py

test-sanitized: $(READY) ## the CPU kernels under the address and undefined-behaviour sanitizers
	$(BIN)/python -m pytest tests/native/test_sanitized.py -m large -rs

test-lowest: ## the tests with the oldest versions that pyproject.toml allows (in .venv-lowest, 8 GB)
	$(call tested-with,lowest,lowest-direct)

test-newest: ## the tests with the newest released versions (in .venv-newest, 8 GB)
	$(call tested-with,newest,highest)

# With uv, because pip cannot resolve to the lowest versions.
define tested-with
"$(PYTHON)" -m venv .venv-$(1)
.venv-$(1)/bin/python -m pip install --quiet uv
.venv-$(1)/bin/uv pip install --python .venv-$(1)/bin/python --upgrade --resolution $(2) --editable ".[dev]"
.venv-$(1)/bin/python tools/environment.py .venv-$(1) native
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv-$(1)/bin/python -m pytest -n 2 --dist worksteal -m "not large"
endef

dist: $(READY) ## build the sdists and wheels of cbam and cbam-native into dist/, and try the wheels
	$(BIN)/python tools/dist.py dist

check: $(READY) ## format, lint, types, floors, GPU kernels (compiled ahead of time), the site
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pyright
	$(BIN)/python -m benchmarks.aot
	$(BIN)/python -m pytest -q tests/house/test_floors.py
	$(SITE)

format: $(READY) ## format the code and apply the safe lint fixes
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean: ## remove caches, reports and builds (.venv stays: rm -rf .venv to set up again)
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist demo-report lightning_logs native/dist native/cbam_native/*.so native/cbam_native/*.sha256
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The CPU kernels. If they cannot be built, one line says so, and everything runs without them.
$(NATIVE): $(READY) $(wildcard native/*.py native/*.toml native/csrc/* native/cbam_native/*.py)
	@"$(PYTHON)" tools/environment.py $(VENV) native
	@touch $@

# The stamp is written last, so that an interrupted set-up does not count as finished. `again` repeats the set-up
# if the interpreter of .venv no longer exists.
$(READY): pyproject.toml tools/environment.py $(if $(wildcard $(BIN)/python),,again)
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "$(PYTHON) was not found: install Python 3.11 or newer, or run make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$("$(PYTHON)" --version 2>&1): run make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" tools/environment.py $(VENV)
	@touch $@

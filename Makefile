# make quickstart   sets itself up and runs the main job on the bundled pages
# make test         sets itself up and runs all tests
# make check        lint and types
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test unit check kenlm clean

quickstart: $(VENV)/.curation
	$(BIN)/gristmill run configs/quickstart.toml

# KenLM's lmplz is built on the way (3 minutes, once per user); where it cannot be, its tests are skipped, and say so
test: $(VENV)/.dev
	@tools/build_kenlm.sh || echo "kenlm: lmplz cannot be built here" >&2
	$(BIN)/python -m pytest

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not ray and not train and not browser and not corpus and not lmplz and not kill"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy filters stages pipeline trainer

# KenLM's lmplz, which gristmill train-lm calls: built from the package's source, kept in .kenlm/
kenlm:
	tools/build_kenlm.sh

clean:
	rm -rf runs artifacts

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "no virtual environment: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.curation: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[train,dev,s3,ner,cluster]'
	@touch $@ $(VENV)/.curation

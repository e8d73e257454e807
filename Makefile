# make quickstart   sets itself up and runs the main job on the bundled pages
# make unit         tests without Ray, torch, network or GPU: a minute
# make test         unit and integration tests, 25 examples of each property
# make test-rest    what `make test` leaves out: kill, chaos and cluster tests, 500 examples
# make test-all     every test but the soak, 500 examples
# make test-soak    200 kills at random over batches and a training: half an hour; SOAK_KILLS=20 for fewer
# make check        lint and types
# make cost         renders docs/cost.md from the figures in benchmarks/
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart unit test test-rest test-all test-cuda test-soak check lint kenlm clean

quickstart: $(VENV)/.curation
	$(BIN)/gristmill run configs/quickstart.toml

# two workers; the tests of a module, and all those that need Ray, stay on one of them
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadgroup
UNIT = tests/filters tests/stages tests/pipeline/config tests/pipeline/controller \
       tests/trainer/telemetry/test_feedback.py tests/test_imports.py

unit: $(VENV)/.dev
	$(PYTEST) -p tests.support.without_trainer $(UNIT) -m "not ray and not train and not kill"

test: $(VENV)/.dev lmplz
	$(PYTEST) -m "not kill and not cuda"

test-rest: $(VENV)/.dev lmplz
	$(PYTEST) -m "(kill or hypothesis or cuda) and not soak" --hypothesis-profile=thorough

test-all: $(VENV)/.dev lmplz
	$(PYTEST) --hypothesis-profile=thorough

# of torch 2.11: an image for GPUs is often behind
test-cuda: $(VENV)/.dev .venv-cuda/.done
	$(PYTEST) tests/test_cuda.py

.venv-cuda/.done:
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check torch==2.11.0 'numpy<2.2' pydantic
	@touch $@

test-soak: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_soak.py -m soak -s

# KenLM's lmplz takes 3 minutes to build, once per user; where it cannot be built, its tests are
# skipped and say so
.PHONY: lmplz
lmplz:
	@tools/build_kenlm.sh || echo "kenlm: lmplz cannot be built here" >&2

check lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy filters stages pipeline trainer

.PHONY: cost
cost: $(VENV)/.curation
	$(BIN)/python -m benchmarks.cost_page

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

# streaming asks for torchvision, and its wheel is CUDA's: beside a CPU build of torch it raises when imported,
# and transformers with it, which imports one that is installed. Neither needs it for text.
$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[train,dev,s3,ner,cluster]'
	@$(BIN)/python -c 'import torchvision' 2> /dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	@touch $@ $(VENV)/.curation

# make search   quick search and retraining on handwritten digits, from nothing
# make test     the test suite
# make docs     the documentation, in site/
# TORCH chooses the torch packages, e.g. make test TORCH=torch==2.13.0
PYTHON ?= python3
TORCH ?= torch torchvision
VENV ?= .venv
RUN ?= runs/quick
OUT ?= runs/gpu_check

BIN := $(VENV)/bin
TORCH_READY := $(VENV)/torch-$(shell echo "$(TORCH)" | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/installed
SOURCES := pyproject.toml $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)

.PHONY: install search test test-slow lint docs clean gpu-check

install: $(INSTALLED)

# another TORCH gets a new environment: torch and torchvision must fit each other
$(TORCH_READY):
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet $(TORCH) "setuptools>=77" wheel ninja pybind11
	touch $@

# no isolation: the extension is built against the torch in this environment
$(INSTALLED): $(TORCH_READY) $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev,log,report,cluster,nasbench,webdataset,export]"
	touch $@

search: install
	$(BIN)/rfdarts search --preset quick --out $(RUN)/search
	$(BIN)/rfdarts train --preset quick --genotype $(RUN)/search/genotype.json --out $(RUN)/train
	@echo; echo "genotype     $(RUN)/search/genotype.json"; cat $(RUN)/search/genotype.json
	@echo "search run   $(RUN)/search"; echo "training run $(RUN)/train"

test: install
	$(BIN)/python -m pytest -m "not slow" -n auto --dist worksteal

test-slow: install
	-$(BIN)/pip install --quiet "rfdarts_fast[fuzz]"
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pip finds the package installed and adds the extra; the variable silences a notice about a later MkDocs
docs: install
	$(BIN)/pip install --quiet "rfdarts_fast[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

clean:
	rm -rf $(VENV) build site *.egg-info rfdarts_fast/ops/*.so

# on a machine with a GPU: builds, tests, measures and sanitizes into OUT; GPU_CHECK=--quick takes two minutes
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --out $(OUT) $(GPU_CHECK)

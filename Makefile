# make search   quick search and retraining on handwritten digits, from nothing
# make test     the test suite
# TORCH chooses the torch packages, e.g. make test TORCH=torch==2.13.0
PYTHON ?= python3
TORCH ?= torch torchvision
VENV ?= .venv
RUN ?= runs/quick

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(shell echo "$(TORCH)" | cksum | cut -d' ' -f1)
SOURCES := pyproject.toml $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)

.PHONY: install search test test-slow lint clean

install: $(INSTALLED)

# build tools first: the extension is built against the torch in this environment
$(INSTALLED): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) "setuptools>=77" wheel ninja pybind11
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev,log]"
	rm -f $(VENV)/installed-*
	touch $@

search: install
	$(BIN)/rfdarts search --preset quick --out $(RUN)/search
	$(BIN)/rfdarts train --recipe quick --genotype $(RUN)/search/genotype.json --out $(RUN)/train
	@echo; echo "genotype     $(RUN)/search/genotype.json"; cat $(RUN)/search/genotype.json
	@echo "search run   $(RUN)/search"; echo "training run $(RUN)/train"

test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info rfdarts_fast/*.so

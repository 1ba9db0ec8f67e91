# blocktune: set up once, then search, test and lint. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help search test lint clean

help:  ## this list
	@echo "blocktune: what each block of a diffusion transformer should do at each step"
	@sed -n 's/^\([a-z]*\):.*##\(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

search: $(STAMP)  ## search policies for the bundled reference model; results in runs/reference; goes on where it stopped
	$(BIN)/blocktune search $(if $(wildcard runs/reference/config.yaml),--resume)

test: $(STAMP)  ## run every test
	@# How many processes, and that those which wait for searches run first: tests/conftest.py. One thread each: torch's own
	@# threads in two processes would wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## ruff (rules and format) and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean:  ## remove the environment and caches; results in runs/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# A second call installs nothing: the stamp is as new as what it was made from.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"$(PYTHON) is {sys.version.split()[0]}; blocktune needs 3.11 or newer: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all]'
	@# pyright does not run the import hook of the editable install: it reads blocktune.* through this link
	@mkdir -p $(VENV)/names && ln -sfn ../.. $(VENV)/names/blocktune
	@touch $@

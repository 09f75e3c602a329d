# `make help` lists what there is. Everything runs in .venv, made on first use from the one tested lock (constraints.txt).
PYTHON ?= python3
# Where only the CPU build of torch is wanted and the default one carries CUDA (Linux on x86-64): the address of PyTorch's
# CPU packages, as its "Get started" page shows it, e.g. make demo TORCH_INDEX=https://...
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-browser lint lab site serve pdf shakespeare chat bench notebook notebooks readme zip clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */	/' | expand -t 16

$(VENV)/.package: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, and $(PYTHON) is older; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "Making .venv (once; torch is the large part) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.development: $(VENV)/.package
	@echo "Adding JupyterLab, nbdev and the test tools to .venv (once) ..."
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.peers: $(VENV)/.package
	@echo "Adding the peers that the benchmark measures to .venv (once) ..."
	@$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.pdf: $(VENV)/.development
	@echo "Adding Pandoc and Typst to .venv (once) ..."
	@$(PIP) -e '.[pdf]'
	@touch $@

demo: $(VENV)/.package  ## train a 5,162-parameter transformer to count, in seconds
	@$(BIN)/transformer-llm demo

shakespeare: $(VENV)/.package  ## train a small character model on Shakespeare, in about a minute
	@$(BIN)/transformer-llm shakespeare

chat: $(VENV)/.package  ## fetch SmolLM2, a real language model (93 MB), and talk to it
	@$(BIN)/transformer-llm chat --model smollm2

bench: $(VENV)/.peers  ## measure the book's code against other people's, in about 25 minutes (QUICK=1: under five)
	@$(BIN)/transformer-llm bench $(if $(QUICK),--quick) --output $(or $(OUTPUT),runs/benchmark.json)

lint: $(VENV)/.development  ## read modules, tools, tests and cells for faults and long lines (ruff; also part of make test)
	@$(BIN)/python tools/check.py linted cells_are_well_formed

lab: $(VENV)/.development  ## open the book in JupyterLab
	@$(BIN)/jupyter lab nbs/index.ipynb

test: $(VENV)/.development  ## check that book and package agree, run every notebook and every test
	@$(BIN)/python tools/run.py

test-browser: $(VENV)/.development  ## read the site and run JupyterLab in headless Chromium, where there is one
	@$(BIN)/python -m pytest tests/test_site.py tests/test_lab.py tests/test_your_model.py -m browser -q -rs --durations=5

site: $(VENV)/.development  ## build the site into _docs (DRAFT=1: even if pages or references are missing)
	@$(BIN)/python book/build.py $(if $(DRAFT),--draft)

serve: $(VENV)/.development  ## build the site and show it at 127.0.0.1:8000
	@$(BIN)/python book/build.py --serve $(if $(DRAFT),--draft)

pdf: $(VENV)/.pdf  ## write the book as a PDF and an EPUB into build/book, in a few minutes
	@$(BIN)/python book/pdf.py

notebook: $(VENV)/.development  ## export, execute and check one notebook while you work on it: make notebook NB=08
	@test -n "$(NB)" || { echo "Which notebook? For example: make notebook NB=08"; exit 2; }
	@$(BIN)/python tools/notebook.py $(NB)

zip: $(VENV)/.development  ## write transformer_llm.zip, the book in one file, as Colab needs it while it has no address
	@$(BIN)/python tools/colab.py --zip

notebooks: $(VENV)/.development  ## export, execute and clean every notebook (what authors do before they commit)
	@$(BIN)/python tools/colab.py && $(BIN)/nbdev_export && $(BIN)/python tools/execute.py && $(BIN)/python tools/readme.py

readme: $(VENV)/.development  ## derive README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) _docs _proc build dist *.egg-info demo transformer_llm.zip .ruff_cache

# make test    sets up and runs the tests          make demo   sets up and makes a video from a prompt
# make lint    ruff, as pre-commit runs it         make clean  removes the environment and the outputs
# make recipe  trains the model that is to ship, on a GPU, whole or in slices (docs/recipe.md): runs/world
#
# PYTHON picks the interpreter. The constraints pin what continuous integration tested on it. Bytecode is made when it is used.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
VENV ?= .venv
EXTRAS ?= dev,parity
BIN := $(VENV)/bin
CONSTRAINTS := constraints/py$(VERSION).txt
OUT ?= outputs/demo

.PHONY: test demo recipe lint clean

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	touch $@

# Made only where it is missing.
$(CONSTRAINTS):
	$(error $(PYTHON) is none of the tested Pythons, 3.11 and 3.12: name one, for example PYTHON=python3.12)

# In the order of names: by their numbers of tests, the longest files would come last.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The main job from its real beginning: PyTorch checkpoints in their original layouts, here with random weights.
demo: $(VENV)/installed
	$(BIN)/python tools/random_checkpoint.py tiny $(OUT)/torch
	$(BIN)/lf-jax convert self_forcing $(OUT)/torch/self_forcing_dmd.pt $(OUT)/model --preset tiny --overwrite
	$(BIN)/lf-jax convert wan_vae $(OUT)/torch/Wan2.1_VAE.pth $(OUT)/model --overwrite
	$(BIN)/lf-jax convert umt5 $(OUT)/torch/models_t5_umt5-xxl-enc-bf16.pth $(OUT)/model --preset tiny --overwrite
	$(BIN)/lf-jax sample --model $(OUT)/model --output $(OUT) --overwrite \
	    --prompt "A red ball rolls slowly behind a white wall"

# With MINUTES=9 make ends with error 75 until everything is done: give the command again.
recipe: $(VENV)/installed
	$(BIN)/python tools/recipe.py $(if $(MINUTES),--minutes $(MINUTES))

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) outputs build *.egg-info

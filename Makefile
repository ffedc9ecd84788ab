# Every target does its own set-up: a virtual environment, and Debian packages where we are root and they are missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin

.PHONY: demo test soak check style types layers collected format evaluate-env serve-env mlflow slurm-up slurm-down debian clean
.DEFAULT_GOAL := help

help:            ## what can be made
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# Set up again when a requirement changes. The stamp is written last: an interrupted set-up is done again.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib || true  # on all processors; a few are templates
	touch $@

demo: .venv/.installed  ## one supervised run on this machine, four faults, nobody at the keyboard (1 to 8 minutes); with TRAINER=hf, Hugging Face's, with TRAINER=lightning, Lightning's, with TRAINER=pytorch, a loop of one's own
	$(BIN)/python scripts/demo.py

test: .venv/.installed debian  ## all tests, on a real Slurm and in a real browser
	$(BIN)/python -m pytest -rs -n 4 --dist loadfile --no-loadscope-reorder

soak: .venv/.installed debian  ## kill -9, a thousand times simulated and 25 times on a real Slurm; hostile input; a rehearsal of gpu_all.sh; new examples of property tests; the tests that are too long for every run
	$(BIN)/python -m benchmarks.kill_soak --kills 1000
	$(BIN)/python -m benchmarks.slurm_soak --kills 25
	$(BIN)/python -m benchmarks.hostile_inputs --mutations 20000
	PYTHON=$(BIN)/python sh benchmarks/gpu_all.sh --rehearse build/gpu-rehearsal
	KERNEL_STEPS=200 $(BIN)/python -m pytest -q -n 2 -m "soak or slow"
	$(BIN)/python -m pytest -q -n 2 --hypothesis-profile=search -m hypothesis

check: style types layers collected  ## what a reviewer would run: style, types, architecture; side by side with make -j 2

style: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/pyright

layers: .venv/.installed
	$(BIN)/lint-imports

# Every test can be imported. It also compiles them, which all workers of `make test` would do at the same time.
collected: .venv/.installed
	@said=$$($(BIN)/python -m pytest -qq --collect-only) || { echo "$$said"; exit 1; }

format: .venv/.installed  ## mend what can be mended by a tool
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

evaluate-env: .venv-evaluate/.installed  ## an environment for `opt-ops ckpt evaluate`: [evaluate] python = ".venv-evaluate/bin/python"

serve-env: .venv-serve/.installed  ## an environment for `opt-ops ckpt serve`: [serve] python = ".venv-serve/bin/python"

.venv-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

mlflow: .venv/.installed  ## serve the chronicle in MLflow on 127.0.0.1:5000
	$(BIN)/opt-ops mlflow open

slurm-up: .venv/.installed debian  ## a real Slurm with four nodes on this machine
	@$(BIN)/python tests/slurm/cluster.py up

slurm-down:      ## stop it, and all that interrupted tests have left of theirs, without a trace
	@$(PYTHON) tests/slurm/cluster.py down

# Only the tests need these. Where we are not root, what is missing makes tests skip and say so.
debian:
	@sh scripts/debian.sh

clean:           ## forget the virtual environment
	rm -rf .venv .venv-evaluate .venv-serve

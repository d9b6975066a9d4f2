# Two commands do everything on a machine with Python and make: `make demo` and `make test`.
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# -qq: errors only; the versions are in constraints.txt, so there is nothing else to read.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -qq install --no-input -c constraints.txt
PINS := pyproject.toml constraints.txt

.PHONY: help demo test test-slow bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install and run the main job on synthetic data (a few minutes)"
	@echo "make test       install what tests need; format, lint, types, fast tests"
	@echo "make test-slow  also torch and JAX (large); the slow tests"
	@echo "make bench      pneumoscope beside the plain Keras procedure (up to an hour)"
	@echo "make clean      remove the environment and the tools' caches; results stay"

demo: $(VENV)/.runs
	$(BIN)/pneumoscope demo --output $(DEMO)
	@echo "The result is in $(DEMO)"

test: $(VENV)/.tests
	scripts/check

# These start Slurm or measure memory, and run one by one on the whole machine; the others two at a time.
ALONE := $(addprefix tests/test_,batch.py jobs.py serving_hostile.py)

test-slow: $(VENV)/.tests-slow
	@$(BIN)/pytest -m slow -n 2 --dist loadfile $(addprefix --ignore=,$(ALONE))
	@$(BIN)/pytest -m slow $(ALONE)

bench: $(VENV)/.runs
	$(BIN)/python benchmarks/bench.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts notebooks benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is remade when the pins change; pip then changes only what differs.
$(VENV)/.runs: $(BIN)/python $(PINS)
	@echo "Installing pneumoscope into $(VENV) (about 2 GB; minutes on a first run) ..."
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.tests: $(BIN)/python $(PINS)
	@echo "Installing pneumoscope and what its tests need into $(VENV) (about 2 GB; minutes on a first run) ..."
	@$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.runs

# The registry's torch for Linux brings gigabytes of CUDA along; where a CPU build is at hand, name its place in
# PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL and pip prefers it: 2.13.0+cpu fits the pin 2.13.0.
$(VENV)/.tests-slow: $(VENV)/.tests
	@echo "Installing torch and JAX into $(VENV) ..."
	@$(INSTALL) -e '.[dev,jax,torch]'
	@touch $@

# Order matters: a half-made environment is removed, so that the next call does not take it for a whole one.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no '$(PYTHON)' here; install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("$(PYTHON) is Python %d.%d; 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=python3.12" % v)'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) comes without venv; install it (on Debian and Ubuntu: apt-get install python3-venv) and run make again." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

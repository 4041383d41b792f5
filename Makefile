# Set up and run everything: `make demo` and `make test` are all a newcomer needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyTorch's own index of CPU wheels, for Linux x86-64 without a GPU:
#   make demo TORCH_INDEX=<address of the index>
TORCH_INDEX ?=
TORCH := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
DEMO_FLAGS ?=

.PHONY: demo test faults lint bench clean mosquitto tools flower

demo: $(VENV)
	$(BIN)/fleet-replay demo --out runs $(DEMO_FLAGS)

# The folder's own time stamp would follow every change in it: a file in it marks it complete.
$(VENV): $(VENV)/complete

$(VENV)/complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"Python 3.10 to 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11 …")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "this Python can't make virtual environments: install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# Flower holds libraries below what the others need, so it has an environment of its own: of it, Ray
# and the aggregator's libraries, without torch. Its tests are skipped where it is not made.
FLOWER := .venv-flower
flower: $(FLOWER)/complete

$(FLOWER)/complete: pyproject.toml constraints-flower.txt
	$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[flower]' -c constraints-flower.txt
	@touch $@

mosquitto:
	@sh scripts/install_mosquitto.sh

tools: $(VENV)
	@sh scripts/install_test_tools.sh $(VENV)

# Many tests wait for real processes most of the time: three run at once, also on two cores.
test: $(VENV) mosquitto tools
	$(BIN)/python -m pytest -n 3 --dist worksteal

# Kills everything everywhere, about 500 times, and prints what became of every update.
FAULTS_FLAGS ?=
faults: $(VENV) mosquitto
	$(BIN)/python -m tests.faults $(FAULTS_FLAGS)
	$(BIN)/python -m tests.fuzz --inputs 100000

lint: $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(FLOWER) runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# `make demo` and `make test` do all the set-up there is; CONTRIBUTING.md says more.
#   PYTHON=python3.12 make test     another Python
#   make test REQUIRE_SLURM=1       no Slurm is a failure instead of a skip
#   make test TESTS=tests/unit      a part of the tests
#   make bench                      checkpoints beside those of other libraries, an hour; make bench-quick, two minutes
#   make chaos                      the faults of tests/faults in full: hundreds of kills, power cuts and full disks, as root
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
REQUIRE_SLURM ?= 0
BIN := $(VENV)/bin

.PHONY: demo test chaos bench bench-quick lint format slurm faults clean

demo: $(VENV)/.installed
	@$(BIN)/python -m examples.demo

test: $(VENV)/.installed slurm faults
	HPCCKPT_REQUIRE_SLURM=$(REQUIRE_SLURM) $(BIN)/python -m pytest $(TESTS)

chaos: $(VENV)/.installed faults
	HPCCKPT_CHAOS=1 HPCCKPT_REQUIRE_SLURM=1 $(BIN)/python -m pytest tests/faults

bench: $(VENV)/.installed
	$(BIN)/python -W ignore -m benchmarks.checkpoints saves stall restore growth --json bench.json
	$(BIN)/python -W ignore -m benchmarks.startstop --json bench.json

bench-quick: $(VENV)/.installed
	$(BIN)/python -W ignore -m benchmarks.checkpoints saves stall restore growth --quick --settle-s 0.1
	$(BIN)/python -W ignore -m benchmarks.startstop --quick

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slurm:
	@slurm/install

faults:
	@tests/faults/install

$(VENV)/.installed: pyproject.toml constraints.txt
	@./bootstrap "$(PYTHON)" "$(VENV)"
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

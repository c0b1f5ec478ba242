# Two commands set up a fresh machine with Python and make:
#   make demo   a text-to-image model of a few hundred drawings, from nothing; leaves a grid and runs/demo/pipeline
#   make test   what CI runs: lint, types, the rooms' walls, tests
# and   make test-faults   the long form of tests/faults: hundreds of killed, damaged and poisoned trainings

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
BIN := $(VENV)/bin
TIME := $(PYTHON) benchmarks/stages.py time
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo test test-faults lint clean

demo: $(VENV)/installed
	$(TIME) $(RUN)/stages.tsv data $(BIN)/ldm data openmoji data/openmoji-demo --size 64 --subset demo
	$(TIME) $(RUN)/stages.tsv vae $(LAUNCH) train/train_vae.py --config configs/demo.yaml run=$(RUN)
	$(TIME) $(RUN)/stages.tsv u-net $(LAUNCH) train/train_ldm.py --config configs/demo.yaml run=$(RUN)
	@$(PYTHON) benchmarks/stages.py report $(VENV)/stages.tsv $(RUN)/stages.tsv
	@echo "the grid is the newest picture in $(RUN)/samples, the model is $(RUN)/pipeline"
	@echo 'draw:  $(BIN)/ldm sample $(RUN)/pipeline "red heart"      serve:  $(BIN)/python app.py --model $(RUN)/pipeline'

test: $(VENV)/installed lint
	$(BIN)/python -m pytest

test-faults: $(VENV)/installed
	$(BIN)/python tests/faults/run.py --full

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(TIME) $(VENV)/stages.tsv install $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs data

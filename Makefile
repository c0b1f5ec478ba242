# Two commands set up a fresh machine with Python and make:
#   make demo   a text-to-image model in a quarter of an hour (MINUTES=15); leaves grids and runs/demo/pipeline
#   make test   lint, types, import contracts, tests; CI runs make docs, make wheel and this
# and   make wheel   install the wheel into a fresh environment; train and sample with it from another folder
#       make data-emoji  the shipped model's data: OpenMoji, recolored, with three other styles fetched by npm
#       make docs    the site, into site/, offline and strict
#       make test-faults   the long form of tests/faults: hundreds of killed, damaged and poisoned trainings
#       make bench         ratios against peers, in benchmarks/README.md; make bench-quick is a look of five minutes

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
MINUTES ?= 15
STYLES ?= noto=@iconify-json/noto@1.2.9 twemoji=@iconify-json/twemoji@1.2.5 fluent=@iconify-json/fluent-emoji-flat@1.2.6
BIN := $(VENV)/bin
TIME := $(PYTHON) benchmarks/stages.py time
BENCH ?= .venv-bench
BENCH_OUT ?= runs/bench
PEER ?= train_text_to_image.py
MODEL ?=
MEASURE := $(BENCH)/bin/python -m benchmarks.
ONTO := --out $(BENCH_OUT)
AGAINST := --peer-script $(PEER)
DRAWN := $(if $(MODEL),--model $(MODEL) --data data/openmoji --net nets/openmoji)
DONE = echo 'the newest grid is in $(RUN)/samples, the model is $(RUN)/pipeline'; echo 'sample:  $(BIN)/ldm sample $(RUN)/pipeline "red heart"      serve:  $(BIN)/ldm app --model $(RUN)/pipeline'
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo demo-with-vae data-emoji docs test wheel test-faults lint bench bench-quick bench-env clean

demo: $(VENV)/installed
	$(TIME) $(RUN)/stages.tsv data $(BIN)/ldm data openmoji data/openmoji-demo --size 64 --subset demo
	$(TIME) $(RUN)/stages.tsv u-net $(LAUNCH) train/train_ldm.py --config configs/demo.yaml run=$(RUN) vae=models/emoji loop.minutes=$(MINUTES) doctor=false
	@$(PYTHON) benchmarks/stages.py report $(VENV)/stages.tsv $(RUN)/stages.tsv
	@$(DONE)

# the whole road: a VAE of its own, too, and the recipe's own number of steps
demo-with-vae: $(VENV)/installed
	$(TIME) $(RUN)/stages.tsv data $(BIN)/ldm data openmoji data/openmoji-demo --size 64 --subset demo
	$(TIME) $(RUN)/stages.tsv vae $(LAUNCH) train/train_vae.py --config configs/demo.yaml run=$(RUN)
	$(TIME) $(RUN)/stages.tsv u-net $(LAUNCH) train/train_ldm.py --config configs/demo.yaml run=$(RUN)
	@$(PYTHON) benchmarks/stages.py report $(VENV)/stages.tsv $(RUN)/stages.tsv
	@$(DONE)

test: $(VENV)/installed lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

wheel:
	PYTHON=$(PYTHON) tests/wheel.sh

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test-faults: $(VENV)/installed
	$(BIN)/python tests/faults/run.py --full

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BENCH)/installed $(PEER) data/openmoji/metadata.jsonl runs/openmoji64/vae/config.json nets/openmoji/net.json
	$(MEASURE)mfu $(ONTO)
	$(MEASURE)memory $(ONTO) $(AGAINST) --settings A --pictures 96
	$(MEASURE)train_throughput $(ONTO) $(AGAINST) --steps 12 --warmup 2 --pictures 224
	$(MEASURE)time_to_quality $(ONTO) $(AGAINST) --vae runs/openmoji64/vae --net nets/openmoji
	$(MEASURE)sampling $(ONTO) $(DRAWN)
	$(MEASURE)startup $(ONTO) --explain
	$(MEASURE)scaling $(ONTO)

bench-quick: $(BENCH)/installed $(PEER) data/openmoji/metadata.jsonl
	$(MEASURE)mfu $(ONTO) --pairs 2
	$(MEASURE)memory $(ONTO) $(AGAINST) --settings C --pairs 1 --pictures 48 --batch-size 8
	$(MEASURE)train_throughput $(ONTO) $(AGAINST) --pairs 1 --pictures 48 --batch-size 8 --steps 4 --warmup 2 --no-search --no-defaults
	$(MEASURE)sampling $(ONTO) --quick
	$(MEASURE)startup $(ONTO) --quick
	$(MEASURE)scaling $(ONTO) --quick

bench-env: $(BENCH)/installed

# the peer imports torchvision, so both sides run with the torch that its newest release wants, a CUDA build of gigabytes
$(BENCH)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	(grep -v '^torch==' constraints.txt; echo torch==2.14.1; echo torchvision==0.29.1) > $(BENCH)/constraints.txt
	$(BENCH)/bin/python -m pip install --quiet --constraint $(BENCH)/constraints.txt torchvision --editable '.[demo,app,metrics,track]'
	@touch $@

# with three other designers' emoji, if npm is there: icon packages of 1 to 3 MB
data-emoji: $(VENV)/installed
	@for style in $(STYLES); do \
	  package=$${style#*=}; name=$${style%%=*}; folder=data/icons/$$name; \
	  if [ -f $$folder/package/icons.json ]; then continue; fi; \
	  if ! command -v npm > /dev/null; then echo "npm is missing, so $$name's emoji are left out (npm pack $$package)"; continue; fi; \
	  mkdir -p $$folder; echo "downloading $$package with npm"; \
	  (cd $$folder && tar xzf "$$(npm pack --silent $$package)") || exit 1; \
	done
	$(BIN)/ldm data emoji data/emoji $$(for style in $(STYLES); do name=$${style%%=*}; \
	  if [ -f data/icons/$$name/package/icons.json ]; then echo --style $$name=data/icons/$$name; fi; done)

data/openmoji/metadata.jsonl:
	$(BENCH)/bin/ldm data openmoji data/openmoji --size 64

runs/openmoji64/vae/config.json:
	$(BENCH)/bin/python train/train_vae.py --config configs/openmoji64.yaml

nets/openmoji/net.json:
	$(BENCH)/bin/ldm evaluate --data data/openmoji --fit-net

$(PEER):
	@echo "$@ is missing: name diffusers' examples/text_to_image/train_text_to_image.py with PEER=PATH (benchmarks/README.md)"; exit 1

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(TIME) $(VENV)/stages.tsv install $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH) runs data

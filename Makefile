# make quickstart   install, make the small actor and its drafter, train: a whole run, with or without a GPU
# make test         install, run the tests but for the long ones: some 12 to 19 minutes on two cores with bf16 instructions
# make test-long    install, run the long ones: kills by the dozen, runs over two hosts, hundreds of pushes
# make test-gpu     install, run the tests that need GPUs; results in OUT and docs/gpu.md. With GPU_PYTHON=python3, say,
#                   nothing is installed: that Python has to have everything, see docs/gpu.md
# make mutation     install, plant mutants in the pure modules and count those that the tests notice; ARGS="data --most 5"
# All can be repeated: what is done is skipped. PIP_FLAGS goes to every pip install (an index of CPU wheels, say).

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUICKSTART := .cache/quickstart
WORKERS ?= 2

GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
RANKS := $(if $(filter 1,$(GPUS)),1,2)
ifeq ($(GPUS),0)
export DS_ACCELERATOR := cpu
endif
export DS_BUILD_OPS := 0
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1

.PHONY: quickstart actor drafter test test-long test-gpu mutation lint clean

quickstart: drafter
	$(BIN)/deepspeed --quiet --num_gpus $(RANKS) launch/train.py --config configs/quickstart.yaml actor.parallel.tp=$(RANKS) $(ARGS)

actor: $(INSTALLED)
	OMP_NUM_THREADS=2 $(BIN)/python tools/make_actor.py --recipe configs/quickstart-actor.yaml --out $(QUICKSTART)/actor

drafter: actor
	OMP_NUM_THREADS=2 $(BIN)/python tools/train_drafter.py --recipe configs/quickstart-drafter.yaml \
	  --actor $(QUICKSTART)/actor --data $(QUICKSTART)/actor/data/train.jsonl --out $(QUICKSTART)/drafter

# Files go to the workers whole: their fixtures are engines and models. And in the order of tests/durations.json, the
# longest first, so that all workers end together.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore=tests/gpu

test: $(INSTALLED)
	$(BIN)/ruff check
	$(PYTEST) -m "not long" $(ARGS)

test-long: $(INSTALLED)
	$(PYTEST) -m long $(ARGS)

# A runner of the project's own, tests/mutation; CONTRIBUTING.md says why, and what it has found.
mutation: $(INSTALLED)
	$(BIN)/python -W ignore -m tests.mutation --workers $(WORKERS) $(ARGS)

OUT ?= runs/gpu-results.json
GPU_PYTHON ?=

test-gpu: $(if $(GPU_PYTHON),,$(INSTALLED))
	RESPEC_GPU_RESULTS=$(abspath $(OUT)) $(or $(GPU_PYTHON),$(BIN)/python) -m pytest tests/gpu $(ARGS); status=$$?; \
	  $(or $(GPU_PYTHON),$(BIN)/python) -m tests.gpu.results $(OUT) docs/gpu.md && exit $$status

lint: $(INSTALLED)
	$(BIN)/ruff check

# torch comes first because deepspeed's build imports it; sglang and torchvision come last on a machine without a GPU,
# without their dependencies, which name CUDA packages.
$(INSTALLED): requirements.txt requirements-cpu.txt requirements-cpu-nodeps.txt setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PIP_FLAGS) "setuptools>=69" wheel torch==2.13.0
ifeq ($(GPUS),0)
	$(BIN)/pip install -q $(PIP_FLAGS) --no-build-isolation -r requirements-cpu.txt
	$(BIN)/pip install -q $(PIP_FLAGS) --no-deps -r requirements-cpu-nodeps.txt
else
	$(BIN)/pip install -q $(PIP_FLAGS) --no-build-isolation -r requirements.txt
endif
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) .cache

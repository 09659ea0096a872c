# Every target installs what it needs by itself; `make help` lists them.
BIN := .venv/bin
comma := ,
SEEDS ?=
ROUNDS ?= 5
MINUTES ?= 40
# One round: a larger week of comparisons, and PPO on the SFT model.
DEMO := configs/demo.toml $(if $(filter 1,$(ROUNDS)),--set rounds=none --set pairs.num_prompts=5000 --set ppo.num_steps=30)
RUN := runs/demo$(if $(filter 1,$(ROUNDS)),-round)

.DEFAULT_GOAL := help
.PHONY: help install demo reproduce smollm2 test test-fast test-gpu check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install:  ## create .venv (DEVICE=cpu|cuda; found out by itself)
	@scripts/install.sh

demo: install  ## V1 to V5 in miniature; ROUNDS=1 a single round with PPO; SEEDS=0,1,2 once per seed
ifeq ($(SEEDS),)
	$(BIN)/rlhf-ray run $(DEMO) --out $(RUN)
else
	set -e; for seed in $(subst $(comma), ,$(SEEDS)); do \
	    $(BIN)/rlhf-ray run $(DEMO) --out $(RUN)-seed$$seed --set run.seed=$$seed; \
	done
	$(BIN)/rlhf-ray report $(foreach seed,$(subst $(comma), ,$(SEEDS)),$(RUN)-seed$(seed))
endif

reproduce: install  ## the recipe's claims over seeds 0 to 4, in parts: MINUTES=40 a call, then again
	$(BIN)/python benchmarks/reproduce.py --minutes $(MINUTES)

smollm2: install  ## a pretrained chat model on HH-RLHF in PREFERENCES=DIR; results in runs/smollm2
	scripts/smollm2.sh $(PREFERENCES)

# One compute thread per process: two that spin on two shared cores are several times slower than one.
test test-fast: export OMP_NUM_THREADS := 1

test: install  ## every test
	$(BIN)/python -m pytest

test-fast: install  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

test-gpu: install  ## what needs a GPU, in parts of four minutes; lines of JSON in runs/gpu_check
	$(BIN)/python scripts/gpu_check.py

check: install  ## lint, format, types and links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_links.py

clean:  ## remove what was installed and built; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

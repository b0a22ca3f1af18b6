# The verbs every paper offers from inside its folder. A paper's Makefile sets PAPER and includes this file.
# With an environment of your own: make PYTHON=python ...
ROOT := $(abspath $(dir $(lastword $(MAKEFILE_LIST)))/..)
PYTHON ?= $(ROOT)/.venv/bin/python
RECIPE ?= tiny
GPUS ?= 1
export PYTHONPATH := $(ROOT)
run = cd $(ROOT) && $(PYTHON) -m
# one process, or one per GPU
launch = cd $(ROOT) && $(PYTHON) -m $(if $(filter 1,$(GPUS)),,common.run.launch $(GPUS))
data = $(if $(DATA),--data $(abspath $(DATA)))
.DEFAULT_GOAL := reproduce
.PHONY: setup reproduce train evaluate test smoke bench

setup:
ifeq ($(origin PYTHON),file)
	@$(ROOT)/tools/setup.sh $(PAPER)
endif

reproduce train: setup
	$(launch) papers.$(PAPER).train $(RECIPE) $(data) $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

evaluate: setup
	@[ -n "$(CHECKPOINT)" ] || { echo "which checkpoint? CHECKPOINT=run folder or file of weights" >&2; exit 2; }
	$(launch) papers.$(PAPER).evaluate $(abspath $(CHECKPOINT)) $(if $(filter command environment,$(origin RECIPE)),--recipe $(RECIPE)) $(data) $(ARGS)

test: setup
	$(run) pytest papers/$(PAPER) $(ARGS)

smoke: setup
	$(ROOT)/ci/smoke.sh $(PAPER) $(PYTHON)

bench: setup
	@[ -e $(ROOT)/papers/$(PAPER)/bench.py ] || { echo "$(PAPER) has no benchmark of its own" >&2; exit 2; }
	$(run) papers.$(PAPER).bench $(data) $(ARGS)

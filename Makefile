# make help    says what there is
PAPER ?=
RECIPE ?= tiny
PAPERS := $(sort $(notdir $(patsubst %/,%,$(dir $(wildcard papers/*/recipes.py)))))
PYTHON := .venv/bin/python
one-paper = $(if $(filter $(PAPER),$(PAPERS)),,$(error $(if $(PAPER),no paper '$(PAPER)',which paper? PAPER=...); there are: $(PAPERS)))
# Paths are meant from here, not from the paper's folder.
paths = $(foreach name,DATA CHECKPOINT,$(if $($(name)),$(name)=$(abspath $($(name)))))
in-paper = @+$(one-paper)$(MAKE) --no-print-directory -C papers/$(PAPER) $@ $(paths)
.DEFAULT_GOAL := help
.PHONY: help setup list reproduce smoke train evaluate test test-long bench report tables plan lint new_paper clean

help:  ## this list
	@grep -hE '^[a-z_-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup:  ## make the environment (.venv); with PAPER=, also what that paper needs
	@$(if $(PAPER),$(one-paper))tools/setup.sh $(PAPER)

list:  ## papers, their recipes, and what each needs
	@python3 tools/list.py

reproduce:  ## train, evaluate and report: PAPER=shiftvit [RECIPE=tiny] [DATA=folder] [GPUS=1] [SEEDS="0 1 2"] [ARGS=...]
	$(in-paper)

smoke:  ## the tiny recipe cut to seconds, interrupted and resumed: PAPER=
	$(in-paper)

train:  ## train only: as reproduce
	$(in-paper)

evaluate:  ## a checkpoint: PAPER= CHECKPOINT=run-folder-or-file [RECIPE=] [DATA=]
	$(in-paper)

test:  ## the tests; with PAPER=, one paper's
	@$(if $(PAPER),$(one-paper))for p in $(or $(PAPER),$(PAPERS)); do tools/setup.sh $$p || exit 1; done
	$(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile $(if $(PAPER),papers/$(PAPER)) $(ARGS)

test-long:  ## what takes minutes: kills, several hosts; with PAPER=, one paper's
	@$(if $(PAPER),$(one-paper))for p in $(or $(PAPER),$(PAPERS)); do tools/setup.sh $$p || exit 1; done
	$(PYTHON) -m pytest --long $(if $(PAPER),papers/$(PAPER)) $(ARGS)

bench: setup  ## kernels and the networks that use them against their baselines; with PAPER=, one paper's
	$(if $(PAPER),$(in-paper),@for m in common.kernels papers.shiftvit papers.smlpnet; do $(PYTHON) -m $$m.bench $(ARGS) || exit; done)

report: setup  ## one page over all runs: runs/report.html
	@$(PYTHON) -m tools.report $(ARGS)

tables:  ## write the READMEs' tables anew from papers/*/results
	@for p in $(PAPERS); do tools/setup.sh $$p || exit 1; done
	@$(PYTHON) -m tools.tables $(ARGS)

plan: setup  ## what a full-scale recipe will cost: PAPER= RECIPE= [ARGS="--gpus 8"]
	@$(one-paper)$(PYTHON) -m tools.plan $(PAPER) $(RECIPE) $(ARGS)

lint: setup  ## ruff
	@$(PYTHON) -m ruff check .

new_paper: setup  ## lay out an eleventh paper: NAME=
	@$(PYTHON) -m tools.new_paper $(NAME)

clean:  ## remove the environment and caches; runs stay
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make help    says what there is
VARIABLES := PAPER RECIPE DATA CHECKPOINT INPUT GPUS SEEDS ARGS NAME PYTHON
# As they were typed: a path may hold spaces and dollar signs.
$(foreach each,$(VARIABLES),$(eval override export $(each) := $$(value $(each))))
.DEFAULT_GOAL := help
VERBS := setup list reproduce smoke train evaluate demo test test-long bench report tables plan rehearse lint new_paper
.PHONY: help clean $(VERBS)

help:  ## this list
	@grep -hE '^#: |^[a-z_-]+:.*##' Makefile | sed -E 's/^#: //; s/:[^#]*## /\t/' | expand -t 12

#: setup	make the environment (.venv); with PAPER=, also what that paper needs
#: list	papers, their recipes, and what each needs
#: reproduce	train, evaluate and report: PAPER=shiftvit [RECIPE=tiny] [DATA=folder] [GPUS=1] [SEEDS="0 1 2"] [ARGS=...]
#: smoke	the tiny recipe cut to seconds, interrupted and resumed: PAPER=
#: train	as reproduce
#: evaluate	a checkpoint: PAPER= CHECKPOINT=run-folder, file or shipped [RECIPE=] [DATA=]
#: demo	a picture or video of yours: PAPER= [INPUT=file] [CHECKPOINT=, the shipped weights] [ARGS=...]
#: test	the tests; with PAPER=, one paper's
#: test-long	what takes minutes: kills, several hosts; with PAPER=, one paper's
#: bench	kernels and the networks that use them against their baselines; with PAPER=, one paper's
#: report	one page over all runs: runs/report.html
#: tables	write the READMEs' tables anew from papers/*/results
#: rehearse	full-scale recipes walked without their data and a GPU: [PAPER=] [RECIPE=] [ARGS="--views -1 --data whole"]
#: plan	what a full-scale recipe will cost: PAPER= RECIPE= [ARGS="--gpus 8"]
#: lint	ruff
#: new_paper	lay out an eleventh paper: NAME=
$(VERBS):
	@tools/do.sh $@

clean:  ## remove the environment and caches; runs stay
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

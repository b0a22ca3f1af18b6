# The verbs every paper offers from inside its folder. A paper's Makefile sets PAPER and includes this file.
# With an environment of your own: make PYTHON=python ...
VARIABLES := PAPER RECIPE DATA CHECKPOINT INPUT GPUS SEEDS ARGS PYTHON
# As they were typed: a path may hold spaces and dollar signs.
$(foreach each,$(VARIABLES),$(eval override export $(each) := $$(value $(each))))
.DEFAULT_GOAL := reproduce
VERBS := setup reproduce train evaluate demo test test-long smoke bench plan
.PHONY: $(VERBS)

$(VERBS):
	@[ -e ../../tools/do.sh ] || { echo "error: make needs tools/ of the whole checkout beside papers/; without it:" \
	  "python -m papers.$(PAPER) RECIPE, from the folder that holds papers/ and common/" >&2; exit 2; }
	@../../tools/do.sh $@

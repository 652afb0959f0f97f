# make demo: everything on the built-in corpus, no download. make help: the list.
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
DEMO    = build/demo
# Small enough for two cores and a few minutes. Without options, the scripts do the published run.
SMALL   = --hidden 96 --validation 800 --epochs 5 --batch-tokens 800 --negatives 400 --lr 0.006 --table-lr 0.006 \
          --dropout 0.2 --word-dropout 0
HEADS   = --hidden 32 --epochs 6 --batch-tokens 800 --lr 0.006 --dropout 0

.PHONY: help setup demo test lint train tasks bench faults findings report clean

help:           ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:[^#]*## */\t/' | expand -t 12

$(VENV)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	touch $@

setup: $(VENV)/ready    ## virtual environment with the pinned packages

demo: setup     ## both scripts on the built-in corpus, in minutes, no download
	$(PY) data/sample.py --out $(DEMO)/corpus --rows 8000 --test-rows 1000 --seed 0
	AG_NEWS_DIR=$(DEMO)/corpus $(PY) ELMO.py --out $(DEMO) --overwrite $(SMALL)
	AG_NEWS_DIR=$(DEMO)/corpus $(PY) classification.py --out $(DEMO) --overwrite --bilstm $(DEMO)/bilstm.pt $(HEADS)
	@echo
	@echo 'Both scripts have run on the built-in corpus. Open these files:'
	@echo '    $(DEMO)/figures/curves_pretraining.png             perplexity after each epoch'
	@echo '    $(DEMO)/figures/confusion_trainable_test.png       which classes are taken for which'
	@echo '    $(DEMO)/classification.json                        all numbers of the classifiers'
	@echo 'Type this next; it uses the published models:'
	@echo '    $(PY) classification.py --predict "Oil prices fall."'
	@echo '    $(PY) ELMO.py --help'

lint: setup     ## check the code's style with ruff
	$(PY) -m ruff check .

test: lint      ## lint, then the test suite
	$(PY) -m pytest

train: setup    ## train the published AG News models and the baselines into models/; continues a stopped run
	$(PY) ELMO.py --overwrite --resume
	$(PY) classification.py --seeds 3 --overwrite --resume
	$(PY) classification.py --finetune --seeds 3 --overwrite --resume
	$(PY) classification.py --fields title+description --finetune --seeds 2 --overwrite --resume
	$(PY) report/baselines.py --seeds 3 --overwrite --resume

tasks: setup    ## SST and NLI on the published biLM; $SST_DIR and $NLI_DIR name their folders
	$(PY) classification.py --task sst5 --adapt 2 --overwrite --resume
	$(PY) classification.py --task sst2 --adapt 2 --overwrite --resume
	$(PY) classification.py --task nli --adapt 1 --epochs 3 --overwrite --resume

faults: setup   ## kill runs, damage files, give wrong inputs, fill a disk; writes models/faults.json
	$(PY) tests/test_faults.py

bench: setup    ## speed on this machine, to models/bench.json
	$(PY) report/bench.py

findings: setup ## the paper's findings on the published biLM, to models/findings.json; under 90 minutes
	$(PY) report/findings.py

report: setup   ## figures, the README's results, report.pdf and the notebook's outputs from the committed files
	$(PY) report/build.py

clean:          ## delete build/, the token cache and the caches of the tests
	rm -rf build data/cache .pytest_cache .ruff_cache

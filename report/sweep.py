"""Searches options of either script with Optuna, on validation rows. No test row is scored.

    python report/sweep.py ELMO.py --trials 20 --search lr=0.002:0.02:log --search dropout=0:0.4 -- --rows 8000
    python report/sweep.py classification.py --trials 10 --search setting=trainable,function -- --epochs 1
    python ELMO.py --config build/sweep/ELMO.toml --out elsewhere       # a whole run with what the search found

A trial is a training with the options behind `--` and the searched ones. Its value is the run's lowest validation number:
mean nll per token, or mean cross-entropy per row. A stopped search continues if the same command is given again: its
finished trials are in OUT/studies.db. OUT/SCRIPT.toml has the best options so far.
"""
import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # for `python report/sweep.py`

try:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from sqlalchemy.exc import SQLAlchemyError
except ModuleNotFoundError as missing:
    print(f"sweep.py: the package {missing.name} is missing; run `pip install optuna`", file=sys.stderr)
    sys.exit(2)

import torch

import classification
import ELMO
from data.ag_news import CACHE, read_ag_news, split
from data.tasks import EncodedTexts, read_task
from data.text import Data
from run.files import InputError, folder_lock, one_line, write_atomically
from run.machine import default_device
from run.options import Parser, add_options, script
from run.progress import Run

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_EFFECT = {"adapt", "adapt_lr", "track"}         # no trial uses them
# Options that change the rows, the vocabulary or the heads: the values of two such trials cannot be compared.
FIXED = {"task", "fields", "rows", "validation", "seed", "seeds", "representation", "min_count", "phrases", "finetune",
         "save_every", "log_every"}


def bilm_trainer(config: ELMO.Config, bilstm: Path) -> tuple[str, Callable]:
    """(digest of the rows, a function that trains a biLM with some Config and returns its Run)."""
    texts = read_ag_news("train", config.rows).description.tolist()
    data = Data.of(texts, config, *split(len(texts), config.validation, config.seed), CACHE)
    device = torch.device(default_device())
    return data.digest, lambda drawn: ELMO.train(ELMO.Trainer(drawn, data, device))


def classifier_trainer(config: classification.Config, bilstm: Path) -> tuple[str, Callable]:
    """The same for heads on the biLM in the file `bilstm`; if the biLM learns too, for the first seed only."""
    elmo = ELMO.ELMo.load(bilstm, default_device())
    task = read_task(config, elmo.config)
    parts = {name: EncodedTexts(getattr(task, name), elmo, CACHE) for name in ("train", "validation")}
    seeds = range(config.seed, config.seed + (1 if config.finetune else config.seeds))
    vectors = classification.ELMoVectors(elmo.model)

    def trainer(drawn: classification.Config) -> classification.Trainer:
        return classification.Trainer(drawn, vectors, parts, len(task.labels), seeds, elmo.digest)
    return json.dumps(trainer(config).identity()), lambda drawn: classification.train(trainer(drawn))


SCRIPTS = {"ELMO.py": (ELMO.Config, bilm_trainer), "classification.py": (classification.Config, classifier_trainer)}


def search_space(searches: Sequence[str], config) -> dict:
    """{option: Optuna's distribution} of NAME=LOW:HIGH, NAME=LOW:HIGH:log and NAME=A,B,C. InputError for other texts."""
    types = {f.name: f.type for f in fields(config) if f.name not in FIXED | WITHOUT_EFFECT}
    space = {}
    for text in searches:
        name, _, choices = text.replace("-", "_", text.partition("=")[0].count("-")).partition("=")
        if name not in types:
            raise InputError(f"--search {text}: {name!r} is no option to search; the script's --help lists the options")

"""Small models and corpora that several tests share; real data only where a test says so."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import ELMO
from data import sample

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)        # small models are not faster with more, and do not wait for a busy core
SENTENCES = ["oil prices fall .", "the cat sat on the mat .", "he won the match today , said the coach .", "goal !"]


def tiny(**options) -> ELMO.Config:
    """A model of a few thousand weights that trains in a second."""
    return ELMO.Config(**{"hidden": 12, "min_count": 1, "epochs": 3.0, "batch_tokens": 60, "negatives": 8,
                          "lr": 0.01, "table_lr": 0.01, "log_every": 10_000} | options)


@pytest.fixture(scope="session")
def elmo() -> ELMO.ELMo:
    """A tiny trained model whose weights are large enough that a leak or a wrong alignment shows."""
    model = ELMO.ELMo.train(SENTENCES * 3, tiny(dropout=0.0))
    torch.manual_seed(1)
    for parameter in model.model.parameters():
        parameter.data.mul_(2)
    model.model.table.data.copy_(torch.randn_like(model.model.table))
    return model


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with train.csv (600 rows) and test.csv (100) of the built-in corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    sample.write(folder, 600, seed=0, test_rows=100)
    return folder


@pytest.fixture(scope="session")
def grammar(tmp_path_factory) -> Path:
    """A folder with 6,000 rows of the built-in corpus and a biLM that has learned its order: who acts on whom."""
    folder = tmp_path_factory.mktemp("grammar")
    sample.write(folder, 6000, seed=1, test_rows=1000)
    ELMO.ELMo.train([text for _, _, text in sample.generate(6000, seed=1)], ELMO.Config(
        hidden=128, validation=500, epochs=6.0, seed=1, batch_tokens=1000, negatives=1000, lr=0.006, table_lr=0.006,
        dropout=0.05, min_count=1, log_every=10_000)).save(folder / "bilstm.pt")
    return folder


@pytest.fixture
def builtin(corpus, monkeypatch) -> Path:
    """The same with $AG_NEWS_DIR naming it, for main(argv) in this process."""
    monkeypatch.setenv("AG_NEWS_DIR", str(corpus))
    return corpus


@pytest.fixture(scope="session")
def ag_news() -> Path:
    """$AG_NEWS_DIR with the real rows; the test is skipped if it is not set."""
    folder = Path(os.environ.get("AG_NEWS_DIR", ""))
    if not (folder / "train.csv").is_file():
        pytest.skip("AG_NEWS_DIR does not name a folder with the AG News files")
    return folder


def encoded(sentences: list[str], **options) -> ELMO.Data:
    """Data of whitespace-ready sentences, all of them training rows."""
    return ELMO.Data.of(sentences, tiny(**options), np.arange(len(sentences)), np.arange(0))

"""What several tests share: small models, corpora and runs of both scripts; real data only where a test says so."""
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import classification
import ELMO
from data import sample
from data.ag_news import read_csv
from data.tasks import EncodedTexts, Part
from data.text import BOS, EOS
from run import figures
from run.files import write_atomically
from run.optimization import Optimizers

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"ELMO.py": ELMO, "classification.py": classification}
FILES = {"ELMO.py": "bilstm.pt", "classification.py": "classifier.pt"}
SMALL = {
    "ELMO.py": "--hidden 12 --validation 60 --epochs 3 --batch-tokens 300 --negatives 50 --lr 0.01 --table-lr 0.01 "
               "--min-count 2 --log-every 20 --save-every 0.1 --precision bf16",
    "classification.py": "--hidden 6 --setting trainable --seeds 2 --batch-tokens 300 --epochs 2 --log-every 20 "
                         "--save-every 0.1 --precision fp32"}
torch.set_num_threads(1)        # small models are not faster with more, and do not wait for a busy core
SENTENCES = ["oil prices fall .", "the cat sat on the mat .", "he won the match today , said the coach .", "goal !"]

HAS_GPU = torch.cuda.is_available()
hidden = pytest.MonkeyPatch()


def hide_gpu() -> None:
    """Hides the GPU from torch and from child processes, so that results do not depend on the machine."""
    hidden.setattr(torch.cuda, "is_available", lambda: False)
    hidden.setenv("CUDA_VISIBLE_DEVICES", "")


hide_gpu()                      # now, because fixtures of the session are made before the first test begins


@pytest.fixture(autouse=True)
def gpu_for_marked_tests(request) -> Iterator[None]:
    """A test marked `cuda` sees the GPU, and is skipped if there is none."""
    marked = request.node.get_closest_marker("cuda") is not None
    if marked and not HAS_GPU:
        pytest.skip("no CUDA device here")
    if marked:
        hidden.undo()
    yield
    if marked:
        hide_gpu()


def save_empty(figure, path: Path) -> None:
    """Takes the place of run.figures.save: an empty file, because drawing takes longer than a small run."""
    write_atomically(path, lambda file: None)


@pytest.fixture(autouse=True)
def figures_are_empty(request, monkeypatch) -> None:
    """Tests that are not marked `figures` do not draw. `whole` does: session fixtures are made before this one."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setattr(figures, "save", save_empty)


# ------------------------------------------------------------------------------------------------- small models
def tiny(**options) -> ELMO.Config:
    """A model of a few thousand weights that trains in a second."""
    return ELMO.Config(**{"hidden": 12, "dropout": 0.2, "word_dropout": 0.0, "weight_decay": 0.0, "min_count": 1,
                          "epochs": 3.0, "batch_tokens": 60, "negatives": 8, "lr": 0.01, "table_lr": 0.01,
                          "log_every": 10_000} | options)


def encoded(sentences: list[str], **options) -> ELMO.Data:
    """Data of sentences whose tokens are split by spaces; all of them are training rows."""
    return ELMO.Data.of(sentences, tiny(**options), np.arange(len(sentences)), np.arange(0))


def trainer_of(elmo: ELMO.ELMo, **options) -> classification.Trainer:
    """A trainer of heads on 120 short random texts, in fp32."""
    draw = random.Random(0)
    words = " ".join(SENTENCES).split()
    rows = [(k % 4, (" ".join(draw.choices(words, k=1 + k % 11)),)) for k in range(150)]
    parts = {"train": EncodedTexts(Part.of(rows[:120]), elmo), "validation": EncodedTexts(Part.of(rows[120:]), elmo)}
    small = {"hidden": 6, "batch_tokens": 60, "precision": "fp32", "log_every": 10_000}
    config = classification.Config(**small | options)
    return classification.Trainer(config, classification.ELMoVectors(elmo.model), parts, 4)


def slow_states(model: ELMO.BiLM, ids: list[int], d: int) -> list[Tensor]:
    """[h_0, h_1, h_2], each (n + 1, P): direction d read one word at a time by the equations of an LSTM cell."""
    stream = [BOS, *ids] if d == 0 else [EOS, *reversed(ids)]
    inputs = [model.table[i] for i in stream]
    layers = [torch.stack(inputs)]
    for j, lstm in enumerate(model.lstms(d)):
        c = torch.zeros(lstm.hidden_size)
        h = torch.zeros(lstm.proj_size or lstm.hidden_size)
        outputs = []
        for x in inputs:
            gates = lstm.weight_ih_l0 @ x + lstm.weight_hh_l0 @ h + lstm.bias_ih_l0
            input_gate, forget_gate, cell, output_gate = gates.chunk(4)
            c = forget_gate.sigmoid() * c + input_gate.sigmoid() * cell.tanh()
            h = output_gate.sigmoid() * c.tanh()
            if lstm.proj_size:
                h = lstm.weight_hr_l0 @ h
            outputs.append(h)
        if j == 1:                                          # skip connection
            outputs = [new + old for new, old in zip(outputs, inputs, strict=True)]
        inputs = outputs
        layers.append(torch.stack(inputs))
    return layers


def gradients_of_update(trainer, step: int, module: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """The gradients of a module's weights, by name, by which the optimizers update them in a step, after clipping."""
    found = {}

    def record(optimizer, args, kwargs):
        """Copies all gradients."""
        for name, weight in module.named_parameters():
            if weight.grad is not None:
                found[name] = weight.grad.to_dense().clone()

    optimizers.optimizers[0].register_step_pre_hook(record)             # called before anything is updated
    trainer.step(step)
    return found


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the weights that differ between two state dicts of the same names."""
    assert before.keys() == after.keys()
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


@pytest.fixture(scope="session")
def elmo() -> ELMO.ELMo:
    """A tiny trained model whose weights are large enough that a leak or a wrong alignment shows."""
    model = ELMO.ELMo.train(SENTENCES * 3, tiny(dropout=0.0))
    torch.manual_seed(1)
    for parameter in model.model.parameters():
        parameter.data.mul_(2)
    model.model.table.data.copy_(torch.randn_like(model.model.table))
    return model


# ------------------------------------------------------------------------------------------------------ corpora
@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with train.csv (600 rows) and test.csv (100) of the built-in corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    sample.write(folder, 600, seed=0, test_rows=100)
    return folder


def labelled(file: Path, rows=slice(None)) -> tuple[list[str], np.ndarray]:
    """The descriptions and the classes, from 0 on, of rows of an AG News file."""
    table = read_csv(file).iloc[rows]
    return table.description.tolist(), table["class"].to_numpy() - 1


@pytest.fixture
def builtin(corpus, monkeypatch) -> Path:
    """The folder `corpus`; $AG_NEWS_DIR names it, so that main(argv) in this process reads it."""
    monkeypatch.setenv("AG_NEWS_DIR", str(corpus))
    return corpus


@pytest.fixture(scope="session")
def grammar(tmp_path_factory) -> Path:
    """A folder with 6,000 rows of the built-in corpus and a biLM that has learned its order: who acts on whom."""
    folder = tmp_path_factory.mktemp("grammar")
    sample.write(folder, 6000, seed=1, test_rows=1000)
    ELMO.ELMo.train([text for _, _, text in sample.generate(6000, seed=1)], ELMO.Config(
        hidden=128, validation=500, epochs=6.0, seed=1, batch_tokens=1000, negatives=1000, lr=0.006, table_lr=0.006,
        dropout=0.05, word_dropout=0.0, weight_decay=0.0, min_count=1, log_every=10_000)).save(folder / "bilstm.pt")
    return folder


@pytest.fixture(scope="session")
def ag_news() -> Path:
    """$AG_NEWS_DIR with the real rows; the test is skipped if it is not set."""
    folder = Path(os.environ.get("AG_NEWS_DIR", ""))
    if not (folder / "train.csv").is_file():
        pytest.skip("AG_NEWS_DIR does not name a folder with the AG News files")
    return folder


# ------------------------------------------------------------------------------------------------- both scripts
def arguments(name: str, out: Path, bilstm: Path, *more: str) -> list[str]:
    """The command line of a small run of a script in the folder `out`; classification.py uses the biLM in `bilstm`."""
    options = SMALL[name].split()
    if name == "classification.py":
        options += ["--bilstm", str(bilstm)]
    return ["--out", str(out), *options, *more]


def files(folder: Path) -> list[str]:
    """Every file in a folder, except the lock of a run."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return sorted(str(path.relative_to(folder)) for path in found)


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """Everything in a folder, with the content of the files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(name: str, argv: list[str], folder: Path, main: Callable | None = None) -> str:
    """The one sentence that a wrong input gets; the exit status is 2, and nothing is written to `folder`.

    main: the program of this name, if it is neither of the scripts.
    """
    main = main or SCRIPTS[name].main
    before = snapshot(folder)
    printed = io.StringIO()
    with redirect_stderr(printed):
        status = main(argv)
    message = printed.getvalue()
    assert status == 2, f"exit status {status}: {message!r}"
    assert message.startswith(f"{name}: ") and message.count("\n") == 1, message
    assert snapshot(folder) == before, "something was written"
    return message


@pytest.fixture(scope="session")
def whole(corpus, tmp_path_factory) -> Path:
    """A folder with what both scripts write, classification.py in all settings, and whole.log with what they print."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch, open(f"{out}.log", "w") as log, redirect_stdout(log):
        patch.setenv("AG_NEWS_DIR", str(corpus))
        assert ELMO.main(arguments("ELMO.py", out, out)) == 0
        assert classification.main(arguments("classification.py", out, out / "bilstm.pt", "--setting", "all")) == 0
    return out


def numbers(name: str, folder: Path = ROOT / "models") -> dict:
    """The content of a JSON file of the scripts; by default a committed one."""
    return json.loads((folder / f"{name}.json").read_text())


def classifier(folder: Path, setting: str | None = None) -> classification.Classifier:
    """The classifier in a folder that both scripts have written."""
    return classification.Classifier.load(folder / "classifier.pt", folder / "bilstm.pt", setting)


@pytest.fixture(scope="session")
def bilm(whole) -> ELMO.ELMo:
    """The biLM of the small run."""
    return ELMO.ELMo.load(whole / "bilstm.pt")

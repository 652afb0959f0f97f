"""Baselines of the AG News classifier, and tests of their differences: models/baselines.json.

    tfidf               a linear model of words and word pairs; its hyperparameters are chosen on validation rows
    word2vec, svd       the head of classification.py on one vector per word, made from the same training rows
    layer0, layer2      the same head on one layer of the biLM
    average             the same head on the plain average of the layers
    untrained           the same head on all layers of a biLM with random weights

    python report/baselines.py --seeds 3        80 minutes on two cores; takes the options of classification.py too

Runs are stored in build/baselines, and a finished one is not trained again. They are compared with the settings in the
classification.json of --out if it was made with the same biLM.

baselines.json: command, versions, machine, minutes (of all runs), peak_memory_gb, config, data and bilm (digests),
rows.{name}: seeds, validation and test {mean, std} of the accuracy over seeds, fresh (the same on the fresh test rows),
    ensemble (test accuracy of the seeds' mean probabilities), minutes, `each`: {validation, test} (accuracies by seed;
    not for tfidf), tried (only tfidf: validation accuracy by hyperparameters),
    against.{word2vec, tfidf, layer0}: `run.metrics.mcnemar` of the ensembles on test rows; p is not corrected for the
        number of comparisons
"""
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix, diags
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/baselines.py`

from classification import Config, ELMoVectors, classify
from data.batches import collate
from data.tasks import Part, Task, read_task
from data.text import Data, Encoded
from data.word2vec import word2vec
from ELMO import HERE, BiLM, ELMo
from run import machine
from run.files import InputError, read_json, write_json
from run.metrics import mcnemar, mean_and_std
from run.options import RUN_FLAGS, script, script_arguments
from run.publication import Publication, options_of_weights

VECTORS = ("word2vec", "svd", "layer0", "layer2", "average", "untrained")
STATIC_VECTORS = {"width": 300, "passes": 10, "window": 5, "negatives": 10}     # SVD has the same width and window
LINEAR_MODELS = (("svm", 0.1), ("svm", 0.3), ("svm", 1.0), ("logistic", 3.0), ("logistic", 10.0), ("logistic", 30.0))
COMPARED = ("word2vec", "tfidf", "layer0")
PARTS = {
    "layer0": lambda layers: layers[:1, ..., :layers.shape[3] // 2],        # x; layer 0 is [x ; x]
    "layer2": lambda layers: layers[2:],
    "average": lambda layers: layers.mean(dim=0, keepdim=True)}


class PartOfELMo(ELMoVectors):
    """One of PARTS of the biLM's layers: (1, T, B, P) for layer 0, otherwise (1, T, B, 2P)."""
    layers = 1

    def __init__(self, model: BiLM, kind: str):
        super().__init__(model)
        self.part = PARTS[kind]
        if kind == "layer0":
            self.width = model.config.width

    def __call__(self, encoded: Encoded, rows: np.ndarray, dtype: torch.dtype, run_both: Callable = map) -> Tensor:
        return self.part(super().__call__(encoded, rows, dtype, run_both))


class StaticVectors:
    """A table (V, width) with one vector per word of the biLM's vocabulary: (1, T, B, width)."""
    layers = 1

    def __init__(self, table: Tensor):
        self.table = table
        self.width = table.shape[1]
        self.device = table.device

    def __call__(self, encoded: Encoded, rows: np.ndarray, dtype: torch.dtype, run_both: Callable = map) -> Tensor:
        ids, _ = collate(replace(encoded, chars=None), rows)                # without characters: ids of words
        words = ids[0, 1:].to(self.device)                                  # (T, B), without <s>
        return F.embedding(words, self.table)[None].to(dtype)


def make_vectors(kind: str, config: Config, elmo: ELMo, task: Task):
    """Word vectors of one of the kinds in VECTORS; word2vec and svd are made from the task's training texts."""
    if kind in PARTS:
        return PartOfELMo(elmo.model, kind)
    if kind == "untrained":
        model = machine.seeded(config.seed, partial(BiLM, elmo.config, len(elmo.words)))        # random weights
        return ELMoVectors(model.requires_grad_(False).to(elmo.device))
    encoded = elmo.encode(task.corpus)
    data = Data(elmo.words, encoded, np.arange(len(encoded.tokens)), np.arange(0))
    table = static_vectors(kind, data, config.seed)
    return StaticVectors(torch.from_numpy(table).to(elmo.device))


def static_vectors(kind: str, data: Data, seed: int, width: int = STATIC_VECTORS["width"]) -> np.ndarray:
    """(V, width) float32 of unit variance, one vector per word, from the training rows; kind: "word2vec" or "svd".

    Word2Vec is skip-gram, which is slower than CBOW but was clearly better when a validation row was classified by the
    mean of its words.
    """
    if kind == "svd":
        table = svd(data, width, seed)
    else:
        vectors = word2vec(data, width, seed, sg=1, epochs=STATIC_VECTORS["passes"], window=STATIC_VECTORS["window"],
                           negative=STATIC_VECTORS["negatives"])
        table = np.zeros((len(data.words), width), dtype=np.float32)
        table[list(vectors)] = list(vectors.values())
    return table / max(table.std(), 1e-12)


def svd(data: Data, width: int, seed: int) -> np.ndarray:
    """(V, width) float32 U sqrt(S), where U S V' is the truncated SVD of max(PMI, 0).

    PMI(w, c) = log(p(w, c) / (p(w) p(c))) over the pairs of `pair_counts` (Levy, Goldberg and Dagan 2015).
    """
    counts = pair_counts(data)
    inverse = diags(1 / np.maximum(counts.sum(axis=1).A1, 1))
    pmi = (inverse @ counts @ inverse * counts.sum()).tocsr()
    pmi.data = np.log(pmi.data).clip(min=0)
    pmi.eliminate_zeros()
    model = TruncatedSVD(min(width, len(data.words) - 1), random_state=seed).fit(pmi)
    roots = np.sqrt(np.maximum(model.singular_values_, 1e-12))
    return (model.transform(pmi) / roots).astype(np.float32)                # transform gives U S


def pair_counts(data: Data) -> csr_matrix:
    """(V, V) how often two words occur at most `window` positions apart in a training row."""
    ids, offsets = data.encoded.flat(data.train)
    row = np.repeat(np.arange(len(data.train)), np.diff(offsets))           # of each token
    shape = (len(data.words), len(data.words))
    counts = csr_matrix(shape)
    for distance in range(1, STATIC_VECTORS["window"] + 1):
        same_row = row[distance:] == row[:-distance]
        first = ids[:-distance][same_row]
        second = ids[distance:][same_row]
        counts += csr_matrix((np.ones(len(first)), (first, second)), shape)
    return counts + counts.T


def texts_of(part: Part) -> list[str]:
    """The texts of rows that have one text each."""
    return [text for text, in part.texts]


def count_words(corpus: Sequence[str]) -> dict[int, TfidfVectorizer]:
    """{n: TF-IDF weights of all sequences of 1 to n words}, counted in all texts, with or without labels."""
    return {n: TfidfVectorizer(ngram_range=(1, n), sublinear_tf=True, min_df=2).fit(corpus) for n in (1, 2)}


def tfidf(task: Task, vectorizers: dict[int, TfidfVectorizer]) -> tuple[dict, np.ndarray]:
    """(row of baselines.json, predictions on test rows) of the linear model with the best validation accuracy.

    If several are equally good, the last one is taken.
    """
    tried = {}
    for n, vectorizer in vectorizers.items():
        parts = (task.train, task.validation, task.test)
        train, validation, test = [vectorizer.transform(texts_of(part)) for part in parts]
        for kind, C in LINEAR_MODELS:
            model = LinearSVC(C=C, random_state=0) if kind == "svm" else LogisticRegression(C=C, max_iter=200)
            model.fit(train, task.train.labels)
            accuracy = float(model.score(validation, task.validation.labels))
            name = f"{kind}, C {C:g}, 1-{n}-grams"
            tried[name] = accuracy
            print(f"TF-IDF {name}: {accuracy:.2%} of validation rows", flush=True)
            best = max(tried.values())
            if accuracy == best:
                predicted = model.predict(test)
    correct = predicted == task.test.labels
    fresh = mean_and_std([correct[task.fresh].mean()]) if task.fresh.any() else None
    numbers = {"tried": tried, "seeds": 1, "validation": mean_and_std([best]),
               "test": mean_and_std([correct.mean()]), "ensemble": float(correct.mean()), "fresh": fresh}
    return numbers, predicted


def row(result: dict, setting: str) -> tuple[dict, np.ndarray]:
    """(row of baselines.json, predictions on test rows) of one setting in the JSON file of a classification."""
    numbers = result["settings"][setting]
    test = numbers["test"]
    each = {part: [seed["accuracy"] for seed in numbers[part]["seeds"]] for part in ("validation", "test")}
    fresh = test["fresh"]["accuracy"] if "fresh" in test else None
    found = {"seeds": len(test["seeds"]), "validation": numbers["validation"]["accuracy"], "test": test["accuracy"],
             "ensemble": test["ensemble"]["accuracy"], "fresh": fresh, "minutes": result["minutes"], "each": each}
    return found, np.array(list(numbers["predictions"]), dtype=int)


def finished_run(path: Path, digest: str, rows: int, options: dict) -> dict | None:
    """The content of `path` if it was made with these options, biLM and number of test rows; otherwise None."""
    if not path.exists():
        return None
    with read_json(path) as result:
        sizes = {len(numbers["predictions"]) for numbers in result["settings"].values()}
        fits = sizes == {rows} and result["bilm"] == digest and options.items() <= result["config"].items()
    return result if fits else None


def train_head(kind: str, config: Config, options, elmo: ELMo, test_rows: int) -> dict | None:
    """The numbers of the head on one kind of vectors, trained if that is not done; None if training was stopped."""
    wanted = (options.build / f"{kind}.json", elmo.digest, test_rows, options_of_weights(config))
    if finished_run(*wanted) is None:
        print(f"training the head on {kind}", flush=True)
        of_run = Namespace(out=options.build, bilstm=options.bilstm, resume=options.resume, overwrite=True)
        classify(config, of_run, partial(make_vectors, kind), kind)
    return finished_run(*wanted)


@script("baselines.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can fix, 130 after Ctrl-C."""
    config, options = script_arguments(argv, Config, "baselines.py", __doc__, HERE / "models", RUN_FLAGS | {
        "--bilstm": {"metavar": "FILE", "type": Path, "default": HERE / "models" / "bilstm.pt", "help": "the biLM"},
        "--build": {"metavar": "DIR", "type": Path, "default": HERE / "build" / "baselines",
                    "help": "folder for the runs (default build/baselines)"}})
    if config.stem != "classifier":
        raise InputError("baselines are only for --task ag_news with descriptions; leave out --fields, --adapt and "
                         "--finetune")
    publication = Publication("baselines", config, options, has_model=False)
    elmo = ELMo.load(options.bilstm)
    task = read_task(config, elmo.config)
    source = {"data": task.digest, "bilm": elmo.digest}
    if publication.finished(source):
        return 0
    begin = time.perf_counter()
    numbers, predicted = tfidf(task, count_words(task.corpus))
    numbers["minutes"] = (time.perf_counter() - begin) / 60
    found = {"tfidf": (numbers, predicted)}
    for kind in VECTORS:
        result = train_head(kind, replace(config, setting="trainable"), options, elmo, len(task.test))
        if result is None:
            return 130
        found[kind] = row(result, "trainable")
    minutes = sum(numbers["minutes"] for numbers, _ in found.values())
    published = finished_run(options.out / "classification.json", elmo.digest, len(task.test),
                             {"seeds": config.seeds, "seed": config.seed})
    if published is not None:
        found |= {setting: row(published, setting) for setting in published["settings"]}
    correct = {name: predicted == task.test.labels for name, (_, predicted) in found.items()}
    rows = {}
    for name, (numbers, _) in found.items():
        rows[name] = numbers
        numbers["against"] = {other: mcnemar(correct[name], correct[other]) for other in COMPARED if other != name}
        print(f"{name:<12}{numbers['validation']['mean']:.2%} validation, {numbers['test']['mean']:.2%} test accuracy")
    about = machine.provenance(machine.find_device(), 60 * minutes)
    write_json(publication.json, about | {"config": asdict(config)} | source | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

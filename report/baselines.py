"""Baselines of the AG News classifier, and which differences are more than chance: models/baselines.json.

    linear TF-IDF           words and pairs of words, its knobs chosen on the validation rows (scikit-learn)
    word2vec, svd           one vector per word from the same training rows, under the same head
    layer0, layer2, average, untrained      parts of the biLM, or one with random weights, under the same head

`python report/baselines.py [--out DIR] [--seeds 3] [knobs of classification.py]` trains them (80 minutes on two cores;
finished ones are kept in build/baselines and not trained again) and puts them beside DIR's classification.json and
finetuned.json, where these are of the same biLM. JSON: command, config, versions, machine, minutes (all runs), and
    rows.{name}: seeds, ngrams (whether a linear model is mixed in), accuracy {mean, deviation} over them on validation
        and test rows, fresh (test), together (accuracy of the seeds' mean probabilities on test rows), minutes;
        against.{word2vec, tfidf, layer0}: difference in test accuracy of `together` with its 95 % bootstrap interval,
        only_this and only_that (rows that one alone has right), p (exact McNemar, not corrected for the number of rows
        here); of tfidf, which is one model without a seed: tried (accuracy on validation rows by knobs)
"""
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python report/baselines.py`

from classification import Config, classify
from data.files import InputError, read_text, write_json
from data.knobs import script, script_arguments
from data.machine import default_device, machine, versions
from data.prepare import Task, read_task
from ELMO import ELMo

ROOT = Path(__file__).resolve().parent.parent
VECTORS = ("word2vec", "svd", "layer0", "layer2", "average", "untrained")
TRIED = [(model, C, ngrams) for ngrams in (1, 2) for model, C in (
    ("svm", 0.1), ("svm", 0.3), ("svm", 1.0), ("logistic", 3.0), ("logistic", 10.0), ("logistic", 30.0))]


def mcnemar(right: np.ndarray, other: np.ndarray) -> dict:
    """Exact two-sided McNemar test of two systems' hits (rows,) bool, and a paired bootstrap of their difference.

    Under the null hypothesis a row that only one of them has right is either's with probability 1/2.
    """
    this, that = int((right & ~other).sum()), int((other & ~right).sum())
    gap = right.astype(float) - other
    drawn = np.random.default_rng(0).multinomial(len(gap), np.full(len(gap), 1 / len(gap)), size=2_000)
    return {"difference": float(gap.mean()), "interval": np.percentile(drawn @ gap / len(gap), [2.5, 97.5]).tolist(),
            "only_this": this, "only_that": that, "p": binomtest(this, this + that).pvalue if this + that else 1.0}


def tfidf(task: Task, vectorizers: dict | None = None) -> tuple[dict, np.ndarray]:
    """(row, predictions on test rows) of the linear classifier whose knobs are best on the validation rows.

    Its words and their weights are counted in all texts of the task, as the other vectors are, labelled or not;
    `vectorizers` keeps what was counted for the next call.
    """
    begin, vectorizers = time.perf_counter(), {} if vectorizers is None else vectorizers
    texts = {part: [text for text, in getattr(task, part).texts] for part in ("train", "validation", "test")}
    fitted, tried = {}, {}
    for kind, C, ngrams in TRIED:
        if ngrams not in vectorizers:
            vectorizers[ngrams] = TfidfVectorizer(ngram_range=(1, ngrams), sublinear_tf=True, min_df=2).fit(task.corpus)
        if ngrams not in fitted:
            fitted[ngrams] = {part: vectorizers[ngrams].transform(texts[part]) for part in texts}
        x = fitted[ngrams]
        model = LinearSVC(C=C, random_state=0) if kind == "svm" else LogisticRegression(C=C, max_iter=200)
        model.fit(x["train"], task.train.labels)
        accuracy = model.score(x["validation"], task.validation.labels)
        tried[f"{kind}, C {C:g}, 1-{ngrams}-grams"] = float(accuracy)
        print(f"TF-IDF {kind}, C {C:g}, 1-{ngrams}-grams: {accuracy:.2%} of validation rows", flush=True)
        if accuracy >= max(tried.values()):
            best = model, x["test"]
    found = best[0].predict(best[1])
    hit = found == task.test.labels
    one = {"deviation": None}
    return {"tried": tried, "seeds": 1, "ngrams": False, "validation": {"mean": max(tried.values())} | one,
            "test": {"mean": float(hit.mean())} | one, "together": float(hit.mean()),
            "fresh": {"mean": float(hit[task.fresh].mean())} | one if task.fresh.any() else None,
            "minutes": (time.perf_counter() - begin) / 60}, found


def row(result: dict, setting: str) -> tuple[dict, np.ndarray]:
    """(row, predictions on test rows) of one setting of a classification JSON."""
    numbers = result["settings"][setting]
    test = numbers["test"]
    return {"seeds": len(test["seeds"]), "validation": numbers["validation"]["accuracy"], "test": test["accuracy"],
            "together": test["together"]["accuracy"], "fresh": test["fresh"]["accuracy"] if "fresh" in test else None,
            "each": {part: [seed["accuracy"] for seed in numbers[part]["seeds"]] for part in ("validation", "test")},
            "minutes": result["minutes"], "ngrams": "ngrams" in result}, np.array([*numbers["predictions"]], dtype=int)


def read_run(path: Path, digest: str, rows: int, wanted: dict) -> dict | None:
    """The JSON of a run on this biLM and as many test rows that was made with the wanted knobs; None without one."""
    if not path.exists():
        return None
    try:
        result = json.loads(read_text(path))
        fits = all(len(numbers["predictions"]) == rows for numbers in result["settings"].values())
        return result if fits and result["bilm"] == digest and wanted.items() <= result["config"].items() else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not what classification.py writes ({error!r}); delete it") from None


@script("baselines.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for an input that the user can mend, 130 after Ctrl-C."""
    config, options = script_arguments(argv, Config, "baselines.py", __doc__, ROOT / "models", {
        "--bilstm": {"metavar": "FILE", "type": Path, "default": ROOT / "models" / "bilstm.pt", "help": "the biLM"},
        "--build": {"metavar": "DIR", "type": Path, "default": ROOT / "build" / "baselines",
                    "help": "folder of the runs (default build/baselines)"}})
    switches = config.finetune, config.ensemble, config.ngrams
    if (config.task, config.fields, *switches) != ("ag_news", "description", False, False, False):
        raise InputError("baselines are for ag_news by its descriptions, not fine-tuned; leave those knobs out")
    elmo = ELMo.load(options.bilstm)
    task = read_task(config, elmo.config)
    size, rows, found = len(task.test), {}, {}
    rows["tfidf"], found["tfidf"] = tfidf(task)
    for kind in VECTORS:
        path, wanted = options.build / f"{kind}.json", replace(config, vectors=kind, setting="trainable")
        free = ("log_every", "save_every", "track")      # no number depends on these
        knobs = {name: value for name, value in vars(wanted).items() if name not in free}
        if (result := read_run(path, elmo.digest, size, knobs)) is None:
            print(f"training the head on {kind}", flush=True)
            if status := classify(wanted, options.build, options.bilstm, options.resume):
                return status
            result = read_run(path, elmo.digest, size, knobs)
        rows[kind], found[kind] = row(result, "trainable")
    for name in ("classification", "finetuned"):
        result = read_run(options.out / f"{name}.json", elmo.digest, size, {}) or {"settings": {}}
        for setting in result["settings"]:
            key = name if name == "finetuned" else setting
            rows[key], found[key] = row(result, setting)
    for key, numbers in rows.items():
        numbers["against"] = {other: mcnemar(found[key] == task.test.labels, found[other] == task.test.labels)
                              for other in ("word2vec", "tfidf", "layer0") if other != key}
    write_json(options.out / "baselines.json", {
        "command": " ".join(["python", "report/baselines.py", *(sys.argv[1:] if argv is None else argv)]),
        "config": asdict(config), "versions": versions(), "machine": machine(torch.device(default_device())),
        "minutes": sum(rows[key]["minutes"] for key in ("tfidf", *VECTORS)), "bilm": elmo.digest, "rows": rows})
    print(table(rows))
    return 0


def table(rows: dict) -> str:
    """Lines to print."""
    lines = [f"{'accuracy':<12}{'validation':>11}{'test':>9}{'deviation':>11}{'fresh':>9}{'seeds together':>16}"
             "   against word2vec, tfidf, layer 0"]
    for name, r in rows.items():
        deviation = "-" if r["test"]["deviation"] is None else f"{r['test']['deviation']:.2%}"
        against = "; ".join(f"{a['difference']:+.2%} p {a['p']:.1e}" for a in r["against"].values())
        fresh = f"{r['fresh']['mean']:.2%}" if r["fresh"] else "-"
        lines.append(f"{name:<12}{r['validation']['mean']:>11.2%}{r['test']['mean']:>9.2%}"
                     f"{deviation:>11}{fresh:>9}{r['together']:>16.2%}   {against}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

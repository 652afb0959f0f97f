"""The numbers of a pretraining run, made by ELMO.py at its end: OUT/pretraining.json and its figures.

Schema of pretraining.json:
    command, config, versions, machine, minutes (command to file), peak_memory_gb, tokens_per_second (training, real
    targets of both directions), vocabulary, parameters, file_mb, digest (of bilstm.pt), unknown {train, validation,
    test} (share of <unk>), history [{step, epoch, seconds, train_perplexity, validation_perplexity [fw, bw]}]
    splits.{train, validation, test}: rows, tokens (predicted, end symbols in), unigram_perplexity, and for forward and
        backward: nats (per token), perplexity, bits_per_token, accuracy, top5_accuracy, macro_precision, macro_recall,
        macro_f1 (over the words that occur as gold), kneser_ney_perplexity (order 4); n-grams up to 5 million tokens
    splits.{validation, test}.fresh: the same for the rows that are no near copies (data/prepare.py: fresh_rows)
    confusion: {words, counts} forward model on test rows: rows gold, columns predicted, the last one every other word
`train` is 4,000 training rows chosen by the seed. Every number is that of the weights in the file, half precision.
"""
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from data.corpus import Tokens
from data.files import write_json
from data.machine import machine, peak_memory_gb, versions
from data.prepare import fresh_rows, read_ag_news
from report import figures, ngram

DIRECTIONS = ("forward", "backward")
SAMPLE = 4000       # training rows that are measured
FREQUENT = 25       # words of the confusion matrix
MOST = 5_000_000    # tokens of a corpus whose n-grams are counted, in memory


def word_metrics(gold: np.ndarray, best: np.ndarray, rank: np.ndarray) -> dict:
    """Word prediction: accuracy, top-5 accuracy, macro precision, recall and F1 over the words that occur as gold."""
    if not len(gold):
        return {}
    precision, recall, f1, _ = precision_recall_fscore_support(gold, best, labels=np.unique(gold), average="macro",
                                                               zero_division=0)
    return {"accuracy": float((gold == best).mean()), "top5_accuracy": float((rank < 5).mean()),
            "macro_precision": float(precision), "macro_recall": float(recall), "macro_f1": float(f1)}


def summary(scores, select: np.ndarray | None = None) -> dict:
    """{"rows", "tokens", "forward": {...}, "backward": {...}} of all rows or of a boolean choice of them."""
    select = np.ones(len(scores.tokens), dtype=bool) if select is None else select
    tokens = int(scores.tokens[select].sum())
    out = {"rows": int(select.sum()), "tokens": tokens}
    for d, name in enumerate(DIRECTIONS):
        nats = float(scores.nats[d, select].sum() / max(1, tokens))
        out[name] = {"nats": nats, "perplexity": float(np.exp(nats)), "bits_per_token": nats / float(np.log(2))}
        if scores.words:
            row, *words = scores.words[d]
            out[name] |= word_metrics(*(part[select[row]] for part in words))
    return out


def rows_of(tokens: Tokens, lookup: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, offsets) of some rows as report/ngram.py takes them."""
    lengths = np.diff(tokens.offsets)[rows]
    offsets = np.append(0, np.cumsum(lengths))
    at = np.repeat(tokens.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return lookup[tokens.ids[at]], offsets


def add_ngrams(splits: dict, train: tuple, parts: dict, fresh: dict, size: int) -> None:
    """Unigram and Kneser-Ney perplexities of every split into `splits`, all rows and fresh ones."""
    def put(name: str, key: str, nats: np.ndarray, direction: str | None = None) -> None:
        for target, mask in ((splits[name], slice(None)), (splits[name].get("fresh"), fresh.get(name))):
            if target:
                (target[direction] if direction else target)[key] = ngram.perplexity(nats, parts[name][1], mask)
    for name, rows in parts.items():
        put(name, "unigram_perplexity", ngram.unigram_nats(*train, size, *rows))
    for direction, turn in (("forward", lambda *rows: rows), ("backward", ngram.reverse)):
        model = ngram.KneserNey(*turn(*train), size)
        for name, rows in parts.items():
            put(name, "kneser_ney_perplexity", model.nats(*turn(*rows)), direction)


def confusion(scores, words: list[str]) -> dict:
    """Counts over the most frequent gold words of the forward model; the last row and column are all other words."""
    _, gold, best, _ = scores.words[0]
    ids, counts = np.unique(gold, return_counts=True)
    top = ids[np.argsort(-counts, kind="stable")[:FREQUENT]]
    place = np.full(len(words), len(top))
    place[top] = np.arange(len(top))
    matrix = confusion_matrix(place[gold], place[best], labels=np.arange(len(top) + 1))
    return {"words": [words[i] for i in top] + ["(other)"], "counts": matrix.tolist()}


def unknown(data) -> dict[str, float]:
    """Share of <unk> among the tokens of each set of rows."""
    encoded, test = data.test
    return {"train": data.encoded.unknown(data.train), "validation": data.encoded.unknown(data.validation),
            "test": encoded.unknown(test)}


def describe(trainer) -> None:
    """Prints rows, vocabulary, unknown words, weights and steps of a run that is about to begin."""
    data, weights = trainer.data, sum(value.numel() for value in trainer.model.state_dict().values())
    train, validation, test = unknown(data).values()
    if trainer.rank == 0:
        print(f"{len(data.train):,} training, {len(data.validation):,} validation, {len(data.test[1]):,} test rows\n"
              f"vocabulary {len(data.words):,} words of min-count {trainer.config.min_count}; <unk> {train:.2%} of "
              f"training, {validation:.2%} of validation, {test:.2%} of test tokens\n"
              f"{weights:,} weights, {str(trainer.dtype).removeprefix('torch.')} on {machine(trainer.device)['device']}"
              f", {trainer.steps:,} steps of {trainer.targets_per_epoch / trainer.per_epoch:,.0f} targets", flush=True)


def measure(elmo, trainer, score_rows) -> tuple[dict, dict]:
    """(splits, confusion) of the finished model, as the schema above says."""
    data = trainer.data
    sample = np.sort(np.random.default_rng([elmo.config.seed, 4]).permutation(data.train)[:SAMPLE])
    chosen = {"train": (data.encoded, sample), "validation": (data.encoded, data.validation),
              "test": data.test}
    fresh = {}
    if data.texts:
        train, test = data.texts
        known = read_ag_news("train").description       # all of train.csv, whatever --rows took of it
        fresh = {"validation": fresh_rows([train[i] for i in data.train], [train[i] for i in data.validation]),
                 "test": fresh_rows(known, test)}
    splits, parts = {}, {}
    for name, (encoded, rows) in chosen.items():
        scores = score_rows(elmo.model, encoded, rows, details=True)
        splits[name] = summary(scores)
        if name in fresh and fresh[name].any():
            splits[name]["fresh"] = summary(scores, fresh[name])
        parts[name] = rows_of(encoded.tokens, encoded.lookup, rows)
    if data.encoded.tokens.offsets[-1] <= MOST:
        train = rows_of(data.encoded.tokens, data.encoded.lookup, data.train)
        add_ngrams(splits, train, parts, fresh, len(data.words))
    return splits, confusion(scores, data.words.words)


def publish(elmo, trainer, score_rows, out: Path, before: float) -> None:
    """Measures the finished model, `before` seconds after the command; OUT/bilstm.pt, pretraining.json and figures."""
    data, begin = trainer.data, time.perf_counter() - before
    print("measuring the finished model with the full softmax", flush=True)
    splits, matrix = measure(elmo, trainer, score_rows)
    elmo.metrics = {name: {d: part[d]["perplexity"] for d in DIRECTIONS} for name, part in splits.items()}
    elmo.save(out / "bilstm.pt")
    seconds = max(elmo.history[-1]["seconds"], 1e-9) if elmo.history else 0.0
    result = {
        "command": " ".join(["python", *(Path(sys.argv[0]).name, *sys.argv[1:])]), "config": asdict(elmo.config),
        "versions": versions(), "machine": machine(trainer.device), "processes": trainer.world,
        "precision": str(trainer.dtype).removeprefix("torch."),
        "training_seconds": seconds, "peak_memory_gb": peak_memory_gb(),
        "tokens_per_second": trainer.targets_per_epoch * elmo.config.epochs / seconds if seconds else None,
        "vocabulary": len(data.words), "parameters": sum(v.numel() for v in elmo.model.state_dict().values()),
        "file_mb": (out / "bilstm.pt").stat().st_size / 1e6, "digest": elmo.digest,
        "unknown": unknown(data),
        "history": elmo.history, "splits": splits, "confusion": matrix}
    figures.pretraining(result, out)
    result["minutes"] = (time.perf_counter() - begin) / 60
    write_json(out / "pretraining.json", result)
    print(table(result))


def table(result: dict) -> str:
    """The perplexities of a result as lines to print."""
    unknown = ", ".join(f"{name} {share:.2%}" for name, share in result["unknown"].items())
    lines = [f"vocabulary {result['vocabulary']:,}; <unk> {unknown}",
             f"{'perplexity':<20}{'rows':>8}{'forward':>10}{'backward':>10}{'Kneser-Ney':>12}{'unigram':>10}"]
    for name, part in result["splits"].items():
        for label, p in ((name, part), (f"{name}, fresh rows", part.get("fresh"))):
            if p and p["rows"]:
                values = (p["forward"]["perplexity"], p["backward"]["perplexity"],
                          p["forward"].get("kneser_ney_perplexity", np.nan), p.get("unigram_perplexity", np.nan))
                lines.append(f"{label:<20}{p['rows']:>8,}" + "{:>10.2f}{:>10.2f}{:>12.2f}{:>10.1f}".format(*values))
    return "\n".join(lines)

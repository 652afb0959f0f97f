"""Metrics of language models and classifiers, from arrays; the dictionaries are parts of the JSON files in models/."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor

DIRECTIONS = ("forward", "backward")
CALIBRATION_BINS = 15
FREQUENT_WORDS = 25     # of the confusion matrix of words


# ----------------------------------------------------------------------------------------------- language models
def full_softmax_nll(h: Tensor, y: Tensor, table: Tensor, bias: Tensor, details: bool = False) -> tuple[Tensor, ...]:
    """A tuple of one (N,) tensor: nll of targets y (N,) given states h (N, P), over all V words but <pad>.

    With details a tuple of four: nll, the targets, the words with the highest logits, and the targets' ranks. A rank is
    the number of words with a higher logit. table (V, P), bias (V, 1).
    """
    block = max(16, 2**23 // len(table))                    # rows of a (block, V) matrix of 32 MB
    parts = []
    with torch.autocast(h.device.type, enabled=False):
        for states, targets in zip(h.float().split(block), y.split(block), strict=True):
            logits = torch.addmm(bias[:, 0], states, table.t())                 # (block, V)
            logits[:, 0] = -torch.inf                                           # <pad> is never a target
            target = logits.gather(1, targets[:, None])                         # (block, 1)
            nll = (logits.logsumexp(dim=1) - target[:, 0]).double()
            if details:
                parts.append((nll, targets, logits.argmax(dim=1), (logits > target).sum(dim=1)))
            else:
                parts.append((nll,))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@dataclass
class Scores:
    """How well both directions of a biLM predict the tokens of some rows, end symbols included.

    nll (2, rows): summed negative log-likelihood of each row, forward and backward; tokens (rows,): predicted tokens.
    words, if they were asked for: for each direction (row, gold word, best word, rank) of every predicted token; rank
    is the number of words with a higher logit than the gold word.
    """
    nll: np.ndarray
    tokens: np.ndarray
    words: list[tuple[np.ndarray, ...]]

    @classmethod
    def of(cls, rows: np.ndarray, tokens: np.ndarray, batches: list) -> "Scores":
        """Scores in the order of `rows`. tokens (rows,): predicted tokens; batches: the results of ELMO.score_batch."""
        order = np.argsort(rows)
        nll = np.zeros((2, len(rows)))
        words = []
        for d, of_direction in enumerate(zip(*batches, strict=True)):
            columns = [np.concatenate(arrays) for arrays in zip(*of_direction, strict=True)]
            position = order[np.searchsorted(rows, columns[0], sorter=order)]       # of a token's row in `rows`
            nll[d] = np.bincount(position, weights=columns[1], minlength=len(rows))
            if len(columns) > 2:
                words.append((position, *columns[2:]))
        return cls(nll, tokens, words)

    def perplexity(self) -> list[float]:
        """exp(summed nll / summed tokens), forward and backward."""
        return np.exp(self.nll.sum(axis=1) / max(1, self.tokens.sum())).tolist()

    def totals(self, unknown: np.ndarray, rows: slice = slice(None)) -> dict:
        """{"forward": {"nats", "tokens", "unknown", "perplexity"}, "backward": ..}, summed over some rows, or over all.

        nats: negative log-likelihood; unknown (rows,): tokens of each row that are <unk>.
        """
        tokens = int(self.tokens[rows].sum())
        totals = {}
        for direction, nll in zip(DIRECTIONS, self.nll[:, rows].sum(axis=1), strict=True):
            totals[direction] = {"nats": float(nll), "tokens": tokens, "unknown": int(unknown[rows].sum()),
                                 "perplexity": math.exp(nll / max(1, tokens))}
        return totals

    def metrics(self, chosen: np.ndarray | None = None) -> dict:
        """rows, tokens, and for "forward" and "backward" the metrics of the `chosen` rows (bool), or of all rows."""
        if chosen is None:
            chosen = np.ones(len(self.tokens), dtype=bool)
        tokens = int(self.tokens[chosen].sum())
        metrics = {"rows": int(chosen.sum()), "tokens": tokens}
        for d, direction in enumerate(DIRECTIONS):
            nll = float(self.nll[d, chosen].sum() / max(1, tokens))
            of_direction = {"nll": nll, "perplexity": math.exp(nll), "bits_per_token": nll / math.log(2)}
            if self.words:
                row, gold, best, rank = self.words[d]
                inside = chosen[row]
                of_direction |= word_metrics(gold[inside], best[inside], rank[inside])
            metrics[direction] = of_direction
        return metrics


def word_metrics(gold: np.ndarray, best: np.ndarray, rank: np.ndarray) -> dict:
    """How well words were predicted: accuracy, top-5 accuracy, macro precision, recall and F1 over the gold words.

    gold, best (tokens,): word ids; rank (tokens,): how many words had a higher logit than the gold word.
    """
    if len(gold) == 0:
        return {}
    precision, recall, f1, _ = precision_recall_fscore_support(
        gold, best, labels=np.unique(gold), average="macro", zero_division=0)
    return {
        "accuracy": float((gold == best).mean()),
        "top5_accuracy": float((rank < 5).mean()),
        "macro_precision": float(precision),
        "macro_recall": float(recall),
        "macro_f1": float(f1),
    }


def word_confusion(gold: np.ndarray, best: np.ndarray, words: Sequence[str]) -> dict:
    """{"words", "counts"}: rows gold, columns predicted, for the most frequent gold words and all others as one."""
    ids, counts = np.unique(gold, return_counts=True)
    by_frequency = np.argsort(-counts, kind="stable")
    frequent = ids[by_frequency[:FREQUENT_WORDS]]
    place = np.full(len(words), len(frequent))              # row of a word in the matrix; the last row is "(other)"
    place[frequent] = np.arange(len(frequent))
    matrix = confusion_matrix(place[gold], place[best], labels=np.arange(len(frequent) + 1))
    names = [words[i] for i in frequent]
    return {"words": [*names, "(other)"], "counts": matrix.tolist()}


def perplexity_sentence(entry: dict) -> str:
    """An evaluation of the history of a pretraining.json as a line to print."""
    training = f"training perplexity {entry['train_perplexity']:.1f} (with dropout and sampled words)"
    if "validation_perplexity" not in entry:
        return training
    forward, backward = entry["validation_perplexity"]
    return f"validation perplexity {forward:.1f} forward, {backward:.1f} backward; {training}"


def perplexity_table(result: dict) -> str:
    """The perplexities of a pretraining.json as lines to print."""
    rows = []
    for name, part in result["splits"].items():
        for label, metrics in ((name, part), (f"{name}, no near copies", part.get("fresh"))):
            if metrics is None:
                continue
            forward = metrics["forward"]
            rows.append({
                "perplexity of": label,
                "rows": metrics["rows"],
                "forward": forward["perplexity"],
                "backward": metrics["backward"]["perplexity"],
                "Kneser-Ney (forward)": None if name == "train" else forward.get("kneser_ney_perplexity"),
                "unigram": metrics.get("unigram_perplexity"),
            })
    return pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format)


# --------------------------------------------------------------------------------------------------- classifiers
def classification_metrics(p: np.ndarray, gold: np.ndarray, labels: Sequence[str | int]) -> dict:
    """Metrics of probabilities p (N, C) against gold classes (N,). labels: the names of the C classes.

    rows, accuracy, nll (mean negative log-likelihood), calibration_error (mean |confidence - accuracy| of 15 bins of
    equal width, weighted by their rows, Guo et al. 2017), macro_precision, macro_recall, macro_f1, classes (precision,
    recall, f1 and rows of each), confusion (counts; rows gold, columns predicted). A class that is never predicted has
    precision 0.
    """
    predicted = p.argmax(axis=1)
    classes = np.arange(len(labels))
    nll = -np.log(np.maximum(p[np.arange(len(gold)), gold], 1e-12))
    metrics = {
        "rows": len(gold),
        "accuracy": float((predicted == gold).mean()),
        "nll": float(nll.mean()),
        "calibration_error": calibration_error(p, gold),
    }
    precision, recall, f1, rows = precision_recall_fscore_support(gold, predicted, labels=classes, zero_division=0)
    metrics["macro_precision"] = float(precision.mean())
    metrics["macro_recall"] = float(recall.mean())
    metrics["macro_f1"] = float(f1.mean())
    metrics["classes"] = {}
    for c, label in enumerate(labels):
        metrics["classes"][str(label)] = {
            "precision": float(precision[c]),
            "recall": float(recall[c]),
            "f1": float(f1[c]),
            "rows": int(rows[c]),
        }
    metrics["confusion"] = confusion_matrix(gold, predicted, labels=classes).tolist()
    return metrics


def calibration_error(p: np.ndarray, gold: np.ndarray) -> float:
    """Sum over the bins of |summed confidence - correct rows|, divided by the rows (Guo et al. 2017)."""
    confidence = p.max(axis=1)
    correct = p.argmax(axis=1) == gold
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(gold))


def mean_and_std(values: Sequence[float]) -> dict:
    """{"mean", "std"}; the standard deviation of one value is None."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std}


def over_seeds(p: np.ndarray, gold: np.ndarray, labels: Sequence[str | int], fresh: np.ndarray | None = None) -> dict:
    """Metrics of S seeds' probabilities p (S, N, C).

    seeds: classification_metrics of each; ensemble: those of the seeds' mean probabilities; accuracy and macro_f1:
    {mean, std} over the seeds; fresh: rows, accuracy, macro_f1 and ensemble {accuracy} of the rows where `fresh` (N,)
    is True, which are no near copies of training rows.
    """
    seeds = [classification_metrics(one_seed, gold, labels) for one_seed in p]
    result = {"seeds": seeds, "ensemble": classification_metrics(p.mean(axis=0), gold, labels),
              "accuracy": mean_and_std([metrics["accuracy"] for metrics in seeds]),
              "macro_f1": mean_and_std([metrics["macro_f1"] for metrics in seeds])}
    if fresh is not None and fresh.any():
        part = over_seeds(p[:, fresh], gold[fresh], labels)
        result["fresh"] = {"rows": int(fresh.sum()), "accuracy": part["accuracy"], "macro_f1": part["macro_f1"],
                           "ensemble": {"accuracy": part["ensemble"]["accuracy"]}}
    return result


def validation_numbers(p: dict[str, Tensor], gold: Tensor, settings: Sequence[str]) -> tuple[float, dict]:
    """(mean negative log-likelihood of all heads, {setting: {"loss": [per seed], "accuracy": [per seed]}}).

    p (N, C) by the name of a head, which begins with its setting: "trainable-0", ..; gold (N,).
    """
    numbers = {setting: {"loss": [], "accuracy": []} for setting in settings}
    losses = []
    for name, of_head in p.items():
        setting, _, _ = name.rpartition("-")
        loss = F.nll_loss(of_head.clamp(min=1e-12).log(), gold).item()
        losses.append(loss)
        numbers[setting]["loss"].append(loss)
        correct = of_head.argmax(dim=1) == gold
        numbers[setting]["accuracy"].append(correct.double().mean().item())
    return float(np.mean(losses)), numbers


def classification_numbers(p: dict, gold: dict, heads: list[str], labels: Sequence[str | int],
                           fresh: np.ndarray | None) -> dict:
    """The numbers of one setting in a classification.json.

    p[part][head] (N, C) tensors for the heads of all seeds, gold[part] (N,), with the parts train, validation and test.
    train, validation, test: from over_seeds; predictions: class of each test row by the seeds' mean probabilities, one
    digit per row ("2031"), or with more than 10 classes a number per row, spaces between ("2 11 0"); best: index of
    the seed that is best on the validation rows.
    """
    numbers = {}
    for part in gold:
        of_seeds = np.stack([p[part][head].numpy() for head in heads])                          # (S, N, C)
        numbers[part] = over_seeds(of_seeds, gold[part], labels, fresh if part == "test" else None)
    predictions = of_seeds.mean(axis=0).argmax(axis=1)                                          # of the last part, test
    space = " " if len(labels) > 10 else ""
    numbers["predictions"] = space.join(str(c) for c in predictions)
    validation = [seed["accuracy"] for seed in numbers["validation"]["seeds"]]
    numbers["best"] = int(np.argmax(validation))
    return numbers


def mcnemar(correct: np.ndarray, other: np.ndarray) -> dict:
    """Exact two-sided McNemar test: do two classifiers differ? correct, other (N,) bool: the rows that each has right.

    Only rows that exactly one of them gets right are counted. If both are equally good, each wins half of these.
    Returns difference (of accuracies), interval (95 %, paired bootstrap), only_this, only_that (rows), p.
    """
    only_this = int((correct & ~other).sum())
    only_that = int((other & ~correct).sum())
    gap = correct.astype(float) - other
    resampled = np.random.default_rng(0).multinomial(len(gap), np.full(len(gap), 1 / len(gap)), size=2_000)
    p = binomtest(only_this, only_this + only_that).pvalue if only_this + only_that else 1.0
    return {"difference": float(gap.mean()),
            "interval": np.percentile(resampled @ gap / len(gap), [2.5, 97.5]).tolist(),
            "only_this": only_this, "only_that": only_that, "p": p}


def accuracy_sentence(entry: dict) -> str:
    """An evaluation of the history of a classification.json as a line to print."""
    accuracies = []
    for setting, numbers in entry["validation"].items():
        accuracies.append(f"{100 * np.mean(numbers['accuracy']):.2f} % {setting}")
    return f"validation accuracy {', '.join(accuracies)}; training loss {entry['train_loss']:.3f}"


def accuracy_table(result: dict) -> str:
    """Accuracies and layer weights of a classification.json as lines to print."""
    rows = []
    for setting, numbers in result["settings"].items():
        test = numbers["test"]
        mixes = []
        for s, gamma in zip(numbers["s"], numbers["gamma"], strict=True):
            mixes.append(" ".join(f"{weight:.2f}" for weight in [*s, gamma]))
        rows.append({
            "accuracy of": setting,
            "train": numbers["train"]["accuracy"]["mean"],
            "validation": numbers["validation"]["accuracy"]["mean"],
            "test": test["accuracy"]["mean"],
            "std over seeds": test["accuracy"]["std"],
            "test, no near copies": test["fresh"]["accuracy"]["mean"] if "fresh" in test else None,
            "test macro-F1": test["macro_f1"]["mean"],
            "s_0 s_1 s_2 gamma (of each seed)": "; ".join(mixes),
        })
    return pd.DataFrame(rows).to_string(index=False, float_format="{:.4f}".format)

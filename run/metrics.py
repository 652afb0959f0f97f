"""Metrics of language models and classifiers, from arrays; the dictionaries are parts of the JSON files in models/."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor

CALIBRATION_BINS = 15
FREQUENT_WORDS = 25     # of the confusion matrix of words


# ----------------------------------------------------------------------------------------------- language models
def full_softmax_nll(h: Tensor, y: Tensor, table: Tensor, bias: Tensor, details: bool = False) -> tuple[Tensor, ...]:
    """((N,),): nll of targets y (N,) given states h (N, P), by a softmax over all V words but <pad>, in fp32.

    With details ((N,), (N,), (N,), (N,)): also the targets, the words with the highest logits, and the targets' ranks,
    which are the numbers of words with a higher logit. table (V, P), bias (V, 1).
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
    words, if they were asked for: for each direction (row, gold word, best word, rank) of every predicted token; rank is
    the number of words with a higher logit than the gold word.
    """
    nll: np.ndarray
    tokens: np.ndarray
    words: list[tuple[np.ndarray, ...]]

    @classmethod
    def of(cls, rows: np.ndarray, tokens: np.ndarray, batches: list) -> "Scores":
        """From ELMO.score_batch's results: for each batch and direction the arrays (row, nll, ..) of its tokens."""
        place = {row: i for i, row in enumerate(rows.tolist())}
        nll = np.zeros((2, len(rows)))
        words = []
        for d, of_direction in enumerate(zip(*batches, strict=True)):
            row, token_nll, *details = (np.concatenate(arrays) for arrays in zip(*of_direction, strict=True))
            position = np.array([place[r] for r in row.tolist()], dtype=int)
            nll[d] = np.bincount(position, weights=token_nll, minlength=len(rows))
            if details:
                words.append((position, *details))
        return cls(nll, tokens, words)

    def perplexity(self) -> list[float]:
        """exp(summed nll / summed tokens), forward and backward."""
        return np.exp(self.nll.sum(axis=1) / max(1, self.tokens.sum())).tolist()

    def metrics(self, chosen: np.ndarray | None = None) -> dict:
        """rows, tokens, and for "forward" and "backward" the metrics of the `chosen` rows (bool), or of all rows."""
        if chosen is None:
            chosen = np.ones(len(self.tokens), dtype=bool)
        tokens = int(self.tokens[chosen].sum())
        metrics = {"rows": int(chosen.sum()), "tokens": tokens}
        for d, direction in enumerate(("forward", "backward")):
            nll = float(self.nll[d, chosen].sum() / max(1, tokens))
            metrics[direction] = {"nll": nll, "perplexity": float(np.exp(nll)), "bits_per_token": nll / float(np.log(2))}
            if self.words:
                row, *words = self.words[d]
                metrics[direction] |= word_metrics(*(values[chosen[row]] for values in words))
        return metrics


def word_metrics(gold: np.ndarray, best: np.ndarray, rank: np.ndarray) -> dict:
    """How well words were predicted: accuracy, top-5 accuracy, macro precision, recall and F1 over the gold words.

    gold, best (tokens,): word ids; rank (tokens,): how many words had a higher logit than the gold word.
    """
    if len(gold) == 0:
        return {}
    precision, recall, f1, _ = precision_recall_fscore_support(gold, best, labels=np.unique(gold), average="macro",
                                                               zero_division=0)
    return {"accuracy": float((gold == best).mean()), "top5_accuracy": float((rank < 5).mean()),
            "macro_precision": float(precision), "macro_recall": float(recall), "macro_f1": float(f1)}


def word_confusion(gold: np.ndarray, best: np.ndarray, words: Sequence[str]) -> dict:
    """{"words", "counts"}: rows gold, columns predicted, for the most frequent gold words and all others as one."""
    ids, counts = np.unique(gold, return_counts=True)
    frequent = ids[np.argsort(-counts, kind="stable")[:FREQUENT_WORDS]]
    place = np.full(len(words), len(frequent))
    place[frequent] = np.arange(len(frequent))
    matrix = confusion_matrix(place[gold], place[best], labels=np.arange(len(frequent) + 1))
    return {"words": [words[i] for i in frequent] + ["(other)"], "counts": matrix.tolist()}


def perplexity_table(result: dict) -> str:
    """The perplexities of a pretraining.json as lines to print."""
    unknown = ", ".join(f"{name} {share:.2%}" for name, share in result["unknown"].items())
    lines = [f"vocabulary {result['vocabulary']:,}; <unk> {unknown}",
             f"{'perplexity':<24}{'rows':>8}{'forward':>10}{'backward':>10}{'Kneser-Ney':>12}{'unigram':>10}"]
    for name, part in result["splits"].items():
        for label, metrics in ((name, part), (f"{name}, fresh rows", part.get("fresh"))):
            if metrics and metrics["rows"]:
                values = (metrics["forward"]["perplexity"], metrics["backward"]["perplexity"],
                          metrics["forward"].get("kneser_ney_perplexity", np.nan),
                          metrics.get("unigram_perplexity", np.nan))
                lines.append(f"{label:<24}{metrics['rows']:>8,}" + "{:>10.2f}{:>10.2f}{:>12.2f}{:>10.1f}".format(*values))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- classifiers
def classification_metrics(p: np.ndarray, gold: np.ndarray, labels: Sequence[str]) -> dict:
    """Metrics of probabilities p (N, C) against gold classes (N,).

    rows, accuracy, nll (mean negative log-likelihood), calibration_error (mean difference between confidence and
    accuracy over 15 equal bins, Guo et al. 2017), macro_precision, macro_recall, macro_f1, classes (the same per
    class), confusion (counts; rows gold, columns predicted). A class that is never predicted has precision 0.
    """
    predicted = p.argmax(axis=1)
    every_class = np.arange(len(labels))
    scores = np.array(precision_recall_fscore_support(gold, predicted, labels=every_class, zero_division=0))    # (4, C)
    nll = -np.log(np.maximum(p[np.arange(len(gold)), gold], 1e-12))
    metrics = {"rows": len(gold), "accuracy": float((predicted == gold).mean()), "nll": float(nll.mean()),
               "calibration_error": calibration_error(p, gold)}
    for name, values in zip(("precision", "recall", "f1"), scores, strict=False):
        metrics[f"macro_{name}"] = float(values.mean())
    metrics["classes"] = {label: dict(zip(("precision", "recall", "f1", "rows"), scores[:, c].tolist(), strict=True))
                          for c, label in enumerate(labels)}
    metrics["confusion"] = confusion_matrix(gold, predicted, labels=every_class).tolist()
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


def over_seeds(p: np.ndarray, gold: np.ndarray, labels: Sequence[str], fresh: np.ndarray | None = None) -> dict:
    """Metrics of S seeds' probabilities p (S, N, C).

    seeds: classification_metrics of each; ensemble: those of the seeds' mean probabilities; accuracy and macro_f1:
    {mean, std} over the seeds; fresh: rows, accuracy, macro_f1 and ensemble {accuracy} of the rows where `fresh` is True.
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
    for name, probabilities in p.items():
        setting, _, _ = name.rpartition("-")
        nll = -probabilities.gather(1, gold[:, None]).clamp(min=1e-12).log().mean()
        losses.append(nll.item())
        numbers[setting]["loss"].append(nll.item())
        numbers[setting]["accuracy"].append((probabilities.argmax(dim=1) == gold).double().mean().item())
    return float(np.mean(losses)), numbers


def classification_numbers(p: dict, gold: dict, heads: list[str], labels: Sequence[str], fresh: np.ndarray | None) -> dict:
    """The numbers of one setting in a classification.json.

    p[part][head] (N, C) tensors for the heads of all seeds, gold[part] (N,), with the parts train, validation and test.
    train, validation, test: from over_seeds; predictions: class of each test row by the seeds' mean probabilities, one
    digit per row; best: index of the seed that is best on the validation rows.
    """
    numbers = {}
    for part in gold:
        of_seeds = np.stack([p[part][head].numpy() for head in heads])                          # (S, N, C)
        numbers[part] = over_seeds(of_seeds, gold[part], labels, fresh if part == "test" else None)
    numbers["predictions"] = "".join(map(str, of_seeds.mean(axis=0).argmax(axis=1)))            # of the last part, test
    numbers["best"] = int(np.argmax([seed["accuracy"] for seed in numbers["validation"]["seeds"]]))
    return numbers


def mcnemar(correct: np.ndarray, other: np.ndarray) -> dict:
    """Exact two-sided McNemar test of two systems' correct rows (N,) bool, and a bootstrap of their difference.

    Under the null hypothesis, a row that only one of them has right is either's with probability 1/2.
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


def accuracy_table(result: dict) -> str:
    """Accuracies and layer weights of a classification.json as lines to print."""
    lines = [f"{'accuracy':<12}{'train':>9}{'validation':>12}{'test':>9}{'std':>8}{'fresh rows':>12}{'macro-F1':>10}"
             "   layer weights s, gamma"]
    for setting, numbers in result["settings"].items():
        test = numbers["test"]
        std = test["accuracy"]["std"]
        cells = [f"{setting:<12}", f"{numbers['train']['accuracy']['mean']:>9.2%}",
                 f"{numbers['validation']['accuracy']['mean']:>12.2%}", f"{test['accuracy']['mean']:>9.2%}",
                 "       -" if std is None else f"{std:>8.2%}",
                 f"{test['fresh']['accuracy']['mean']:>12.2%}" if "fresh" in test else f"{'-':>12}",
                 f"{test['macro_f1']['mean']:>10.4f}   "]
        mixes = [f"{' '.join(f'{weight:.2f}' for weight in s)}, {gamma:.2f}"
                 for s, gamma in zip(numbers["s"], numbers["gamma"], strict=True)]
        lines.append("".join(cells) + "; ".join(mixes))
    return "\n".join(lines)

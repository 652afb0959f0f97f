"""A linear classifier of hashed words and pairs of words, and its share of the probabilities: --ngrams.

    ngrams = Ngrams.fit(rows, labels, classes=4)        # rows: tuples of texts, as in data.prepare.Part
    q = ngrams.probabilities(rows)              # (N, C)
    ngrams.choose([p], q, gold)                 # p (S, N, C) of other classifiers, on validation rows
    ngrams.mixed(p, q)                          # (S, N, C)

It knows no meaning and little order, and errs on other rows than a biLM does.
"""
from collections.abc import Sequence
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from data.files import InputError

COLUMNS = 2**18     # on validation rows 2^20 are no better in the mixture
SHARES = [k / 16 for k in range(9)]     # up to one half; exact in half precision


class Ngrams:
    """softmax(W x + b) of x, a text's TF-IDF vector of hashed words and pairs of words (Weinberger et al. 2009).

    weights: "weight" (C, COLUMNS), "bias" (C,), "idf" (COLUMNS,), "share" (), as half precision holds them.
    """

    def __init__(self, weights: dict[str, Tensor], classes: int):
        """ValueError where the weights are not those of such a model of as many classes."""
        shapes = {"weight": (classes, COLUMNS), "bias": (classes,), "idf": (COLUMNS,), "share": ()}
        if {name: tuple(value.shape) for name, value in weights.items()} != shapes:
            raise ValueError(f"its linear model has not the shapes {shapes}")
        self.weights = {name: value.half().float() for name, value in weights.items()}
        if not all(value.isfinite().all() for value in self.weights.values()) or not 0 <= self.weights["share"] <= 1:
            raise ValueError("its linear model holds weights that are not finite, or a share outside 0 to 1")

    @classmethod
    def fit(cls, rows: Sequence[tuple[str, ...]], labels: np.ndarray, classes: int) -> "Ngrams":
        """Logistic regression by scikit-learn; a class without a training row has probability 0."""
        if len(np.unique(labels)) < 2:
            raise InputError("ngrams: the training rows are all of one class; take more --rows")
        transformer = TfidfTransformer(sublinear_tf=True)
        x = transformer.fit_transform(hashed(rows))
        with catch_warnings():
            simplefilter("ignore", ConvergenceWarning)      # C was chosen with as many iterations
            model = LogisticRegression(C=30, max_iter=100).fit(x, labels)
        weight, bias = torch.zeros(classes, COLUMNS), torch.full((classes,), -1e4)
        bias[model.classes_] = 0
        at = model.classes_[-len(model.coef_):]         # of two classes, only the second has weights
        weight[at], bias[at] = (torch.from_numpy(part).float() for part in (model.coef_, model.intercept_))
        idf = torch.from_numpy(transformer.idf_)
        return cls({"weight": weight, "bias": bias, "idf": idf, "share": torch.zeros(())}, classes)

    def probabilities(self, rows: Sequence[tuple[str, ...]]) -> Tensor:
        """(N, C) float32."""
        transformer = TfidfTransformer(sublinear_tf=True)
        transformer.idf_ = self.weights["idf"].double().numpy()
        x = transformer.transform(hashed(rows))
        logits = x @ self.weights["weight"].double().numpy().T + self.weights["bias"].double().numpy()
        return torch.from_numpy(logits).float().softmax(dim=1)

    def choose(self, others: Sequence[Tensor], q: Tensor, gold: Tensor) -> None:
        """Sets the share with the lowest mean cross-entropy of all classifiers `others`, each (S, N, C)."""
        every = torch.arange(len(gold))
        def nats(share: float) -> float:
            return sum(-float(mixture(p, q, share)[:, every, gold].clamp(min=1e-12).log().mean()) for p in others)
        self.weights["share"] = torch.tensor(min(SHARES, key=nats))

    def mixed(self, p: Tensor, q: Tensor) -> Tensor:
        """The mixture with the chosen share."""
        return mixture(p, q, float(self.weights["share"]))


def mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    """p^(1 - share) q^share, of sum 1: a geometric mean, in which who is sure outvotes who is in doubt."""
    return ((1 - share) * p.clamp(min=1e-12).log() + share * q.clamp(min=1e-12).log()).softmax(dim=-1)


def hashed(rows: Sequence[tuple[str, ...]]):
    """(N, COLUMNS) sparse counts of words and pairs of words."""
    vectorizer = HashingVectorizer(n_features=COLUMNS, ngram_range=(1, 2), alternate_sign=False, norm=None)
    return vectorizer.transform([" ".join(row) for row in rows])

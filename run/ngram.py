"""Two count-based language models, unigram and Kneser-Ney. A neural one should have a lower perplexity.

Unigram: p(w) = (c(w) + 1) / (N + S). Interpolated modified Kneser-Ney of order n (Chen and Goodman 1998, section 3):

    p_k(w | h) = (a(h w) - D_k(a(h w))) / a(h .) + gamma_k(h) p_{k-1}(w | h'),    h' = h without its first word
    gamma_k(h) = sum_w D_k(a(h w)) / a(h .),                                      p_0 = 1 / S

At the highest order (k = n), a(g) is the count of the n-gram g. At lower orders it is the number of distinct words
before g. If g begins with <s>, no word is before it, and a(g) is its count (Heafield et al. 2013, section 3.2). No
history reaches beyond the <s> of its row, so w_1 is predicted from bigrams. S = V - 2 symbols can be predicted: all
except <pad> and <s>.

Rows are (ids, offsets): row r is ids[offsets[r]:offsets[r + 1]], word ids without boundary symbols. With both boundary
symbols, R rows have T symbols, of which N = T - R are predicted. V is the vocabulary size. <unk> counts as a word, so
perplexities can be compared only at the same V.
"""
import numpy as np
from numpy import ndarray as Array

PAD = 0
START = 2
END = 3
MAX_TOKENS = 5_000_000                      # of the training rows; the counts of more would not fit in memory
FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])   # discounts for a corpus too small to estimate them, as in KenLM


def add_boundaries(ids: Array, offsets: Array, vocabulary_size: int) -> tuple[Array, Array]:
    """All rows with boundaries as one sequence (T,), and the positions of <s> in it (R,).

    The rows [5 6] and [] become <s> 5 6 </s> <s> </s>, with <s> at 0 and 4. Raises ValueError if an id is not a word.
    """
    ids = np.asarray(ids, np.int64)
    offsets = np.asarray(offsets, np.int64)
    if np.any((ids < 0) | (ids >= vocabulary_size) | np.isin(ids, (PAD, START, END))):
        raise ValueError(f"rows hold <unk> (1) and words 4 to {vocabulary_size - 1}, no <pad> or boundary symbols")
    shift = 2 * np.arange(len(offsets) - 1)                 # number of boundary symbols in earlier rows
    starts = offsets[:-1] + shift
    ends = offsets[1:] + shift + 1
    words = np.full(len(ids) + 2 * len(starts), -1)
    words[starts] = START
    words[ends] = END
    words[words < 0] = ids
    return words, starts


def reverse(ids: Array, offsets: Array) -> tuple[Array, Array]:
    """The same rows, each with its words in reverse order, for the backward model.

    add_boundaries then writes <s> w_n .. w_1 </s> for </s> w_n .. w_1 <s>. Swapping the two symbols changes no count.
    """
    ids = np.asarray(ids)
    offsets = np.asarray(offsets)
    mirror = np.repeat(offsets[:-1] + offsets[1:] - 1, np.diff(offsets))        # first + last position of each row
    return ids[mirror - np.arange(len(ids))], offsets


def discounts(counts: Array) -> Array:
    """D(0) = 0, D(1), D(2) and D(3 or more) of one order (Chen and Goodman 1998, section 3).

    D(j) = j - (j + 1) Y n_{j+1} / n_j with Y = n_1 / (n_1 + 2 n_2), where n_j is the number of n-grams counted j times.
    Returns FALLBACK if any n_j is 0 or any D(j) is not between 0 and j.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)      # n_1 .. n_4
    if not n.all():
        return FALLBACK
    j = np.arange(1, 4)
    y = n[0] / (n[0] + 2 * n[1])
    d = j - (j + 1) * y * n[1:] / n[:-1]
    if np.any((d <= 0) | (d >= j)):
        return FALLBACK
    return np.append(0.0, d)


def previous(grams: Array, starts: Array) -> Array:
    """(T,) id of the n-gram that ends one position earlier; -1 at <s>, so no history reaches into the row before."""
    history = np.roll(grams, 1)
    history[starts] = -1
    return history


class KneserNey:
    """A fitted model. Every k-gram of the training rows has an id >= 0; -1 stands for a k-gram that is not in them.

    The id of a 1-gram is its word id. A longer k-gram has the key (id of its history) * V + (last word). Its id is the
    position of this key in keys[k - 1], which is sorted. So keys stay below 2^63 at any order.
    first_term[k - 1][id of the k-gram] is the first term of p_k, backoff[k - 1][id of the history] is gamma_k. Index
    -1, the last entry, holds 0 in first_term and 1 in backoff, so that p_k = p_{k-1}.
    """

    def __init__(self, ids: Array, offsets: Array, vocabulary_size: int, order: int = 4):
        self.vocabulary_size = vocabulary_size
        self.order = order
        self.keys = [np.arange(vocabulary_size)]
        self.first_term = []
        self.backoff = []
        words, starts = add_boundaries(ids, offsets, vocabulary_size)
        grams = words           # (T,) id of the k-gram that ends at each position
        histories = 1           # number of (k - 1)-grams
        for k in range(1, order + 1):
            counted = grams >= 0                            # (T,) positions whose k-gram adds 1 to its count
            longer = np.full(len(words), -1)                # (T,) id of the (k + 1)-gram that ends at each position
            if k < order:
                key = self.join(previous(grams, starts), words)
                inside = np.flatnonzero(key >= 0)
                keys, first, ranks = np.unique(key[inside], return_index=True, return_inverse=True)
                self.keys.append(keys)
                longer[inside] = ranks
                # a k-gram counts once per distinct word before it; if it begins with <s>, it counts each time
                counted[inside] = False
                counted[inside[first]] = True
            counted[starts] = False                         # <s> is never predicted
            own_keys = self.keys[k - 1]
            counts = np.bincount(grams[counted], minlength=len(own_keys))
            self.estimate(own_keys // vocabulary_size, counts, histories)
            grams = longer
            histories = len(counts)

    def join(self, history: Array, words: Array) -> Array:
        """(T,) keys of the n-grams with these histories' ids and these last words; -1 for a history of -1."""
        return np.where(history >= 0, history * self.vocabulary_size + words, -1)

    def estimate(self, history: Array, counts: Array, histories: int) -> None:
        """Appends first_term and backoff of one order, from the history and the count a of each k-gram."""
        discount = discounts(counts)[np.minimum(counts, 3)]
        total = np.bincount(history, counts, histories)     # a(h .)
        divisor = np.maximum(total, 1)
        first_term = (counts - discount) / divisor[history]
        gamma = np.bincount(history, discount, histories) / divisor
        gamma[total == 0] = 1.0                             # nothing ever followed this history
        self.first_term.append(np.append(first_term, 0.0))
        self.backoff.append(np.append(gamma, 1.0))

    def probabilities(self, ids: Array, offsets: Array) -> tuple[Array, Array]:
        """(T,) probability of every symbol given those before it in its row (1 for <s>), and (R,) positions of <s>."""
        words, starts = add_boundaries(ids, offsets, self.vocabulary_size)
        p = np.full(len(words), 1 / (self.vocabulary_size - 2))
        grams = words
        history = np.zeros_like(words)
        for k in range(self.order):
            if k > 0:
                history = previous(grams, starts)
                key = self.join(history, words)
                rank = np.searchsorted(self.keys[k], key)
                known = np.append(self.keys[k], -2)[rank] == key        # the entry past the end is -2, no key
                grams = np.where(known, rank, -1)
            p = self.first_term[k][grams] + self.backoff[k][history] * p
        p[starts] = 1.0
        return p, starts

    def nll(self, ids: Array, offsets: Array) -> Array:
        """(R,) negative log-likelihood of each row in nats, summed over its words and its end symbol."""
        p, starts = self.probabilities(ids, offsets)
        return np.add.reduceat(-np.log(p), starts)


def unigram_nll(train_ids: Array, train_offsets: Array, vocabulary_size: int, ids: Array,
                offsets: Array) -> Array:
    """(R,) negative log-likelihood of each row in nats under the add-one unigram model, end symbol included."""
    train_words, train_starts = add_boundaries(train_ids, train_offsets, vocabulary_size)
    predicted = len(train_words) - len(train_starts)
    p = (np.bincount(train_words, minlength=vocabulary_size) + 1) / (predicted + vocabulary_size - 2)
    p[START] = 1.0                                          # <s> is given, never predicted
    words, starts = add_boundaries(ids, offsets, vocabulary_size)
    return np.add.reduceat(-np.log(p[words]), starts)


def perplexity(nll: Array, offsets: Array, rows: Array | slice = slice(None)) -> float:
    """exp(sum of nll / number of predicted symbols) over `rows`: all of them, or those of a boolean mask."""
    predicted = np.diff(offsets) + 1
    return float(np.exp(nll[rows].sum() / predicted[rows].sum()))


def add_perplexities(splits: dict, train: tuple[Array, Array], parts: dict, fresh: dict, vocabulary_size: int) -> None:
    """Adds unigram and Kneser-Ney perplexities to every part of `splits`, and to its "fresh" rows if it has them.

    train, parts[name]: (ids, offsets). fresh[name]: (R,) bool. splits[name]: an entry of "splits" in pretraining.json.
    Nothing is added if the training rows have more than MAX_TOKENS tokens.
    """
    if len(train[0]) > MAX_TOKENS:
        return
    forward = KneserNey(*train, vocabulary_size)
    backward = KneserNey(*reverse(*train), vocabulary_size)
    for name, (ids, offsets) in parts.items():
        unigram = unigram_nll(*train, vocabulary_size, ids, offsets)
        kneser_ney = {"forward": forward.nll(ids, offsets), "backward": backward.nll(*reverse(ids, offsets))}
        measured = [(splits[name], slice(None))]
        if "fresh" in splits[name]:
            measured.append((splits[name]["fresh"], fresh[name]))
        for metrics, rows in measured:
            metrics["unigram_perplexity"] = perplexity(unigram, offsets, rows)
            for direction, nll in kneser_ney.items():
                metrics[direction]["kneser_ney_perplexity"] = perplexity(nll, offsets, rows)

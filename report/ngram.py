"""Perplexities of two count-based language models on the biLM's own tokens: the baselines that a neural one must beat.

Unigram: p(w) = (c(w) + 1) / (N + S). Interpolated modified Kneser-Ney of order n (Chen and Goodman 1998, section 3):

    p_k(w | h) = (a(h w) - D_k(a(h w))) / a(h .) + gamma_k(h) p_{k-1}(w | h'),    h' = h without its first word
    gamma_k(h) = sum_w D_k(a(h w)) / a(h .),                                      p_0 = 1 / S

a(g) is how often g occurs for k = n, and how many distinct words stand before it for k < n; an n-gram that begins with
<s> has nothing before it and keeps its occurrences (Heafield et al. 2013, section 3.2). A history ends where its row
begins: <s> stands there once, so that w_1 is given by bigrams. S = V - 2 symbols can be predicted: not <pad> and <s>.

Rows are (ids, offsets): row r is ids[offsets[r]:offsets[r + 1]], word ids without boundary symbols. R rows hold T
symbols with both boundaries, N = T - R of them predicted; V is the vocabulary size. <unk> is a word like any other:
compare perplexities at the same V only.
"""

import numpy as np

PAD, START, END = 0, 2, 3
FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])  # KenLM's --discount_fallback, for a corpus too small to estimate discounts


def bounded(ids: np.ndarray, offsets: np.ndarray, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(T,) rows [5 6] and [] as <s> 5 6 </s> <s> </s>, and (R,) where each <s> is: 0, 4. ValueError for other ids."""
    ids, offsets = np.asarray(ids, np.int64), np.asarray(offsets, np.int64)
    if np.any((ids < 0) | (ids >= vocabulary_size) | np.isin(ids, (PAD, START, END))):
        raise ValueError(f"rows hold <unk> (1) and words 4 to {vocabulary_size - 1}, no <pad> or boundary symbols")
    shift = 2 * np.arange(len(offsets) - 1)
    starts, ends = offsets[:-1] + shift, offsets[1:] + shift + 1
    words = np.full(len(ids) + 2 * len(starts), -1)
    words[starts], words[ends] = START, END
    words[words < 0] = ids
    return words, starts


def reverse(ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same rows, each read from its end: what the backward model is fitted to and scored on.

    Boundaries are added later and their names are symmetric: </s> w_n .. w_1 <s> is counted as <s> w_n .. w_1 </s>.
    """
    ids, offsets = np.asarray(ids), np.asarray(offsets)
    return ids[np.repeat(offsets[:-1] + offsets[1:] - 1, np.diff(offsets)) - np.arange(len(ids))], offsets


def discounts(counts: np.ndarray) -> np.ndarray:
    """D(0) = 0, D(1), D(2) and D(3 or more) of one order (Chen and Goodman 1998, section 3).

    D(j) = j - (j + 1) Y n_{j+1} / n_j with Y = n_1 / (n_1 + 2 n_2), n_j being the number of n-grams counted j times.
    A D(j) of 0 can leave unseen words no probability, one of j the seen ones; either way all four are FALLBACK.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    if n.all():
        j = np.arange(1, 4)
        d = j - (j + 1) * n[0] / (n[0] + 2 * n[1]) * n[1:] / n[:-1]
        if np.all((d > 0) & (d < j)):
            return np.append(0.0, d)
    return FALLBACK


class KneserNey:
    """A fitted model. Every k-gram of the training rows has a dense id; -1 is one unseen or longer than its row so far.

    Ids of longer n-grams are ranks among the sorted keys (id of the history) * V + (last word), so that a key stays
    below 2^63 at any order. For order k, seen[k - 1] holds the first term of p_k by k-gram and backoff[k - 1] gamma_k
    by history. Both end in the value that id -1 picks, 0 and 1, which leaves p_{k-1} as it is.
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray, vocabulary_size: int, order: int = 4):
        self.vocabulary_size, self.order = vocabulary_size, order
        words, starts = bounded(ids, offsets, vocabulary_size)
        self.keys, self.seen, self.backoff = [np.arange(vocabulary_size)], [], []
        grams, histories = words, 1  # (T,) id of the k-gram that ends at each position: at k = 1 the word
        for k in range(1, order + 1):
            counted, longer = grams >= 0, np.full(len(words), -1)
            if k < order:
                _, key = self._extend(grams, words, starts)
                whole = np.flatnonzero(key >= 0)
                unique, first, longer[whole] = np.unique(key[whole], return_index=True, return_inverse=True)
                # one count per distinct (k + 1)-gram that ends in the k-gram; where a row begins, one per occurrence
                counted[whole] = False
                counted[whole[first]] = True
                self.keys.append(unique)
            counted[starts] = False  # <s> is read and never predicted
            counts = np.bincount(grams[counted], minlength=len(self.keys[k - 1]))
            self._estimate(self.keys[k - 1] // vocabulary_size, counts, histories)
            grams, histories = longer, len(counts)

    def _extend(self, grams: np.ndarray, words: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T,) ids of the k-grams that end one position earlier and (T,) keys of the (k + 1)-grams, -1 without one."""
        history = np.roll(grams, 1)
        history[starts] = -1  # no history reaches into another row
        return history, np.where(history >= 0, history * self.vocabulary_size + words, -1)

    def _estimate(self, history: np.ndarray, counts: np.ndarray, histories: int) -> None:
        """Appends one order's `seen` and `backoff`, from each k-gram's history and count a."""
        discount = discounts(counts)[np.minimum(counts, 3)]
        total = np.bincount(history, counts, histories)
        gamma = np.bincount(history, discount, histories) / np.maximum(total, 1)
        self.seen.append(np.append((counts - discount) / np.maximum(total, 1)[history], 0.0))
        self.backoff.append(np.append(np.where(total > 0, gamma, 1.0), 1.0))  # total is 0 where nothing ever followed

    def probabilities(self, ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T,) p of every symbol given what precedes it in its row, 1 for <s>, and (R,) where each <s> is."""
        words, starts = bounded(ids, offsets, self.vocabulary_size)
        p = np.full(len(words), 1 / (self.vocabulary_size - 2))
        history, grams = np.zeros(len(words), np.int64), words
        for k in range(self.order):
            if k:
                history, key = self._extend(grams, words, starts)
                place = np.searchsorted(self.keys[k], key)
                grams = np.where(np.append(self.keys[k], -2)[place] == key, place, -1)  # -2: past the last, no key
            p = self.seen[k][grams] + self.backoff[k][history] * p
        p[starts] = 1.0
        return p, starts

    def nats(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """(R,) -log p of every row in nats, summed over its words and its end symbol."""
        p, starts = self.probabilities(ids, offsets)
        return np.add.reduceat(-np.log(p), starts)


def unigram_nats(
    train_ids: np.ndarray, train_offsets: np.ndarray, vocabulary_size: int, ids: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """(R,) -log p of every row in nats under add-one counts of single words, its end symbol included."""
    words, starts = bounded(train_ids, train_offsets, vocabulary_size)
    p = (np.bincount(words, minlength=vocabulary_size) + 1) / (len(words) - len(starts) + vocabulary_size - 2)
    p[START] = 1.0  # given, never predicted
    words, starts = bounded(ids, offsets, vocabulary_size)
    return np.add.reduceat(-np.log(p[words]), starts)


def perplexity(nats: np.ndarray, offsets: np.ndarray, rows: np.ndarray | slice = slice(None)) -> float:
    """exp(nats / predicted symbols) over `rows`, a boolean mask or all: summed first and divided once."""
    return float(np.exp(nats[rows].sum() / (np.diff(offsets)[rows] + 1).sum()))

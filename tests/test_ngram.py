"""The n-gram models against a second implementation with dictionaries, and against arithmetic on paper."""
import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from run.ngram import FALLBACK, KneserNey, discounts, perplexity, reverse, unigram_nll


def flat(rows):
    """Lists of words as (ids, offsets)."""
    ids = list(itertools.chain.from_iterable(rows))
    return np.array(ids, np.int64), np.cumsum([0] + [len(row) for row in rows])


def random_rows(seed, count, vocabulary_size, longest=9):
    """Rows with Zipf-like word frequencies. Some repeat earlier rows, so that long n-grams recur too; 1 is <unk>."""
    rng = np.random.default_rng(seed)
    words = np.array([1, *range(4, vocabulary_size)])
    weights = 1 / np.arange(1, len(words) + 1)
    p = weights / weights.sum()
    rows = []
    for _ in range(count):
        length = rng.integers(0, longest)
        rows.append(rng.choice(words, length, p=p).tolist())
    return [row if rng.random() < 0.7 else rows[rng.integers(0, 9)][:6] for row in rows]


class Reference:
    """Interpolated modified Kneser-Ney written as its definition: tuples, sets and a recursion."""

    def __init__(self, rows, vocabulary_size, order):
        self.order = order
        self.symbols = vocabulary_size - 2
        occurrences = Counter()
        before = defaultdict(set)               # n-gram -> the distinct words before it
        for words in rows:
            row = [2, *words, 3]
            for end in range(2, len(row) + 1):
                for begin in range(max(0, end - order), end):
                    gram = tuple(row[begin:end])
                    occurrences[gram] += 1
                    if begin > 0:
                        before[gram].add(row[begin - 1])
        self.after = defaultdict(dict)          # history -> {word: a(history word)}
        for gram, count in occurrences.items():
            keeps_count = len(gram) == order or gram[0] == 2
            self.after[gram[:-1]][gram[-1]] = count if keeps_count else len(before[gram])
        self.discount = {k: self.discounts_of(k) for k in range(1, order + 1)}

    def discounts_of(self, k):
        n = Counter()                           # count of counts
        for history, words in self.after.items():
            if len(history) == k - 1:
                n.update(words.values())
        if n[1] and n[2] and n[3] and n[4]:
            y = n[1] / (n[1] + 2 * n[2])
            d = (0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3])
            if all(0 < d[j] < j for j in (1, 2, 3)):
                return d
        return (0, 0.5, 1.0, 1.5)

    def p(self, history, word):
        """p(word | history); the history is a tuple that begins with <s>."""
        return self.recursion(history[max(0, len(history) - self.order + 1):], word)

    def recursion(self, history, word):
        shorter = self.recursion(history[1:], word) if history else 1 / self.symbols
        follow = self.after.get(history)
        if not follow:
            return shorter
        d = self.discount[len(history) + 1]
        gamma = sum(d[min(count, 3)] for count in follow.values())
        count = follow.get(word, 0)
        return (count - d[min(count, 3)] + gamma * shorter) / sum(follow.values())

    def nll(self, words):
        row = (2, *words, 3)
        return -sum(math.log(self.p(row[:i], row[i])) for i in range(1, len(row)))


@pytest.mark.parametrize("order", [1, 2, 4, 6])
@pytest.mark.parametrize("v", [9, 60])
@pytest.mark.parametrize("count", [1, 120])
def test_rows_have_the_same_nll_as_a_reference_with_dictionaries(count, v, order):
    train = random_rows(1, count, v)
    test = [*random_rows(2, 20, v), []]
    reference = Reference(train, v, order)
    expected = [reference.nll(row) for row in test]
    np.testing.assert_allclose(KneserNey(*flat(train), v, order).nll(*flat(test)), expected, rtol=1e-10)
    if (count, v, order) == (120, 60, 4):                   # estimated discounts, not only the fallback
        assert sum(d != tuple(FALLBACK) for d in reference.discount.values()) >= 2


def test_a_bigram_model_agrees_with_arithmetic_on_paper():
    # rows "a b" and "a": bigram counts <s> a 2, a b 1, b </s> 1, a </s> 1
    # number of distinct symbols before a: 1, before b: 1, before </s>: 2; S = 4
    end = (2 - 1.0) / 4 + (0.5 + 0.5 + 1.0) / 4 / 4
    word = (1 - 0.5) / 4 + (0.5 + 0.5 + 1.0) / 4 / 4
    first = (2 - 1.0) / 2 + 1.0 / 2 * word
    second = (1 - 0.5) / 2 + (0.5 + 0.5) / 2 * end
    a = 4
    b = 5
    nll = KneserNey(*flat([[a, b], [a]]), 6, order=2).nll(*flat([[a]]))
    assert nll == pytest.approx([-math.log(first) - math.log(second)])


def test_discounts_follow_chen_and_goodman_and_fall_back_if_they_cannot_be_estimated():
    counts = np.repeat([0, 1, 2, 3, 4, 7], [50, 40, 12, 6, 3, 5])  # Y = 40 / 64
    expected = [0, 1 - 2 * 0.625 * 12 / 40, 2 - 3 * 0.625 * 6 / 12, 3 - 4 * 0.625 * 3 / 6]
    assert discounts(counts) == pytest.approx(expected)
    assert discounts(counts[counts != 3]) == pytest.approx(FALLBACK)
    assert discounts(np.repeat([1, 2, 3, 4], [40, 1, 9, 9])) == pytest.approx(FALLBACK)  # D(2) would be negative


def test_word_ids_up_to_hundreds_of_thousands_get_distinct_keys():
    v = 800_000
    rows = random_rows(5, 200, 60)
    reference = Reference(rows, v, 4)
    ids, offsets = flat(rows)
    large_ids = np.where(ids > 3, v - ids, ids)
    found = KneserNey(large_ids, offsets, v, 4).nll(large_ids, offsets)
    np.testing.assert_allclose(found[:40], [reference.nll(row) for row in rows[:40]], rtol=1e-10)


def test_rows_are_reversed_one_by_one():
    ids, offsets = reverse(*flat([[4, 5, 6], [], [7], [8, 9]]))
    assert ids.tolist() == [6, 5, 4, 7, 9, 8]
    assert offsets.tolist() == [0, 3, 3, 4, 6]


def test_the_unigram_model_has_add_one_counts_and_predicts_the_end_symbol():
    # four words and two end symbols were counted; S = 5 of the 7 ids can be predicted
    nll = unigram_nll(*flat([[4, 4, 5], [1]]), 7, *flat([[4, 6], []]))
    assert nll == pytest.approx([-math.log(3 / 11 * 1 / 11 * 3 / 11), -math.log(3 / 11)])


def test_perplexity_with_a_mask_is_that_of_the_rows_in_it():
    nll = np.array([6.0, 1.0, 4.0])
    offsets = np.array([0, 2, 2, 5])
    assert perplexity(nll, offsets) == pytest.approx(math.exp(11 / 8))
    assert perplexity(nll, offsets, np.array([True, False, True])) == pytest.approx(math.exp(10 / 7))


@pytest.mark.parametrize("word", [-1, 0, 2, 3, 9])
def test_padding_boundary_symbols_and_unknown_ids_in_a_row_are_refused(word):
    with pytest.raises(ValueError, match="words 4 to 8"):
        KneserNey(*flat([[4, word]]), 9)

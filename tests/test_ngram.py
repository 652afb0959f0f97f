"""The n-gram baselines against a second implementation with dictionaries, against sums to one, and against paper."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from report.ngram import FALLBACK, KneserNey, discounts, perplexity, reverse, unigram_nats


def flat(rows):
    """Lists of words as (ids, offsets)."""
    return np.array([w for row in rows for w in row], np.int64), np.cumsum([0] + [len(row) for row in rows])


def random_rows(seed, count, vocabulary_size, longest=9):
    """Rows from a Zipf-like source that also repeats itself, so that n-grams of every order recur; 1 is <unk>."""
    rng = np.random.default_rng(seed)
    words = np.array([1, *range(4, vocabulary_size)])
    p = 1 / np.arange(1, len(words) + 1)
    rows = [rng.choice(words, rng.integers(0, longest), p=p / p.sum()).tolist() for _ in range(count)]
    return [row if rng.random() < 0.7 else rows[rng.integers(0, 9)][:6] for row in rows]


class Reference:
    """Interpolated modified Kneser-Ney as its definition reads: tuples, sets and a recursion."""

    def __init__(self, rows, vocabulary_size, order):
        self.order, self.symbols = order, vocabulary_size - 2
        occurrences, before = Counter(), defaultdict(set)
        for row in rows:
            row = [2, *row, 3]
            for end in range(2, len(row) + 1):
                for begin in range(max(0, end - order), end):
                    occurrences[tuple(row[begin:end])] += 1
                    if begin:
                        before[tuple(row[begin:end])].add(row[begin - 1])
        self.after, self.discount = defaultdict(dict), {}
        for gram, count in occurrences.items():
            raw = len(gram) == order or gram[0] == 2
            self.after[gram[:-1]][gram[-1]] = count if raw else len(before[gram])
        for k in range(1, order + 1):
            n = Counter(c for h, words in self.after.items() if len(h) == k - 1 for c in words.values())
            self.discount[k] = (0, 0.5, 1.0, 1.5)
            if n[1] and n[2] and n[3] and n[4]:
                y = n[1] / (n[1] + 2 * n[2])
                d = (0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3])
                if all(0 < d[j] < j for j in (1, 2, 3)):
                    self.discount[k] = d

    def p(self, history, word):
        """p(word | history), the history being a tuple that begins with <s>."""
        return self._p(history[max(0, len(history) - self.order + 1) :], word)

    def _p(self, history, word):
        shorter = self._p(history[1:], word) if history else 1 / self.symbols
        follow = self.after.get(history)
        if not follow:
            return shorter
        d = self.discount[len(history) + 1]
        total, gamma = sum(follow.values()), sum(d[min(c, 3)] for c in follow.values())
        count = follow.get(word, 0)
        return (count - d[min(count, 3)] + gamma * shorter) / total

    def nats(self, row):
        row = (2, *row, 3)
        return -sum(math.log(self.p(row[:i], row[i])) for i in range(1, len(row)))


CASES = [(rows, v, order) for rows in (1, 120) for v in (9, 60) for order in (1, 2, 4, 6)]


@pytest.mark.parametrize("count, v, order", CASES)
def test_rows_have_the_nats_of_a_reference_with_dictionaries(count, v, order):
    train, heldout = random_rows(1, count, v), [*random_rows(2, 20, v), []]
    expected = [Reference(train, v, order).nats(row) for row in heldout]
    np.testing.assert_allclose(KneserNey(*flat(train), v, order).nats(*flat(heldout)), expected, rtol=1e-10)


def test_the_reference_case_uses_estimated_discounts_as_well_as_the_fallback():
    estimated = [d for k, d in Reference(random_rows(1, 120, 60), 60, 4).discount.items() if d != tuple(FALLBACK)]
    assert len(estimated) >= 2


@pytest.mark.parametrize("count, order", [(0, 4), (1, 4), (300, 1), (300, 2), (300, 4)])
def test_probabilities_sum_to_one_over_the_predictable_symbols_after_any_history(count, order):
    v, train = 30, random_rows(3, count, 30)
    model = KneserNey(*flat(train), v, order)
    for history in [[], [4], [29, 29], *train[:8], *random_rows(4, 8, v, longest=14)]:
        rows = [[*history, w] for w in (1, *range(4, v))]
        p, starts = model.probabilities(*flat(rows))
        end = model.probabilities(*flat([history]))[0][-1]
        assert p[starts + len(history) + 1].sum() + end == pytest.approx(1, abs=1e-12)
        assert p.min() > 0


def test_a_bigram_model_agrees_with_arithmetic_on_paper():
    # rows a b, a: bigrams <s>a 2, ab 1, b</s> 1, a</s> 1; a stands after 1 symbol, b after 1, </s> after 2; S = 4
    a, b, v = 4, 5, 6
    end = (2 - 1.0) / 4 + (0.5 + 0.5 + 1.0) / 4 / 4
    word = (1 - 0.5) / 4 + (0.5 + 0.5 + 1.0) / 4 / 4
    first = (2 - 1.0) / 2 + 1.0 / 2 * word
    second = (1 - 0.5) / 2 + (0.5 + 0.5) / 2 * end
    nats = KneserNey(*flat([[a, b], [a]]), v, order=2).nats(*flat([[a]]))
    assert nats == pytest.approx([-math.log(first) - math.log(second)])


def test_discounts_follow_chen_and_goodman_and_fall_back_when_a_count_of_counts_is_zero():
    counts = np.repeat([0, 1, 2, 3, 4, 7], [50, 40, 12, 6, 3, 5])  # Y = 40 / 64
    expected = [0, 1 - 2 * 0.625 * 12 / 40, 2 - 3 * 0.625 * 6 / 12, 3 - 4 * 0.625 * 3 / 6]
    assert discounts(counts) == pytest.approx(expected)
    assert discounts(counts[counts != 3]) == pytest.approx(FALLBACK)
    assert discounts(np.repeat([1, 2, 3, 4], [40, 1, 9, 9])) == pytest.approx(FALLBACK)  # D(2) would be negative


def test_word_ids_up_to_hundreds_of_thousands_are_packed_without_collision():
    small, v = random_rows(5, 200, 60), 800_000
    far = [[v - w if w > 3 else w for w in row] for row in small]
    near, away = Reference(small, v, 4), KneserNey(*flat(far), v, 4)
    np.testing.assert_allclose(away.nats(*flat(far[:40])), [near.nats(row) for row in small[:40]], rtol=1e-10)


def test_a_row_scores_the_same_alone_and_between_others():
    train, heldout = random_rows(6, 200, 40), random_rows(7, 20, 40)
    model = KneserNey(*flat(train), 40)
    assert [model.nats(*flat([row]))[0] for row in heldout] == pytest.approx(model.nats(*flat(heldout)).tolist())


def test_rows_are_reversed_one_by_one():
    ids, offsets = reverse(*flat([[4, 5, 6], [], [7], [8, 9]]))
    assert ids.tolist() == [6, 5, 4, 7, 9, 8]
    assert offsets.tolist() == [0, 3, 3, 4, 6]


def test_unigram_nats_are_add_one_counts_with_the_end_symbol():
    # four words and two ends were seen; S = 5 of the 7 ids can be predicted
    nats = unigram_nats(*flat([[4, 4, 5], [1]]), 7, *flat([[4, 6], []]))
    assert nats == pytest.approx([-math.log(3 / 11 * 1 / 11 * 3 / 11), -math.log(3 / 11)])


def test_perplexity_of_a_mask_is_that_of_the_rows_it_keeps():
    nats, offsets = np.array([6.0, 1.0, 4.0]), np.array([0, 2, 2, 5])
    assert perplexity(nats, offsets) == pytest.approx(math.exp(11 / 8))
    assert perplexity(nats, offsets, np.array([True, False, True])) == pytest.approx(math.exp(10 / 7))


@pytest.mark.parametrize("word", [-1, 0, 2, 3, 9])
def test_padding_boundaries_and_foreign_ids_in_a_row_are_refused(word):
    with pytest.raises(ValueError, match="words 4 to 8"):
        KneserNey(*flat([[4, word]]), 9)

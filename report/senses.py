"""Ambiguous words, their uses, and the nearest uses by the vectors of a layer (section 5.3 and table 4 of the paper).

AG News has no labels of word senses, so the sense of a use is taken to be the class of its row. A query is a use whose
nearest uses are sought; its pool is the uses of the same word in training rows. The findings `senses` and `neighbours`
of report/findings.py are made here.
"""
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pandas as pd
import torch.nn.functional as F
from nltk import ngrams, trigrams
from scipy.stats import entropy

from data.tasks import Part, Task
from ELMO import ELMo
from report.baselines import texts_of
from run.files import InputError

DETERMINERS = frozenset("the a an its his her their our this that these those".split())
FOLLOWERS = frozenset(", . ; : ) of in on at for to from by with and or as is was are were has had have will would "
                      "that which who when while after before".split())
NOUN_SHARE = 0.15       # a noun has at least this share of its uses between a determiner and a follower
MIN_USES = 20           # an ambiguous word has at least so many uses in test rows
MAX_SHARE = 0.7         # and no class has more than this share of them
RULE = ("words that follow a determiner and stand before a preposition, an auxiliary, a conjunction or a sign in at "
        f"least {NOUN_SHARE:.0%} of their uses in training rows (nouns), with at least {MIN_USES} uses in test rows, "
        f"none of whose classes has more than {MAX_SHARE:.0%} of these")
POOL = 800              # at most so many uses of a word in training rows are searched
VOTERS = 10             # number of nearest uses that vote
COPIED_WORDS = 8        # two rows that share a sequence of so many words are near copies; their class proves nothing


@dataclass
class Uses:
    """Uses of one word: vectors (uses, 3, D) of unit length, row and class of each use, and the tokens of all rows."""
    vectors: np.ndarray
    rows: np.ndarray
    classes: np.ndarray
    tokens: list[list[str]]

    def take(self, chosen: list[int]) -> "Uses":
        """The uses at these positions."""
        return Uses(self.vectors[chosen], self.rows[chosen], self.classes[chosen], self.tokens)


def nouns(tokens: list[list[str]]) -> set[str]:
    """Words that often stand where nouns stand, by RULE. It needs neither a tagger nor a lexicon."""
    seen = Counter()
    like_nouns = Counter()
    for row in tokens:
        seen.update(row)
        for before, word, after in trigrams(row):
            if before in DETERMINERS and after in FOLLOWERS:
                like_nouns[word] += 1
    return {word for word, count in like_nouns.items() if count >= NOUN_SHARE * seen[word] and word.isalpha()}


def ambiguous(words: set[str], tokens: list[list[str]], classes: np.ndarray, min_uses: int) -> list[str]:
    """The `words` that are frequent enough in these rows and occur in several classes, by RULE; sorted.

    tokens and classes: of each row.
    """
    every_token = pd.Series(tokens, index=classes).explode()
    found = every_token[every_token.isin(words)]
    counts = pd.crosstab(found, found.index)                                # words by classes
    uses = counts.sum(axis=1)
    chosen = (uses >= min_uses) & (counts.max(axis=1) <= MAX_SHARE * uses)
    return sorted(counts.index[chosen])


def find_uses(elmo: ELMo, part: Part, tokens: list[list[str]], words: Sequence[str],
              max_uses: float = math.inf) -> dict[str, Uses]:
    """{word: its uses in the rows of a part}, at most `max_uses` of them, drawn at random; tokens: of each row."""
    counts = dict.fromkeys(words, 0)
    places = defaultdict(list)                                              # row -> [(word, position), ..]
    for row in np.random.default_rng(0).permutation(len(tokens)).tolist():
        for k, word in enumerate(tokens[row]):
            if word in counts and counts[word] < max_uses:
                counts[word] += 1
                places[row].append((word, k))
    vectors = {word: [] for word in words}
    rows = {word: [] for word in words}
    in_order = sorted(places)
    stream = elmo.embed_stream(texts_of(part.take(in_order)), "bf16")
    for row, layers in zip(in_order, stream, strict=True):
        for word, k in places[row]:
            unit = F.normalize(layers[:, k], dim=1).half()                  # (3, D)
            vectors[word].append(unit.numpy())
            rows[word].append(row)
    return {word: Uses(np.stack(vectors[word]), np.array(rows[word]), part.labels[rows[word]], tokens)
            for word in words}


def uses_by_word(elmo: ELMo, task: Task, part: str, train_tokens: list[list[str]],
                 min_uses: int) -> dict[str, tuple[Uses, Uses]]:
    """{word: (its uses in the part's rows, its uses in training rows)} for the words that RULE finds."""
    rows = getattr(task, part)
    tokens = [elmo.tokenize(text) for text in texts_of(rows)]
    known = nouns(train_tokens) & elmo.words.index.keys()
    words = ambiguous(known, tokens, rows.labels, min_uses)
    if not words:
        raise InputError(f"no word of the {part} rows is ambiguous by the rule, so no senses can be measured")
    pool = find_uses(elmo, task.train, train_tokens, words, POOL)
    queries = find_uses(elmo, rows, tokens, words)
    return {word: (queries[word], pool[word]) for word in words}


def cosines(queries: Uses, pool: Uses, layer: int) -> np.ndarray:
    """(queries, pool) cosine similarities."""
    a = queries.vectors[:, layer].astype(np.float32)
    b = pool.vectors[:, layer].astype(np.float32)
    return a @ b.T


def nearest(queries: Uses, pool: Uses, similar: np.ndarray, count: int) -> list[list[int]]:
    """For each query, the positions of its `count` nearest uses in the pool; similar: what `cosines` returns.

    A use in a near copy of the query's row is never among them. So there can be fewer than `count`, or none.
    """
    found = []
    orders = np.argsort(-similar).tolist()
    pool_tokens = [pool.tokens[row] for row in pool.rows]
    for row, order in zip(queries.rows, orders, strict=True):
        copied = set(ngrams(queries.tokens[row], COPIED_WORDS))
        originals = (i for i in order if copied.isdisjoint(ngrams(pool_tokens[i], COPIED_WORDS)))
        found.append(list(islice(originals, count)))
    return found


def with_neighbours(uses: dict[str, tuple[Uses, Uses]]) -> dict[str, tuple[Uses, Uses]]:
    """The words and queries without queries whose pool has only near copies, and without words that have no query left.

    uses: {word: (queries, pool)}. Raises InputError if no query is left.
    """
    found = {}
    for word, (queries, pool) in uses.items():
        neighbours = nearest(queries, pool, cosines(queries, pool, layer=2), 1)
        chosen = [i for i, neighbour in enumerate(neighbours) if neighbour]
        if chosen:
            found[word] = (queries.take(chosen), pool)
    if not found:
        raise InputError("ambiguous words have only near copies as neighbours, so no senses can be measured")
    return found


def correct_classes(queries: Uses, pool: Uses, layer: int) -> np.ndarray:
    """(2, queries): whether the nearest use has the query's class, and whether the VOTERS nearest uses vote for it.

    Every query must have a neighbour; `with_neighbours` leaves out those that have none. The weight of a vote is its
    cosine. In layer 0 all uses of a word are the same vector, so no use is nearest. There the first number is the share
    of the query's class in the pool, and the vote goes to the pool's most frequent class.
    """
    if layer == 0:
        expected = (pool.classes == queries.classes[:, None]).mean(axis=1)
        majority = queries.classes == np.bincount(pool.classes).argmax()
        return np.array([expected, majority])
    similar = cosines(queries, pool, layer)
    first = []
    votes = []
    for i, uses in enumerate(nearest(queries, pool, similar, VOTERS)):
        classes = pool.classes[uses]
        first.append(classes[0])
        votes.append(np.bincount(classes, similar[i, uses]).argmax())
    return np.array([first, votes]) == queries.classes


def sense_accuracy(uses: dict[str, tuple[Uses, Uses]]) -> dict:
    """How often nearest uses predict a use's class: words, uses, majority, layers, votes, interval of findings.json.

    uses: {word: (queries, pool)}. Queries without a neighbour count nowhere, in no layer.
    """
    words = {}
    sums = []
    for word, (queries, pool) in with_neighbours(uses).items():
        by_layer = [correct_classes(queries, pool, layer) for layer in range(3)]
        correct = np.stack(by_layer)                                        # (3, 2, queries)
        layers, votes = correct.mean(axis=2).T.tolist()
        words[word] = {"uses": len(queries.rows), "majority": votes[0], "layers": layers, "votes": votes}
        sums.append(correct.sum(axis=2))
    hits = np.array(sums)                                                   # (words, 3, 2)
    sizes = np.array([numbers["uses"] for numbers in words.values()])       # (words,)
    share = hits.sum(axis=0) / sizes.sum()                                  # (3, 2)
    layers, votes = share.T.tolist()
    drawn = np.random.default_rng(0).integers(len(words), size=(2_000, len(words)))
    resampled = hits[drawn, :, 1].sum(axis=1) / sizes[drawn].sum(axis=1)[:, None]           # (2000, 3)
    interval = np.percentile(resampled, [2.5, 97.5], axis=0).T.tolist()
    return {"words": words, "uses": int(sizes.sum()), "majority": votes[0],
            "layers": layers, "votes": votes, "interval": interval}


def nearest_uses(uses: dict[str, tuple[Uses, Uses]], elmo: ELMo, task: Task, shown: int = 4) -> list[dict]:
    """`words` of the finding `neighbours`: the most evenly ambiguous words, with two uses of each.

    The two uses are in test rows of the word's two most frequent classes, and their nearest uses in training rows that
    are no near copies. A word whose counted uses all have one class has one use here.
    """
    counted = with_neighbours(uses)
    evenness = {word: entropy(np.bincount(queries.classes)) for word, (queries, _) in counted.items()}
    table = F.normalize(elmo.model.table, dim=1)
    words = []
    for word in sorted(counted, key=evenness.get, reverse=True)[:shown]:
        queries, pool = counted[word]
        counts = np.bincount(queries.classes)
        by_count = counts.argsort()[::-1]
        pairs = []
        for label in by_count[counts[by_count] > 0][:2]:
            use = queries.take(np.flatnonzero(queries.classes == label)[:1])
            near = pool.take(nearest(use, pool, cosines(use, pool, layer=2), 1)[0])
            pairs.append({
                "text": task.test.texts[use.rows[0]][0],
                "label": task.labels[label],
                "nearest": task.train.texts[near.rows[0]][0],
                "nearest_label": task.labels[near.classes[0]],
                "cosine": float(cosines(use, near, layer=2)[0, 0])})
        similar = table @ table[elmo.words.index[word]]                     # (V,)
        static = [elmo.words.words[i] for i in similar.topk(7).indices[1:]]             # without the word itself
        words.append({"word": word, "static": static, "uses": pairs})
    return words

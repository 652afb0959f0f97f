"""Text to word ids: tokens by rule, a vocabulary from the training rows alone, and the rows of either set.

    tokenize("Oil prices fall.")                        # ["oil", "prices", "fall", "."]
    data = Data.of(texts, config, train, validation)    # config: lowercase, min_count, representation, max_chars
    data.words.words[:5]                                # ["<pad>", "<unk>", "<s>", "</s>", "the"]
"""
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from nltk.tokenize import RegexpTokenizer
from torch import Tensor

from data.corpus import LONGEST, Lines, Tokens, spell, tokenize_corpus
from data.files import InputError
from data.prepare import Part, read_ag_news, split

PAD, UNK, BOS, EOS = range(4)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
ENTITY = re.compile(r"(?<![&\w])(?<!&amp;)(#\d{1,7}|amp|quot|apos|lt|gt|nbsp);")     # AG News lost most entities' &
TOKENS = RegexpTokenizer(
    r"</?[A-Za-z][^<>]{0,200}>"             # mark-up, whole: it says where a story came from
    r"|(?:[^\W\d_]\.){2,}"                  # u.s., a.m.
    r"|\d+(?:[.,:/]\d+)*"                   # 1,000  4.5  9/11
    r"|(?i:n't)\b|'(?i:s|re|ve|ll|d|m)\b|\w+?(?=(?i:n't)\b)"            # can't -> ca n't, Iraq's -> Iraq 's
    r"|\w+|\.{2,}|-{2,}|[^\w\s]")           # words, dashes and dots in a row, every other sign alone


def tokenize(text: str, lowercase: bool = True) -> list[str]:
    """Tokens of a text: entities become characters, mark-up stays, nothing needs NLTK's data.

    "Oil #39;s up &lt;b&gt;4.5%&lt;/b&gt;." -> ["oil", "'s", "up", "<b>", "4.5", "%", "</b>", "."]
    """
    text = re.sub(r"&#(?=\d{8})", "& #", text)      # no character's number is as long, and Python refuses the longest
    text = html.unescape(html.unescape(ENTITY.sub(r"&\1;", text)))
    return TOKENS.tokenize(text.lower() if lowercase else text)


def tokenized(texts: Iterable[str], config, cache: Path | None = None) -> Tokens:
    """The texts' Tokens; the cache is keyed by the texts and by all that decides how they are cut."""
    version = f"{TOKENS._pattern} {ENTITY.pattern} lowercase={config.lowercase}"
    return tokenize_corpus(texts, partial(tokenize, lowercase=config.lowercase), version, cache)


class Vocabulary:
    """words[i] is the word of id i; the first four are <pad> <unk> <s> </s>, and no text can spell them."""

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.index = {word: i for i, word in enumerate(self.words) if i >= len(SPECIAL)}

    @classmethod
    def count(cls, types: Sequence[str], counts: np.ndarray, min_count: int) -> "Vocabulary":
        """Words counted at least `min_count` times, most frequent first, ties by spelling."""
        kept = [(-int(n), word) for word, n in zip(types, counts, strict=True) if n >= min_count]
        return cls(SPECIAL + [word for _, word in sorted(kept) if word not in SPECIAL])

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, types: Iterable[str]) -> np.ndarray:
        """(types,) int64 word ids, <unk> for what is not a word of the vocabulary."""
        return np.array([self.index.get(token, UNK) for token in types], dtype=np.int64)


@dataclass
class Encoded:
    """Tokens with what the model needs of them: lookup (types,) word ids; chars from `spell` for the char model."""
    tokens: Tokens
    lookup: np.ndarray
    chars: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tokens, words: Vocabulary, config) -> "Encoded":
        """Any corpus, in the ids of this vocabulary."""
        lookup = words.ids(tokens.types)
        if config.representation != "char":
            return cls(tokens, lookup)
        return cls(tokens, lookup, torch.from_numpy(spell(tokens.types, config.max_chars, len(SPECIAL))))

    def unknown(self, rows: np.ndarray | slice = slice(None)) -> float:
        """Share of <unk> among the tokens of these rows, or of all."""
        counts = self.tokens.counts(rows)
        return float(counts[self.lookup == UNK].sum() / max(1, counts.sum()))


@dataclass
class Data:
    """A tokenized corpus, its vocabulary from the training rows alone, and its sets of row numbers.

    test: a corpus in the same ids and the numbers of its test rows; texts: train.csv's and test.csv's descriptions,
    from which near copies are told. Both only for the script's run.
    """
    words: Vocabulary
    encoded: Encoded
    train: np.ndarray
    validation: np.ndarray
    test: tuple[Encoded, np.ndarray] | None = None
    texts: tuple[list[str], list[str]] | None = None

    @classmethod
    def of(cls, texts: Sequence[str], config, train: np.ndarray, validation: np.ndarray,
           cache: Path | None = None) -> "Data":
        """Data of any texts."""
        return cls.of_tokens(tokenized(texts, config, cache), config, train, validation)

    @classmethod
    def of_tokens(cls, tokens: Tokens, config, train: np.ndarray, validation: np.ndarray) -> "Data":
        words = Vocabulary.count(tokens.types, tokens.counts(train), config.min_count)
        return cls(words, Encoded.of(tokens, words, config), train, validation)

    @classmethod
    def of_ag_news(cls, config, cache: Path) -> "Data":
        """Descriptions of train.csv, `validation` of them kept apart, and as test rows those of test.csv."""
        texts, test = (read_ag_news(*part).description.tolist() for part in (("train", config.rows), ("test",)))
        data = cls.of(texts, config, *split(len(texts), config.validation, config.seed), cache)
        encoded = Encoded.of(tokenized(test, config, cache), data.words, config)
        data.test, data.texts = (encoded, np.arange(len(test))), (texts, test)
        return data

    @classmethod
    def of_plain_text(cls, path: str, config, cache: Path) -> "Data":
        """Lines of a file or folder, `validation` of them kept apart for validation and as many for test."""
        if config.rows:
            raise InputError("--rows is for train.csv; with --corpus name a shorter file")
        lines, kept = tokenized(Lines(path), config, cache), config.validation
        if len(lines) <= 2 * kept:
            raise InputError(f"{path} has {len(lines):,} lines, of which validation and test take {kept:,} each; "
                             "choose a smaller --validation or name more text")
        train, held_out = split(len(lines), 2 * kept, config.seed)
        tokens, line = lines.cut(LONGEST)               # the parts of a line stay on one side
        train, validation, test = (np.flatnonzero(np.isin(line, part)) for part in (
            train, *(held_out[half] for half in split(2 * kept, kept, config.seed))))
        data = cls.of_tokens(tokens, config, train, validation)
        data.test = (data.encoded, test)
        return data

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the vocabulary and of the training rows' words in their order."""
        tokens = self.encoded.tokens
        found = hashlib.sha256("\n".join(self.words.words).encode("utf-8", "surrogatepass"))
        for part in (self.train, tokens.offsets, self.encoded.lookup, tokens.ids):
            found.update(np.ascontiguousarray(part).data)
        return found.hexdigest()

    def counts(self) -> np.ndarray:
        """(V,) how often each word is a target of the training rows; either boundary symbol ends one stream a row."""
        counts = np.bincount(self.encoded.lookup, weights=self.encoded.tokens.counts(self.train),
                             minlength=len(self.words))
        counts[[BOS, EOS]] = len(self.train)
        return counts


class Texts:
    """A part of a task in the ids of an ELMo: a pair's first texts, then its second ones."""

    def __init__(self, part: Part, elmo, cache: Path | None = None):
        self.labels, self.pair = torch.from_numpy(part.labels), len(part) > 0 and len(part.texts[0]) == 2
        sides = [texts[side] for side in range(1 + self.pair) for texts in part.texts]
        self.encoded = Encoded.of(tokenized(sides, elmo.config, cache), elmo.words, elmo.config)
        self.words = np.diff(self.encoded.tokens.offsets)                       # (N,) or (2 N,)
        self.lengths = self.words.reshape(1 + self.pair, -1).max(axis=0)        # (N,)


def batches(lengths: np.ndarray, positions: int, generator: np.random.Generator | None = None) -> list[np.ndarray]:
    """Row numbers in batches of about equal length and at most `positions` cells (one row, where it alone is longer).

    Sorted by length, ties and the order of batches at random: under 5 % of the cells pad, and every epoch has the
    same number of batches. Without a generator the order is by length.
    """
    tie = generator.random(len(lengths)) if generator else np.zeros(len(lengths))
    order = np.lexsort((tie, lengths))
    out, start = [], 0
    sizes = lengths[order] + 1
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * sizes[end] <= positions:
            end += 1
        out.append(order[start:end])
        start = end
    return [out[i] for i in generator.permutation(len(out))] if generator else out

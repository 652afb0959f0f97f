"""From text to word ids: tokens, and a vocabulary made from the training rows alone.

    tokenize("Oil prices fall.")                        # ["oil", "prices", "fall", "."]
    tokenize(["Oil", "prices", "fall."])                # ["oil", "prices", "fall."]: given tokens are not split
    data = Data.of(texts, config, train, validation)    # config: min_count, representation
    data.words.words[:5]                                # ["<pad>", "<unk>", "<s>", "</s>", "the"]
"""
import hashlib
import html
import inspect
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from nltk.tokenize import RegexpTokenizer
from torch import Tensor

from data.ag_news import fresh_rows, read_ag_news, split
from data.characters import character_codes
from data.corpus import LONGEST, Lines, Tokens, tokenize_corpus, writable
from data.inputs import Text
from run.files import InputError, split_at_spaces

PAD, UNK, BOS, EOS = range(4)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
MANY_UNKNOWN = 0.2          # share of <unk> from which a warning is given
ENTITY = re.compile(r"(?<![&\w])(?<!&amp;)(#\d{1,7}|amp|quot|apos|lt|gt|nbsp);")     # most in AG News lack their &
APOSTROPHE = re.compile(r"(?:^|(?<=[^\W\d_]))’(?=[^\W\d_])")      # between letters, or before the first one
TOKENS = RegexpTokenizer(
    r"</?[A-Za-z][^<>]{0,200}>"             # an HTML tag is one token: it can show the news source
    r"|(?:[^\W\d_]\.){2,}"                  # u.s., a.m.
    r"|\d+(?:[.,:/]\d+)*"                   # 1,000  4.5  9/11
    r"|(?i:n't)\b|'(?i:s|re|ve|ll|d|m)\b|\w+?(?=(?i:n't)\b)"            # can't -> ca n't, Iraq's -> Iraq 's
    r"|\w+|\.{2,}|-{2,}|[^\w\s]")           # words, dashes and dots in a row, every other sign by itself


# ----------------------------------------------------------------------------------------------------- tokens
def normalize(text: str) -> str:
    """The text with entities as characters, in Unicode's form NFC, and ' for a ’ between letters or at the start."""
    text = re.sub(r"&#(?=\d{8})", "& #", text)      # no such character exists, and int() refuses long numbers
    text = ENTITY.sub(r"&\1;", text)
    text = html.unescape(html.unescape(text))
    return APOSTROPHE.sub("'", unicodedata.normalize("NFC", text))


def tokenize(text: Text) -> list[str]:
    """The lower-cased tokens of a text. Entities become characters, mark-up stays. Given tokens are never split.

    "Oil #39;s up &lt;b&gt;4.5%&lt;/b&gt;." -> ["oil", "'s", "up", "<b>", "4.5", "%", "</b>", "."]
    """
    if isinstance(text, list):
        return [normalize(token).lower() for token in text]
    return TOKENS.tokenize(normalize(text).lower())


def tokenize_spaced(text: str) -> list[str]:
    """Like `tokenize`, for a text that is tokenized already, with spaces between its tokens."""
    return tokenize(split_at_spaces(text))


def tokenize_texts(texts: Iterable[Text], cache: Path | None = None, tokenized: bool = False) -> Tokens:
    """The tokens of many texts, from the folder `cache` if the same texts were tokenized by the same code before.

    tokenized: the texts have spaces between their tokens, and are split there only.
    """
    version = ""
    if cache is not None:                       # reading the source takes time, and only a cache needs it
        rules = [inspect.getsource(part) for part in (normalize, tokenize, tokenize_spaced, split_at_spaces)]
        version = " ".join([str(tokenized), TOKENS._pattern, ENTITY.pattern, APOSTROPHE.pattern, *rules])
    return tokenize_corpus(texts, tokenize_spaced if tokenized else tokenize, version, cache)


class Vocabulary:
    """words[i] is the word with id i. The first four are <pad> <unk> <s> </s>; of these, text can only become <unk>."""

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.index = {word: i for i, word in enumerate(self.words) if i >= len(SPECIAL)}

    @classmethod
    def count(cls, types: Sequence[str], counts: np.ndarray, min_count: int) -> "Vocabulary":
        """The words that are counted at least `min_count` times, most frequent first, ties in alphabetical order."""
        frequent = [(-int(n), word) for word, n in zip(types, counts, strict=True) if n >= min_count]
        return cls(SPECIAL + [word for _, word in sorted(frequent) if word not in SPECIAL])

    def grown_by(self, other: "Vocabulary") -> "Vocabulary":
        """These words with their ids, and after them the words that only `other` has."""
        return Vocabulary(self.words + [word for word in other.words[len(SPECIAL):] if word not in self.index])

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, types: Iterable[str]) -> np.ndarray:
        """(types,) int64 word ids; UNK for a type that is no word of the vocabulary."""
        return np.array([self.index.get(token, UNK) for token in types], dtype=np.int64)


@dataclass
class Encoded:
    """Tokens in the ids of a vocabulary. A type is a distinct token of the texts; a word is one in the vocabulary.

    lookup: (types,) word id of each type; chars: (4 + types, L) from `character_codes`, for the char model only.
    """
    tokens: Tokens
    lookup: np.ndarray
    chars: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tokens, words: Vocabulary, representation: str) -> "Encoded":
        chars = None
        if representation == "char":
            chars = torch.from_numpy(character_codes(tokens.types, len(SPECIAL)))
        return cls(tokens, words.ids(tokens.types), chars)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows,) number of tokens of each row."""
        return np.diff(self.tokens.offsets)

    def types(self, row: int) -> np.ndarray:
        """(tokens,) int64 type ids of a row."""
        begin, end = self.tokens.offsets[row:row + 2]
        return self.tokens.ids[begin:end].astype(np.int64)

    def ids(self, row: int) -> np.ndarray:
        """(tokens,) int64 word ids of a row."""
        return self.lookup[self.types(row)]

    @cached_property
    def unknown_tokens(self) -> np.ndarray:
        """(rows,) number of tokens of each row that are <unk>."""
        total = np.append(0, np.cumsum(self.lookup[self.tokens.ids] == UNK))
        return np.diff(total[self.tokens.offsets])

    def flat(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens,) word ids of some rows, one after the other, and (rows + 1,) offsets."""
        ids = [self.ids(row) for row in rows]
        return np.concatenate([*ids, np.zeros(0, np.int64)]), np.append(0, np.cumsum(self.lengths[rows]))

    def unknown(self, rows: np.ndarray | slice = slice(None)) -> float:
        """Share of <unk> among the tokens of these rows."""
        return self.unknown_share(self.tokens.counts(rows))

    def unknown_share(self, counts: np.ndarray) -> float:
        """The same from the counts (types,) of the tokens."""
        return float(counts[self.lookup == UNK].sum() / max(1, counts.sum()))


# ------------------------------------------------------------------------------------------------------- data
def warn_of_unknown(share: float, what: str) -> None:
    """Warns if at least MANY_UNKNOWN of some tokens, named by `what`, are <unk>."""
    if share >= MANY_UNKNOWN:
        warnings.warn(
            f"{share:.0%} of the {what} are not in the vocabulary. All of them are one word, <unk>, which is easy to "
            "predict, so a low perplexity means little. Train with a smaller min_count, put spaces between the words, "
            "or train with representation char", stacklevel=3)


@dataclass
class Data:
    """A tokenized corpus, its vocabulary made from the training rows, and the row numbers of training and validation.

    test: a corpus in the same ids, and the numbers of its test rows; texts: the descriptions of train.csv and test.csv,
    by which near copies are found. Without test rows, as in ELMo.train, test is None; without train.csv, texts is.
    """
    words: Vocabulary
    encoded: Encoded
    train: np.ndarray
    validation: np.ndarray
    test: tuple[Encoded, np.ndarray] | None = None
    texts: tuple[list[str], list[str]] | None = None

    @classmethod
    def of(cls, texts: Sequence[Text], config, train: np.ndarray, validation: np.ndarray) -> "Data":
        """Data of any texts; config: min_count, representation."""
        return cls.of_tokens(tokenize_texts(texts), config, train, validation)

    @classmethod
    def of_tokens(cls, tokens: Tokens, config, train: np.ndarray, validation: np.ndarray,
                  known: Vocabulary | None = None) -> "Data":
        """Data of any tokens. The words of `known` keep their ids; the new ones follow."""
        counts = tokens.counts(train)
        words = Vocabulary.count(tokens.types, counts, config.min_count)
        if known is not None:
            words = known.grown_by(words)
        encoded = Encoded.of(tokens, words, config.representation)
        warn_of_unknown(encoded.unknown_share(counts), "training tokens")
        return cls(words, encoded, train, validation)

    @classmethod
    def read(cls, config, options, cache: Path, known: Vocabulary | None = None) -> "Data":
        """The data of a run: the plain text --corpus, or AG News. The words of `known` keep their ids.

        options: corpus, tokenized and out of the command line. If `cache` cannot be written, OUT/cache is used.
        """
        if config.validation == 0:
            raise InputError("validation is 0; expected 1 or more rows, which choose the best epoch")
        if options.corpus is not None:
            folder = cache if writable(cache) else options.out / "cache"
            return cls.of_plain_text(options.corpus, config, folder, known, options.tokenized)
        if options.tokenized:
            raise InputError("--tokenized is for --corpus and --embed; AG News is not tokenized")
        return cls.of_ag_news(config, cache, known)

    @classmethod
    def of_ag_news(cls, config, cache: Path, known: Vocabulary | None = None) -> "Data":
        """The descriptions of train.csv, `config.validation` of them as validation rows, and of test.csv as test."""
        texts = read_ag_news("train", config.rows).description.tolist()
        test_texts = read_ag_news("test").description.tolist()
        train, validation = split(len(texts), config.validation, config.seed)
        data = cls.of_tokens(tokenize_texts(texts, cache), config, train, validation, known)
        test = Encoded.of(tokenize_texts(test_texts, cache), data.words, config.representation)
        data.test = (test, np.arange(len(test_texts)))
        data.texts = (texts, test_texts)
        return data

    @classmethod
    def of_plain_text(cls, path: str, config, cache: Path, known: Vocabulary | None = None,
                      tokenized: bool = False) -> "Data":
        """The lines of a file or folder, `config.validation` of them for validation and as many for test.

        A line of more than LONGEST tokens becomes several rows, all of them in the same part.
        """
        if config.rows:
            raise InputError("--rows is for train.csv; with --corpus name a shorter file")
        lines = tokenize_texts(Lines(path), cache, tokenized)
        size = config.validation
        if len(lines) <= 2 * size:
            raise InputError(f"{path} has {len(lines):,} lines, but validation and test need {size:,} each; choose a "
                             "smaller --validation or name more text")
        train_lines, others = split(len(lines), 2 * size, config.seed)
        for_validation, for_test = split(2 * size, size, config.seed)
        tokens, line_of_row = lines.cut(LONGEST)
        train = np.flatnonzero(np.isin(line_of_row, train_lines))
        validation = np.flatnonzero(np.isin(line_of_row, others[for_validation]))
        data = cls.of_tokens(tokens, config, train, validation, known)
        data.test = (data.encoded, np.flatnonzero(np.isin(line_of_row, others[for_test])))
        return data

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the vocabulary, of all tokens and of the numbers of the training rows."""
        sha = hashlib.sha256("\n".join(self.words.words).encode("utf-8", "surrogatepass"))
        sha.update(self.train.tobytes())
        if self.encoded.chars is not None:              # then words of the same id can differ
            sha.update("\n".join(self.encoded.tokens.types).encode("utf-8", "surrogatepass"))
        corpora = [self.encoded]
        if self.test is not None and self.test[0] is not self.encoded:
            corpora.append(self.test[0])
        for encoded in corpora:
            for part in (encoded.tokens.offsets, encoded.lookup, encoded.tokens.ids):
                sha.update(np.ascontiguousarray(part).data)
        return sha.hexdigest()

    def counts(self) -> np.ndarray:
        """(V,) how often each word is a target in the training rows; </s> (forward) and <s> (backward) once per row."""
        counts = np.bincount(self.encoded.lookup, weights=self.encoded.tokens.counts(self.train),
                             minlength=len(self.words))
        counts[[BOS, EOS]] = len(self.train)
        return counts

    def unknown(self) -> dict[str, float]:
        """Share of <unk> among the tokens of the training, validation and test rows."""
        test, test_rows = self.test
        return {"train": self.encoded.unknown(self.train), "validation": self.encoded.unknown(self.validation),
                "test": test.unknown(test_rows)}

    def summary(self) -> str:
        """Rows, vocabulary and unknown words, as lines to print."""
        unknown = ", ".join(f"{100 * share:.2f} % of {name} tokens" for name, share in self.unknown().items())
        return (f"{len(self.train):,} training, {len(self.validation):,} validation, {len(self.test[1]):,} test rows\n"
                f"the vocabulary has {len(self.words):,} words; not in it: {unknown}")

    def parts(self, train_rows: int, seed: int) -> dict[str, tuple[Encoded, np.ndarray]]:
        """The rows that a model is measured on: `train_rows` training rows, drawn by the seed, validation and test."""
        order = np.random.default_rng([seed, 4]).permutation(self.train)
        return {"train": (self.encoded, np.sort(order[:train_rows])), "validation": (self.encoded, self.validation),
                "test": self.test}

    def fresh(self) -> dict[str, np.ndarray]:
        """For AG News {"validation", "test"}: (rows,) bool, False for near copies of training rows; otherwise {}.

        Test rows are compared with all of train.csv, even if the run uses a part of it.
        """
        if self.texts is None:
            return {}
        train, test = self.texts
        known = [train[row] for row in self.train]
        everything = read_ag_news("train").description      # all of train.csv, even if the run uses a part
        return {"validation": fresh_rows(known, [train[row] for row in self.validation]),
                "test": fresh_rows(everything, test)}

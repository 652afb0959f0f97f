"""Classification tasks: AG News, the Stanford Sentiment Treebank (SST) and natural language inference (NLI).

    task = read_task(config, bilm_config)       # Task: labels, train, validation, test
    task.train.texts[0], task.train.labels[0]   # ("Oil prices fall.",), 2
"""
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from nltk import Tree

from data.ag_news import ag_news_folder, fresh_rows, read_ag_news, split
from data.inputs import Text, check_text, check_texts
from data.text import Encoded, tokenize_texts
from run.files import InputError, read_lines

AG_NEWS_LABELS = ["World", "Sports", "Business", "Sci/Tech"]
NLI_LABELS = ["entailment", "neutral", "contradiction"]
SST5_LABELS = ["very negative", "negative", "neutral", "positive", "very positive"]
SST2_LABELS = ["negative", "positive"]
SST2_OF_SST5 = {0: 0, 1: 0, 3: 1, 4: 1}         # neutral phrases are left out


@dataclass
class Part:
    """The rows of one part of a task: texts, each a tuple of one or two texts, and labels (rows,) from 0 on."""
    texts: list[tuple[Text, ...]]
    labels: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[int, tuple[str, ...]]]) -> "Part":
        """Made from (label, texts) of each row."""
        return cls([texts for _, texts in rows], np.array([label for label, _ in rows], dtype=np.int64))

    @classmethod
    def without_labels(cls, texts: list[tuple[str, ...]]) -> "Part":
        """Texts to be classified; the labels are not known and set to 0."""
        return cls(texts, np.zeros(len(texts), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Part":
        """The rows with these numbers, in their order."""
        return Part([self.texts[i] for i in rows], self.labels[rows])


@dataclass
class Task:
    """A classification task.

    corpus: the training texts for a language model; they differ from `train` if its rows are phrases or pairs.
    fresh: (test rows,) bool, False for near copies of rows of train.csv; None if the task is not AG News.
    notes: what a user should know of how the rows were read, as lines to print.
    """
    name: str
    labels: list[str | int]
    train: Part
    validation: Part
    test: Part
    corpus: list[Text]
    fresh: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Name and rows, and the notes, as lines to print."""
        rows = (f"{self.name}: {len(self.train):,} training, {len(self.validation):,} validation, "
                f"{len(self.test):,} test rows")
        return "\n".join([rows, *self.notes])

    @property
    def digest(self) -> str:
        """SHA-256 of all texts and labels."""
        sha = hashlib.sha256(repr(self.corpus).encode())
        if self.name == "own":                          # the classes of the other tasks have fixed names
            sha.update(repr(self.labels).encode())
        for part in (self.train, self.validation, self.test):
            sha.update(repr(part.texts).encode())
            sha.update(part.labels.tobytes())
        return sha.hexdigest()

    def with_labels(self, rows: int, seed: int) -> "Task":
        """The same task with only `rows` labelled training rows (0: all), drawn by the seed; `corpus` stays whole."""
        if rows == 0:
            return self
        if rows > len(self.train):
            raise InputError(f"rows is {rows}, but the task has {len(self.train)} training rows")
        chosen = np.random.default_rng([seed, 5]).permutation(len(self.train))[:rows]
        train = self.train.take(np.sort(chosen))
        missing = np.setdiff1d(self.train.labels, train.labels)
        if len(missing):
            raise InputError(f"rows is {rows}, which leaves no training row of the class {self.labels[missing[0]]}; "
                             "choose more rows, or another seed")
        return replace(self, train=train)


def read_task(config, bilm_config) -> Task:
    """The task that a classification.Config names. The ELMO.Config tells which rows of AG News the biLM has not seen.

    Raises InputError if files are missing or damaged.
    """
    if config.task == "ag_news":
        task = ag_news_task(config, bilm_config)
    elif config.task == "nli":
        task = nli_task(config.validation, config.seed)
    else:
        task = sst_task(config.task == "sst2", config.phrases)
    return task.with_labels(config.rows, config.seed)


class EncodedTexts:
    """A part of a task in the ids of an ELMo. For pairs: all first texts, then all second texts.

    labels (N,); encoded: N rows, 2 N for pairs; words: tokens of each encoded row; lengths (N,): of the longer text;
    shortest (N,): of the shorter one.
    """

    def __init__(self, part: Part, elmo, cache: Path | None = None):
        self.labels = torch.from_numpy(part.labels)
        self.pair = len(part) > 0 and len(part.texts[0]) == 2
        texts = [row[0] for row in part.texts]
        if self.pair:
            texts += [row[1] for row in part.texts]
        self.encoded = Encoded.of(tokenize_texts(texts, cache), elmo.words, elmo.config.representation)
        self.words = self.encoded.lengths
        sides = self.words.reshape(2 if self.pair else 1, -1)               # (2, N) or (1, N)
        self.lengths = sides.max(axis=0)
        self.shortest = sides.min(axis=0)

    def check_words(self) -> None:
        """Raises InputError that names a text without words."""
        if not self.shortest.all():
            raise InputError(f"text {self.shortest.argmin()} has no words; leave it out")

    def sides(self, rows: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        """Rows of `encoded` for these rows of the task, and their lengths; for pairs all first texts come first."""
        sides = np.concatenate([rows, rows + len(self.lengths)]) if self.pair else rows
        return sides, torch.from_numpy(self.words[sides])


def check_rows(texts: Iterable[Text | tuple[Text, ...]], config) -> list[tuple[Text, ...]]:
    """The texts that a user gives a classifier, as `Part.texts`; config: two_texts, pair.

    Raises InputError for an item that is no text, or no tuple of texts if the classifier reads several.
    """
    if not config.two_texts:
        return [(text,) for text in check_texts(texts)]
    rows = []
    for i, row in enumerate(texts):
        if not isinstance(row, tuple) or len(row) < 2 or (config.pair and len(row) > 2):
            raise InputError(f"text {i} is {str(row)[:40]!r}; expected a tuple of two texts (on a line: a tab between)")
        parts = tuple(check_text(text, f"text {i}") for text in row)
        has_words = "".join("".join(part) for part in parts).strip() != ""
        if not config.pair:
            parts = (with_title(*parts) if has_words else "",)
        rows.append(parts)
    return rows


# ---------------------------------------------------------------------------------------------------- AG News
def with_title(*texts: Text) -> Text:
    """Title and description, or any texts, joined to one text. The texts are all strings, or all lists of tokens.

    ("A title", "Oil rises") -> "A title . Oil rises"; (["A", "title"], ["Oil", "rises"]) -> ["A", "title", ".", "Oil",
    "rises"].
    """
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) == len(texts):
        return " . ".join(texts)
    if strings:
        raise InputError("a string and a list of tokens cannot be joined to one text; write both in the same form")
    joined = list(texts[0])
    for text in texts[1:]:
        joined += [".", *text]
    return joined


def ag_news_part(table: pd.DataFrame, fields: str) -> Part:
    """All rows of train.csv or test.csv; fields: "description" or "title+description"."""
    texts = table.description.tolist()
    if "title" in fields:
        if not table.title.str.strip().any():
            raise InputError(f"fields is {fields}, but {ag_news_folder()} has no titles; use --fields description")
        texts = [with_title(*row) for row in zip(table.title, table.description, strict=True)]
    return Part([(text,) for text in texts], table["class"].to_numpy() - 1)


def ag_news_task(config, bilm_config) -> Task:
    """AG News, or own rows in its layout. Its classes are those of the rows of train.csv.

    config: fields, validation, seed; bilm_config: validation, seed, rows. The validation rows are those of the biLM,
    which it took from the first `rows` rows (0: all) of train.csv. See `ag_news_validation` for a biLM of other texts.
    """
    table = read_ag_news("train")
    test_table = read_ag_news("test")
    classes = np.unique(table["class"])                 # for example [1, 2]
    check_ag_news_classes(classes, test_table)
    known = renumbered(ag_news_part(table, config.fields), classes - 1)
    test = renumbered(ag_news_part(test_table, config.fields), classes - 1)
    validation_rows, notes = ag_news_validation(len(known), config, bilm_config)
    validation_rows = leave_each_class(validation_rows, known.labels)
    train = known.take(np.setdiff1d(np.arange(len(known)), validation_rows))
    labels = [AG_NEWS_LABELS[c - 1] for c in classes]
    fresh = fresh_rows(table.description, test_table.description)
    return Task("ag_news", labels, train, known.take(validation_rows), test, corpus_of(train.texts), fresh, notes)


def check_ag_news_classes(classes: np.ndarray, test_table: pd.DataFrame) -> None:
    """Raises InputError if train.csv has only one class, or test.csv a class that train.csv does not have."""
    folder = ag_news_folder()
    if len(classes) == 1:
        raise InputError(f"{folder / 'train.csv'}: every row has class {classes[0]}; expected at least two classes")
    known = test_table["class"].isin(classes)
    if not known.all():
        row = int(np.argmin(known))
        raise InputError(f"{folder / 'test.csv'}, row {row + 1}: class is {test_table['class'][row]}, but no row of "
                         "train.csv has this class; add such rows to train.csv or remove this one")


def renumbered(part: Part, classes: np.ndarray) -> Part:
    """The part with its labels as positions in `classes`: with classes [1, 3], labels 1 and 3 become 0 and 1."""
    return Part(part.texts, np.searchsorted(classes, part.labels))


def ag_news_validation(rows: int, config, bilm_config) -> tuple[np.ndarray, list[str]]:
    """(row numbers of validation, notes) for a train.csv with so many rows.

    They are the rows that the biLM did not learn. If it has none, or so many that over half of train.csv would be
    validation, its texts were others. Then `config` draws the rows, at most a tenth of train.csv.
    """
    if 0 < bilm_config.validation <= rows // 2:
        first = bilm_config.rows if 0 < bilm_config.rows <= rows else rows
        _, validation_rows = split(first, bilm_config.validation, bilm_config.seed)
        return validation_rows, ["the validation rows are those of the biLM's run; --validation is not used"]
    size = min(config.validation, max(1, rows // 10))
    _, validation_rows = split(rows, size, config.seed)
    note = (f"{size:,} validation rows are drawn by --validation and --seed, at most a tenth of train.csv, because the "
            "biLM's run has none that fit this file")
    return validation_rows, [note]


def leave_each_class(validation: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The validation rows, but a class that would have no training row left keeps the first of its rows in training.

    labels: of all rows, training and validation. With labels [0, 1, 1] and validation rows [1, 2], row 2 is left.
    Raises InputError if none is left.
    """
    classes, first = np.unique(labels[validation], return_index=True)
    training_labels = np.delete(labels, validation)
    lost = ~np.isin(classes, training_labels)
    rest = np.delete(validation, first[lost])
    if len(validation) > 0 and len(rest) == 0:
        raise InputError("each row that was drawn for validation is the only one of its class; add training rows of "
                         "these classes")
    return rest


def corpus_of(rows: Sequence[tuple[str | list[str], ...]]) -> list[str | list[str]]:
    """The texts of the rows, for a language model. Pairs often share a text, so each of their texts comes once."""
    if rows and len(rows[0]) == 1:
        return [text for text, in rows]
    texts = {}
    for row in rows:
        for text in row:
            key = text if isinstance(text, str) else tuple(text)
            texts.setdefault(key, text)
    return list(texts.values())


def task_folder(variable: str, files: Sequence[str], content: str) -> Path:
    """The folder that an environment variable names. Raises InputError if one of the files is missing there."""
    named = os.environ.get(variable)
    if not named:
        raise InputError(f"${variable} is not set; set it to a folder with {', '.join(files)} ({content})")
    folder = Path(named)
    for name in files:
        if not (folder / name).is_file():
            raise InputError(f"${variable} is {folder}, where {name} is missing; expected {', '.join(files)}")
    return folder


# -------------------------------------------------------------------------------------------------------- SST
def sst_task(binary: bool, phrases: bool) -> Task:
    """The Stanford Sentiment Treebank (Socher et al. 2013): whole sentences, and if `phrases` all training phrases."""
    folder = task_folder("SST_DIR", ["train.txt", "dev.txt", "test.txt"], "bracketed trees, one a line")
    train = read_trees(folder / "train.txt", phrases, binary)
    validation = read_trees(folder / "dev.txt", False, binary)
    test = read_trees(folder / "test.txt", False, binary)
    sentences = read_trees(folder / "train.txt", phrases=False, binary=False)
    corpus = [text for text, in sentences.texts]
    if binary:
        return Task("sst2", SST2_LABELS, train, validation, test, corpus)
    return Task("sst5", SST5_LABELS, train, validation, test, corpus)


def read_trees(path: Path, phrases: bool, binary: bool) -> Part:
    """The labelled texts of a file of trees, one per line: (3 (2 It) (4 (2 's) (4 great))).

    phrases: every phrase of every tree, each once; otherwise the whole sentences. binary: see SST2_OF_SST5.
    """
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            found = labelled_phrases(line)
        except (ValueError, RecursionError):
            raise InputError(f"{path}, line {number}: {line.strip()[:40]!r} is no tree; expected (label words)"
                             ) from None
        rows += found if phrases else found[-1:]
    if phrases:
        rows = list(dict.fromkeys(rows))
    if binary:
        rows = [(SST2_OF_SST5[label], text) for label, text in rows if label in SST2_OF_SST5]
    if not rows:
        raise InputError(f"{path} has no row for this task; expected bracketed trees, one a line")
    return Part.of([(label, (text,)) for label, text in rows])


def labelled_phrases(line: str) -> list[tuple[int, str]]:
    """(label, text) of each phrase of a tree, inner ones first and the whole sentence last.

    "(3 (2 It) (4 (2 's) (4 great)))" -> (2, "It"), (2, "'s"), (4, "great"), (4, "'s great"), (3, "It 's great").
    Raises ValueError if the line is no tree, a label is not 0 to 4, or a phrase has no words.
    """
    out = []

    def visit(phrase: Tree) -> list[str]:
        """Appends the inner phrases and then `phrase` to out; returns its words."""
        words = []
        for child in phrase:
            words += visit(child) if isinstance(child, Tree) else [child]
        if phrase.label() not in {"0", "1", "2", "3", "4"} or not words:
            raise ValueError("a phrase needs a label from 0 to 4 and words")
        out.append((int(phrase.label()), " ".join(words)))
        return words

    visit(Tree.fromstring(line, read_leaf=unescape))
    return out


def unescape(word: str) -> str:
    """A word as it was before the treebank escaped it."""
    word = {"-LRB-": "(", "-RRB-": ")"}.get(word, word)
    return word.replace("\\/", "/").replace("\\*", "*")


# -------------------------------------------------------------------------------------------------------- NLI
def nli_task(validation: int, seed: int) -> Task:
    """MultiNLI (Williams et al. 2018) with validation rows from its training rows. SNLI's rows join the training."""
    folder = task_folder("NLI_DIR", ["mnli_train_subset.tsv", "mnli_eval_easycl.tsv"], "label, premise, hypothesis")
    known, notes = read_pairs(folder / "mnli_train_subset.tsv")
    test, test_notes = read_pairs(folder / "mnli_eval_easycl.tsv")
    notes += test_notes
    train_rows, validation_rows = split(len(known), validation, seed)
    train = known.take(train_rows)
    if (folder / "snli_train_subset.tsv").is_file():
        snli, snli_notes = read_pairs(folder / "snli_train_subset.tsv")
        notes += snli_notes
        train = Part(train.texts + snli.texts, np.concatenate([train.labels, snli.labels]))
    return Task("nli", NLI_LABELS, train, known.take(validation_rows), test, corpus_of(train.texts), notes=notes)


def read_pairs(path: Path) -> tuple[Part, list[str]]:
    """The rows of a file of label, premise and hypothesis with tabs between, without a header.

    A row with the label "-" is skipped: its annotators did not agree. A note tells how many there are.
    """
    rows = []
    skipped = 0
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        label, *texts = line.split("\t")
        if len(texts) != 2 or label not in [*NLI_LABELS, "-"]:
            raise InputError(f"{path}, line {number}: {line[:40]!r} is no row; expected label, premise and hypothesis "
                             f"with a tab between, the label one of {', '.join(NLI_LABELS)}")
        if label == "-":
            skipped += 1
        else:
            rows.append((NLI_LABELS.index(label), tuple(texts)))
    if not rows:
        raise InputError(f"{path}: the file is empty, or has no row with a label; expected rows of label, premise, "
                         "hypothesis")
    notes = [f"{path.name}: {skipped:,} rows without a label (-) are skipped"] if skipped else []
    return Part.of(rows), notes

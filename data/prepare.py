"""Rows and row sets of the corpora, and word vectors that need no biLM: find, download, verify, read, split.

    rows = read_ag_news("train")            # DataFrame: class 1-4, title, description
    train, validation = split(len(rows), 4000, seed=0)     # row numbers, apart by construction
    fresh = fresh_rows(train_descriptions, test_descriptions)

`python data/prepare.py` downloads AG News to data/ag_news/ (or says which copy it found) and prints its hashes.
"""
import csv
import hashlib
import http.client
import io
import os
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as `python data/prepare.py`

from data.files import InputError, read_lines, read_text, write_atomically

HERE = Path(__file__).resolve().parent
SOURCE = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"
SHA256 = {"train": "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e",
          "test": "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699"}
CACHE = HERE / "cache"      # of tokenized corpora
COLUMNS = ["class", "title", "description"]
STATIC_VECTORS = {"width": 300, "passes": 10, "window": 5, "negatives": 10}     # the first and third of SVD too


# ---------------------------------------------------------------------------------------------------- finding
def ag_news_folder() -> Path:
    """Folder that holds train.csv and test.csv: $AG_NEWS_DIR if set and nothing else, data/ag_news/, a download."""
    if named := os.environ.get("AG_NEWS_DIR"):
        folder = Path(named)
        for part in SHA256:
            if not (folder / f"{part}.csv").is_file():
                raise InputError(f"$AG_NEWS_DIR is {folder}, where {part}.csv is missing; put train.csv and test.csv "
                                 "there or unset the variable")
        return folder
    folder = HERE / "ag_news"
    if not all((folder / f"{part}.csv").is_file() for part in SHA256):
        download(folder)
    return folder


def download(folder: Path) -> None:
    """The missing ones of AG News' two files into `folder`; none of them before all are fetched and verified."""
    contents = {}
    for part, expected in SHA256.items():
        if (folder / f"{part}.csv").exists():
            continue
        try:
            with urllib.request.urlopen(f"{SOURCE}{part}.csv", timeout=30) as reply:
                contents[part] = reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"AG News is neither in $AG_NEWS_DIR nor in {folder}, and the download failed ({error}); mend it in "
                "one of three ways: set AG_NEWS_DIR to a folder with train.csv and test.csv, put the two files into "
                f"{folder}, or connect to the network and run this again (`make demo` needs no download)") from None
        if (found := hashlib.sha256(contents[part]).hexdigest()) != expected:
            raise InputError(f"the download of {part}.csv has SHA-256 {found} where {expected} was expected; "
                             "run it again, or fetch the file by hand")
    for part, content in contents.items():
        write_atomically(folder / f"{part}.csv", lambda file, content=content: file.write(content))


# ---------------------------------------------------------------------------------------------------- reading
def read_ag_news(part: str, rows: int = 0) -> pd.DataFrame:
    """The first `rows` rows (0: all) of "train" or "test": class (1-4), title ("" where there is none), description."""
    path = ag_news_folder() / f"{part}.csv"
    table = read_csv(path)
    if rows > len(table):
        raise InputError(f"rows is {rows}, but {path} has {len(table)} rows")
    return table[:rows or None]


def read_csv(path: str | Path) -> pd.DataFrame:
    """Rows of one AG News file in any of its three layouts, told apart by the first line.

        "3","Title","Text"                      the original: no header, three columns
        Class Index,Title,Description           a header and three columns
        Class Index,Description                 a header and two columns

    InputError names the file, the row (1 is the first below a header) and what was expected.
    """
    path, text = Path(path), read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty; expected rows of class, title, description")
    rows = read_rows(text, path)
    if not rows:
        raise InputError(f"{path}: the file is empty; expected rows of class, title, description")
    first, headers = [name.strip() for name in rows[0]], (["Class Index", *COLUMNS[1:]], ["Class Index", COLUMNS[2]])
    header = not first[0].lstrip("+-").isdigit()
    if header and [name.lower() for name in first] not in [[name.lower() for name in names] for names in headers]:
        raise InputError(f"{path}: the header is {','.join(first)[:80]!r}; expected 'Class Index,Title,Description', "
                         "'Class Index,Description', or no header and three columns")
    if not header and len(first) != 3:
        raise InputError(f"{path}, row 1: has {len(first)} columns; expected class, title, description")
    for number, row in enumerate(rows[header:], start=1):
        if len(row) != len(first):
            raise InputError(f"{path}, row {number}: has {len(row)} columns; expected {len(first)}")
    table = pd.DataFrame(rows[header:], columns=COLUMNS if len(first) == 3 else ["class", "description"])
    return checked(table, path).reindex(columns=COLUMNS, fill_value="")


def read_rows(text: str, path: Path) -> list[list[str]]:
    """The fields of every row that is not blank, by Python's reader: pandas would fill up rows that are too short."""
    if "\0" in text:
        line = text[:text.index("\0")].count("\n") + 1
        raise InputError(f"{path}, line {line}: holds a NUL character; it is not the text of a CSV file")
    csv.field_size_limit(2**27)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [row for row in reader if row and (len(row) > 1 or row[0].strip())]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; check the quotes there") from None


def checked(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The same rows with integer classes; InputError for the first row without class 1-4."""
    if table.empty:
        raise InputError(f"{path}: a header and no row below it; expected rows of class, title, description")
    number = pd.to_numeric(table["class"], errors="coerce")
    for row in np.flatnonzero(~number.isin([1, 2, 3, 4]))[:1]:
        raise InputError(f"{path}, row {row + 1}: class is {str(table['class'][row])[:40]!r}; expected 1, 2, 3 or 4")
    if not table["description"].str.strip().any():
        raise InputError(f"{path}: every description is empty; expected a text in the last column")
    return table.assign(**{"class": number.astype("int64")})


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list; InputError for one string, or for anything in it that is not a string."""
    if isinstance(texts, str):
        raise InputError("texts is one string; expected a list of strings, such as [text]")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {i} is of type {type(text).__name__}; expected str")
    return texts


def split(rows: int, validation: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of training and validation, each sorted, drawn without replacement by the seed."""
    if not 0 < validation < rows:
        raise InputError(f"validation is {validation} of {rows} rows; expected at least one row on either side")
    order = np.random.default_rng(seed).permutation(rows)
    return np.sort(order[validation:]), np.sort(order[:validation])


def fresh_rows(known: Iterable[str], texts: Sequence[str], most: float = 0.2, n: int = 8) -> np.ndarray:
    """(rows,) bool: True where at most a fifth of the row's 8-grams of `lower().split()` stand in any known text.

    One AG News test row in seven is a near copy of training rows, and a model that has seen it scores it far too
    well. Rows of under 8 words have no 8-gram and count as fresh. `known` is all of train.csv, validation included.
    """
    def grams(text: str) -> list[int]:
        words = text.lower().split()
        return [hash(tuple(words[i:i + n])) for i in range(len(words) - n + 1)]
    wanted = [grams(text) for text in texts]
    asked = {gram for row in wanted for gram in row}
    seen = {gram for text in known for gram in grams(text) if gram in asked}
    return np.array([not row or sum(gram in seen for gram in row) <= most * len(row) for row in wanted], dtype=bool)


# ------------------------------------------------------------------------------------------------------ tasks
@dataclass
class Part:
    """Rows of one part of a task: texts, each a tuple of one or two strings, and labels (rows,) from 0."""
    texts: list[tuple[str, ...]]
    labels: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[int, tuple[str, ...]]]) -> "Part":
        """From (label, texts) of each row."""
        return cls([texts for _, texts in rows], np.array([label for label, _ in rows], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Part":
        """The rows of these numbers, in their order."""
        return Part([self.texts[i] for i in rows], self.labels[rows])


@dataclass
class Task:
    """A classification task; fresh (test rows,) bool says which test rows are no near copies of training rows.

    corpus: the training texts as a language model should read them, which are not always the rows of `train`.
    """
    name: str
    labels: list[str]
    train: Part
    validation: Part
    test: Part
    corpus: list[str]
    fresh: np.ndarray | None = None

    def with_labels(self, rows: int, seed: int) -> "Task":
        """The same task with so many of its training rows, drawn by the seed; `corpus` stays whole."""
        if rows > len(self.train):
            raise InputError(f"rows is {rows}, but the task has {len(self.train)} training rows")
        chosen = np.random.default_rng([seed, 5]).permutation(len(self.train))[:rows]
        return replace(self, train=self.train.take(np.sort(chosen)))


def joined(title: str, description: str) -> str:
    """One text of a row's two fields."""
    return f"{title} . {description}"


def check_rows(texts: Sequence[str | tuple[str, str]], config) -> list[tuple[str, ...]]:
    """What a user gives a classifier as rows of a Part; InputError for anything that is no text, or no pair."""
    if not config.two_texts:
        return [(text,) for text in check_texts(texts)]
    pairs = list(texts)
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(f"text {i} is {str(pair)[:40]!r}; expected two texts (on a line: a tab between)")
        if not any(text.strip() for text in pair):
            raise InputError(f"text {i} has no words; there is nothing to classify")
    return [tuple(pair) if config.pair else (joined(*pair),) for pair in pairs]


def ag_news_task(fields: str, validation: int, seed: int, first: int = 0) -> Task:
    """World, Sports, Business, Sci/Tech; validation rows are those that ELMO.py kept apart of the `first` (0: all)."""
    tables = [read_ag_news(part) for part in ("train", "test")]
    if "title" in fields and not all(table.title.str.strip().any() for table in tables):
        raise InputError(f"fields is {fields}, but {ag_news_folder()} has no titles; use --fields description")
    known, test = (Part([(joined(*row) if "title" in fields else row[1],)
                         for row in zip(table.title, table.description, strict=True)], table["class"].to_numpy() - 1)
                   for table in tables)
    _, held_out = split(first or len(known), validation, seed)
    train = known.take(np.setdiff1d(np.arange(len(known)), held_out))
    return Task("ag_news", ["World", "Sports", "Business", "Sci/Tech"], train, known.take(held_out), test,
                [text for text, in train.texts], fresh_rows(*(table.description for table in tables)))


def task_folder(variable: str, files: Sequence[str], what: str) -> Path:
    """The folder that an environment variable names, which holds these files."""
    folder = Path(os.environ.get(variable) or "")
    if not os.environ.get(variable):
        raise InputError(f"${variable} is not set; set it to a folder with {', '.join(files)} ({what})")
    for name in files:
        if not (folder / name).is_file():
            raise InputError(f"${variable} is {folder}, where {name} is missing; expected {', '.join(files)}")
    return folder


def read_trees(path: Path, phrases: bool, binary: bool) -> Part:
    """Labelled texts of bracketed trees, one a line: (3 (2 It) (4 (2 's) (4 great))); the roots, or every phrase once.

    binary: 0 and 1 are negative, 3 and 4 positive, and 2 (neutral) is left out.
    """
    rows = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        found = spans(line)
        if not found:
            raise InputError(f"{path}, line {number}: {line.strip()[:40]!r} is no tree; expected (label words)")
        rows |= dict.fromkeys(found) if phrases else {(*found[-1], number): None}
    keep = {0: 0, 1: 0, 3: 1, 4: 1} if binary else {k: k for k in range(5)}
    kept = [(keep[label], (text,)) for label, text, *_ in rows if label in keep]
    if not kept:
        raise InputError(f"{path} has no row for this task; expected bracketed trees, one a line")
    return Part.of(kept)


def spans(line: str) -> list[tuple[int, str]]:
    """(label, text) of each phrase of a tree, inner ones first and the whole last; [] for a line that is no tree."""
    escaped, open_phrases, out = {"-LRB-": "(", "-RRB-": ")"}, [], []
    pieces = line.replace("(", " ( ").replace(")", " ) ").split()
    for previous, piece in zip(["", *pieces], pieces, strict=False):
        if piece == "(" and (open_phrases or not out):
            open_phrases.append([None, []])
        elif not open_phrases:
            return []
        elif piece == ")":
            label, words = open_phrases.pop()
            if label is None or not words:
                return []
            out.append((label, " ".join(words)))
            if open_phrases:
                open_phrases[-1][1].extend(words)
        elif previous == "(":
            if piece not in {"0", "1", "2", "3", "4"}:
                return []
            open_phrases[-1][0] = int(piece)
        else:
            open_phrases[-1][1].append(escaped.get(piece, piece).replace("\\/", "/").replace("\\*", "*"))
    return out if not open_phrases and sum(piece == "(" for piece in pieces) == len(out) else []


def sst_task(binary: bool, phrases: bool) -> Task:
    """The Stanford Sentiment Treebank (Socher et al. 2013): roots, and in training every phrase too where asked."""
    folder = task_folder("SST_DIR", ["train.txt", "dev.txt", "test.txt"], "bracketed trees, one a line")
    train, validation, test = (read_trees(folder / f"{part}.txt", phrases and part == "train", binary)
                               for part in ("train", "dev", "test"))
    labels = ["negative", "positive"]
    labels = labels if binary else [f"very {labels[0]}", labels[0], "neutral", labels[1], f"very {labels[1]}"]
    sentences = [text for text, in read_trees(folder / "train.txt", False, False).texts]
    return Task("sst2" if binary else "sst5", labels, train, validation, test, sentences)


NLI_LABELS = ["entailment", "neutral", "contradiction"]


def read_pairs(path: Path) -> Part:
    """Rows of label, premise, hypothesis, separated by tabs, no header."""
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 3 or fields[0] not in NLI_LABELS:
            raise InputError(f"{path}, line {number}: {line[:40]!r} is no row; expected label, premise and hypothesis "
                             f"with a tab between, the label one of {', '.join(NLI_LABELS)}")
        rows.append((NLI_LABELS.index(fields[0]), tuple(fields[1:])))
    if not rows:
        raise InputError(f"{path}: the file is empty; expected rows of label, premise, hypothesis")
    return Part.of(rows)


def nli_task(validation: int, seed: int) -> Task:
    """MultiNLI (Williams et al. 2018): validation cut from its training rows; SNLI's training rows join the others."""
    folder = task_folder("NLI_DIR", ["mnli_train_subset.tsv", "mnli_eval_easycl.tsv"], "label, premise, hypothesis")
    known, test = read_pairs(folder / "mnli_train_subset.tsv"), read_pairs(folder / "mnli_eval_easycl.tsv")
    rows, held_out = split(len(known), validation, seed)
    train = known.take(rows)
    if (folder / "snli_train_subset.tsv").is_file():
        more = read_pairs(folder / "snli_train_subset.tsv")
        train = Part(train.texts + more.texts, np.concatenate([train.labels, more.labels]))
    return Task("nli", NLI_LABELS, train, known.take(held_out), test,
                list(dict.fromkeys(text for pair in train.texts for text in pair)))


def read_task(config, bilm) -> Task:
    """The task of a classification.Config; `bilm`, the biLM's Config, says which rows of AG News it has not seen."""
    if config.task == "ag_news":
        task = ag_news_task(config.fields, bilm.validation, bilm.seed, bilm.rows)
    elif config.task == "nli":
        task = nli_task(config.validation, config.seed)
    else:
        task = sst_task(config.task == "sst2", config.phrases)
    return task.with_labels(config.rows, config.seed) if config.rows else task


# ---------------------------------------------------------------------------------------------------- vectors
def word2vec(data, size: int, epochs: int, seed: int, skip_gram: bool = False) -> dict[int, np.ndarray]:
    """{word id: (size,) vector} by gensim's CBOW or skip-gram on the training rows of a data.text.Data.

    One worker: with more, the vectors of a seed differ from run to run.
    """
    from gensim.models import Word2Vec

    class Sentences:
        def __iter__(self) -> Iterator[list[int]]:
            tokens, lookup = data.encoded.tokens, data.encoded.lookup
            for row in data.train:
                yield lookup[tokens.ids[tokens.offsets[row]:tokens.offsets[row + 1]]].tolist()
    vectors = Word2Vec(Sentences(), vector_size=size, min_count=1, workers=1, seed=seed, epochs=epochs,
                       sg=int(skip_gram), window=STATIC_VECTORS["window"], negative=STATIC_VECTORS["negatives"]).wv
    return {i: vectors[i] for i in range(len(data.words)) if i in vectors.key_to_index}


def static_vectors(kind: str, data, size: int = STATIC_VECTORS["width"], epochs: int = STATIC_VECTORS["passes"],
                   seed: int = 0) -> np.ndarray:
    """(V, size) float32 of unit variance, one vector per word of a data.text.Data, for --vectors word2vec or svd.

    Word2Vec as skip-gram: slower than CBOW, and clearly better as the mean of a validation row's words.
    """
    if kind == "word2vec":
        table = np.zeros((len(data.words), size), dtype=np.float32)
        for word, vector in word2vec(data, size, epochs, seed, skip_gram=True).items():
            table[word] = vector
    else:
        table = svd(data, size, seed)
    return table / max(table.std(), 1e-12)


def svd(data, size: int, seed: int, window: int = STATIC_VECTORS["window"]) -> np.ndarray:
    """(V, size) left singular vectors times the values' roots, of the words' positive pointwise mutual information.

    Counted over all pairs of words at most `window` apart in a training row (Levy, Goldberg and Dagan 2015), by
    scikit-learn's TruncatedSVD.
    """
    from scipy.sparse import coo_matrix, diags
    from sklearn.decomposition import TruncatedSVD
    tokens, V = data.encoded.tokens, len(data.words)
    inside = np.zeros(len(tokens), dtype=bool)
    inside[data.train] = True
    row = np.repeat(np.arange(len(tokens)), np.diff(tokens.offsets))
    ids, row = data.encoded.lookup[tokens.ids][inside[row]], row[inside[row]]
    counts = coo_matrix((V, V), dtype=np.float64).tocsr()
    for apart in range(1, window + 1):
        same = row[apart:] == row[:-apart]
        counts += coo_matrix((np.ones(int(same.sum())), (ids[:-apart][same], ids[apart:][same])), shape=(V, V)).tocsr()
    counts = counts + counts.T
    total, sums = counts.sum(), np.asarray(counts.sum(axis=1)).ravel()
    pmi = (diags(1 / np.maximum(sums, 1)) @ counts @ diags(1 / np.maximum(sums, 1)) * total).tocsr()
    pmi.data = np.maximum(np.log(np.maximum(pmi.data, 1e-12)), 0)
    pmi.eliminate_zeros()
    found = TruncatedSVD(min(size, V - 1), random_state=seed).fit(pmi)
    return (found.transform(pmi) / np.sqrt(np.maximum(found.singular_values_, 1e-12))).astype(np.float32)


def main() -> int:
    """Prints which AG News copy is in use, its rows per class and its hashes; downloads it when there is none."""
    try:
        folder = ag_news_folder()
        for part, original in SHA256.items():
            rows = read_csv(folder / f"{part}.csv")
            digest = hashlib.sha256((folder / f"{part}.csv").read_bytes()).hexdigest()
            kind = "the original" if digest == original else "not the original, accepted as it is"
            classes = dict(sorted(Counter(rows["class"].tolist()).items()))
            print(f"{folder / part}.csv: {len(rows):,} rows, by class {classes}, SHA-256 {digest} ({kind})")
    except InputError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
